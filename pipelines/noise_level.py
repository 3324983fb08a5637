"""Noise-level guidance as an initial noise."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hfnoise.guidance.number_check import check_number
from hfnoise.guidance.tensor_math import norm, sample_dims
from hfnoise.latents import noise_level_step
from hfnoise.latents.noise_level_guidance import check_step
from hfnoise.pipelines.guider_options import check_flags
from hfnoise.pipelines.initial_noise import InitialNoise, StartState
from hfnoise.pipelines.redenoise import check_count
from hfnoise.pipelines.start_branches import StartBranches, check_branches
from hfnoise.pipelines.start_context import StartContext
from hfnoise.pipelines.start_report import StartReport

COMPATS = (None, "official")
_OPTIONAL = ("max_relative_step", "boundary", "direction_scale")


class NoiseLevelGuidance(InitialNoise):
    """Moves the noise, in small steps, to where the model expects the prompt.

    Noise Level Guidance (arXiv 2509.13936), see [`hfnoise.latents.noise_level_step`]; two evaluations a step. To first
    order its direction is that of [`ReDenoise`], which needs three in all: with many steps it collapses onto one image
    a prompt.

    Departures from the official code: every prediction type, and the schedule's own signal and noise, where the code
    reads the smallest sigma in its first batch; the first timestep of the run in the place of 999; the largest step in
    units of the noise's norm, so that it is the same for all sizes of latents; fresh noise from the call's generator
    at every step, and none by default, where the code adds the same noise each time; float32.

    Args:
        num_steps (`int`, defaults to `5`): at least 0, where 0 is off; 20 in the paper.
        step_size (`float`, defaults to `1.0`): above 0.
        max_relative_step (`float`, *optional*, defaults to `0.0026`): of a step, in units of the norm of unit noise,
            sqrt(d), above 0: the paper's 0.5 for 36864 numbers. `None` is no limit.
        noise_variance (`float`, defaults to `0.0`): at least 0, of the noise added at each step; 0.001 in the paper.
        normalize (`bool`, defaults to `True`): keep samples at the norm sqrt(d).
        boundary (`float`, *optional*): numbers are kept within plus and minus this, above 0; 3 in the code, if at all.
        direction_scale (`float`, *optional*): move against the guided prediction, uncond + scale (cond - uncond), and
            not against cond - uncond: 3 in the code, if at all. Its length is that of the noise itself.
        stop_early (`bool`, defaults to `False`): leave a sample alone once its direction does not shrink any more; the
            batch ends with its last one.
        weak_model (`torch.nn.Module`, *optional*): a worse model of the kind of the denoiser: the direction is then
            that of AutoGuidance, the prediction of the pipeline's minus that of the weak one, both for the prompt. It
            also serves where guidance is distilled.
        compat (`str`, *optional*): `"official"`: the noise that is added is the same at each step, and the model is
            given what is left of its input in 16 bits.

    Raises:
        TypeError, ValueError: if an option is out of its range.

    Example:
        >>> from hfnoise.pipelines import NoiseLevelGuidance, guide
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> pipe, guidance = new_digits_pipeline(width=8), NoiseLevelGuidance(2)
        >>> with guide(pipe, initial_noise=guidance):
        ...     image = pipe("the digit seven", num_inference_steps=4, guidance_scale=1.0).images[0]
        >>> guidance.report.evaluations
        4
    """

    def __init__(
        self,
        num_steps: int = 5,
        *,
        step_size: float = 1.0,
        max_relative_step: float | None = 0.0026,
        noise_variance: float = 0.0,
        normalize: bool = True,
        boundary: float | None = None,
        direction_scale: float | None = None,
        stop_early: bool = False,
        weak_model: torch.nn.Module | None = None,
        compat: str | None = None,
    ) -> None:
        self.num_steps, self.step_size, self.max_relative_step = num_steps, step_size, max_relative_step
        self.noise_variance, self.normalize, self.stop_early = noise_variance, normalize, stop_early
        self.boundary, self.direction_scale, self.compat = boundary, direction_scale, compat
        self.weak_model = weak_model
        self.report: StartReport | None = None
        self._check()

    def _check(self) -> None:
        check_count("num_steps", self.num_steps, 0)
        check_flags(normalize=self.normalize, stop_early=self.stop_early)
        for name in ("step_size", "noise_variance", *_OPTIONAL):
            if name not in _OPTIONAL or getattr(self, name) is not None:
                check_number(name, getattr(self, name))
        for name in _OPTIONAL:
            if not 0.0 < (1.0 if getattr(self, name) is None else getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be above 0, or None for none, got {getattr(self, name)}.")
        check_step(self.step_size, self.max_relative_step, self.noise_variance)
        if not (self.weak_model is None or isinstance(self.weak_model, torch.nn.Module)):
            raise TypeError(f"weak_model must be a torch module, got {type(self.weak_model).__name__}.")
        if self.compat not in COMPATS:
            raise ValueError(f"compat must be one of {COMPATS}, got {self.compat!r}.")

    @property
    def is_off(self) -> bool:
        """Whether it changes nothing."""
        return self.num_steps == 0

    def check_pipeline(self, pipeline_class: type) -> None:
        """Raise ValueError if a pipeline makes no prediction without prompt."""
        check_branches(pipeline_class, type(self).__name__, uncond=self.weak_model is None)

    def refine(self, unit_noise: Tensor, context: StartContext) -> StartState:
        """Return the moved noise."""
        self._check()
        if self.is_off:
            self.report = StartReport.of(unit_noise, unit_noise)
            return StartState(unit_noise)
        branches, official = StartBranches(context, self.weak_model), self.compat == "official"
        size = math.sqrt(unit_noise[0].numel())
        limit = None if self.max_relative_step is None else self.max_relative_step * size
        noise, fresh, last = unit_noise.float(), None, torch.full((len(unit_noise),), math.inf)
        for _ in range(self.num_steps):
            predicted = branches.predict(noise.half().float() if official else noise)
            scale = self.direction_scale
            direction = predicted.difference if scale is None else predicted.guided(scale)
            length = norm(direction, sample_dims(noise, None)).flatten()
            going = length < last.to(length.device) if self.stop_early else torch.ones_like(length, dtype=torch.bool)
            if not going.any():
                break
            if self.noise_variance and (fresh is None or not official):
                fresh = context.normal(*noise.shape[1:])
            moved = noise_level_step(
                noise, direction, self.step_size, limit, fresh_noise=fresh, noise_variance=self.noise_variance,
                boundary=self.boundary, normalize=self.normalize,
            )  # fmt: skip
            noise = torch.where(going.reshape(-1, *[1] * (noise.dim() - 1)), moved, noise)
            # One that has stopped stays so.
            last = torch.where(going, length, -math.inf)
        self.report = StartReport.of(unit_noise, noise, branches.evaluations)
        return StartState(noise, evaluations=branches.evaluations)

    def to_config(self) -> dict[str, Any] | None:
        """Return the options; `None` with a weak model, which is not saved."""
        names = ("num_steps", "step_size", "noise_variance", "normalize", "stop_early", "compat", *_OPTIONAL)
        return {name: getattr(self, name) for name in names} if self.weak_model is None else None

    def __repr__(self) -> str:
        return f"NoiseLevelGuidance({self.num_steps}, max_relative_step={self.max_relative_step})"
