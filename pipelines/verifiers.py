"""What judges images: any function of images and prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Takes images of shape (batch, channels, height, width) in [0, 1] and a prompt of each; returns a number of each, more
# being better.
Verifier = Callable[[Tensor, Sequence[str]], Any]


def verified(verifier: Verifier, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the scores of a verifier, checked.

    Args:
        verifier (`Callable`): called with the images, `(batch, channels, height, width)` in [0, 1], and the prompts.
        images (`torch.Tensor`): as above.
        prompts (sequence of `str`): one an image.

    Returns:
        `torch.Tensor` of shape `(batch,)`; in float32 on the CPU, unless it can be differentiated.

    Raises:
        TypeError: if the verifier returns no numbers.
        ValueError: if it returns another number of them, or one that is not finite.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.verifiers import verified
        >>> verified(lambda images, prompts: images.mean((1, 2, 3)), torch.ones(2, 3, 8, 8), ["a", "b"])
        tensor([1., 1.])
    """
    name = getattr(verifier, "__name__", type(verifier).__name__)
    found = verifier(images, list(prompts))
    try:
        scores = found.float() if isinstance(found, Tensor) else torch.as_tensor(found, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"the verifier {name} returned {type(found).__name__}, and no number an image.") from error
    if not scores.requires_grad:
        scores = scores.cpu()
    if scores.shape != (len(images),):
        raise ValueError(
            f"the verifier {name} returned scores of shape {tuple(scores.shape)} for {len(images)} images: it must "
            "return one number for each."
        )
    broken = (~scores.detach().isfinite()).nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"the verifier {name} gave images {broken} of {len(images)} scores that are not finite: "
            f"{scores.detach()[broken].tolist()[:3]}. A search or a filter by them would be left to chance."
        )
    return scores


def check_verifier(verifier: Any, name: str = "verifier") -> None:
    """Raise TypeError if a verifier cannot be called.

    Example:
        >>> from hfnoise.pipelines.verifiers import check_verifier
        >>> check_verifier(lambda images, prompts: images.mean((1, 2, 3)))
    """
    if not callable(verifier):
        raise TypeError(
            f"{name} must be a function of (images, prompts) that returns a number for each image, got "
            f"{type(verifier).__name__}."
        )
