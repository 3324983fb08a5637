"""What a denoiser is called with: its noisy input, and some rows of all of it."""

from __future__ import annotations

from collections.abc import Mapping
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


def select_rows(value: Any, rows: torch.Tensor, batch: int, skipped: tuple[str, ...] = NOT_BATCHED) -> Any:
    """Return some samples of a batch: of every tensor whose first dimension is `batch`, in dicts, lists and tuples.

    Args:
        value: what a model is given.
        rows (`torch.Tensor` of shape `(selected,)`): indices.
        batch (`int`): number of samples in `value`.
        skipped (`tuple[str, ...]`): names of arguments that are left alone.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.model_inputs import select_rows
        >>> select_rows({"x": torch.arange(3), "t": torch.tensor(9)}, torch.tensor([2]), 3)
        {'x': tensor([2]), 't': tensor(9)}
    """
    if isinstance(value, torch.Tensor):
        return value[rows.to(value.device)] if value.dim() and len(value) == batch else value
    if isinstance(value, dict):
        return {
            name: entry if name in skipped else select_rows(entry, rows, batch, skipped)
            for name, entry in value.items()
        }
    if isinstance(value, (list, tuple)):
        return type(value)([select_rows(entry, rows, batch, skipped) for entry in value])
    return value


def part_that_is_predicted(model_input: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    """Return the part of a model's input that its prediction is of: without masks, images and reference tokens.

    Inpainting, pix2pix and image-to-video models are given more channels than they predict, editing models more
    tokens; both are dimension 1, and what is denoised comes first.

    Raises:
        ValueError: if the shapes do not match beyond that.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.model_inputs import part_that_is_predicted
        >>> part_that_is_predicted(torch.zeros(2, 9, 8, 8), torch.zeros(2, 4, 8, 8)).shape
        torch.Size([2, 4, 8, 8])
    """
    if model_input.dim() == prediction.dim() and model_input.shape[1] > prediction.shape[1]:
        model_input = model_input[:, : prediction.shape[1]]
    if model_input.shape != prediction.shape:
        raise ValueError(
            f"the model was given {tuple(model_input.shape)} and predicted {tuple(prediction.shape)}: x0 does not "
            "follow. Use space='model'."
        )
    return model_input
