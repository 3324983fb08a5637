"""Noise near to other noise: at a fixed angle to it, and of its length."""

from __future__ import annotations

import math

from torch import Tensor

from hfnoise.guidance.number_check import check_number


def noise_neighbour(noise: Tensor, direction: Tensor, cosine: float) -> Tensor:
    """Return r (c u + sqrt(1 - c^2) v), which has the cosine c to the noise r u.

    u is the noise at length 1, and v the part of `direction` that is orthogonal to it, at length 1. The neighbours of
    zero-order search in "Inference-time scaling for diffusion models beyond scaling denoising steps"
    (arXiv 2501.09732, section 3.2). For a standard normal direction all neighbours at that angle are equally likely.

    Args:
        noise (`torch.Tensor` of shape `(batch, ...)`): each row has a neighbour of its own.
        direction (`torch.Tensor` of that shape): of any length.
        cosine (`float`): c, in [-1, 1]; 1 returns the noise.

    Returns:
        `torch.Tensor` of that shape and dtype; computed in float64.

    Raises:
        ValueError: if shapes differ, or the cosine is out of its range.

    Example:
        >>> import torch
        >>> from hfnoise.latents import noise_neighbour
        >>> noise_neighbour(torch.tensor([[5.0, 0.0]]), torch.tensor([[1.0, 1.0]]), 0.6)
        tensor([[3., 4.]])
    """
    check_number("cosine", cosine)
    if not -1.0 <= cosine <= 1.0:
        raise ValueError(f"cosine must be in [-1, 1], got {cosine}.")
    if noise.shape != direction.shape:
        raise ValueError(
            f"direction is of shape {tuple(direction.shape)} and the noise of {tuple(noise.shape)}: they must be the "
            "same."
        )
    if cosine == 1.0:
        return noise
    rows, other = noise.double().flatten(1), direction.double().flatten(1)
    length = rows.norm(dim=1, keepdim=True)
    unit = rows / length
    across = other - (other * unit).sum(1, keepdim=True) * unit
    across = across / across.norm(dim=1, keepdim=True)
    found: Tensor = length * (cosine * unit + math.sqrt(1.0 - cosine * cosine) * across)
    return found.reshape(noise.shape).to(noise.dtype)
