"""What a denoiser is called with: its noisy input, and some rows of all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

# The first argument of diffusers' denoisers, by name.
_INPUT_NAMES = ("sample", "hidden_states")
# Positions, not samples, though their length may equal the batch.
NOT_BATCHED = ("img_ids", "txt_ids", "image_rotary_emb", "rotary_emb", "freqs_cis")


def noisy_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Return the tensor that a denoiser is asked to denoise.

    Raises:
        TypeError: if it is none: lists of images of different sizes (Z-Image) have no batch.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.model_inputs import noisy_input
        >>> noisy_input((), {"timestep": 1, "hidden_states": torch.zeros(2, 4)}).shape
        torch.Size([2, 4])
    """
    value = args[0] if args else next((kwargs[name] for name in _INPUT_NAMES if name in kwargs), None)
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"the denoiser is given {type(value).__name__} where a tensor of shape (batch, ...) is expected. Use "
            "space='model' and per_sample=False, which need no access to it."
        )
    return value


def select_rows(
    value: Any,
    rows: torch.Tensor,
    batch: int,
    skipped: tuple[str, ...] = (),
    repeated: tuple[str, ...] = (),
    second: tuple[str, ...] = (),
) -> Any:
    """Return some samples of a batch: of every tensor whose first dimension is `batch`, in dicts, lists and tuples.

    Args:
        value: what a model is given.
        rows (`torch.Tensor` of shape `(selected,)`): indices.
        batch (`int`): number of samples in `value`.
        skipped (`tuple[str, ...]`): names of arguments that are left alone, beside those that never hold samples.
        repeated (`tuple[str, ...]`): names of arguments with a multiple of `batch` rows, those of a sample together.
        second (`tuple[str, ...]`): names of arguments whose samples are dimension 1.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.model_inputs import select_rows
        >>> select_rows({"x": torch.arange(3), "t": torch.tensor(9)}, torch.tensor([2]), 3)
        {'x': tensor([2]), 't': tensor(9)}
    """
    if isinstance(value, torch.Tensor):
        return value[rows.to(value.device)] if value.dim() and len(value) == batch else value
    if isinstance(value, (list, tuple)):
        return type(value)([select_rows(entry, rows, batch, skipped, repeated, second) for entry in value])
    if not isinstance(value, dict):
        return value
    selected = {}
    for name, entry in value.items():
        if name in NOT_BATCHED or name in skipped:
            selected[name] = entry
        elif name in repeated:
            selected[name] = _select_repeated(entry, rows, batch)
        elif name in second and isinstance(entry, torch.Tensor):
            selected[name] = entry[:, rows.to(entry.device)]
        else:
            selected[name] = select_rows(entry, rows, batch, skipped, repeated, second)
    return selected


def _select_repeated(value: Any, rows: torch.Tensor, batch: int) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)([_select_repeated(entry, rows, batch) for entry in value])
    if not isinstance(value, torch.Tensor) or not value.dim() or len(value) % batch:
        return value
    grouped = value.reshape(batch, len(value) // batch, *value.shape[1:])
    return grouped[rows.to(value.device)].flatten(0, 1)


def predicted_part(
    model_input: torch.Tensor, prediction: torch.Tensor, latents: torch.Size | None = None
) -> tuple[slice, ...]:
    """Return which part of both a model's input and its prediction is what is denoised, as an index of either.

    Inpainting, pix2pix and image-to-video models are given more channels than they predict, editing models more
    tokens; models that learn the variance predict more channels than they are given. What is denoised comes first,
    in whatever dimension that is: channels are the second or third one of a video, or the last.

    Args:
        model_input (`torch.Tensor` of shape `(batch, ...)`): what is denoised.
        prediction (`torch.Tensor` of shape `(batch, ...)`): what came out.
        latents (`torch.Size`, *optional*): shape of what the run started from; where both tensors have more of one
            dimension than it, that is left out too.

    Raises:
        ValueError: if the shapes do not match beyond that.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.model_inputs import predicted_part
        >>> part = predicted_part(torch.zeros(2, 9, 8, 8), torch.zeros(2, 4, 8, 8))
        >>> torch.zeros(2, 9, 8, 8)[part].shape
        torch.Size([2, 4, 8, 8])
    """
    given, found = model_input.shape, prediction.shape
    if given[:1] != found[:1] or len(given) != len(found) or _differing(given, found) > 1:
        raise ValueError(
            f"the model was given {tuple(given)} and predicted {tuple(found)}: x0 does not follow. Use space='model'."
        )
    lengths = [min(pair) for pair in zip(given[1:], found[1:], strict=True)]
    # Another order of the dimensions differs in more than one.
    if latents is not None and len(latents) == len(given) and _differing(latents[1:], lengths) == 1:
        lengths = [min(pair) for pair in zip(lengths, latents[1:], strict=True)]
    return (slice(None), *(slice(length) for length in lengths))


def _differing(left: Sequence[int], right: Sequence[int]) -> int:
    return sum(a != b for a, b in zip(left, right, strict=True))
