"""Starts that are made of an estimate of the image, with the noise of the scheduler's first step on it."""

from __future__ import annotations

import dataclasses
import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hfnoise.pipelines.initial_noise import InitialNoise, StartState
from hfnoise.pipelines.start_context import StartContext

# Signal over noise below which a schedule has no gap: at 512 x 512 pixels the mean of a channel then has a
# signal-to-noise ratio of 64 * 64 * 1e-6, which no model reads.
LEAST_SIGNAL = 1e-3


@dataclass(frozen=True)
class Estimate:
    """Part of an estimate of the image.

    Args:
        x0 (`torch.Tensor`): in latents, float32.
        noise (`torch.Tensor`): to be put on it.
        evaluations (`int`, defaults to `0`): of a network, per sample.
        noise_exponent (`float`, defaults to `1.0`): power of its standard deviation that the noise is multiplied with;
            2 is the slip of the official code of One More Step.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.start_estimate import Estimate
        >>> Estimate(torch.zeros(1), torch.ones(1)).evaluations
        0
    """

    x0: Tensor
    noise: Tensor
    evaluations: int = 0
    noise_exponent: float = 1.0


class StartEstimate(InitialNoise):
    """Base of initial noises that start from an estimate of the image and not from noise alone."""

    space: ClassVar[str] = "scheduler"
    scale: float = 1.0
    # Of a terminal prior: in the place of one that another member would take from its module.
    draws_residuals: ClassVar[bool] = False

    @abstractmethod
    def estimate(self, noise: Tensor, context: StartContext) -> Estimate:
        """Return an estimate of the image.

        Args:
            noise (`torch.Tensor`): of unit variance, in float32.
            context ([`StartContext`]): the call.
        """

    @property
    def is_off(self) -> bool:
        """Whether it changes nothing: the run is then the stock one to the bit."""
        return self.scale == 0.0

    def refine(self, unit_noise: Tensor, context: StartContext) -> StartState:
        """Return the estimate with the noise of the first step on it."""
        return start_from([self], unit_noise, context)


def start_from(members: Sequence[StartEstimate], noise: Tensor, context: StartContext) -> StartState:
    """Return the start a (sum of the estimates) + s noise, with a and s of the scheduler's first timestep.

    It is left to the scheduler's `add_noise`, so that it is in the scale that its `step` expects, whatever the
    scheduler: official code scales by `init_noise_sigma`, which is right by chance or not at all. Where there is no
    gap to close, it warns and returns the noise.

    Args:
        members (sequence of [`StartEstimate`]): those that are off are left out.
        noise (`torch.Tensor`): of unit variance.
        context ([`StartContext`]): the call.
    """
    context = dataclasses.replace(context, draws_residuals=any(member.draws_residuals for member in members))
    members = [member for member in members if not member.is_off]
    if not members:
        return StartState(noise)
    names = " and ".join(type(member).__name__ for member in members)
    reason = no_gap(context.scheduler, context.timesteps[:1])
    if reason:
        warnings.warn(f"{names} does nothing in this run: {reason}.", stacklevel=2)
        return StartState(noise)
    unit, evaluations, exponent = noise.float(), 0, 1.0
    x0 = torch.zeros_like(unit)
    for member in members:
        estimate = member.estimate(unit, context)
        x0 = x0 + member.scale * estimate.x0
        unit, exponent = estimate.noise, max(exponent, estimate.noise_exponent)
        evaluations += estimate.evaluations
    if exponent != 1.0:
        signal, spread = scales(context.scheduler, context.timesteps[:1])
        unit = unit * (spread / math.hypot(signal, spread)) ** (exponent - 1.0)
    return StartState(add_noise(context.scheduler, x0, unit, context.timesteps[:1]), "scheduler", evaluations)


def add_noise(scheduler: Any, x0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Return the scheduler's a x0 + s noise at a timestep, in float32.

    Args:
        scheduler: of diffusers, with its timesteps set.
        x0, noise (`torch.Tensor` of the same shape).
        timestep (`torch.Tensor` of shape `(1,)`): the same for all samples.

    Example:
        >>> import torch
        >>> from diffusers import DDIMScheduler
        >>> from hfnoise.pipelines.start_estimate import add_noise
        >>> scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        >>> add_noise(scheduler, torch.ones(1, 1), torch.zeros(1, 1), scheduler.timesteps[:1])
        tensor([[0.0683]])
    """
    return scheduler.add_noise(x0.float(), noise.float(), timestep.to(x0.device))


def scales(scheduler: Any, timestep: Tensor) -> tuple[float, float]:
    """Return a and s of [`add_noise`].

    Example:
        >>> from diffusers import DDIMScheduler
        >>> from hfnoise.pipelines.start_estimate import scales
        >>> scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        >>> [round(number, 4) for number in scales(scheduler, scheduler.timesteps[:1])]
        [0.0683, 0.9977]
    """
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    return float(add_noise(scheduler, one, zero, timestep)), float(add_noise(scheduler, zero, one, timestep))


def no_gap(scheduler: Any, timestep: Tensor) -> str:
    """Return why a schedule has no gap between its start and noise; empty if it has one.

    Example:
        >>> from diffusers import FlowMatchEulerDiscreteScheduler
        >>> from hfnoise.pipelines.start_estimate import no_gap
        >>> scheduler = FlowMatchEulerDiscreteScheduler()
        >>> no_gap(scheduler, scheduler.timesteps[:1])
        'FlowMatchEulerDiscreteScheduler is of flow matching, which starts from noise alone in training too'
    """
    name = type(scheduler).__name__
    flow = scheduler.config.get("use_flow_sigmas") or scheduler.config.get("prediction_type") == "flow_prediction"
    if flow or not hasattr(scheduler, "add_noise"):
        return f"{name} is of flow matching, which starts from noise alone in training too"
    signal, spread = scales(scheduler, timestep)
    if signal < LEAST_SIGNAL * spread:
        return f"{name} starts at a signal-to-noise ratio of 0, as a model with zero terminal SNR is trained to"
    return ""
