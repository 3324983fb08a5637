"""Guided runs whose every step is written down: both predictions, and what reached the scheduler, with x0 of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch

from hfnoise.pipelines import AdaptiveGuidance, ProjectedGuidance, guide
from hfnoise.worlds.tiny_pipelines import images_of

# Their samples are x0 + sigma eps; those of the others are alpha x0 + sigma eps.
_LARGE = ("Euler", "Heun", "KDPM2", "LMS", "DPMSolverSDE")


@dataclass
class Seen:
    """One evaluation.

    Args:
        cond, uncond: what the guider was told, with the sign that the scheduler sees.
        x0: of `cond` and of `uncond`, as the guider computes them; `None` where it does not.
        guided: what the scheduler was given, in float64.
        truth: x0 of a prediction at this step in float64, by the scheduler's own sample, timestep and sigma.
    """

    cond: torch.Tensor
    uncond: torch.Tensor
    x0: Any
    guided: Any = None
    truth: Any = None


class WatchedAdaptive(AdaptiveGuidance):
    """Writes down the predictions, and x0 as the guider understands it."""

    def _observe(self, step):
        super()._observe(step)
        x0 = [step.point.denoised(step.noisy, output) for output in (step.cond, step.uncond)]
        self.seen.append(Seen(step.cond.clone(), step.uncond.clone(), x0))


class WatchedProjected(ProjectedGuidance):
    """Writes down the predictions."""

    def _shape(self, update, step):
        self.seen.append(Seen(step.cond.clone(), step.uncond.clone(), None))
        return super()._shape(update, step)


def denoised_by(scheduler: Any, timestep: Any, sample: torch.Tensor) -> Any:
    """Return the function from a prediction to x0 at the step that a scheduler is about to make, in float64."""
    sample = sample.double()
    name, kind = type(scheduler).__name__, scheduler.config.get("prediction_type", "flow_prediction")
    if not hasattr(scheduler, "sigmas"):
        power = float(scheduler.alphas_cumprod[int(timestep)])
        alpha, sigma = power**0.5, (1 - power) ** 0.5
    else:
        index = scheduler.step_index
        index = index if index is not None else scheduler.begin_index
        index = index if index is not None else scheduler.index_for_timestep(timestep)
        sigma = float(scheduler.sigmas[index])
        if name.startswith("KDPM2") and not scheduler.state_in_first_order:
            sigma = float(scheduler.sigmas_interpol[index])
        if name.startswith("FlowMatch") or scheduler.config.get("use_flow_sigmas"):
            return lambda output: sample - sigma * output.double()
        if name.startswith(_LARGE):
            if kind == "epsilon":
                return lambda output: sample - sigma * output.double()
            sample = sample / (1 + sigma**2) ** 0.5
        alpha = 1 / (1 + sigma**2) ** 0.5
        sigma = sigma * alpha
    if kind == "v_prediction":
        return lambda output: alpha * sample - sigma * output.double()
    assert kind == "epsilon", kind
    return lambda output: (sample - sigma * output.double()) / alpha


def watched_run(pipe: Any, call: dict[str, Any], guider: Any) -> tuple[list[Seen], torch.Tensor]:
    """Return what a guided run did, evaluation by evaluation, and its images."""
    guider.seen = []
    stock = pipe.scheduler.step

    @wraps(stock)
    def step(model_output, timestep, sample, *args, **kwargs):
        seen = guider.seen[-1]
        assert seen.guided is None, "two steps of the scheduler for one of the guider"
        seen.guided = model_output.double()
        seen.truth = denoised_by(pipe.scheduler, timestep, sample)
        return stock(model_output, timestep, sample, *args, **kwargs)

    pipe.scheduler.step = step
    try:
        with guide(pipe, guider):
            return guider.seen, images_of(pipe(**call))
    finally:
        del pipe.scheduler.step


def projected_in_float64(cond, uncond, eta, norm_threshold, average):
    """Return the update of APG on x0 (arXiv 2410.02416, Algorithm 1 and the code of its appendix), and its momentum.

    Args:
        average: beta and the running average, or `None`.
    """
    update = cond - uncond
    dims = tuple(range(1, cond.dim()))
    if average is not None:
        beta, before = average
        update = update + beta * before if before is not None else update
    running = update
    if norm_threshold:
        length = update.square().sum(dims, keepdim=True).sqrt()
        update = update * (norm_threshold / length).clamp(max=1.0)
    direction = cond / cond.square().sum(dims, keepdim=True).sqrt()
    parallel = (update * direction).sum(dims, keepdim=True) * direction
    return update - parallel + eta * parallel, running
