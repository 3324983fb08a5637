"""The shaded digits world: digits on backgrounds from black to white, for what a model makes of brightness.

"a photo of the digit seven on a dark background" says how bright a picture is on average, and leaves it wide open all
the same: the words overlap, and some prompts have none of them. A model of this world therefore reads the brightness
from the noise that it starts from, as those of natural images do, which is what One More Step (arXiv 2311.15744) is
about.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hfnoise.worlds.digit_world import IMAGE_SIZE, DigitWorld, LabelledImages
from hfnoise.worlds.digits import WORDS, load_digit_images

BACKGROUNDS = ("dark", "grey", "bright")
TEMPLATES = (
    "a photo of the digit {digit} on a {background} background",
    "the digit {digit} on a {background} background",
    "{digit} on {background}",
    # Of any brightness.
    "a photo of the digit {digit}",
    "the digit {digit}",
)
# The one to ask for a digit on any background with.
ANY_BACKGROUND = TEMPLATES[3]
# Smaller than the image: the background is most of it, and the brightness of the image hardly depends on the digit.
_DIGIT_SIZE = 12
_CONTRAST = 1.0
# How often every handwritten digit is there with every word.
_TRAINING_SHADES, _TEST_SHADES = 2, 4


def draw_shades(words: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return shades of backgrounds at random, wide for every word and overlapping.

    Dark is the darkest of four shades drawn uniformly from black to white, bright the brightest of four, and grey the
    middle one of seven: Beta distributions with means of -0.6, 0.6 and 0 and all with a spread of 1/3.

    Args:
        words (`torch.Tensor` of shape `(count,)`): numbers of [`BACKGROUNDS`].
        generator (`torch.Generator`): of the draw.

    Returns:
        `torch.Tensor` of shape `(count,)`, from -1, black, to 1, white.

    Example:
        >>> import torch
        >>> from hfnoise.worlds.shaded_digits import draw_shades
        >>> shades = draw_shades(torch.tensor([0, 2]).repeat(500), torch.Generator().manual_seed(0))
        >>> [round(shades[word::2].mean().item(), 1) for word in (0, 1)]
        [-0.6, 0.6]
    """
    uniform = 2 * torch.rand(len(words), 7, generator=generator) - 1
    by_word = torch.stack(
        [uniform[:, :4].min(dim=1).values, uniform.median(dim=1).values, uniform[:, :4].max(dim=1).values], dim=1
    )
    return by_word.gather(1, words[:, None])[:, 0]


def shade_images(plain: LabelledImages, repeats: int, seed: int) -> LabelledImages:
    """Return every plain digit on backgrounds of every word; those of one digit follow each other.

    On a background darker than mid grey the ink is lighter than it by half the way from black to white, on the others
    as much darker: the digit can be read on all of them.

    Args:
        plain ([`LabelledImages`]): of the digits world.
        repeats (`int`): how often, each time with shades of its own.
        seed (`int`): of the shades.

    Returns:
        `3 * repeats` times as many images; the labels are background and digit.

    Example:
        >>> import torch
        >>> from hfnoise.worlds.digit_world import LabelledImages
        >>> from hfnoise.worlds.shaded_digits import shade_images
        >>> plain = LabelledImages(-torch.ones(2, 1, 16, 16), torch.tensor([[3], [7]]))
        >>> shade_images(plain, 1, seed=0).labels.tolist()
        [[0, 3], [1, 3], [2, 3], [0, 7], [1, 7], [2, 7]]
    """
    margin = (IMAGE_SIZE - _DIGIT_SIZE) // 2
    smaller = F.interpolate(plain.images + 1, size=_DIGIT_SIZE, mode="area") / 2
    ink = F.pad(smaller, [margin] * 4)
    number = repeats * len(BACKGROUNDS)
    words = torch.arange(len(BACKGROUNDS)).repeat(repeats * len(plain))
    shades = draw_shades(words, torch.Generator().manual_seed(seed))[:, None, None, None]
    towards_mid = torch.where(shades < 0, _CONTRAST, -_CONTRAST)
    images = shades + towards_mid * ink.repeat_interleave(number, dim=0)
    return LabelledImages(images, torch.stack([words, plain.labels[:, 0].repeat_interleave(number)], dim=1))


def load_shaded_digit_images() -> tuple[LabelledImages, LabelledImages]:
    """Return training and test images, in one fixed order; no handwritten digit is in both.

    Raises:
        ImportError: if scikit-learn is missing.

    Example:
        >>> from hfnoise.worlds.shaded_digits import load_shaded_digit_images
        >>> train, test = load_shaded_digit_images()  # doctest: +SKIP
    """
    train, test = load_digit_images()
    return shade_images(train, _TRAINING_SHADES, seed=0), shade_images(test, _TEST_SHADES, seed=1)


SHADED_DIGITS = DigitWorld(
    name="shaded-digits",
    attributes={"background": BACKGROUNDS, "digit": WORDS},
    templates=TEMPLATES,
    channels=1,
    max_tokens=12,  # <bos>, ten words and <eos>
    load=load_shaded_digit_images,
)
