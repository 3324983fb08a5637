"""What the worlds of digits have in common: labelled images, and prompts that are combinations of attributes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

IMAGE_SIZE = 16


@dataclass(frozen=True)
class LabelledImages:
    """Images with what they show.

    Args:
        images (`torch.Tensor` of shape `(count, channels, 16, 16)`): float32 in [-1, 1], -1 is paper.
        labels (`torch.Tensor` of shape `(count, attributes)`): int64, a column for each attribute of the world.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | torch.Tensor) -> LabelledImages:
        return LabelledImages(self.images[rows], self.labels[rows])


@dataclass(frozen=True)
class DigitWorld:
    """A world: which attributes its images have, how one asks for them, and where the images come from.

    Args:
        name (`str`): on the command line.
        attributes (`dict[str, tuple[str, ...]]`): for each attribute the words for its values.
        templates (`tuple[str, ...]`): of prompts, with a field for each attribute; the first is the one to test with.
        channels (`int`): of the images, 1 or 3.
        max_tokens (`int`): of the longest prompt with its two ends.
        load (`Callable`): returns training and test images.
        held_out (`Callable`, *optional*): which rows of labels no generator is trained on; none by default.

    Example:
        >>> from hfnoise.worlds.digits import DIGITS
        >>> DIGITS.prompt(7)
        'a photo of the digit seven'
    """

    name: str
    attributes: dict[str, tuple[str, ...]]
    templates: tuple[str, ...]
    channels: int
    max_tokens: int
    load: Callable[[], tuple[LabelledImages, LabelledImages]] = field(repr=False)
    held_out: Callable[[torch.Tensor], torch.Tensor] | None = field(default=None, repr=False)

    @property
    def classes(self) -> tuple[int, ...]:
        """How many values each attribute has."""
        return tuple(len(words) for words in self.attributes.values())

    def combinations(self) -> torch.Tensor:
        """Return the labels of all combinations, of shape `(count, attributes)`."""
        return torch.cartesian_prod(*[torch.arange(count) for count in self.classes]).reshape(-1, len(self.classes))

    def numbers(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the rows of [`combinations`] in which labels of shape `(count, attributes)` stand."""
        strides = [math.prod(self.classes[position + 1 :]) for position in range(len(self.classes))]
        return (labels * torch.tensor(strides)).sum(dim=1)

    def is_held_out(self, labels: torch.Tensor) -> torch.Tensor:
        """Return for labels of shape `(count, attributes)` whether the generator is never trained on them."""
        return torch.zeros(len(labels), dtype=torch.bool) if self.held_out is None else self.held_out(labels)

    def prompt(self, labels: int | Sequence[int], template: str | None = None) -> str:
        """Return what to ask for, to get an image with these labels.

        Args:
            labels (`int` or `Sequence[int]`): one for each attribute.
            template (`str`, *optional*): one of `templates`, the first by default.

        Raises:
            ValueError: for another number of labels, or one that is out of range.
        """
        given = [labels] if isinstance(labels, int) else [int(label) for label in labels]
        if len(given) != len(self.classes):
            raise ValueError(f"{len(self.classes)} labels are needed ({', '.join(self.attributes)}), got {given}.")
        values = {}
        for (attribute, words), label in zip(self.attributes.items(), given, strict=True):
            if not 0 <= label < len(words):
                raise ValueError(f"{attribute} must be 0 to {len(words) - 1}, got {label}.")
            values[attribute] = words[label]
        return (self.templates[0] if template is None else template).format(**values)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return images turned by up to 10 degrees, scaled by up to 10 % and shifted by up to a pixel.

    Example:
        >>> import torch
        >>> from hfnoise.worlds.digit_world import augment
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
    # What comes in from outside is paper, of the shade of the first corner: no digit reaches into it.
    paper = images[:, :, :1, :1]
    return F.grid_sample(images - paper, grid, align_corners=False, padding_mode="zeros") + paper
