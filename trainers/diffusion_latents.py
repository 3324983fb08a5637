"""From images and captions to the rows of [`~hfnoise.DiffusionTrainer`]: latents and prompt states, made once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import torch
from datasets.fingerprint import generate_random_fingerprint
from torch import Tensor

from hfnoise.trainers.diffusion_noise import draw_training_noise
from hfnoise.trainers.diffusion_rows import LATENTS, STATES

POOLED = "pooled_projections"
TEXT_EMBEDS = "added_cond_kwargs.text_embeds"
TIME_IDS = "added_cond_kwargs.time_ids"


def precompute_latents(
    dataset: datasets.Dataset,
    pipe: Any,
    *,
    image_column: str = "image",
    caption_column: str | None = "text",
    resolution: int | None = None,
    batch_size: int = 8,
    seed: int | None = 0,
) -> datasets.Dataset:
    """Return a dataset of latents and prompt states; the autoencoder and the text encoder leave the training loop.

    Latents are scaled as the denoiser expects them: (z - shift_factor) * scaling_factor of the autoencoder, or
    (z - latents_mean) / latents_std where it has those. Works for Stable Diffusion 1.x, 2.x, XL and 3 and pipelines of
    their form; for others make the columns yourself, named like the arguments of the denoiser's forward. Nothing is
    kept in the cache of `datasets`: `save_to_disk` the result.

    Args:
        dataset (`datasets.Dataset`): rows.
        pipe (`DiffusionPipeline`): its `vae`, `encode_prompt` and denoiser are used, where they are.
        image_column (`str`, defaults to `"image"`): PIL images, or tensors of `(channels, height, width)` in [-1, 1].
        caption_column (`str`, *optional*, defaults to `"text"`): captions; `None` for a denoiser without prompts.
        resolution (`int`, *optional*): crop PIL images to their middle square and resize them to this size, in pixels.
        batch_size (`int`, defaults to `8`): images that are encoded together.
        seed (`int`, *optional*, defaults to `0`): of one sample of each image's posterior, by row, which is what
            diffusers' scripts train on; `None` is its mean, as for the denoisers of the digits world.

    Returns:
        `datasets.Dataset` in torch format, with `latents` and, by pipeline, `encoder_hidden_states`,
        `pooled_projections`, `added_cond_kwargs.text_embeds`, `added_cond_kwargs.time_ids`; float32.

    Raises:
        TypeError: for a dataset of another kind, and images that are paths.
        ValueError: for a missing column, images of different sizes or another number of channels than the autoencoder
            takes, an autoencoder without scaling factor, latents that are not finite, or a pipeline of another form.

    Example:
        >>> import datasets, torch
        >>> from hfnoise.trainers.diffusion_latents import precompute_latents
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> images = datasets.Dataset.from_dict({"image": torch.zeros(2, 1, 16, 16).tolist(), "text": ["one", "two"]})
        >>> rows = precompute_latents(images, new_digits_pipeline(width=8))
        >>> rows[0]["latents"].shape, rows[0]["encoder_hidden_states"].shape
        (torch.Size([4, 8, 8]), torch.Size([8, 64]))
    """
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"dataset is a {type(dataset).__name__}; give a datasets.Dataset: one split of a DatasetDict, a stream or "
            "a list by Dataset.from_list(list(rows))."
        )
    if resolution is not None and (isinstance(resolution, bool) or not isinstance(resolution, int) or resolution < 1):
        raise ValueError(f"resolution is {resolution!r}; give a whole number of pixels above 0, or None.")
    missing = [name for name in (image_column, caption_column) if name and name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"the dataset has no column {', '.join(missing)}; it has {dataset.column_names}. Name its columns by "
            "image_column and caption_column (None for a denoiser without prompts)."
        )
    if not len(dataset):
        raise ValueError("the dataset is empty.")
    vae = getattr(pipe, "vae", None)
    if vae is None:
        raise ValueError(f"{type(pipe).__name__} has no vae, which makes the latents.")
    scaled = latent_scaling(vae)

    def encode(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, Any]:
        pixels, time_ids = _pixels(pipe, rows[image_column], resolution)
        latents = scaled(_encode_images(vae, pixels, indices, seed)).float()
        broken = ~latents.flatten(1).isfinite().all(1)
        if bool(broken.any()):
            raise ValueError(
                f"the latents of rows {torch.tensor(indices)[broken.cpu()].tolist()} are not finite. An autoencoder "
                "in float16 can overflow (SDXL's does): pipe.vae.to(torch.float32)."
            )
        columns = {LATENTS: latents}
        if caption_column is not None:
            gaps = [row for row, caption in zip(indices, rows[caption_column], strict=True) if caption is None]
            if gaps:
                raise ValueError(
                    f"rows {gaps} have no caption in {caption_column!r}. Give them one, '' for the empty prompt, or "
                    "filter them out."
                )
            columns |= encode_prompts(pipe, rows[caption_column])
            if TEXT_EMBEDS in columns:
                columns[TIME_IDS] = time_ids
        return {name: one.cpu().numpy() for name, one in columns.items()}

    first = encode(dataset[:1], [0])

    def encode_alike(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, Any]:
        columns = encode(rows, indices)
        # `datasets` would write other shapes without a word, and read them in that of the first row.
        for name, one in columns.items():
            if one.shape[1:] != first[name].shape[1:]:
                raise ValueError(
                    f"{name} of row {indices[0]} have the shape {one.shape[1:]}, those of row 0 "
                    f"{first[name].shape[1:]}: images have different sizes. Set resolution to bring them to one."
                )
        return columns

    return dataset.map(
        encode_alike,
        batched=True,
        with_indices=True,
        batch_size=batch_size,
        remove_columns=dataset.column_names,
        features=datasets.Features({name: _feature(value[0]) for name, value in first.items()}),
        desc="encoding images and prompts",
        # By default the function is hashed, with all weights of the pipeline in it.
        new_fingerprint=generate_random_fingerprint(),
    ).with_format("torch")


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Return the columns of prompts; of `[""]` it is the `empty_prompt` of [`~hfnoise.DiffusionTrainer`].

    Args:
        pipe (`DiffusionPipeline`): of the form of Stable Diffusion 1.x, 2.x, XL or 3.
        prompts (`Sequence[str]`): texts.

    Returns:
        `dict[str, Tensor]`: the states by the name of the denoiser's argument, `(len(prompts), ...)`, float32.

    Raises:
        ValueError: for a pipeline of another form, or a prompt that is no text.

    Example:
        >>> from hfnoise.trainers.diffusion_latents import encode_prompts
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> encode_prompts(new_digits_pipeline(width=8), [""])["encoder_hidden_states"].shape
        torch.Size([1, 8, 64])
    """
    if isinstance(prompts, str) or not all(isinstance(one, str) for one in prompts):
        raise ValueError(f"prompts must be a list of texts, without gaps; got {prompts!r:.200}.")
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if denoiser is None or not hasattr(pipe, "encode_prompt"):
        raise ValueError(f"{type(pipe).__name__} has no denoiser or no encode_prompt; {_OWN_COLUMNS}")
    known = inspect.signature(pipe.encode_prompt).parameters
    given: dict[str, Any] = {"prompt": list(prompts), "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    given |= {"device": pipe._execution_device, "prompt_2": None, "prompt_3": None}
    outputs = pipe.encode_prompt(**{name: value for name, value in given.items() if name in known})
    takes = inspect.signature(type(denoiser).forward).parameters
    if not isinstance(outputs, tuple) or STATES not in takes:
        raise ValueError(f"{type(pipe).__name__} encodes prompts in a form of its own; {_OWN_COLUMNS}")
    columns = {STATES: outputs[0]}
    if len(outputs) == 4 and POOLED in takes:
        columns[POOLED] = outputs[2]
    elif len(outputs) == 4 and denoiser.config.get("addition_embed_type") == "text_time":
        columns[TEXT_EMBEDS] = outputs[2]
    elif len(outputs) != 2 or denoiser.config.get("addition_embed_type") is not None or POOLED in takes:
        raise ValueError(f"{type(pipe).__name__} encodes prompts in a form of its own; {_OWN_COLUMNS}")
    return {name: one.float() for name, one in columns.items()}


_OWN_COLUMNS = "make the columns yourself, named like the arguments of the denoiser's forward."


def latent_scaling(vae: Any) -> Callable[[Tensor], Tensor]:
    """Return the function that brings what an autoencoder encodes to the scale of the denoiser.

    Raises:
        ValueError: if the autoencoder says nothing of the scale.
    """
    config = vae.config
    factor = config.get("scaling_factor")
    if factor is not None:
        shift = config.get("shift_factor") or 0.0
        return lambda latents: (latents - shift) * factor
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        raise ValueError(
            f"the config of {type(vae).__name__} has neither scaling_factor nor latents_mean and latents_std, so the "
            "scale of its latents is not known. Set it: vae.register_to_config(scaling_factor=1 / latents.std())."
        )

    def normalized(latents: Tensor) -> Tensor:
        shape = (-1, *[1] * (latents.ndim - 2))
        parts = (
            torch.as_tensor(one, device=latents.device, dtype=latents.dtype).reshape(shape) for one in (mean, std)
        )
        center, spread = parts
        return (latents - center) / spread

    return normalized


@torch.no_grad()
def _encode_images(vae: Any, pixels: Tensor, indices: list[int], seed: int | None) -> Tensor:
    encoded = vae.encode(pixels.to(vae.device, vae.dtype))
    if not hasattr(encoded, "latent_dist"):
        return encoded.latents
    posterior = encoded.latent_dist
    if seed is None:
        return posterior.mean
    draws = draw_training_noise(seed, 0, indices, tuple(posterior.mean.shape[1:]), stream="latents")
    return posterior.mean + posterior.std * draws.noise.to(posterior.mean)


def _pixels(pipe: Any, images: list[Any], resolution: int | None) -> tuple[Tensor, Tensor]:
    """Return a batch of pixels in [-1, 1], and SDXL's size conditions: original size, no crop, size."""
    if any(image is None for image in images):
        raise ValueError("an image is missing: a row has None in its place. Filter the dataset first.")
    if all(hasattr(image, "convert") for image in images):
        from PIL import ImageOps

        originals = [(image.height, image.width) for image in images]
        # What diffusers crops with makes grey images RGB.
        mode = "L" if pipe.vae.config.get("in_channels") == 1 else "RGB"
        same = [image.convert(mode) for image in images]
        if resolution is not None:
            same = [ImageOps.fit(image, (resolution, resolution)) for image in same]
        tensors = [pipe.image_processor.preprocess(image)[0] for image in same]
    else:
        path = next((image for image in images if isinstance(image, (str, bytes, dict))), None)
        if path is not None:
            raise TypeError(
                f"an image is a {type(path).__name__}: {path!r:.80}. Have datasets open it: "
                "dataset.cast_column(column, datasets.Image())."
            )
        if resolution is not None:
            raise ValueError("resolution is for PIL images; bring tensors to one size before.")
        tensors = [torch.as_tensor(image, dtype=torch.float32) for image in images]
        originals = [tuple(one.shape[-2:]) for one in tensors]
        if any(one.ndim != 3 or not bool((one.abs() <= 1).all()) for one in tensors):
            raise ValueError("images that are tensors must be (channels, height, width), with values in [-1, 1].")
    sizes = {tuple(one.shape) for one in tensors}
    if len(sizes) > 1:
        raise ValueError(f"images have different sizes: {sorted(sizes)}. Set resolution to bring them to one.")
    channels = pipe.vae.config.get("in_channels", len(tensors[0]))
    if len(tensors[0]) != channels:
        raise ValueError(f"images have {len(tensors[0])} channels, and the autoencoder takes {channels}.")
    pixels = torch.stack(tensors)
    size = tuple(pixels.shape[-2:])
    return pixels, torch.tensor([[*original, 0, 0, *size] for original in originals], dtype=torch.float32)


def _feature(value: Any) -> Any:
    kinds = {2: datasets.Array2D, 3: datasets.Array3D, 4: datasets.Array4D}
    if value.ndim in kinds:
        return kinds[value.ndim](shape=value.shape, dtype=str(value.dtype))
    return datasets.Sequence(datasets.Value(str(value.dtype)), length=len(value))
