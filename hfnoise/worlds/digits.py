"""The digits world: handwritten digits of 16 x 16 pixels, and prompts that ask for them.

The images are scikit-learn's copy of the UCI digits (1797 of 8 x 8), made larger. scikit-learn is needed to train the
world anew, not to use it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

IMAGE_SIZE = 16
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a photo of the digit {}",
    "the digit {}",
    "a handwritten {}",
    "a picture of the number {}",
    "{}",
)
_TEST_IMAGES = 297


@dataclass(frozen=True)
class DigitImages:
    """Images with what they show.

    Args:
        images (`torch.Tensor` of shape `(count, 1, 16, 16)`): float32 in [-1, 1], -1 is paper.
        digits (`torch.Tensor` of shape `(count,)`): int64, 0 to 9.
    """

    images: torch.Tensor
    digits: torch.Tensor

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, rows: slice | torch.Tensor) -> DigitImages:
        return DigitImages(self.images[rows], self.digits[rows])


def prompt(digit: int, template: str = TEMPLATES[0]) -> str:
    """Return what to ask for, to get a digit.

    Args:
        digit (`int`): 0 to 9.
        template (`str`): one of `TEMPLATES`.

    Raises:
        ValueError: for another digit.

    Example:
        >>> from hfnoise.worlds.digits import prompt
        >>> prompt(7)
        'a photo of the digit seven'
    """
    if not 0 <= digit <= 9:
        raise ValueError(f"digit must be 0 to 9, got {digit}.")
    return template.format(WORDS[digit])


def load_digit_images() -> tuple[DigitImages, DigitImages]:
    """Return training and test images, in one fixed order.

    Raises:
        ImportError: if scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the images of the digits world come with scikit-learn, which is not installed: pip install scikit-learn. "
            "Only building the world needs it."
        ) from error
    raw = load_digits()
    return split_digit_images(torch.as_tensor(raw.images, dtype=torch.float32), torch.as_tensor(raw.target))


def split_digit_images(raw: torch.Tensor, digits: torch.Tensor) -> tuple[DigitImages, DigitImages]:
    """Return raw images as training and test images of the world: shuffled, enlarged, in [-1, 1].

    Args:
        raw (`torch.Tensor` of shape `(count, 8, 8)`): ink of 0 to 16.
        digits (`torch.Tensor` of shape `(count,)`): what they show.

    Example:
        >>> import torch
        >>> from hfnoise.worlds.digits import split_digit_images
        >>> train, test = split_digit_images(torch.zeros(600, 8, 8), torch.zeros(600))
        >>> len(train), len(test), train.images.shape[1:]
        (303, 297, torch.Size([1, 16, 16]))
    """
    if len(raw) <= _TEST_IMAGES:
        raise ValueError(f"{_TEST_IMAGES} images are for tests, so more are needed; got {len(raw)}.")
    larger = F.interpolate(raw[:, None] / 8 - 1, size=IMAGE_SIZE, mode="bicubic", align_corners=False).clamp(-1, 1)
    order = torch.randperm(len(raw), generator=torch.Generator().manual_seed(0))
    shuffled = DigitImages(larger[order], digits[order].long())
    return shuffled[_TEST_IMAGES:], shuffled[:_TEST_IMAGES]


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return images turned by up to 10 degrees, scaled by up to 10 % and shifted by up to a pixel.

    Example:
        >>> import torch
        >>> from hfnoise.worlds.digits import augment
        >>> augment(-torch.ones(2, 1, 16, 16), torch.Generator()).min().item()
        -1.0
    """
    count = len(images)
    angle = (torch.rand(count, generator=generator) - 0.5) * math.radians(20)
    scale = 1 + (torch.rand(count, generator=generator) - 0.5) * 0.2
    shift = (torch.rand(count, 2, generator=generator) - 0.5) * (4 / IMAGE_SIZE)
    rows = (
        torch.stack([scale * angle.cos(), -scale * angle.sin(), shift[:, 0]], dim=1),
        torch.stack([scale * angle.sin(), scale * angle.cos(), shift[:, 1]], dim=1),
    )
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    # What comes in from outside is paper.
    return F.grid_sample(images + 1, grid, align_corners=False, padding_mode="zeros") - 1
