"""The classifiers of the digits worlds as verifiers of images and prompts, for searches and rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hfnoise.worlds.digit_world import DigitWorld
from hfnoise.worlds.digits import DIGITS
from hfnoise.worlds.digits_checkpoints import load_digit_classifier


def digit_verifier(
    kind: str = "verifier", name: str | Path = "digits-sd", world: DigitWorld = DIGITS
) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """Return a verifier: the log-probability, by a classifier, that images show what prompts ask for.

    Args:
        kind (`str`, defaults to `"verifier"`): that, to search by, or `"judge"`, which is independent of it.
        name (`str` or `Path`, defaults to `"digits-sd"`): of the checkpoint.
        world ([`DigitWorld`], defaults to the plain digits): whose prompts.

    Returns:
        function of images `(batch, channels, 16, 16)` in [0, 1] and prompts of the world; its `__name__` is the kind.
        It raises ValueError for another prompt.

    Example:
        >>> import torch
        >>> from hfnoise.worlds.digits_verifier import digit_verifier
        >>> digit_verifier("judge")(torch.zeros(2, 1, 16, 16), ["the digit one", "the digit two"]).shape
        torch.Size([2])
    """
    classifier = load_digit_classifier(kind, name)
    labels = {
        world.prompt(row, template): row for row in world.combinations().tolist() for template in world.templates
    }

    def log_probability(images: Tensor, prompts: Sequence[str]) -> Tensor:
        if unknown := [prompt for prompt in prompts if prompt not in labels]:
            raise ValueError(f"{unknown[0]!r} is no prompt of {world.name}; one is {next(iter(labels))!r}.")
        asked = torch.tensor([labels[prompt] for prompt in prompts])
        return classifier.log_probability(2.0 * images.float() - 1.0, asked)

    log_probability.__name__ = kind
    return log_probability
