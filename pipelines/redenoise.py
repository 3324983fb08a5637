"""Golden noise by the model itself: re-denoising as an initial noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfnoise.guidance import DenoisingPoint
from hfnoise.guidance.number_check import check_number
from hfnoise.latents import Redenoising, ddim_step, start_form, unit_norm
from hfnoise.pipelines.guider_options import check_flags
from hfnoise.pipelines.initial_noise import InitialNoise, StartState
from hfnoise.pipelines.start_branches import StartBranches, check_branches
from hfnoise.pipelines.start_context import StartContext
from hfnoise.pipelines.start_report import StartReport

COMPATS = (None, "official")


class ReDenoise(InitialNoise):
    """Starts from noise that one guided step down and one unguided step up have turned towards the prompt.

    The re-denoise sampling of Golden Noise (arXiv 2411.09502), which makes the training pairs of NPNet, at inference
    and in closed form: see [`hfnoise.latents.Redenoising`]. Three evaluations at the default scales, before any number
    of steps. It acts as more guidance does: images follow the prompt better and are less diverse.

    Departures from the official code: the step up is the inverse of the step down (`compat="official"` inverts the
    next one, as the code does); the pass up needs no unconditional prediction at a scale of 1; it starts at the first
    timestep of the run, whatever the scheduler; flow matching, v-prediction and zero terminal SNR are ours.

    Args:
        num_steps (`int`, *optional*): at least 2; the step is that of a schedule of so many, whatever the run has.
            Fewer are a larger step. 10 by default.
        strength (`float`, *optional*): instead of `num_steps`: step size times the difference of the scales, at least
            0, where 0 is off. With SD's schedule 10 steps are 1.73, 50 are 0.49.
        guidance_scales (pair of `float`, defaults to `(5.5, 1.0)`): down and up, each at least 0; equal ones are off.
        iterations (`int`, defaults to `1`): how often, at least 1.
        normalize (`bool`, defaults to `False`): keep the norm that each sample's noise had.
        compat (`str`, *optional*): `"official"`, of models that predict noise with `num_steps` only.

    Raises:
        TypeError, ValueError: if an option is out of its range, or both `num_steps` and `strength` are given.

    Example:
        >>> from hfnoise.pipelines import ReDenoise, guide
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> pipe, golden = new_digits_pipeline(width=8), ReDenoise()
        >>> with guide(pipe, initial_noise=golden):
        ...     image = pipe("the digit seven", num_inference_steps=4).images[0]
        >>> golden.report.evaluations
        3
    """

    def __init__(
        self,
        num_steps: int | None = None,
        *,
        strength: float | None = None,
        guidance_scales: tuple[float, float] = (5.5, 1.0),
        iterations: int = 1,
        normalize: bool = False,
        compat: str | None = None,
    ) -> None:
        self.num_steps = 10 if num_steps is None and strength is None else num_steps
        self.strength, self.guidance_scales = strength, guidance_scales
        self.iterations, self.normalize, self.compat = iterations, normalize, compat
        self.report: StartReport | None = None
        self._check()

    def _check(self) -> None:
        # Again at every call: the options are plain attributes, to be changed between calls.
        if (self.num_steps is None) == (self.strength is None):
            raise ValueError(
                f"num_steps and strength both set the size of the step: give one, got {self.num_steps} and "
                f"{self.strength}."
            )
        check_flags(normalize=self.normalize)
        if self.num_steps is not None:
            check_count("num_steps", self.num_steps, 2)
        else:
            check_number("strength", self.strength)
            assert self.strength is not None
            if not 0.0 <= self.strength < float("inf"):
                raise ValueError(f"strength must be at least 0, where 0 is off; got {self.strength}.")
        if not isinstance(self.guidance_scales, (list, tuple)) or len(self.guidance_scales) != 2:
            raise ValueError(f"guidance_scales are two, down and up, got {self.guidance_scales!r}.")
        down, up = self.guidance_scales
        self.guidance_scales = (down, up)
        for scale in self.guidance_scales:
            check_number("guidance_scales", scale)
            if not 0.0 <= scale < float("inf"):
                raise ValueError(f"guidance_scales must be at least 0, got {self.guidance_scales}.")
        down, up = self.guidance_scales
        if self.strength and down <= up:
            raise ValueError(
                f"strength is the step size times the difference of the guidance_scales, and {down} - {up} is not "
                "above 0. Give num_steps, or a larger scale for the way down."
            )
        check_count("iterations", self.iterations, 1)
        if self.compat not in COMPATS:
            raise ValueError(f"compat must be one of {COMPATS}, got {self.compat!r}.")
        if self.compat and self.num_steps is None:
            raise ValueError("compat='official' is of steps of a schedule: give num_steps, and no strength.")

    @property
    def is_off(self) -> bool:
        """Whether it changes nothing."""
        # The official code moves the noise at equal scales too: its way up is another one.
        return self.strength == 0.0 or (self.guidance_scales[0] == self.guidance_scales[1] and not self.compat)

    def check_pipeline(self, pipeline_class: type) -> None:
        """Raise ValueError if a pipeline makes no prediction without prompt."""
        check_branches(pipeline_class, type(self).__name__)

    def refine(self, unit_noise: Tensor, context: StartContext) -> StartState:
        """Return the golden noise."""
        self._check()
        if self.is_off:
            self.report = StartReport.of(unit_noise, unit_noise)
            return StartState(unit_noise)
        branches = StartBranches(context)
        refined = unit_noise
        for _ in range(self.iterations):
            refined = self._once(refined, branches)
        if self.normalize:
            refined = unit_norm(refined, like=unit_noise)
        self.report = StartReport.of(unit_noise, refined, branches.evaluations)
        return StartState(refined, evaluations=branches.evaluations)

    def to_config(self) -> dict[str, Any]:
        """Return the options."""
        names = ("num_steps", "strength", "iterations", "normalize", "compat")
        return {**{name: getattr(self, name) for name in names}, "guidance_scales": list(self.guidance_scales)}

    def _once(self, noise: Tensor, branches: StartBranches) -> Tensor:
        scale_down, scale_up = self.guidance_scales
        down = branches.predict(noise, uncond=scale_down != 1.0).guided(scale_down)
        assert branches.point is not None
        step = self._step(branches.point, branches.scheduler)
        moved = step.denoised(noise, down)
        up = branches.predict(moved, uncond=scale_up != 1.0).guided(scale_up)
        if not self.compat:
            return step.refined(noise, down, up)
        if start_form(branches.point) != "noise" or self.num_steps is None:
            raise ValueError(
                f"compat='official' is of models with noise in their latents and signal at the start; "
                f"{type(branches.scheduler).__name__} is of another kind. Leave compat out."
            )
        powers = (training_power(branches.scheduler, self.num_steps, count) for count in (2, 1))
        return ddim_step(moved, up, *powers)

    def _step(self, point: DenoisingPoint, scheduler: Any) -> Redenoising:
        if self.num_steps is not None:
            return Redenoising.between(point, _following(point, scheduler, self.num_steps))
        if start_form(point) == "image":
            raise ValueError(
                "at a signal-to-noise ratio of 0 the size of a step has no unit of its own: give num_steps instead of "
                "strength."
            )
        assert self.strength is not None
        down, up = self.guidance_scales
        return Redenoising(point, self.strength / (down - up))

    def __repr__(self) -> str:
        size = f"{self.num_steps}" if self.num_steps is not None else f"strength={self.strength}"
        return f"ReDenoise({size}, guidance_scales={self.guidance_scales})"


def _following(point: DenoisingPoint, scheduler: Any, num_steps: int) -> DenoisingPoint:
    """Return where the first step of a schedule of so many ends."""
    if start_form(point) == "velocity":
        # The run's own sigmas, with the shift that its resolution has, at that share of the way.
        sigmas = torch.as_tensor(scheduler.sigmas).double()
        place = (len(sigmas) - 1) / num_steps
        index = min(int(place), len(sigmas) - 2)
        sigma = float(torch.lerp(sigmas[index], sigmas[index + 1], place - index))
        return DenoisingPoint.from_sigma(point.prediction_type, sigma)
    power = training_power(scheduler, num_steps)
    return DenoisingPoint(point.prediction_type, power**0.5, (1.0 - power) ** 0.5)


def training_power(scheduler: Any, num_steps: int, count: int = 1) -> float:
    """Return the power of the signal after some steps of a schedule of so many, from the run's first timestep on.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> from hfnoise.pipelines.redenoise import training_power
        >>> scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        >>> round(training_power(scheduler, 10), 4)
        0.0143
    """
    powers = scheduler.alphas_cumprod
    first = round(float(torch.as_tensor(scheduler.timesteps).flatten()[0]))
    return float(powers[max(first - count * (len(powers) // num_steps), 0)])


def check_count(name: str, count: Any, least: int) -> None:
    """Raise unless an option is a whole number of at least `least`.

    Example:
        >>> from hfnoise.pipelines.redenoise import check_count
        >>> check_count("num_steps", 10, 2)
    """
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name} must be a whole number, got {count!r} of type {type(count).__name__}.")
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}.")
