"""Whether a pipeline starts from noise that its model never saw, and how much of the image that costs."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hfnoise.pipelines.start_estimate import no_gap, scales

# The parts that are asked for the size of their latents, in this order.
_DENOISERS = ("unet", "transformer", "prior")


@dataclass(frozen=True)
class StartGap:
    """What a model can read of an image in the start of a run, where sampling gives it none.

    Args:
        timestep (`float`): the first one.
        signal, noise (`float`): a and s of the training data a x0 + s noise there.
        size (`tuple` of two `int`): of the latents; `(0, 0)` where there is no gap.
        reason (`str`): why there is no gap at all; empty if there may be one.

    Example:
        >>> from hfnoise.pipelines.gap import StartGap
        >>> gap = StartGap(timestep=981, signal=0.0760, noise=0.9971, size=(64, 64))
        >>> round(gap.brightness_snr, 1), gap.level
        (23.8, 'large')
    """

    timestep: float
    signal: float
    noise: float
    size: tuple[int, int]
    reason: str = ""

    @property
    def brightness_snr(self) -> float:
        """Signal-to-noise ratio of the mean of a channel of unit variance: height x width x (a / s)^2.

        White noise averages out over the image and the mean does not, so it grows with the resolution.
        """
        return math.prod(self.size) * (self.signal / self.noise) ** 2

    @property
    def level(self) -> str:
        """`"large"`, `"mild"` or `"none"`."""
        # At a ratio of 1 a model that knows nothing else takes half of the mean from the start, at a tenth a tenth.
        if self.reason or self.brightness_snr < 0.1:
            return "none"
        return "large" if self.brightness_snr >= 1.0 else "mild"

    @property
    def verdict(self) -> str:
        """In words: whether One More Step has anything to repair."""
        if self.reason:
            return f"nothing to repair: {self.reason}"
        return {
            "large": "brightness is read from the start: One More Step has something to repair",
            "mild": "brightness is read from the start in part: a mild gap",
            "none": "next to nothing to repair: the brightness drowns in the noise of the start",
        }[self.level]

    def __str__(self) -> str:
        if self.reason:
            return f"timestep {self.timestep:g}: {self.verdict}"
        height, width = self.size
        return (
            f"timestep {self.timestep:g}, {height} x {width} latents, signal-to-noise ratio of the brightness "
            f"{self.brightness_snr:.3g}: {self.verdict}"
        )


def start_gap(
    pipe: Any, num_inference_steps: int | None = None, height: int | None = None, width: int | None = None
) -> StartGap:
    """Return how far the start of a pipeline is from what its model was trained on; nothing is evaluated.

    The flaw of arXiv 2305.08891, section 3, in numbers of your own run: the scheduler, its spacing, the number of
    steps and the resolution all enter. [`OneMoreStep`] repairs it.

    Args:
        pipe: of diffusers; its scheduler is left as it is.
        num_inference_steps (`int`, *optional*): of the run; the pipeline's default.
        height, width (`int`, *optional*): of the image, in pixels; the size of the model by default.

    Raises:
        ValueError: if the pipeline has no scheduler, or does not say how large its latents are.

    Example:
        >>> from hfnoise.pipelines import start_gap
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> print(start_gap(new_digits_pipeline(width=8), num_inference_steps=20))
        timestep 951, 8 x 8 latents, signal-to-noise ratio of the brightness 0.526: ...
    """
    if getattr(pipe, "scheduler", None) is None:
        raise ValueError(f"{type(pipe).__name__} has no scheduler, so it has no start to look at.")
    if num_inference_steps is None:
        num_inference_steps = inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
    return schedule_gap(pipe.scheduler, num_inference_steps, lambda: _latent_size(pipe, height, width))


def schedule_gap(
    scheduler: Any, num_inference_steps: int | None, size: tuple[int, int] | Callable[[], tuple[int, int]]
) -> StartGap:
    """Return the gap of a scheduler alone; see [`start_gap`].

    Args:
        scheduler: of diffusers; it is left as it is.
        num_inference_steps (`int`, *optional*): of the run.
        size (`tuple` of two `int`): of the latents; or a function that is asked for it if there may be a gap.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> from hfnoise.pipelines.gap import schedule_gap
        >>> schedule_gap(DDIMScheduler(beta_schedule="linear"), 50, (32, 32)).verdict
        'next to nothing to repair: the brightness drowns in the noise of the start'
    """
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(num_inference_steps)
    except ValueError:
        # Flow matching with a shift by resolution wants the shift; it has no gap at any.
        if not no_gap(scheduler, scheduler.timesteps[:1]):
            raise
    first = scheduler.timesteps[:1]
    reason = no_gap(scheduler, first)
    if reason:
        return StartGap(float(first[0]), 0.0, 1.0, (0, 0), reason)
    return StartGap(float(first[0]), *scales(scheduler, first), size() if callable(size) else size)


def _latent_size(pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
    factor: int | None = getattr(pipe, "vae_scale_factor", None)
    if (height or width) and factor is None:
        raise ValueError(
            f"{type(pipe).__name__} does not say how many pixels a latent is; leave height and width out."
        )
    denoisers = (getattr(pipe, name, None) for name in _DENOISERS)
    sizes = (part.config.get("sample_size") for part in denoisers if part is not None)
    found = next((size for size in sizes if size), None)
    if found is None and not (height and width):
        raise ValueError(f"{type(pipe).__name__} does not say how large its latents are: give height and width.")
    own: Any = (found, found) if not isinstance(found, (list, tuple)) else (found[-2], found[-1])
    rows, columns = (
        side // (factor or 1) if side else default for side, default in zip((height, width), own, strict=True)
    )
    return rows, columns
