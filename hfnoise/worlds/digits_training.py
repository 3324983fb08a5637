"""How a pipeline of a world of digits is trained, part by part: text encoder, autoencoder, UNet."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from hfnoise.worlds.digit_world import DigitWorld, LabelledImages, augment
from hfnoise.worlds.digits_judges import DigitClassifier
from hfnoise.worlds.digits_recipe import DigitsRecipe

# Of the learning rate, over which it is warmed up.
_WARM_UP_STEPS = 50


def train_text_encoder(pipe: Any, world: DigitWorld, data: LabelledImages, recipe: DigitsRecipe) -> None:
    """Train the text encoder as one half of a small CLIP; with the UNet it would learn too late to be of use."""
    # A prompt that is held out is no wrong answer either.
    shown = world.numbers(data.labels).unique()
    text, ids = pipe.text_encoder.train(), _prompt_ids(pipe.tokenizer, world)[shown]
    image = DigitClassifier("verifier", world.channels, world.classes).train()
    image.head = torch.nn.Linear(image.head.in_features, text.config.hidden_size)
    scale = torch.nn.Parameter(torch.tensor(2.0))
    optimizer = torch.optim.AdamW([*image.parameters(), *text.parameters(), scale], 3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=recipe.text_steps)
    generator = torch.Generator().manual_seed(recipe.seed + 3)
    for _ in _bar(recipe.text_steps, "text encoder"):
        batch = data[torch.randint(len(data), (recipe.batch_size,), generator=generator)]
        chosen = torch.randint(len(world.templates), (len(ids),), generator=generator)
        images = F.normalize(image(augment(batch.images, generator)), dim=-1)
        texts = F.normalize(text(ids[torch.arange(len(ids)), chosen]).pooler_output, dim=-1)
        answers = torch.searchsorted(shown, world.numbers(batch.labels))
        _update(optimizer, F.cross_entropy(scale.exp() * images @ texts.T, answers))
        schedule.step()
    text.eval().requires_grad_(False)


def train_autoencoder(vae: Any, data: LabelledImages, recipe: DigitsRecipe) -> None:
    """Train the autoencoder, and set the scale at which its latents have unit variance."""
    vae.train()
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=recipe.vae_steps)
    generator = torch.Generator().manual_seed(recipe.seed + 4)
    for _ in _bar(recipe.vae_steps, "autoencoder"):
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
def latents(vae: Any, data: LabelledImages, recipe: DigitsRecipe) -> LabelledImages:
    """Return latents of the images and of their augmentations: the autoencoder leaves the inner loop."""
    generator = torch.Generator().manual_seed(recipe.seed + 5)
    variants = [data.images, *[augment(data.images, generator) for _ in range(recipe.variants - 1)]]
    encoded = [vae.encode(images).latent_dist.mean * vae.config.scaling_factor for images in variants]
    return LabelledImages(torch.cat(encoded), data.labels.repeat(len(variants), 1))


def train_unet(pipe: Any, world: DigitWorld, data: LabelledImages, recipe: DigitsRecipe) -> float:
    """Train on the noise of random steps; return the running loss. The weights kept are an average over steps."""
    unet, scheduler = pipe.unet.train(), pipe.scheduler
    ids = _prompt_ids(pipe.tokenizer, world)
    with torch.no_grad():  # the text encoder is a table of all prompts, and of none
        table = torch.stack([pipe.text_encoder(row)[0] for row in ids])
        empty = pipe.text_encoder(_tokens(pipe.tokenizer, [""]))[0]
    optimizer = torch.optim.AdamW(unet.parameters(), recipe.learning_rate, weight_decay=1e-3, betas=(0.9, 0.99))
    average = {name: value.detach().clone() for name, value in unet.state_dict().items()}
    generator = torch.Generator().manual_seed(recipe.seed + 6)
    running = math.nan
    for step in _bar(recipe.steps, "UNet"):
        cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps)) * 0.95 + 0.05
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, step / _WARM_UP_STEPS) * cosine
        batch = data[torch.randint(len(data), (recipe.batch_size,), generator=generator)]
        template = torch.randint(len(world.templates), (recipe.batch_size,), generator=generator)
        dropped = torch.rand(recipe.batch_size, generator=generator) < recipe.prompt_dropout
        context = torch.where(dropped[:, None, None], empty, table[world.numbers(batch.labels), template])
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


def _bar(steps: int, part: str) -> Any:
    from huggingface_hub.utils import tqdm

    return tqdm(range(steps), desc=part, name="hfnoise.worlds.digits_training")


def _update(optimizer: torch.optim.Optimizer, loss: torch.Tensor, clipped: Any = None) -> None:
    optimizer.zero_grad()
    loss.backward()
    if clipped is not None:
        torch.nn.utils.clip_grad_norm_(clipped, 1.0)
    optimizer.step()


def _prompt_ids(tokenizer: Any, world: DigitWorld) -> torch.Tensor:
    """Return the tokens of all prompts, of shape `(combinations, templates, max_tokens)`."""
    combinations = world.combinations().tolist()
    texts = [world.prompt(labels, template) for labels in combinations for template in world.templates]
    return _tokens(tokenizer, texts).reshape(len(combinations), len(world.templates), -1)


def _tokens(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    return tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
