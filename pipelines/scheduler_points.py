"""What a diffusers scheduler says about the evaluation that comes next: signal, noise, and which one of its step."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from hfnoise.guidance import PREDICTION_TYPES, DenoisingPoint

# Flow matching without a `prediction_type`: velocity, and sigmas in [0, 1].
_FLOW_SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LTXEulerAncestralRFScheduler",
)


def prediction_type(scheduler: Any) -> str:
    """Return what the model of a scheduler puts out, one of `hfnoise.guidance.PREDICTION_TYPES`.

    Raises:
        ValueError: if it cannot be told: schedulers that precondition (EDM, consistency models) and unknown ones.

    Example:
        >>> from diffusers import FlowMatchEulerDiscreteScheduler
        >>> from hfnoise.pipelines.scheduler_points import prediction_type
        >>> prediction_type(FlowMatchEulerDiscreteScheduler())
        'flow_prediction'
    """
    name, config = type(scheduler).__name__, scheduler.config
    kind = "flow_prediction" if name in _FLOW_SCHEDULERS else config.get("prediction_type")
    # These divide the model's input by another number and mix it into the output.
    if "sigma_data" in config or kind not in PREDICTION_TYPES:
        raise ValueError(
            f"x0 cannot be told from the output of a model under {name} (prediction_type {kind!r}). Use "
            "space='model', or a scheduler of the DDIM, Euler, DPM-Solver, UniPC or flow-matching families."
        )
    if config.get("invert_sigmas"):
        raise ValueError(f"{name} has invert_sigmas: its sigmas grow, and are no noise levels. Use space='model'.")
    if config.get("use_flow_sigmas") and kind != "flow_prediction":
        raise ValueError(
            f"{name} has use_flow_sigmas and prediction_type {kind!r}: that mixture is not known. Use space='model'."
        )
    return kind


def denoising_point(scheduler: Any, timestep: Any) -> DenoisingPoint:
    """Return where a run stands, for the evaluation that comes next.

    Sigmas rather than timesteps where a scheduler has them: a shifted flow's sigma is not its timestep over 1000.

    Args:
        scheduler: of diffusers, with its timesteps set.
        timestep (`float`, `int` or `torch.Tensor`): of this evaluation.

    Raises:
        ValueError: if x0 cannot be told (see [`prediction_type`]), or the timesteps are per frame or per sample.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> from hfnoise.pipelines.scheduler_points import denoising_point
        >>> denoising_point(DDIMScheduler(), 0).prediction_type
        'epsilon'
    """
    kind = prediction_type(scheduler)
    timestep = torch.as_tensor(timestep)
    if timestep.numel() != 1:
        raise ValueError(
            f"the timestep is of shape {tuple(timestep.shape)}: samples or frames at several noise levels have no "
            "common x0 formula. Use space='model'."
        )
    if hasattr(scheduler, "sigmas"):
        return DenoisingPoint.from_sigma(kind, _current_sigma(scheduler, timestep.reshape(())))
    if hasattr(scheduler, "alphas_cumprod"):
        power = float(scheduler.alphas_cumprod[int(timestep)])
        return DenoisingPoint(kind, power**0.5, (1 - power) ** 0.5)
    raise ValueError(f"{type(scheduler).__name__} has neither sigmas nor alphas_cumprod. Use space='model'.")


def is_first_evaluation(scheduler: Any) -> bool:
    """Return whether this is the first, or only, evaluation of a step: Heun and KDPM2 make two.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> from hfnoise.pipelines.scheduler_points import is_first_evaluation
        >>> is_first_evaluation(DDIMScheduler())
        True
    """
    return bool(getattr(scheduler, "state_in_first_order", True))


def schedule_levels(scheduler: Any) -> list[float]:
    """Return the noise levels of a run: sigmas, or timesteps where there are no sigmas.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> from hfnoise.pipelines.scheduler_points import schedule_levels
        >>> len(schedule_levels(DDIMScheduler()))
        1000
    """
    levels = scheduler.sigmas if hasattr(scheduler, "sigmas") else scheduler.timesteps
    return [float(level) for level in levels]


# A scheduler makes a new tensor whenever its timesteps are set; with the tensor its entry goes.
_LEVELS = WeakTensorKeyDictionary()


def _current_sigma(scheduler: Any, timestep: torch.Tensor) -> float:
    index = scheduler.step_index
    if index is None:  # before the first step: as the scheduler itself will begin
        index = getattr(scheduler, "begin_index", None)
    if index is None:
        index = scheduler.index_for_timestep(timestep.to(scheduler.timesteps.device))
    levels = scheduler.sigmas
    if not is_first_evaluation(scheduler):
        # KDPM2 evaluates between two sigmas. Heun's are listed twice.
        levels = getattr(scheduler, "sigmas_interpol", levels)
        if getattr(scheduler, "mid_point_sigma", None) is not None:
            return float(scheduler.mid_point_sigma)
    if index >= len(levels):
        raise ValueError(
            f"{type(scheduler).__name__} is at step {index} of {len(levels)}: call set_timesteps before every run."
        )
    return _on_cpu(levels)[index]


def _on_cpu(levels: Any) -> list[float]:
    """Return sigmas as numbers, read once for a run: on an accelerator each reading waits for the device."""
    if not isinstance(levels, torch.Tensor):
        return [float(level) for level in levels]
    if levels not in _LEVELS:
        _LEVELS[levels] = levels.tolist()
    return _LEVELS[levels]
