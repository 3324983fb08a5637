"""SSIM of small images, for guidance that should draw what full guidance draws."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Wang et al. 2004, section III.C: a Gaussian of 1.5 pixels, and constants for values of range 1.
_DEVIATION = 1.5
_CONSTANTS = (0.01**2, 0.03**2)
# Theirs is 11: of 16 x 16 pixels that would leave 6 x 6 places.
_WINDOW = 7


def structural_similarity(images: Tensor, references: Tensor, window: int = _WINDOW) -> Tensor:
    """Return the mean SSIM of each image to its reference (Wang et al. 2004, equation 13), in [-1, 1].

    Departure: a window of 7 pixels in the place of 11, since the images have 16. Places where it does not fit are left
    out, as in the authors' code. Channels are averaged.

    Args:
        images, references (`torch.Tensor` of shape `(count, channels, height, width)`): in [0, 1].
        window (`int`, defaults to `7`): side of the Gaussian window, odd.

    Raises:
        ValueError: if shapes differ, or the images are smaller than the window.
    """
    if images.shape != references.shape or images.dim() != 4 or min(images.shape[2:]) < window:
        raise ValueError(
            f"needed are two batches of images of one shape (count, channels, height, width), at least {window} "
            f"pixels a side, got {tuple(images.shape)} and {tuple(references.shape)}."
        )
    places = torch.arange(window, dtype=images.dtype) - window // 2
    weights = torch.exp(-(places**2) / (2 * _DEVIATION**2))
    weights /= weights.sum()

    def smooth(values: Tensor) -> Tensor:
        shape = values.shape
        flat = values.reshape(-1, 1, *shape[2:])
        flat = F.conv2d(F.conv2d(flat, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
        return flat.reshape(*shape[:2], *flat.shape[2:])

    mean, other = smooth(images), smooth(references)
    variance, other_variance = smooth(images**2) - mean**2, smooth(references**2) - other**2
    covariance = smooth(images * references) - mean * other
    first, second = _CONSTANTS
    similarity = (2 * mean * other + first) * (2 * covariance + second)
    similarity /= (mean**2 + other**2 + first) * (variance + other_variance + second)
    return similarity.flatten(1).mean(1)
