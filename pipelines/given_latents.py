"""Whether latents that a user gives to a call are those that the call would draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from hfnoise.pipelines.random_state import kept_random_state
from hfnoise.pipelines.start_context import copied_generators

_NOT_BY_NAME = ("self", "args", "kwargs")


def check_given_latents(name: str, latents: Any, prepare: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raise ValueError if `latents=` of a call have another shape than its own noise.

    A pipeline takes them as they are, and its denoiser fails on them later, or an initial noise does, in terms of
    their own. Images of other sides are let through: a UNet draws them in that size.

    Args:
        name (`str`): of the pipeline.
        latents: of the call; `None` is right.
        prepare (`Callable`): its `prepare_latents`.
        given (`Mapping`): the arguments of that method in this call, by name.

    Raises:
        TypeError: if they are no tensor.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.given_latents import check_given_latents
        >>> latents = torch.zeros(2, 4, 8, 8)
        >>> draw = lambda batch_size, latents, generator: torch.randn(batch_size, 4, 8, 8)
        >>> check_given_latents("It", latents, draw, {"batch_size": 1, "latents": latents})
        Traceback (most recent call last):
        ...
        ValueError: latents= are of shape (2, 4, 8, 8), and this call of It draws (1, 4, 8, 8)...
    """
    if latents is None:
        return
    if not isinstance(latents, torch.Tensor):
        raise TypeError(f"latents= must be a tensor, as {name} draws one, got {type(latents).__name__}.")
    if given.get("image") is not None:
        # Drawing anew would encode the image anew.
        fits, wanted = len(latents) == given.get("batch_size", len(latents)), f"{given.get('batch_size')} samples"
    else:
        again = {key: value for key, value in given.items() if key not in _NOT_BY_NAME}
        again |= {"latents": None, "generator": copied_generators(given.get("generator"))}
        with kept_random_state(torch.device(given.get("device") or "cpu")):
            drawn = prepare(**again)
        own = (drawn[0] if isinstance(drawn, tuple) else drawn).shape
        sides = 2 if len(own) == 4 else len(own)
        fits, wanted = latents.dim() == len(own) and latents.shape[:sides] == own[:sides], str(tuple(own))
    if not fits:
        raise ValueError(
            f"latents= are of shape {tuple(latents.shape)}, and this call of {name} draws {wanted}: a row for each "
            "image of each prompt, in the layout of the pipeline. Give such, or leave latents= out."
        )
