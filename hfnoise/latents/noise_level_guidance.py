"""Noise-level guidance: noise that is moved along the guidance before sampling begins."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hfnoise.guidance.tensor_math import norm, sample_dims, widened


def noise_level_step(
    noise: Tensor,
    direction: Tensor,
    step_size: float = 1.0,
    max_norm: float | None = None,
    *,
    fresh_noise: Tensor | None = None,
    noise_variance: float = 0.0,
    boundary: float | None = None,
    normalize: bool = True,
) -> Tensor:
    """Return one step of noise-level guidance, n - step_size d with |d| at most `max_norm`, in float32.

    Noise Level Guidance (arXiv 2509.13936): d = eps(n, prompt) - eps(n, nothing) at the first timestep. The noise thus
    comes to expect the prompt. Every norm is that of a sample.

    Departure: the input is not changed in place.

    Args:
        noise (`torch.Tensor` of shape `(batch, ...)`): n, of unit variance.
        direction (`torch.Tensor` of that shape): d.
        step_size (`float`, defaults to `1.0`): above 0.
        max_norm (`float`, *optional*): of a step's direction, above 0; 0.5 in the paper, for 36864 numbers.
        fresh_noise (`torch.Tensor` of that shape, *optional*): z of unit variance: sqrt(noise_variance) z is added.
        noise_variance (`float`, defaults to `0.0`): at least 0; 0.001 in the paper.
        boundary (`float`, *optional*): numbers are kept within plus and minus this.
        normalize (`bool`, defaults to `True`): bring each sample to the norm sqrt(d) of unit noise.

    Raises:
        ValueError: if shapes differ, a number is out of its range, or there is a variance and no noise.

    Example:
        >>> import torch
        >>> from hfnoise.latents import noise_level_step
        >>> noise_level_step(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 8.0]]), max_norm=4.0, normalize=False)
        tensor([[3., 0.]])
    """
    check_step(step_size, max_norm, noise_variance)
    if noise.shape != direction.shape:
        raise ValueError(
            f"the noise is of shape {tuple(noise.shape)} and the direction of {tuple(direction.shape)}: they must be "
            "the same."
        )
    if noise_variance and fresh_noise is None:
        raise ValueError(f"noise_variance is {noise_variance}, and there is no fresh_noise to add.")
    x = widened(noise) - step_size * clipped(direction, max_norm)
    if noise_variance and fresh_noise is not None:
        x = x + math.sqrt(noise_variance) * widened(fresh_noise)
    if boundary is not None:
        x = x.clamp(-boundary, boundary)
    return unit_norm(x) if normalize else x


def clipped(direction: Tensor, max_norm: float | None) -> Tensor:
    """Return a direction, in float32, of a norm of at most `max_norm` in each sample.

    Example:
        >>> import torch
        >>> from hfnoise.latents.noise_level_guidance import clipped
        >>> clipped(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0)
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    direction = widened(direction)
    if max_norm is None:
        return direction
    length = norm(direction, sample_dims(direction, None))
    # A direction of 0 stays 0.
    return direction * (max_norm / length.clamp_min(torch.finfo(length.dtype).tiny)).clamp_max(1.0)


def unit_norm(noise: Tensor, like: Tensor | None = None) -> Tensor:
    """Return noise brought to the norm sqrt(d) in each sample, in float32, or to that of other noise.

    Args:
        noise (`torch.Tensor` of shape `(batch, ...)`).
        like (`torch.Tensor` of that shape, *optional*): whose norms are kept.

    Example:
        >>> import torch
        >>> from hfnoise.latents import unit_norm
        >>> unit_norm(torch.tensor([[3.0, 3.0]]))
        tensor([[1., 1.]])
    """
    x = widened(noise)
    dims = sample_dims(x, None)
    target: Tensor | float = math.sqrt(x[0].numel()) if like is None else norm(widened(like), dims)
    return x * (target / norm(x, dims))


def check_step(step_size: float, max_norm: float | None, noise_variance: float) -> None:
    """Raise ValueError if a number of a step is out of its range.

    Example:
        >>> from hfnoise.latents.noise_level_guidance import check_step
        >>> check_step(1.0, None, 0.0)
    """
    if not 0.0 < step_size < math.inf:
        raise ValueError(f"step_size must be above 0, got {step_size}.")
    if max_norm is not None and not 0.0 < max_norm < math.inf:
        raise ValueError(f"the largest norm of a step must be above 0, or None for no limit, got {max_norm}.")
    if not 0.0 <= noise_variance < math.inf:
        raise ValueError(f"noise_variance must be at least 0, got {noise_variance}.")
