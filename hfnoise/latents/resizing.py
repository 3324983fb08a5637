"""Noise and changes of noise on a grid of another size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resized_noise(noise: Tensor, height: int, width: int) -> Tensor:
    """Return white noise on another grid, for a network that knows one size only; every number has unit variance.

    Nearest pixels, the usual resize, come in equal groups on a larger grid. Here each number is a weighted sum of
    neighbours (averages where the grid shrinks, linear interpolation where it grows), over the root of the sum of the
    squared weights. It remains independent where a side shrinks by a whole number; on a larger grid neighbours are
    correlated, whatever one does, so that it is never what a run starts from.

    Args:
        noise (`torch.Tensor` of shape `(batch, channels, height, width)`): float32.
        height, width (`int`): of the new grid.

    Example:
        >>> import torch
        >>> from hfnoise.latents.resizing import resized_noise
        >>> resized_noise(torch.ones(1, 1, 4, 4), 2, 4)[0, 0, 0]
        tensor([1.4142, 1.4142, 1.4142, 1.4142])
    """
    rows, columns = (_weights(*sides, noise) for sides in zip(noise.shape[-2:], (height, width), strict=True))
    return rows @ noise @ columns.mT


def _weights(before: int, after: int, like: Tensor) -> Tensor:
    """Return the matrix that resizes a side, its rows of norm 1."""
    one = torch.eye(before, device=like.device, dtype=like.dtype)[:, None]
    resized = F.interpolate(one, after, mode="area") if after < before else F.interpolate(one, after, mode="linear")
    return F.normalize(resized[:, 0].mT, dim=1)


def resized_delta(delta: Tensor, height: int, width: int) -> Tensor:
    """Return a change of noise on another grid, at the same amplitude, by bilinear interpolation.

    The change that re-denoising makes is in proportion to what the prompt changes of the image (a difference of two
    predictions of it), which has the same amplitude at every resolution: unlike noise it is not scaled.

    Args:
        delta (`torch.Tensor` of shape `(batch, channels, height, width)`).
        height, width (`int`): of the new grid.

    Example:
        >>> import torch
        >>> from hfnoise.latents.resizing import resized_delta
        >>> resized_delta(torch.ones(1, 1, 4, 4), 2, 6).shape
        torch.Size([1, 1, 2, 6])
    """
    if delta.shape[-2:] == (height, width):
        return delta
    return F.interpolate(delta, (height, width), mode="bilinear", antialias=True)
