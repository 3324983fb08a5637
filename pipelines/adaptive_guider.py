"""Adaptive Guidance: no unconditional evaluation for a sample whose two predictions have become alike."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config

from hfnoise.guidance import SPACES, cosine_similarity
from hfnoise.pipelines.guidance_step import GuidanceStep
from hfnoise.pipelines.guider_base import UpdateGuidance
from hfnoise.pipelines.guider_options import check_flags, check_numbers

# Of the paper, whose text calls 0.991 the default.
_PAPER_THRESHOLDS = (0.991, 0.994, 0.996)
# In eps space SDXL begins above 0.9999 and SD at 0.9976 or more.
_LEAST_EPS_THRESHOLD = 0.9999


class AdaptiveGuidance(UpdateGuidance):
    """Classifier-free guidance until the two predictions of a sample agree, then the conditional one alone.

    Adaptive Guidance (arXiv 2312.12487): per sample, once the cosine between them reaches `threshold`, the
    unconditional prediction is neither used nor evaluated for the rest of the run.

    Departures. The cosine is taken on x0, not on eps: there every Stable Diffusion model starts above the paper's
    0.991, whose curve is of its own models, and guidance would end at the first step. Hence another default, 0.999.
    The step at which a sample is found to have converged is still guided, since both evaluations are paid for
    (`at_detection`). And not before a tenth of the steps (`min_steps`).

    On `space="x0"`, `"v"` and `"eps"` the noise level is needed: call `guider.bind(pipe)` once. With a compiled
    denoiser, where each number of rows is compiled anew, use `per_sample=False`.

    Args:
        guidance_scale (`float`, *optional*): w; 7.5, or that of `inner`. 1 is no guidance.
        threshold (`float`, defaults to `0.999`): in (0, 1]. The paper's 0.991, 0.994 and 0.996 are of another
            quantity and warn.
        space (`str`, defaults to `"x0"`): of the cosine: `"x0"`, `"v"`, `"eps"` or `"model"` (the raw output).
        min_steps (`float`, defaults to `0.1`): share of the steps that are guided in any case, in [0, 1].
        patience (`int`, defaults to `1`): consecutive steps at which the threshold is to be reached.
        per_sample (`bool`, defaults to `True`): `False`: one cosine over the whole batch, which stops together, as
            ComfyUI's node has it.
        at_detection (`str`, defaults to `"cfg"`): what the detecting step returns; `"cond"` is the paper's formula.
        inner ([`LinearGuidance`], [`ProjectedGuidance`] or `dict`, *optional*): how the samples that are guided are;
            its own `start`, `stop` and `guidance_rescale` stay at their defaults.
        guidance_rescale (`float`, defaults to `0.0`), use_original_formulation (`bool`, defaults to `False`), start
            (`float`, defaults to `0.0`), stop (`float`, defaults to `1.0`), enabled (`bool`, defaults to `True`): of
            `diffusers.ClassifierFreeGuidance`. Outside of `start` and `stop` nothing is guided, nor measured.

    Raises:
        ValueError: if an option is out of range, or `inner` cannot be inside.
        TypeError: if one that is a number is given as something else.

    Example:
        >>> from hfnoise.pipelines import AdaptiveGuidance, ProjectedGuidance
        >>> guider = AdaptiveGuidance(guidance_scale=7.5, inner=ProjectedGuidance(norm_threshold=15.0))
        >>> guider.config["threshold"], guider.config["inner"]["norm_threshold"]
        (0.999, 15.0)
    """

    _accepts_inner = ("LinearGuidance", "ProjectedGuidance")

    @register_to_config
    def __init__(
        self,
        guidance_scale: float | None = None,
        threshold: float = 0.999,
        space: str = "x0",
        min_steps: float = 0.1,
        patience: int = 1,
        per_sample: bool = True,
        at_detection: str = "cfg",
        inner: UpdateGuidance | dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        self._set_up(guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled, inner)
        check_numbers(threshold=threshold, min_steps=min_steps, patience=patience)
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must lie in (0, 1], got {threshold}: it is a cosine, 0.999 by default.")
        if space not in SPACES:
            raise ValueError(f"space must be one of {SPACES}, got {space!r}.")
        if not 0 <= min_steps <= 1:
            raise ValueError(f"min_steps is a share of the steps, in [0, 1], got {min_steps}.")
        check_flags(per_sample=per_sample)
        if not 1 <= patience < math.inf or patience != int(patience):
            raise ValueError(f"patience is a whole number of steps, at least 1, got {patience}.")
        if at_detection not in ("cfg", "cond"):
            raise ValueError(f"at_detection must be 'cfg' or 'cond', got {at_detection!r}.")
        if space == "eps":
            self._warn_of_eps(threshold)
        elif space != "model" and threshold in _PAPER_THRESHOLDS:
            # Of the raw output it may be the paper's own quantity; what a model predicts is known in a run only.
            warnings.warn(
                f"threshold={threshold} is of the paper (arXiv 2312.12487), a cosine of noise predictions of its own "
                f"models. On {space} it ends guidance much earlier than the default 0.999: as users of SDXL report, "
                "after 8 of 50 steps instead of 18. Leave it out, or choose one on a plot of the guidance report.",
                stacklevel=3,
            )
        self.threshold = threshold
        self.space = space
        self.min_steps = min_steps
        self.patience = patience
        self.per_sample = per_sample
        self.at_detection = at_detection
        self._reset()

    def _warn_of_eps(self, threshold: float) -> None:
        if threshold < _LEAST_EPS_THRESHOLD:
            warnings.warn(
                f"threshold={threshold} on noise predictions ends guidance at the first steps: at high noise both are "
                "nearly x / sigma, whatever the prompt (SDXL starts above 0.9999). The 0.991 of the paper (arXiv "
                "2312.12487) is of its own models, and the 0.99 of ComfyUI's node is a cosine of x0. Leave space at "
                "'x0', with a threshold of 0.99 to 0.999.",
                stacklevel=4,
            )

    @property
    def _needs_input(self) -> bool:
        return self.space != "model"

    def _reset(self) -> None:
        self._converged: torch.Tensor | None = None
        self._reached: torch.Tensor | None = None
        self._warned = False
        self._stop_steps = None

    def _guided(self) -> torch.Tensor | None:
        return None if self._converged is None else ~self._converged

    def _observe(self, step: GuidanceStep) -> None:
        guided = step.guided
        if self._converged is None or self._reached is None or self._stop_steps is None:
            self._converged, self._reached = torch.zeros_like(guided), torch.zeros_like(guided, dtype=torch.int64)
            self._stop_steps = torch.full_like(self._reached, -1)
        cosine = self._similarity(step)
        step.similarity = cosine
        # NaN, also of what was not measured, reaches nothing.
        self._reached = torch.where(cosine >= self.threshold, self._reached + 1, torch.zeros_like(self._reached))
        first = step.number if self.at_detection == "cond" else step.number + 1
        if first < int(self.min_steps * step.num_inference_steps):
            return
        found = guided & (self._reached >= self.patience)
        self._converged = self._converged | found
        self._stop_steps = torch.where(found, torch.full_like(self._stop_steps, first), self._stop_steps)
        if self.at_detection == "cond":
            step.guided = guided & ~found

    def _similarity(self, step: GuidanceStep) -> torch.Tensor:
        unknown = torch.full((len(step.cond),), float("nan"), device=step.cond.device)
        if step.uncond is None:
            return unknown
        cond, uncond = step.cond, step.uncond
        if self._needs_input:
            if not step.point.has_denoised or (self.space != "x0" and step.point.sigma == 0):
                return unknown
            cond, uncond = (step.point.in_space(self.space, step.noisy, output) for output in (cond, uncond))
        elif step.scheduler is not None and not self._warned and step.predicts_noise:
            self._warned = True
            self._warn_of_eps(self.threshold)
        cosine = cosine_similarity(cond, uncond, per_sample=self.per_sample)
        return torch.where(step.guided, cosine.to(unknown.dtype), unknown)
