"""The scores of images of an embedded world, by their prompts in the place of labels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hfnoise.worlds.digits_checkpoints import CHECKPOINTS
from hfnoise.worlds.digits_score import score_digit_images


def score_prompted_images(images: Tensor, prompts: Sequence[str], name: str = "digits-sd") -> dict[str, float]:
    """Return judge accuracy, Fréchet distance and diversity; see [`~hfnoise.worlds.digits_score.score_digit_images`].

    Args:
        images (`torch.Tensor` of shape `(count, channels, 16, 16)`): in [0, 1].
        prompts (sequence of `str`): of the world, one an image.
        name (`str`, defaults to `"digits-sd"`): of the checkpoint.

    Raises:
        ValueError: if a prompt is not of the world.

    Example:
        >>> import torch
        >>> from hfnoise.worlds.digits_prompt_scores import score_prompted_images
        >>> sorted(score_prompted_images(torch.rand(4, 1, 16, 16), ["the digit one", "the digit two"] * 2))
        ['diversity', 'frechet_distance', 'judge_accuracy']
    """
    world = CHECKPOINTS[name]
    labels = {
        world.prompt(row, template): row for row in world.combinations().tolist() for template in world.templates
    }
    if unknown := [prompt for prompt in prompts if prompt not in labels]:
        raise ValueError(f"{unknown[0]!r} is no prompt of {world.name}; one is {next(iter(labels))!r}.")
    wanted = Tensor([labels[prompt] for prompt in prompts]).long()
    scores = score_digit_images(images, wanted, name)
    return {
        "judge_accuracy": scores.judge_accuracy, "frechet_distance": scores.frechet_distance,
        "diversity": scores.diversity,
    }  # fmt: skip
