"""What a scheduler says about training: how much noise each timestep has, and what the model is to predict there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfnoise.guidance.denoising_point import PREDICTION_TYPES


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise levels of training: x_t = signal x0 + noise eps, one entry a level, float32.

    Args:
        prediction_type (`str`): `"epsilon"`, `"v_prediction"`, `"sample"` or `"flow_prediction"`.
        signal, noise (`Tensor` of shape `(levels,)`): factors of x0 and of eps.
        timesteps (`Tensor` of shape `(levels,)`): what the model is given: int64, for flow matching float32.

    Example:
        >>> from diffusers import DDPMScheduler
        >>> from hfnoise.trainers.diffusion_schedule import NoiseSchedule
        >>> schedule = NoiseSchedule.of(DDPMScheduler())
        >>> schedule.prediction_type, len(schedule.timesteps)
        ('epsilon', 1000)
    """

    prediction_type: str
    signal: Tensor
    noise: Tensor
    timesteps: Tensor

    @classmethod
    def of(cls, scheduler: Any) -> NoiseSchedule:
        """Return the schedule that models of a diffusers scheduler are trained on.

        Every scheduler with `alphas_cumprod` says the same about training as `DDPMScheduler` of its config, also those
        whose own `add_noise` is in another state space (Euler). What `set_timesteps` left in it is not read.

        Raises:
            TypeError: for a scheduler that is neither of that kind nor of flow matching.
            ValueError: for a prediction type that does not belong to the kind.
        """
        config = getattr(scheduler, "config", None)
        if isinstance(scheduler, type) or config is None:
            raise TypeError(f"scheduler is {scheduler!r}; give a scheduler of diffusers, such as pipe.scheduler.")
        name = type(scheduler).__name__
        fresh = type(scheduler).from_config(config)  # set_timesteps overwrites the sigmas of a flow
        kind = config.get("prediction_type", "epsilon")
        if name.startswith("FlowMatch"):
            sigmas = fresh.sigmas.to(torch.float32)[: config.num_train_timesteps]
            steps = fresh.timesteps.to(torch.float32)[: config.num_train_timesteps]
            return cls("flow_prediction", 1 - sigmas, sigmas, steps)
        if not isinstance(getattr(fresh, "alphas_cumprod", None), Tensor):
            raise TypeError(
                f"{name} has no alphas_cumprod, so it does not say which noise to train on. Use DDPMScheduler (or "
                "another of its family), or FlowMatchEulerDiscreteScheduler."
            )
        if kind not in PREDICTION_TYPES or kind == "flow_prediction":
            raise ValueError(
                f"{name} has prediction_type {kind!r}; with alphas_cumprod it is 'epsilon', 'v_prediction' or "
                "'sample'. For flow matching give a FlowMatchEulerDiscreteScheduler."
            )
        alphas = fresh.alphas_cumprod.to(torch.float32)
        return cls(kind, alphas**0.5, (1 - alphas) ** 0.5, torch.arange(len(alphas)))

    @property
    def snr(self) -> Tensor:
        """(signal / noise)^2 of every level, float64; infinite where there is no noise."""
        return (self.signal.double() / self.noise.double()) ** 2

    def to(self, device: Any) -> NoiseSchedule:
        """Return the schedule on a device."""
        parts = (self.signal, self.noise, self.timesteps)
        return NoiseSchedule(self.prediction_type, *(part.to(device) for part in parts))

    def noised(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Return x_t, float32: what `scheduler.add_noise` of DDPM and `scale_noise` of flow matching return.

        Args:
            latents, noise (`Tensor` of shape `(batch, ...)`): float32.
            levels (`Tensor` of shape `(batch,)`): indices of noise levels, int64.
        """
        return self._at(self.signal, levels, latents) * latents + self._at(self.noise, levels, latents) * noise

    def target(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Return what the model is to predict from x_t, float32; arguments as in `noised`."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        if self.prediction_type == "flow_prediction":
            return noise - latents
        return self._at(self.signal, levels, latents) * noise - self._at(self.noise, levels, latents) * latents

    @staticmethod
    def _at(table: Tensor, levels: Tensor, like: Tensor) -> Tensor:
        return table[levels].reshape(-1, *[1] * (like.ndim - 1))
