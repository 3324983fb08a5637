"""Noise on the text states, for models whose images hardly depend on the seed."""

from __future__ import annotations

import math

from torch import Tensor

from hfnoise.guidance.tensor_math import sample_dims, widened


def noised_condition(states: Tensor, noise: Tensor, strength: float, rescale: float = 1.0) -> Tensor:
    """Return sqrt(1 - s^2) y + s sigma z, brought to the mean and the spread of y, in the dtype of y.

    The corrupted and rescaled condition of CADS (arXiv 2310.17347), with gamma = 1 - s^2. Departure: the noise is
    in units of sigma, the standard deviation of y, so that one strength serves all text encoders.

    Args:
        states (`torch.Tensor` of shape `(batch, tokens, width)`): y.
        noise (`torch.Tensor` of that shape): z, of unit variance.
        strength (`float`): s, in [0, 1]; 0 returns `states` themselves.
        rescale (`float`, defaults to `1.0`): psi, in [0, 1]: how much of the change of mean and spread is undone.

    Raises:
        ValueError: if shapes differ, or a number is out of its range.

    Example:
        >>> import torch
        >>> from hfnoise.latents import noised_condition
        >>> states = torch.tensor([[[1.0, -1.0]]])
        >>> noised_condition(states, torch.tensor([[[2.0, 2.0]]]), 0.6, rescale=0.0)
        tensor([[[2.0000, 0.4000]]])
    """
    for name, number in (("strength", strength), ("rescale", rescale)):
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {number}.")
    if states.shape != noise.shape:
        raise ValueError(
            f"the states are of shape {tuple(states.shape)} and the noise of {tuple(noise.shape)}: they must be the "
            "same."
        )
    if strength == 0.0:
        return states
    y = widened(states)
    dims = sample_dims(y, None)
    mean, spread = y.mean(dims, keepdim=True), y.std(dims, keepdim=True, correction=0)
    noised = math.sqrt(1.0 - strength * strength) * y + strength * spread * widened(noise)
    centred = noised - noised.mean(dims, keepdim=True)
    alike = centred * (spread / noised.std(dims, keepdim=True, correction=0)) + mean
    return (rescale * alike + (1.0 - rescale) * noised).to(states.dtype)
