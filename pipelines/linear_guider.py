"""LinearAG that does not diverge: the unconditional evaluation of some steps is replaced by an estimate."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config

from hfnoise.guidance import (
    EstimateKey,
    LinearCoefficients,
    UpdateHistory,
    evaluated_steps,
    fit_linear_coefficients,
    schedule_digest,
)
from hfnoise.pipelines.guidance_step import GuidanceStep
from hfnoise.pipelines.guider_base import UpdateGuidance
from hfnoise.pipelines.scheduler_points import schedule_levels


class LinearGuidance(UpdateGuidance):
    """Classifier-free guidance whose update, cond - uncond, is estimated at some steps instead of evaluated.

    After LinearAG (arXiv 2312.12487), with the update in the place of the unconditional prediction: the
    paper's regression diverges when its estimates are fed back. Order 0 holds the last update and needs nothing; order
    1 and 2 are weighted sums of the last ones, with coefficients fitted by [`GuidanceRecorder`] for one model,
    scheduler, number of steps and scale, and refused for any other. For them call `guider.bind(pipe)` once.

    Args:
        guidance_scale (`float`, *optional*): w; 7.5, or that of `inner`.
        policy (`str`, defaults to `"alternate"`): which steps are evaluated, see
            [`~hfnoise.guidance.evaluated_steps`]. Holding the last update is close to full guidance with
            `"alternate"`, and nowhere near it where half of the run is estimated.
        coefficients ([`~hfnoise.guidance.LinearCoefficients`] or `dict`, *optional*): `None` is order 0.
        inner ([`ProjectedGuidance`] or `dict`, *optional*): shapes what was evaluated or estimated.
        guidance_rescale (`float`, defaults to `0.0`), use_original_formulation (`bool`, defaults to `False`), start
            (`float`, defaults to `0.0`), stop (`float`, defaults to `1.0`), enabled (`bool`, defaults to `True`): of
            `diffusers.ClassifierFreeGuidance`. `stop=0.5` ends guidance where the paper's policy begins to estimate
            all.

    Raises:
        ValueError: if an option is out of range, or `inner` cannot be inside.
        TypeError: if `coefficients` is something else, such as the name of a file.

    Example:
        >>> from hfnoise.pipelines import LinearGuidance
        >>> LinearGuidance(guidance_scale=5.0).order
        0
    """

    _accepts_inner = ("ProjectedGuidance",)
    _changes_update = True

    @register_to_config
    def __init__(
        self,
        guidance_scale: float | None = None,
        policy: str = "alternate",
        coefficients: LinearCoefficients | dict[str, Any] | None = None,
        inner: UpdateGuidance | dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        self._set_up(guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled, inner)
        evaluated_steps(policy, 1)  # refuses another policy
        if isinstance(coefficients, LinearCoefficients):
            self.register_to_config(coefficients=coefficients.to_dict())
        elif coefficients is not None and not isinstance(coefficients, dict):
            raise TypeError(
                f"coefficients takes LinearCoefficients, got {coefficients!r}. Of a file: "
                "hfnoise.guidance.LinearCoefficients.load(path)."
            )
        elif coefficients is not None:
            coefficients = LinearCoefficients.from_dict(coefficients)
        self.policy = policy
        self.coefficients = coefficients
        self._reset()

    @property
    def order(self) -> int:
        """How many updates back the estimate looks; 0 holds the last."""
        return 0 if self.coefficients is None else self.coefficients.order

    def _reset(self) -> None:
        self._forget_updates()
        self._checked = False

    def _forget_updates(self) -> None:
        self._history = UpdateHistory(self.coefficients)
        self._has_updates = False

    def _wants_uncond(self, number: int, num_inference_steps: int) -> bool:
        return not self._has_updates or evaluated_steps(self.policy, num_inference_steps)[number]

    def _shape(self, update: torch.Tensor | None, step: GuidanceStep) -> torch.Tensor | None:
        if not step.is_first_evaluation:
            raise ValueError(
                f"LinearGuidance counts one evaluation per step, and {type(step.scheduler).__name__} makes two; use a "
                "multistep solver, which reuses the ones before."
            )
        if self.coefficients is not None and not self._checked:
            self.coefficients.check(run_key(step))
            self._checked = True
        if step.uncond is not None:
            self._history.append(step.cond.float() - step.uncond.float())
            self._has_updates = True
            return update
        estimate = self._history.estimate(step.number)
        self._history.append(estimate)
        return estimate


class GuidanceRecorder(UpdateGuidance):
    """Classifier-free guidance, to the bit, that records the updates of its runs, to fit coefficients for them.

    Run a pipeline with it a few times, with different prompts and seeds: two numbers per step are fitted over all
    pixels, so a few dozen images do. Call `guider.bind(pipe)` first. The updates are kept on the CPU.

    Args:
        guidance_scale (`float`, *optional*): w, 7.5 by default.
        guidance_rescale (`float`, defaults to `0.0`), use_original_formulation (`bool`, defaults to `False`), start
            (`float`, defaults to `0.0`), stop (`float`, defaults to `1.0`), enabled (`bool`, defaults to `True`): of
            `diffusers.ClassifierFreeGuidance`; all steps must be guided.

    Example:
        >>> from hfnoise.pipelines import GuidanceRecorder
        >>> GuidanceRecorder().coefficients()
        Traceback (most recent call last):
        ...
        ValueError: no run was recorded...
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        self._set_up(guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled)
        self._runs: list[list[torch.Tensor]] = []
        self._key: EstimateKey | None = None

    def _reset(self) -> None:
        self._runs.append([])

    def _observe(self, step: GuidanceStep) -> None:
        key = run_key(step)
        if self._key not in (None, key):
            raise ValueError(f"this recorder has runs of {self._key} and is given one of {key}; use one for each.")
        self._key = key
        assert step.uncond is not None
        self._runs[-1].append((step.cond.float() - step.uncond.float()).cpu())

    def coefficients(self, order: int = 2, ridge: float = 1e-3) -> LinearCoefficients:
        """Return coefficients fitted on all runs that went to their end.

        Args:
            order, ridge: see [`~hfnoise.guidance.fit_linear_coefficients`].

        Raises:
            ValueError: if no run went to its end, with every step guided.
        """
        steps = 0 if self._key is None else self._key.num_inference_steps
        complete = [run for run in self._runs if run and len(run) == steps]
        if not complete:
            raise ValueError("no run was recorded to its end: run a pipeline with this guider, all steps guided.")
        assert self._key is not None
        return fit_linear_coefficients(
            [torch.cat(updates) for updates in zip(*complete, strict=True)], self._key, order=order, ridge=ridge
        )


def run_key(step: GuidanceStep) -> EstimateKey:
    """Return what linear coefficients are bound to, for the run of a step.

    See [`model_digest`] for how the model is named.

    Raises:
        ValueError: if the guider is not bound or saw no denoiser.
    """
    if step.scheduler is None or step.denoiser is None:
        raise ValueError(
            "linear coefficients hold for one model and schedule: call guider.bind(pipe) once, and use a pipeline "
            "that calls guider.prepare_models(denoiser)."
        )
    return EstimateKey(
        model=model_digest(step.denoiser), scheduler=type(step.scheduler).__name__,
        num_inference_steps=step.num_inference_steps, guidance_scale=float(step.guidance_scale),
        sigmas=schedule_digest(schedule_levels(step.scheduler)),
    )  # fmt: skip


def model_digest(model: torch.nn.Module) -> str:
    """Return class, configuration and weights of a model as a short name.

    Of every parameter four numbers are read, at the same places, rounded to bfloat16: it is quick, tells fine-tunes
    apart, and is the same in 16 and 32 bits.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.linear_guider import model_digest
        >>> model = torch.nn.Linear(2, 2)
        >>> before = model_digest(model)
        >>> with torch.no_grad():
        ...     _ = model.weight.mul_(2)
        >>> before == model_digest(model)
        False
    """
    model = getattr(model, "_orig_mod", model)  # compiled
    config = {name: value for name, value in dict(getattr(model, "config", {})).items() if not name.startswith("_")}
    found = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        places = torch.linspace(0, max(len(flat) - 1, 0), 4, dtype=torch.float64).long()
        numbers = flat[places.to(flat.device)].bfloat16().float().tolist() if len(flat) else []
        found.update(f"{name}{tuple(parameter.shape)}{numbers}".encode())
    return f"{type(model).__name__}-{found.hexdigest()[:16]}"
