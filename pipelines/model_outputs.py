"""What a denoiser returns: the prediction in it, and the same output with another prediction."""

from __future__ import annotations

from typing import Any

import torch


def prediction_of(output: Any) -> torch.Tensor:
    """Return the prediction in the output of a denoiser of diffusers.

    Args:
        output: a tensor, a tuple of one, or an output of diffusers with `sample` or one other field.

    Raises:
        TypeError: if there are several (audio beside video), or none.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.model_outputs import prediction_of
        >>> prediction_of((torch.ones(2, 4),)).shape
        torch.Size([2, 4])
    """
    found = output
    if isinstance(output, dict):  # an output of diffusers
        found = output.get(_field_of(output), output)
    elif isinstance(found, (tuple, list)) and len(found) == 1:
        found = found[0]
    if not isinstance(found, torch.Tensor):
        raise TypeError(
            f"the denoiser returns {type(found).__name__}, where one tensor is expected: models with several outputs, "
            "or with lists of images, cannot be guided here. Run this pipeline without guider."
        )
    return found


def with_prediction(output: Any, prediction: torch.Tensor) -> Any:
    """Return an output with another prediction.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.model_outputs import with_prediction
        >>> with_prediction((torch.ones(2),), torch.zeros(4))
        (tensor([0., 0., 0., 0.]),)
    """
    if isinstance(output, torch.Tensor):
        return prediction
    if isinstance(output, (tuple, list)):
        return type(output)([prediction])
    return type(output)(**{**output, _field_of(output): prediction})


def _field_of(output: dict[str, Any]) -> str:
    """Return where the prediction is: priors do not call it `sample`."""
    return next(iter(output)) if len(output) == 1 else "sample"


def scatter_rows(value: Any, rows: torch.Tensor, batch: int) -> Any:
    """Return the opposite of `select_rows`: tensors with `batch` rows, zero where nothing was evaluated.

    Args:
        value: tensors of `len(rows)` rows, in tuples, lists and outputs of diffusers.
        rows (`torch.Tensor` of shape `(selected,)`): where they go.
        batch (`int`): rows of the result.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.model_outputs import scatter_rows
        >>> scatter_rows([torch.tensor([5.0])], torch.tensor([1]), 2)
        [tensor([0., 5.])]
    """
    if isinstance(value, torch.Tensor):
        if not value.dim() or len(value) != len(rows):
            return value
        full = value.new_zeros(batch, *value.shape[1:])
        full[rows.to(value.device)] = value
        return full
    if isinstance(value, dict):  # also the outputs of diffusers
        return type(value)(**{name: scatter_rows(entry, rows, batch) for name, entry in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)([scatter_rows(entry, rows, batch) for entry in value])
    return value
