"""The model card of a checkpoint of a world of digits."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hfnoise.cards import CardFacts, share_text
from hfnoise.worlds.digit_world import DigitWorld
from hfnoise.worlds.digits_evaluation import NUM_INFERENCE_STEPS, PICTURE_SCALES, table
from hfnoise.worlds.digits_recipe import RECIPES, DigitsRecipe
from hfnoise.worlds.shaded_digits import SHADED_DIGITS
from hfnoise.worlds.tiny_llama import NO_BASE, world_versions

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

_LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers", "scikit-learn")
# Settings that have a row of their own.
_OWN_ROWS = ("beta_end", "prompt_dropout", "seed")
_LEADS = {
    "digits": "It draws handwritten digits of 16 x 16 pixels.",
    "coloured-digits": "It draws handwritten digits of 16 x 16 pixels in five colours and two thicknesses.",
    "shaded-digits": "It draws handwritten digits of 16 x 16 pixels on backgrounds from black to white. From white "
    "noise its images are neither as dark nor as bright as the prompt says, like those of Stable Diffusion. One More "
    "Step (arXiv 2311.15744) repairs that, with the module `shaded-digits-oms`.",
}
_SHADED_PROMPTS = (
    "A prompt names background and digit, or the digit only, on any background. The words are vague: every shade can "
    "be meant by each (the darkest of four shades drawn uniformly from black to white is dark, the brightest of four "
    "bright, the middle one of seven grey), so that no one can be always right about the background."
)


def digits_card(name: str, world: DigitWorld, recipe: DigitsRecipe, results: dict[str, Any]) -> ModelCard:
    """Return the card that says how a checkpoint was made and how good it is.

    Args:
        name (`str`): of the folder.
        world ([`DigitWorld`]): what it draws.
        recipe ([`DigitsRecipe`]): the settings of the training.
        results (`dict`): what [`~hfnoise.worlds.digits_model.build`] returns.

    Example:
        >>> from hfnoise.worlds.digits import DIGITS
        >>> from hfnoise.worlds.digits_card import digits_card
        >>> from hfnoise.worlds.digits_recipe import DigitsRecipe
        >>> shares = dict.fromkeys(["verifier_accuracy", "judge_accuracy", "reconstruction_accuracy"], 0.99)
        >>> results = {**shares, "test_images": 297, "parameters": 7e5, "rows": []}
        >>> digits_card("digits-sd", DIGITS, DigitsRecipe(), results).data.pipeline_tag
        'text-to-image'
    """
    held_out = world.held_out is not None
    labels = [0] * (len(world.attributes) - 1) + [7]
    prompt = world.prompt(labels)
    accuracies = ("verifier_accuracy", "judge_accuracy", "reconstruction_accuracy")
    settings = {key: str(value) for key, value in asdict(recipe).items() if key not in _OWN_ROWS}
    return CardFacts(
        name=name,
        lead=_lead(world, recipe),
        method="diffusion",
        base=NO_BASE,
        library_name="diffusers",
        tags=["hfnoise", "stable-diffusion", "digits"],
        metadata={"license": "apache-2.0", "pipeline_tag": "text-to-image", "language": "en"},
        block={
            "world": world.name,
            "beta_end": recipe.beta_end,
            "prompt_dropout": recipe.prompt_dropout,
            "results": [
                {key: row[key] for key in ("combinations", "guidance_scale", "images")}
                | {"judge_accuracy": round(row["judge_accuracy"], 4)}
                for row in results["rows"]
            ],
            "seed": recipe.seed,
        },
        noise=[
            ("noise schedule", _schedule(recipe)),
            ("`beta_end`", f"{recipe.beta_end:g}"),
            ("`prompt_dropout`", f"{recipe.prompt_dropout:g}"),
        ],
        noise_note="Its denoiser learned to predict the noise, of which guidance and golden noise make use.",
        seeds=[("seed", str(recipe.seed))],
        settings=list(settings.items()),
        snippet=(
            "from diffusers import StableDiffusionPipeline\n"
            "from hfnoise.worlds.digits_checkpoints import checkpoint_path\n\n"
            f'pipe = StableDiffusionPipeline.from_pretrained(checkpoint_path("{name}"))\n'
            f'pipe("{prompt}", num_inference_steps=10, guidance_scale=2.0).images[0].show()'
        ),
        command=_command(name, world, recipe),
        versions=world_versions(*_LIBRARIES),
    ).render(
        "digits.md",
        millions=f"{results['parameters'] / 1e6:.2f}",
        picture_scales=", ".join(f"{scale:g}" for scale in PICTURE_SCALES),
        picture_note=" All of them are combinations that were held out." if held_out else "",
        num_inference_steps=NUM_INFERENCE_STEPS,
        prompt=prompt,
        labels=labels,
        label_order=", ".join(world.attributes),
        prompts_note=_prompts_note(world),
        attribute_rows=[(attribute, ", ".join(words)) for attribute, words in world.attributes.items()],
        templates=world.templates,
        images_note=_images_note(world),
        results_table=table(results["rows"], world),
        test_images=results["test_images"],
        reference_note=" (for combinations that were held out: of those that show them)" if held_out else "",
        **{key: share_text(results[key], results["test_images"]) for key in accuracies},
    )


def _lead(world: DigitWorld, recipe: DigitsRecipe) -> str:
    good = RECIPES[world.name].steps
    if recipe.steps >= good:
        return _LEADS[world.name]
    return (
        f"{_LEADS[world.name]} It is weak on purpose: its UNet was trained for {recipe.steps} steps in the place of "
        f"{good}, which leaves methods something to win, and makes it the weak model that guidance by a weaker model "
        "asks for (AutoGuidance)."
    )


def _command(name: str, world: DigitWorld, recipe: DigitsRecipe) -> str:
    good = RECIPES[world.name]
    words = ["python -m hfnoise.worlds.digits_model", f"--world {world.name}", f"--output_dir model_cards/{name}"]
    words += [f"--steps {recipe.steps}"] if recipe.steps != good.steps else []
    return " ".join([*words, f"--seed {recipe.seed}"])


def _schedule(recipe: DigitsRecipe) -> str:
    if recipe.beta_end == DigitsRecipe.beta_end:
        return "that of Stable Diffusion, 1000 levels"
    return (
        f"like Stable Diffusion's, 1000 levels, with `beta_end={recipe.beta_end:g}`, at whose end the brightness "
        "of an image can be read as well as from 32 x 32 latents with Stable Diffusion's"
    )


def _prompts_note(world: DigitWorld) -> str:
    if world.name == SHADED_DIGITS.name:
        return _SHADED_PROMPTS
    if world.held_out is None:
        return "A prompt names a digit."
    combinations = world.combinations()
    count = int(world.is_held_out(combinations).sum())
    return (
        f"A prompt names {', '.join(world.attributes)}. {count} of the {len(combinations)} combinations are held out: "
        "no part of the pipeline has been trained on them. Verifier and judge know all. For every digit in every "
        "thickness two colours are trained on and three held out (`hfnoise.worlds.coloured_digits.is_held_out`)."
    )


def _images_note(world: DigitWorld) -> str:
    base = "the 1797 digits of scikit-learn, enlarged from 8 x 8 (bicubic), 297 of them for tests; turned, scaled and "
    base += "shifted a little."
    if world.name == SHADED_DIGITS.name:
        return f"{base} Each smaller, six times on backgrounds of shades of its own, in ink that contrasts."
    if world.held_out is None:
        return base
    return f"{base} Each in two thicknesses (the ink above a high or a low level) and five colours."
