"""CFG-Zero*: the unconditional velocity, scaled to fit the conditional one."""

from __future__ import annotations

import torch
from torch import Tensor

from hfnoise.guidance.tensor_math import check_pair, inner, sample_dims, widened


def zero_star_scale(cond: Tensor, uncond: Tensor) -> Tensor:
    """Return s* = <cond, uncond> / ||uncond||^2 per sample (the optimised scale of CFG-Zero*, arXiv 2503.18886).

    Guidance then starts from s* uncond, the multiple that is nearest to cond. Its zero-init, no velocity at all in the
    first steps, is a matter of the caller. Departure: no epsilon in the denominator (1e-8 in diffusers); an all-zero
    prediction keeps the scale 0 all the same.

    Args:
        cond (`torch.Tensor` of shape `(batch, ...)`): conditional output of a flow model.
        uncond (`torch.Tensor` of shape `(batch, ...)`): unconditional output.

    Returns:
        `torch.Tensor` of shape `(batch, 1, ...)`, float32, to be multiplied with `uncond`.

    Raises:
        TypeError: if a prediction is no floating-point tensor.
        ValueError: if the shapes differ or have no batch dimension.

    Example:
        >>> import torch
        >>> from hfnoise.guidance import zero_star_scale
        >>> zero_star_scale(torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 0.0]])).tolist()
        [[2.0]]
    """
    check_pair(cond, uncond)
    left, right = widened(cond), widened(uncond)
    dims = sample_dims(left, None)
    return inner(left, right, dims) / inner(right, right, dims).clamp_min(torch.finfo(right.dtype).tiny)
