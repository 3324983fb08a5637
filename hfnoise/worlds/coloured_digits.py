"""The coloured digits world: harder prompts, with combinations that no generator has been trained on.

"a thin red seven" asks for three things at once, and 60 of the 100 combinations of thickness, colour and digit are
held out of the training: a pipeline has to put together what it has only seen apart. Plain digits are drawn almost
without an error from a guidance scale of 2 on; here there is something left to win.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hfnoise.worlds.digit_world import DigitWorld, LabelledImages
from hfnoise.worlds.digits import WORDS, load_digit_images

THICKNESSES = ("thin", "thick")
COLOURS = ("red", "yellow", "green", "blue", "purple")
TEMPLATES = (
    "a photo of a {thickness} {colour} {digit}",
    "a {thickness} {colour} {digit}",
    "the digit {digit} in {thickness} {colour} ink",
    "{thickness} {colour} {digit}",
)
_INK = torch.tensor([[1.0, 0.1, 0.1], [1.0, 0.9, 0.1], [0.1, 0.9, 0.1], [0.15, 0.3, 1.0], [0.75, 0.15, 0.9]])
# The ink from which on a pixel is taken for inked: a high level leaves the core of a stroke.
_LEVELS = (0.65, 0.3)
_EDGE = 0.08
# Of five, for every digit in every thickness. With four, what is held out comes out right almost as often as the rest.
_COLOURS_TRAINED_ON = 2


def is_held_out(labels: torch.Tensor) -> torch.Tensor:
    """Return which combinations no generator is trained on: for every digit in every thickness three of five colours.

    Those that are left show every digit in four colours, and every colour in both thicknesses.

    Args:
        labels (`torch.Tensor` of shape `(count, 3)`): thickness, colour, digit.

    Example:
        >>> import torch
        >>> from hfnoise.worlds.coloured_digits import is_held_out
        >>> is_held_out(torch.tensor([[0, 0, 7], [1, 0, 8]])).tolist()  # a thin red seven, a thick red eight
        [True, False]
    """
    thickness, colour, digit = labels.unbind(dim=1)
    return (2 * thickness + colour + digit) % len(COLOURS) >= _COLOURS_TRAINED_ON


def colour_images(grey: LabelledImages) -> LabelledImages:
    """Return every grey digit in every thickness and colour; those of one digit follow each other.

    Args:
        grey ([`LabelledImages`]): of the digits world.

    Returns:
        Ten times as many images with 3 channels; the labels are thickness, colour and digit.

    Example:
        >>> import torch
        >>> from hfnoise.worlds.coloured_digits import colour_images
        >>> from hfnoise.worlds.digit_world import LabelledImages
        >>> colour_images(LabelledImages(torch.zeros(2, 1, 16, 16), torch.tensor([[3], [7]]))).labels[9:11].tolist()
        [[1, 4, 3], [0, 0, 7]]
    """
    count, pairs = len(grey), len(THICKNESSES) * len(COLOURS)
    strokes = torch.stack([_stroke(grey.images, level) for level in _LEVELS], dim=1)  # (count, 2, 1, 16, 16)
    images = strokes[:, :, None] * _INK[:, :, None, None]  # (count, 2, 5, 3, 16, 16)
    labels = torch.cat(
        [
            torch.cartesian_prod(torch.arange(len(THICKNESSES)), torch.arange(len(COLOURS))).repeat(count, 1),
            grey.labels.repeat_interleave(pairs, dim=0),
        ],
        dim=1,
    )
    return LabelledImages(2 * images.flatten(0, 2) - 1, labels)


def load_coloured_digit_images() -> tuple[LabelledImages, LabelledImages]:
    """Return training and test images, in one fixed order; no handwritten digit is in both.

    The training images hold all combinations, for verifier and judge must know them all.

    Raises:
        ImportError: if scikit-learn is missing.

    Example:
        >>> from hfnoise.worlds.coloured_digits import load_coloured_digit_images
        >>> train, test = load_coloured_digit_images()  # doctest: +SKIP
    """
    train, test = load_digit_images()
    return colour_images(train), colour_images(test)


def _stroke(images: torch.Tensor, level: float) -> torch.Tensor:
    """Return ink in [0, 1] where that of images in [-1, 1] is above a level, with a soft edge."""
    larger = F.interpolate((images + 1) / 2, scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1)
    floor = torch.sigmoid(torch.tensor(-level / _EDGE))
    ink = (torch.sigmoid((larger - level) / _EDGE) - floor) / (1 - floor)
    return F.avg_pool2d(ink, 4).clamp(0, 1)


COLOURED_DIGITS = DigitWorld(
    name="coloured-digits",
    attributes={"thickness": THICKNESSES, "colour": COLOURS, "digit": WORDS},
    templates=TEMPLATES,
    channels=3,
    max_tokens=9,  # <bos>, seven words and <eos>
    load=load_coloured_digit_images,
    held_out=is_held_out,
)
