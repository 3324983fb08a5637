"""The start of a run as a slot: unit noise in, a better start out, and what that cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

_SPACES = ("unit", "scheduler")


@dataclass(frozen=True)
class StartState:
    """What a run starts from.

    Args:
        latents (`torch.Tensor`): of the shape of the noise.
        space (`str`, defaults to `"unit"`): `"unit"`: noise of unit variance, which can be refined again; or
            `"scheduler"`: already scaled as the scheduler's first step wants it.
        evaluations (`int`, defaults to `0`): of the denoiser, per sample, that it cost.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.initial_noise import StartState
        >>> StartState(torch.zeros(1, 4, 8, 8)).space
        'unit'
    """

    latents: torch.Tensor
    space: str = "unit"
    evaluations: int = 0

    def __post_init__(self) -> None:
        if self.space not in _SPACES:
            raise ValueError(f"space must be one of {_SPACES}, got {self.space!r}.")


class InitialNoise(ABC):
    """Base of what goes into the slot `initial_noise` of a guided pipeline.

    One that is saved with its pipeline names the sub-folder of the repository, which must hold a `config.json`, and
    has `save_pretrained(folder)` and the class method `from_pretrained(repository, subfolder=..., **options)`;
    `hfnoise.pipelines.saved_parts.INITIAL_NOISES` says which class is behind which sub-folder.
    """

    subfolder: ClassVar[str | None] = None

    @abstractmethod
    def refine(self, unit_noise: torch.Tensor, context: Any) -> StartState:
        """Return what to start from.

        Args:
            unit_noise (`torch.Tensor`): the pipeline's own, of unit variance.
            context: the pipeline, in the middle of its call.
        """


def check_initial_noise(pipeline_class: type, initial_noise: Any) -> None:
    """Refuse what cannot be a start.

    Raises:
        TypeError: if it is no [`InitialNoise`].
        ValueError: if the pipeline prepares no latents.

    Example:
        >>> from diffusers import StableDiffusionPipeline
        >>> from hfnoise.pipelines.initial_noise import check_initial_noise
        >>> check_initial_noise(StableDiffusionPipeline, None)
    """
    if initial_noise is None:
        return
    if not isinstance(initial_noise, InitialNoise):
        raise TypeError(f"initial_noise must be an InitialNoise of hfnoise, got {type(initial_noise).__name__}.")
    if not hasattr(pipeline_class, "prepare_latents"):
        raise ValueError(f"{pipeline_class.__name__} prepares no latents: there is no start to refine.")


@contextmanager
def refined_start(pipe: Any, initial_noise: InitialNoise) -> Iterator[None]:
    """Within the block `pipe.prepare_latents` returns what `initial_noise` makes of the pipeline's own noise."""
    prepare = pipe.prepare_latents

    def refined(*args: Any, **kwargs: Any) -> Any:
        prepared = prepare(*args, **kwargs)
        latents = prepared[0] if isinstance(prepared, tuple) else prepared
        scale = getattr(pipe.scheduler, "init_noise_sigma", 1.0)
        state = initial_noise.refine(latents / scale, pipe)
        start = state.latents if state.space == "scheduler" else state.latents * scale
        start = start.to(latents.dtype)
        return (start, *prepared[1:]) if isinstance(prepared, tuple) else start

    before = pipe.__dict__.get("prepare_latents")
    pipe.__dict__["prepare_latents"] = refined
    try:
        yield
    finally:
        # Somebody else may have put one there: the guider's run does.
        pipe.__dict__.pop("prepare_latents", None)
        if before is not None:
            pipe.__dict__["prepare_latents"] = before
