"""The digits world: handwritten digits of 16 x 16 pixels, and prompts that ask for them.

The images are scikit-learn's copy of the UCI digits (1797 of 8 x 8), made larger. scikit-learn is needed to train the
world anew, not to use it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hfnoise.worlds.digit_world import IMAGE_SIZE, DigitWorld, LabelledImages

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a photo of the digit {digit}",
    "the digit {digit}",
    "a handwritten {digit}",
    "a picture of the number {digit}",
    "{digit}",
)
_TEST_IMAGES = 297


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
    return DIGITS.prompt(digit, template)


def load_digit_images() -> tuple[LabelledImages, LabelledImages]:
    """Return training and test images, in one fixed order; the label is the digit.

    Raises:
        ImportError: if scikit-learn is missing.

    Example:
        >>> from hfnoise.worlds.digits import load_digit_images
        >>> train, test = load_digit_images()  # doctest: +SKIP
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the images of the digits world come with scikit-learn, which is not installed: "
            "pip install 'hfnoise[worlds]'. Only building the world needs it."
        ) from error
    raw = load_digits()
    return split_digit_images(torch.as_tensor(raw.images, dtype=torch.float32), torch.as_tensor(raw.target))


def split_digit_images(raw: torch.Tensor, digits: torch.Tensor) -> tuple[LabelledImages, LabelledImages]:
    """Return raw images as training and test images of the world: shuffled, enlarged, in [-1, 1].

    Args:
        raw (`torch.Tensor` of shape `(count, 8, 8)`): ink of 0 to 16.
        digits (`torch.Tensor` of shape `(count,)`): what they show.

    Raises:
        ValueError: if there are no more images than the test needs.

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
    shuffled = LabelledImages(larger[order], digits[order, None].long())
    return shuffled[_TEST_IMAGES:], shuffled[:_TEST_IMAGES]


DIGITS = DigitWorld(
    name="digits",
    attributes={"digit": WORDS},
    templates=TEMPLATES,
    channels=1,
    max_tokens=8,  # <bos>, six words and <eos>
    load=load_digit_images,
)
