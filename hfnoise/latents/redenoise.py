"""Golden noise without training: one step of the sampler with much guidance, and one back with little."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from hfnoise.guidance import DenoisingPoint
from hfnoise.guidance.tensor_math import widened
from hfnoise.latents.start_prediction import start_form


@dataclass(frozen=True)
class Redenoising:
    """The closed form of re-denoise sampling, x' = x + k (p_back - p_down), for all kinds of models.

    The training pairs of NPNet (Golden Noise, arXiv 2411.09502) are made of one DDIM step from noise x at t0 down to
    t1, with the guided prediction p_down, and one inverted step back up, with the prediction p_back of a smaller
    guidance scale at (x1, t0). Both steps together are that sum exactly. p is the noise, k = sigma0 - alpha0 sigma1 /
    alpha1; for flow matching it is the velocity, k = sigma0 - sigma1; from a signal-to-noise ratio of 0 it is minus
    the image, k = alpha1 / sigma1, where the form in the noise diverges. Flow matching and the last are ours: the
    official code has neither.

    Args:
        point ([`hfnoise.guidance.DenoisingPoint`]): of t0.
        step_size (`float`): k, at least 0. To first order x' = x - k (w_down - w_back) (p_cond - p_uncond).

    Raises:
        ValueError: if k is negative or reaches beyond the image, or the model predicts noise at a signal-to-noise
            ratio of 0.

    Example:
        >>> import torch
        >>> from hfnoise.guidance import DenoisingPoint
        >>> from hfnoise.latents import Redenoising
        >>> step = Redenoising(DenoisingPoint("flow_prediction", 0.0, 1.0), step_size=0.25)
        >>> step.refined(torch.zeros(1), torch.tensor([4.0]), torch.tensor([1.0]))
        tensor([-0.7500])
    """

    point: DenoisingPoint
    step_size: float

    def __post_init__(self) -> None:
        largest = {"noise": self.point.sigma, "velocity": self.point.sigma, "image": math.inf}[start_form(self.point)]
        if not 0.0 <= self.step_size <= largest or math.isinf(self.step_size):
            raise ValueError(
                f"the step size of the re-denoising must be in [0, {largest:.4g}], got {self.step_size:.4g}: at the "
                "upper end the image itself is reached. Take a smaller strength, or more num_steps."
            )

    @classmethod
    def between(cls, point: DenoisingPoint, following: DenoisingPoint) -> Redenoising:
        """Return the step from one point of a schedule to the following one, and back.

        Args:
            point, following ([`hfnoise.guidance.DenoisingPoint`]): of t0 and t1.

        Example:
            >>> from hfnoise.guidance import DenoisingPoint
            >>> from hfnoise.latents import Redenoising
            >>> t901, t801 = DenoisingPoint("epsilon", 0.6, 0.8), DenoisingPoint("epsilon", 0.8, 0.6)
            >>> round(Redenoising.between(t901, t801).step_size, 4)
            0.35
        """
        form = start_form(point)
        if form == "velocity":
            return cls(point, point.sigma - following.sigma)
        if form == "image":
            return cls(point, following.alpha / following.sigma)
        return cls(point, point.sigma - point.alpha * following.sigma / following.alpha)

    def denoised(self, noise: Tensor, prediction: Tensor) -> Tensor:
        """Return x1, in float32.

        Args:
            noise (`torch.Tensor` of shape `(batch, ...)`): x, of unit variance.
            prediction (`torch.Tensor` of that shape): p_down, as [`start_prediction`] returns it.
        """
        x, p, form = widened(noise), widened(prediction), start_form(self.point)
        if form == "velocity":
            return x - self.step_size * p
        if form == "image":
            alpha = self.step_size / math.hypot(1.0, self.step_size)
            return math.sqrt(1.0 - alpha * alpha) * x - alpha * p
        ratio = (self.point.sigma - self.step_size) / self.point.alpha
        return ddim_step(x, p, self.point.alpha**2, 1.0 / (1.0 + ratio * ratio))

    def refined(self, noise: Tensor, down: Tensor, back: Tensor) -> Tensor:
        """Return x', in float32; `noise` itself where k is 0.

        Args:
            noise (`torch.Tensor` of shape `(batch, ...)`): x.
            down, back (`torch.Tensor` of that shape): p_down of x, and p_back of [`Redenoising.denoised`].
        """
        if self.step_size == 0.0:
            return noise
        return widened(noise) + self.step_size * (widened(back) - widened(down))


def ddim_step(x: Tensor, noise_prediction: Tensor, power: float, target_power: float) -> Tensor:
    """Return the deterministic DDIM step (arXiv 2010.02502, equation 12 with sigma = 0), up or down, in float32.

    The official code of golden noise inverts by the step from t2 to t1 instead of that from t1 to t0
    (`DDIMInverseScheduler.step` takes the timestep that it goes to); it is made of two calls of this.

    Args:
        x (`torch.Tensor` of shape `(batch, ...)`): a state of unit scale.
        noise_prediction (`torch.Tensor` of that shape): eps.
        power, target_power (`float`): of the signal, `alphas_cumprod`, above 0: of `x`, and of what is returned.

    Raises:
        ValueError: if a power is outside of (0, 1].

    Example:
        >>> import torch
        >>> from hfnoise.latents import ddim_step
        >>> round(ddim_step(torch.tensor(1.0), torch.tensor(0.5), 0.36, 0.64).item(), 4)
        1.1
    """
    for given in (power, target_power):
        if not 0.0 < given <= 1.0:
            raise ValueError(f"the power of the signal must be in (0, 1], got {given}.")
    x, eps = widened(x), widened(noise_prediction)
    x0 = (x - math.sqrt(1.0 - power) * eps) / math.sqrt(power)
    return math.sqrt(target_power) * x0 + math.sqrt(1.0 - target_power) * eps
