"""Which text states are of padding, found among what a pipeline encodes a prompt to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def text_mask(encoded: Sequence[Any]) -> Tensor | None:
    """Return the mask among what `encode_prompt` returned; `None` if there is none.

    Some pipelines cast masks to the dtype of the states, and pooled states may be as wide as there are tokens: a mask
    is what holds 0 and 1 only, with a 1 for each prompt.

    Args:
        encoded (sequence): the text states first, of shape `(batch, tokens, width)`.

    Returns:
        `torch.Tensor` of shape `(batch, tokens)`, 0 where a state is of padding.

    Example:
        >>> import torch
        >>> from hfnoise.latents.text_mask import text_mask
        >>> text_mask((torch.zeros(1, 3, 8), torch.randn(1, 3), torch.tensor([[1, 1, 0]])))
        tensor([[1, 1, 0]])
    """
    states = encoded[0]
    parts = (part for part in encoded[1:] if isinstance(part, Tensor) and part.shape == states.shape[:2])
    return next((part for part in parts if _is_mask(part)), None)


def _is_mask(part: Tensor) -> bool:
    return bool(((part == 0) | (part == 1)).all() and part.bool().any(1).all())
