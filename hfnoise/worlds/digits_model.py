"""Train a world of digits and save it as a Hub folder: a Stable Diffusion pipeline, its verifier, its judge, its card.

One command builds it from scikit-learn's digits, on a CPU::

    python -m hfnoise.worlds.digits_model --output_dir model_cards/digits-sd

With `--steps 445` it is the weak checkpoint: the same model, trained for a third of the time. `--world
coloured-digits` is the world of harder prompts, `--world shaded-digits` that of brightness.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hfnoise.worlds.digit_world import DigitWorld, LabelledImages
from hfnoise.worlds.digits import DIGITS
from hfnoise.worlds.digits_card import digits_card
from hfnoise.worlds.digits_checkpoints import WORLDS
from hfnoise.worlds.digits_evaluation import evaluate, samples_picture
from hfnoise.worlds.digits_judges import accuracy, train_digit_classifier
from hfnoise.worlds.digits_pipeline import new_digits_pipeline
from hfnoise.worlds.digits_recipe import RECIPES, WEAK_STEPS, DigitsRecipe
from hfnoise.worlds.digits_score import save_references
from hfnoise.worlds.digits_training import latents, train_autoencoder, train_text_encoder, train_unet

logger = logging.getLogger(__name__)


def build(
    output_dir: str | Path,
    recipe: DigitsRecipe | None = None,
    train: LabelledImages | None = None,
    test: LabelledImages | None = None,
    world: DigitWorld = DIGITS,
) -> dict[str, Any]:
    """Train the world and save it: the pipeline, and in it `verifier/`, `judge/`, samples and card.

    Args:
        output_dir (`str` or `Path`): folder to write, made if it is missing.
        recipe ([`DigitsRecipe`], *optional*): settings; those of the world by default.
        train, test ([`LabelledImages`], *optional*): those of the world by default.
        world ([`DigitWorld`], defaults to the plain digits): what to draw.

    Returns:
        `verifier_accuracy` and `judge_accuracy` on test images, `reconstruction_accuracy` of the judge on those after
        the autoencoder, `loss` of the UNet, `parameters` of the pipeline, the number of `test_images`, and
        `rows`: what [`evaluate`] returns.

    Raises:
        ImportError: if no images are given and scikit-learn is missing.

    Example:
        >>> from hfnoise.worlds.digits_model import DigitsRecipe, build
        >>> build("my-digits", DigitsRecipe(steps=445))["judge_accuracy"] > 0.95  # doctest: +SKIP
        True
    """
    recipe = recipe or RECIPES[world.name]
    if train is None or test is None:
        train, test = world.load()
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)  # before the training: an unwritable place fails at once
    half = len(train) // 2
    seed, epochs = recipe.seed, recipe.classifier_epochs
    # Disjoint halves: what the verifier learned by heart the judge has not seen. Both know all combinations.
    classifiers = {
        "verifier": train_digit_classifier("verifier", train[:half], world.classes, seed + 1, epochs),
        "judge": train_digit_classifier("judge", train[half:], world.classes, seed + 2, epochs),
    }
    shown = train[~world.is_held_out(train.labels)]
    pipe = new_digits_pipeline(recipe.width, seed, world, recipe.beta_end)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        train_text_encoder(pipe, world, shown, recipe)
        train_autoencoder(pipe.vae, shown, recipe)
        loss = train_unet(pipe, world, latents(pipe.vae, shown, recipe), recipe)
    with torch.no_grad():
        reconstructed = pipe.vae.decode(pipe.vae.encode(test.images).latent_dist.mean).sample
    results: dict[str, Any] = {
        f"{kind}_accuracy": accuracy(model, test.images, test.labels) for kind, model in classifiers.items()
    }
    results["reconstruction_accuracy"] = accuracy(classifiers["judge"], reconstructed, test.labels)
    results["loss"] = loss
    parts = (pipe.text_encoder, pipe.vae, pipe.unet)
    results["parameters"] = sum(parameter.numel() for part in parts for parameter in part.parameters())
    pipe.save_pretrained(folder)
    for kind, model in classifiers.items():
        model.save_pretrained(folder / kind)
    held_out = world.is_held_out(test.labels)
    references = {"all": test.images} | ({"held_out": test.images[held_out]} if held_out.any() else {})
    save_references(classifiers["judge"], references, folder)
    results["test_images"] = len(test)
    # From the saved folder: what the card reports is what is shipped.
    results["rows"] = evaluate(folder, world, recipe.evaluation_images)
    samples_picture(folder, world).save(folder / "samples.png", optimize=True)
    digits_card(folder.name, world, recipe, results).save(folder / "README.md")
    logger.info("saved %s: %s", folder, results)
    return results


def main() -> None:
    """Build a world from the command line."""
    parser = argparse.ArgumentParser(description="Train a world of digits and save it as a Hub folder.")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--world", choices=list(WORLDS), default=DIGITS.name, help="default: %(default)s")
    parser.add_argument(
        "--steps", type=int, help=f"of the UNet; {WEAK_STEPS} is the weak checkpoint of the plain digits"
    )
    parser.add_argument("--seed", type=int, default=DigitsRecipe.seed, help="default: %(default)s")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipe = RECIPES[options.world]
    recipe = replace(recipe, steps=recipe.steps if options.steps is None else options.steps, seed=options.seed)
    build(options.output_dir, recipe, world=WORLDS[options.world])


if __name__ == "__main__":
    main()
