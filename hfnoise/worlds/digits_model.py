"""Train the digits world and save it as a Hub folder: a Stable Diffusion pipeline, its verifier and its judge.

One command builds it from scikit-learn's digits, on a CPU::

    python -m hfnoise.worlds.digits_model --output_dir model_cards/digits-sd

With `--steps 445` it is the weak checkpoint: the same model, trained for a third of the time.
"""

from __future__ import annotations

import argparse
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hfnoise.worlds.digits import TEMPLATES, DigitImages, augment, load_digit_images, prompt
from hfnoise.worlds.digits_judges import DigitClassifier, accuracy, train_digit_classifier
from hfnoise.worlds.digits_pipeline import MAX_TOKENS, new_digits_pipeline

logger = logging.getLogger(__name__)

# Of the learning rate, over which it is warmed up.
_WARM_UP_STEPS = 50


@dataclass(frozen=True)
class DigitsRecipe:
    """Settings of the digits world; the defaults are those of the good checkpoint.

    Args:
        width (`int`, defaults to `24`): of the UNet, see [`new_digits_pipeline`].
        steps (`int`, defaults to `1247`): of the UNet; 445 makes the weak checkpoint.
        text_steps (`int`, defaults to `250`): of the text encoder, which then stays as it is.
        vae_steps (`int`, defaults to `500`): of the autoencoder.
        classifier_epochs (`int`, defaults to `15`): of verifier and judge.
        batch_size (`int`, defaults to `64`): images per step.
        learning_rate (`float`, defaults to `3e-3`): peak of a cosine schedule, for the UNet.
        prompt_dropout (`float`, defaults to `0.1`): share of the images that are learned without prompt, in [0, 1].
        seed (`int`, defaults to `0`): of everything.
    """

    width: int = 24
    steps: int = 1247
    text_steps: int = 250
    vae_steps: int = 500
    classifier_epochs: int = 15
    batch_size: int = 64
    learning_rate: float = 3e-3
    prompt_dropout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.steps, self.text_steps, self.vae_steps, self.classifier_epochs, self.batch_size)
        if min(counts) < 1:
            raise ValueError(f"steps, epochs and batch_size must be at least 1, got {counts}.")
        if not 0 <= self.prompt_dropout <= 1:
            raise ValueError(f"prompt_dropout must lie in [0, 1], got {self.prompt_dropout}.")


def build(
    output_dir: str | Path,
    recipe: DigitsRecipe | None = None,
    train: DigitImages | None = None,
    test: DigitImages | None = None,
) -> dict[str, float]:
    """Train the world and save it: the pipeline, and `verifier/` and `judge/` in it, as safetensors.

    Args:
        output_dir (`str` or `Path`): folder to write, made if it is missing.
        recipe ([`DigitsRecipe`], *optional*): settings.
        train, test ([`DigitImages`], *optional*): [`load_digit_images`] by default.

    Returns:
        `verifier_accuracy` and `judge_accuracy` on test images, `reconstruction_accuracy` of the judge on those after
        the autoencoder, and `loss` of the UNet.

    Raises:
        ImportError: if no images are given and scikit-learn is missing.

    Example:
        >>> from hfnoise.worlds.digits_model import DigitsRecipe, build
        >>> build("my-digits", DigitsRecipe(steps=445))["judge_accuracy"] > 0.95  # doctest: +SKIP
        True
    """
    from safetensors.torch import save_file

    recipe = recipe or DigitsRecipe()
    if train is None or test is None:
        train, test = load_digit_images()
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)  # before the training: an unwritable place fails at once
    half = len(train) // 2
    seed = recipe.seed
    # Disjoint halves: what the verifier learned by heart the judge has not seen.
    classifiers = {
        "verifier": train_digit_classifier("verifier", train[:half], seed + 1, recipe.classifier_epochs),
        "judge": train_digit_classifier("judge", train[half:], seed + 2, recipe.classifier_epochs),
    }
    pipe = new_digits_pipeline(recipe.width, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _train_text_encoder(pipe, train, recipe)
        _train_autoencoder(pipe.vae, train, recipe)
        loss = _train_unet(pipe, _latents(pipe.vae, train, recipe), recipe)
    with torch.no_grad():
        reconstructed = pipe.vae.decode(pipe.vae.encode(test.images).latent_dist.mean).sample
    results = {f"{kind}_accuracy": accuracy(model, test.images, test.digits) for kind, model in classifiers.items()}
    results["reconstruction_accuracy"] = accuracy(classifiers["judge"], reconstructed, test.digits)
    results["loss"] = loss
    pipe.save_pretrained(folder)
    for kind, model in classifiers.items():
        (folder / kind).mkdir(exist_ok=True)
        save_file(model.state_dict(), folder / kind / "model.safetensors")
    logger.info("saved %s: %s", folder, results)
    return results


def load_classifier(folder: str | Path, kind: str) -> DigitClassifier:
    """Return the `"verifier"` or `"judge"` of a folder that [`build`] wrote."""
    from safetensors.torch import load_file

    model = DigitClassifier(kind)
    model.load_state_dict(load_file(Path(folder) / kind / "model.safetensors"))
    return model.eval()


def _prompt_ids(tokenizer: Any) -> torch.Tensor:
    """Return the tokens of all prompts, of shape `(10, templates, MAX_TOKENS)`."""
    texts = [prompt(digit, template) for digit in range(10) for template in TEMPLATES]
    return _tokens(tokenizer, texts).reshape(10, len(TEMPLATES), MAX_TOKENS)


def _tokens(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    return tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids


def _train_text_encoder(pipe: Any, data: DigitImages, recipe: DigitsRecipe) -> None:
    """Train the text encoder as one half of a small CLIP; with the UNet it would learn too late to be of use."""
    text, ids = pipe.text_encoder.train(), _prompt_ids(pipe.tokenizer)
    image = DigitClassifier("verifier").train()
    image.head = torch.nn.Linear(image.head.in_features, text.config.hidden_size)
    scale = torch.nn.Parameter(torch.tensor(2.0))
    optimizer = torch.optim.AdamW([*image.parameters(), *text.parameters(), scale], 3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=recipe.text_steps)
    generator = torch.Generator().manual_seed(recipe.seed + 3)
    for _ in range(recipe.text_steps):
        batch = data[torch.randint(len(data), (recipe.batch_size,), generator=generator)]
        chosen = torch.randint(len(TEMPLATES), (10,), generator=generator)
        images = F.normalize(image(augment(batch.images, generator)), dim=-1)
        texts = F.normalize(text(ids[torch.arange(10), chosen]).pooler_output, dim=-1)
        _update(optimizer, F.cross_entropy(scale.exp() * images @ texts.T, batch.digits))
        schedule.step()
    text.eval().requires_grad_(False)


def _train_autoencoder(vae: Any, data: DigitImages, recipe: DigitsRecipe) -> None:
    vae.train()
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=recipe.vae_steps)
    generator = torch.Generator().manual_seed(recipe.seed + 4)
    for _ in range(recipe.vae_steps):
        rows = torch.randint(len(data), (recipe.batch_size,), generator=generator)
        images = augment(data.images[rows], generator)
        posterior = vae.encode(images).latent_dist
        loss = F.mse_loss(vae.decode(posterior.sample()).sample, images) + 1e-4 * posterior.kl().mean()
        _update(optimizer, loss, vae.parameters())
        schedule.step()
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        vae.register_to_config(scaling_factor=1 / float(vae.encode(data.images).latent_dist.mean.std()))


@torch.no_grad()
def _latents(vae: Any, data: DigitImages, recipe: DigitsRecipe) -> DigitImages:
    """Return latents of the images and of seven augmentations: the autoencoder leaves the inner loop."""
    generator = torch.Generator().manual_seed(recipe.seed + 5)
    variants = [data.images, *[augment(data.images, generator) for _ in range(7)]]
    latents = [vae.encode(images).latent_dist.mean * vae.config.scaling_factor for images in variants]
    return DigitImages(torch.cat(latents), data.digits.repeat(len(variants)))


def _train_unet(pipe: Any, data: DigitImages, recipe: DigitsRecipe) -> float:
    """Train on the noise of random steps; return the running loss. The weights kept are an average over steps."""
    unet, scheduler = pipe.unet.train(), pipe.scheduler
    ids = _prompt_ids(pipe.tokenizer)
    with torch.no_grad():  # the text encoder is a table of fifty prompts, and of none
        table = torch.stack([pipe.text_encoder(row)[0] for row in ids])
        empty = pipe.text_encoder(_tokens(pipe.tokenizer, [""]))[0]
    optimizer = torch.optim.AdamW(unet.parameters(), recipe.learning_rate, weight_decay=1e-3, betas=(0.9, 0.99))
    average = {name: value.detach().clone() for name, value in unet.state_dict().items()}
    generator = torch.Generator().manual_seed(recipe.seed + 6)
    running = math.nan
    for step in range(recipe.steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps)) * 0.95 + 0.05
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, step / _WARM_UP_STEPS) * cosine
        batch = data[torch.randint(len(data), (recipe.batch_size,), generator=generator)]
        template = torch.randint(len(TEMPLATES), (recipe.batch_size,), generator=generator)
        dropped = torch.rand(recipe.batch_size, generator=generator) < recipe.prompt_dropout
        context = torch.where(dropped[:, None, None], empty, table[batch.digits, template])
        noise = torch.randn(batch.images.shape, generator=generator)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (recipe.batch_size,), generator=generator)
        noisy = scheduler.add_noise(batch.images, noise, timesteps)
        loss = F.mse_loss(unet(noisy, timesteps, encoder_hidden_states=context).sample, noise)
        _update(optimizer, loss, unet.parameters())
        decay = min(0.995, (1 + step) / (10 + step))
        for name, value in unet.state_dict().items():
            average[name].lerp_(value, 1 - decay)
        running = loss.item() if step == 0 else 0.99 * running + 0.01 * loss.item()
    unet.load_state_dict(average)
    unet.eval().requires_grad_(False)
    return running


def _update(optimizer: torch.optim.Optimizer, loss: torch.Tensor, clipped: Any = None) -> None:
    optimizer.zero_grad()
    loss.backward()
    if clipped is not None:
        torch.nn.utils.clip_grad_norm_(clipped, 1.0)
    optimizer.step()


def main() -> None:
    """Build the world from the command line."""
    parser = argparse.ArgumentParser(description="Train the digits world and save it as a Hub folder.")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument(
        "--steps", type=int, default=DigitsRecipe.steps, help="of the UNet; 445 is the weak checkpoint"
    )
    parser.add_argument("--seed", type=int, default=DigitsRecipe.seed)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build(arguments.output_dir, DigitsRecipe(steps=arguments.steps, seed=arguments.seed))


if __name__ == "__main__":
    main()
