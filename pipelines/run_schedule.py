"""Which timestep of its scheduler each evaluation of a run is at, however much of the schedule the run covers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class RunSchedule:
    """The part of a scheduler's timesteps that one run of a pipeline goes through.

    Image-to-image pipelines run the end of it, `denoising_end` of SDXL its beginning, and some do not say how many
    steps they make. Then the timestep of the first evaluation tells where the run begins. The timesteps are the
    scheduler's, not what the model is given, which may be a fraction of them, rounded to 16 bits, or one for each
    token. They are read once: on an accelerator each reading waits for the device.

    Args:
        scheduler: of diffusers, with its timesteps set.
        count (`int`, *optional*): evaluations of the run, where the pipeline says it.
        given: the timestep of the first evaluation as the model is given it, where known.

    Example:
        >>> import torch
        >>> from diffusers import DDIMScheduler
        >>> from hfnoise.pipelines.run_schedule import RunSchedule
        >>> scheduler = DDIMScheduler(timestep_spacing="trailing")
        >>> scheduler.set_timesteps(10)
        >>> run = RunSchedule(scheduler, 4, torch.tensor(399))
        >>> run.count, run.timestep(0)
        (4, tensor(399))
    """

    def __init__(self, scheduler: Any, count: int | None, given: Any = None) -> None:
        self.scheduler = scheduler
        self._timesteps = torch.as_tensor(scheduler.timesteps).cpu()
        length = len(self._timesteps)
        self._first = 0 if count == length else self._find_first(count, given)
        self.count = count or length - self._first

    def timestep(self, number: int) -> torch.Tensor:
        """Return the timestep of an evaluation, a tensor of shape `()` on the CPU.

        Raises:
            ValueError: if the scheduler has none: another one took its place in mid-run.
        """
        if self._first + number >= len(self._timesteps):
            raise ValueError(
                f"evaluation {number + 1} of {self.count} is past the end of the {len(self._timesteps)} timesteps of "
                f"{type(self.scheduler).__name__}: set them on a scheduler before it takes over in mid-run."
            )
        return self._timesteps[self._first + number]

    def _find_first(self, count: int | None, given: Any) -> int:
        length = len(self._timesteps)
        tail = max(length - count, 0) if count else 0
        if given is None:
            return tail
        given = torch.as_tensor(given).flatten()[:1].cpu()
        # Flux and its like are given thousandths.
        total = self.scheduler.config.get("num_train_timesteps", 1000)
        candidates = self._timesteps.double()
        exact = max(torch.finfo(given.dtype).eps, 1e-6) if given.is_floating_point() else 0.0
        for number in (given.double(), given.double() * total):
            close = (candidates - number).abs() <= 2 * exact * number.abs()
            # Solvers with two evaluations a step have timesteps twice.
            if close[tail]:
                return tail
            if close.any():
                return int(close.nonzero()[0])
        return tail


def given_timestep(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the timestep that a denoiser of diffusers is called with, `None` if it has another name there.

    Example:
        >>> from hfnoise.pipelines.run_schedule import given_timestep
        >>> given_timestep((0.5,), {"timestep": 999})
        999
    """
    return kwargs.get("timestep", args[1] if len(args) > 1 else None)
