"""Waves across an image: the lowest frequencies of the discrete cosine transform."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosine_basis(frequencies: int, size: int) -> Tensor:
    """Return the lowest waves of the DCT-II along one side of an image, each of mean square 1 over its pixels.

    Wave u is sqrt(2) cos(pi u (i + 1/2) / size), u half periods from edge to edge, and wave 0 is 1. In a strongly
    correlated sequence with free ends their amplitudes are nearly uncorrelated (Ahmed, Natarajan and Rao, IEEE
    Transactions on Computers, 1974), as those of the Fourier transform are on a ring. An image is no ring: its left
    edge is not its right one. A ramp from one to the other has 96 / pi^4 = 98.6 % of its variance in wave 1; in the
    Fourier transform it is spread over all frequencies.

    Args:
        frequencies (`int`): how many, the mean (wave 0) among them.
        size (`int`): pixels.

    Returns:
        `torch.Tensor` of shape `(frequencies, size)`, in float64.

    Raises:
        ValueError: with more waves than pixels.

    Example:
        >>> from hfnoise.latents.cosine_basis import cosine_basis
        >>> basis = cosine_basis(3, 8)
        >>> bool(((basis @ basis.T / 8).round(decimals=6) == basis.new_tensor([1, 1, 1]).diag()).all())
        True
    """
    if not 1 <= frequencies <= size:
        raise ValueError(f"an image of {size} pixels has 1 to {size} frequencies along that side, got {frequencies}.")
    numbers = torch.arange(frequencies, dtype=torch.float64)[:, None]
    pixels = torch.arange(size, dtype=torch.float64) + 0.5
    basis = math.sqrt(2.0) * torch.cos(math.pi * numbers * pixels / size)
    basis[0] = 1.0
    return basis


def cosine_amplitudes(images: Tensor, frequencies: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the amplitudes of the lowest waves in images: the mean over pixels of the image times the wave.

    Args:
        images (`torch.Tensor` of shape `(samples, channels, ..., height, width)`): what is between, the frames of a
            video, is averaged. With `frequencies=1` any shape with samples and channels.
        frequencies (`int`): along each side.
        dtype (`torch.dtype`, defaults to float64): to sum in.

    Returns:
        `torch.Tensor` of shape `(samples, channels, frequencies^2)`, by row: along the width first, the channel means
        the first of all.

    Raises:
        ValueError: if the images have too few pixels, or none.

    Example:
        >>> import torch
        >>> from hfnoise.latents.cosine_basis import cosine_amplitudes, cosine_basis
        >>> ramp = cosine_basis(2, 8)[1].expand(1, 1, 6, 8)
        >>> [round(number, 6) + 0.0 for number in cosine_amplitudes(ramp, 2).flatten().tolist()]
        [0.0, 1.0, 0.0, 0.0]
    """
    means = images.flatten(2).mean(2, dtype=dtype) if images.dim() > 2 else images.to(dtype)
    if frequencies == 1:
        return means[..., None]
    check_has_space(images.shape)
    planes = images.to(dtype).flatten(2, -3).mean(2) if images.dim() > 4 else images.to(dtype)
    rows, columns = (cosine_basis(frequencies, size).to(images.device, dtype) for size in images.shape[-2:])
    amplitudes = (rows @ planes @ columns.T / planes[0, 0].numel()).flatten(2)
    return torch.cat([means[..., None], amplitudes[..., 1:]], -1)


def cosine_waves(amplitudes: Tensor, height: int, width: int) -> Tensor:
    """Return the images that have these amplitudes, and no other waves.

    Args:
        amplitudes (`torch.Tensor` of shape `(samples, channels, frequencies^2)`): as [`cosine_amplitudes`] has them.
        height, width (`int`): of any image: the waves go from edge to edge, and keep their size.

    Returns:
        `torch.Tensor` of shape `(samples, channels, height, width)`.

    Example:
        >>> import torch
        >>> from hfnoise.latents.cosine_basis import cosine_waves
        >>> cosine_waves(torch.ones(1, 1, 4), 8, 8).square().mean()
        tensor(4.)
    """
    frequencies = math.isqrt(amplitudes.shape[-1])
    grid = amplitudes.reshape(*amplitudes.shape[:-1], frequencies, frequencies)
    rows, columns = (cosine_basis(frequencies, size).to(grid) for size in (height, width))
    waves: Tensor = rows.T @ grid @ columns
    return waves


def check_has_space(shape: torch.Size | tuple[int, ...]) -> None:
    """Raise ValueError unless a shape has samples, channels, height and width.

    Example:
        >>> from hfnoise.latents.cosine_basis import check_has_space
        >>> check_has_space((1, 4, 8, 8))
    """
    if len(shape) < 4:
        raise ValueError(
            f"frequencies above the mean need images of shape (samples, channels, height, width), got {tuple(shape)}."
        )
