"""Between what a model puts out and the denoised image x0, at one step of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from hfnoise.guidance.tensor_math import widened

PREDICTION_TYPES = ("epsilon", "v_prediction", "flow_prediction", "sample")
SPACES = ("x0", "v", "eps", "model")
# Below it x0 = (x - sigma eps) / alpha has no digits left in float32: zero terminal SNR.
_LEAST_ALPHA = 1e-6


@dataclass(frozen=True)
class DenoisingPoint:
    """Where a run stands: the model's input is x = alpha x0 + sigma eps, with what its output means.

    Args:
        prediction_type (`str`): of the model, in the words of diffusers: `"epsilon"`, `"v_prediction"` (v = alpha eps
            - sigma x0), `"flow_prediction"` (v = eps - x0) or `"sample"` (x0).
        alpha (`float`): of the signal in the tensor that the model is given, at least 0.
        sigma (`float`): of the noise in it, at least 0. The variance-preserving schedules of Stable Diffusion have
            alpha^2 + sigma^2 = 1, also with the schedulers that keep larger latents: they scale what they hand to the
            model. Flow matching has alpha = 1 - sigma. See [`DenoisingPoint.from_sigma`].

    Raises:
        ValueError: for another prediction type, or if alpha and sigma are not finite and at least 0, or both 0.

    Example:
        >>> import torch
        >>> from hfnoise.guidance import DenoisingPoint
        >>> point = DenoisingPoint("flow_prediction", alpha=0.25, sigma=0.75)
        >>> point.denoised(torch.ones(1, 2), torch.ones(1, 2)).tolist()
        [[0.25, 0.25]]
    """

    prediction_type: str
    alpha: float
    sigma: float

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type must be one of {PREDICTION_TYPES}, got {self.prediction_type!r}.")
        if not (math.isfinite(self.alpha) and math.isfinite(self.sigma)) or min(self.alpha, self.sigma) < 0:
            raise ValueError(f"alpha and sigma must be finite and at least 0, got {self.alpha} and {self.sigma}.")
        if self.alpha == self.sigma == 0:
            raise ValueError("alpha and sigma are both 0: the model's input would be empty.")

    @classmethod
    def from_sigma(cls, prediction_type: str, sigma: float) -> DenoisingPoint:
        """Return the point of a diffusers scheduler's `sigmas[i]`.

        Args:
            prediction_type (`str`): see the class. It tells what sigma is: of flow matching, in [0, 1], or noise over
                signal, sigma / alpha, as in Stable Diffusion's schedulers (14.6 at the start).
            sigma (`float`): at least 0.

        Raises:
            ValueError: if a flow's sigma is above 1, or sigma is negative.

        Example:
            >>> from hfnoise.guidance import DenoisingPoint
            >>> DenoisingPoint.from_sigma("epsilon", 0.75)
            DenoisingPoint(prediction_type='epsilon', alpha=0.8, sigma=0.6)
        """
        if prediction_type == "flow_prediction":
            if not 0 <= sigma <= 1:
                raise ValueError(f"sigma of a flow must lie in [0, 1], got {sigma}: it is no sigma of flow matching.")
            return cls(prediction_type, 1 - sigma, sigma)
        length = math.hypot(1, sigma)
        return cls(prediction_type, 1 / length, sigma / length)

    @property
    def has_denoised(self) -> bool:
        """Whether x0 follows from the output: not from eps at zero terminal SNR (alpha = 0), where x is all noise."""
        return self.prediction_type != "epsilon" or self.alpha >= _LEAST_ALPHA

    @property
    def denoised_per_output(self) -> float:
        """What a difference of outputs is multiplied by to become a difference of x0: kappa, negative but for x0.

        Since it is one number per step, guidance in x0 space needs no second pass over the predictions.

        Raises:
            ValueError: if [`DenoisingPoint.has_denoised`] is false.
        """
        if self.prediction_type == "sample":
            return 1.0
        if self.prediction_type != "epsilon":
            return -self.sigma
        if not self.has_denoised:
            raise ValueError(
                f"x0 does not follow from a noise prediction at alpha = {self.alpha} (zero terminal SNR). Begin "
                "guidance a step later, or use a model with v-prediction."
            )
        return -self.sigma / self.alpha

    def denoised(self, model_input: Tensor, output: Tensor) -> Tensor:
        """Return x0 in float32, of the shape of `output`.

        Args:
            model_input (`torch.Tensor`): what the model was given, scaled as it was; of the shape of `output`.
            output (`torch.Tensor`): what the model returned.

        Raises:
            ValueError: if [`DenoisingPoint.has_denoised`] is false.
        """
        if self.prediction_type == "sample":
            return widened(output)
        # Asked for first: it refuses where alpha is 0.
        per_output = self.denoised_per_output
        per_input = 1.0
        if self.prediction_type == "epsilon":
            per_input = 1 / self.alpha
        elif self.prediction_type == "v_prediction":
            per_input = self.alpha
        return widened(model_input) * per_input + per_output * widened(output)

    def in_space(self, space: str, model_input: Tensor, output: Tensor) -> Tensor:
        """Return an output as x0, v or eps, or as it is, in float32.

        Args:
            space (`str`): `"x0"`, `"v"` (the flow's velocity for flow matching), `"eps"` or `"model"`.
            model_input, output: see [`DenoisingPoint.denoised`].

        Raises:
            ValueError: for another space; for `"eps"` and `"v"` of a model that puts out another quantity at sigma =
                0; if [`DenoisingPoint.has_denoised`] is false and x0 is needed.
        """
        if space not in SPACES:
            raise ValueError(f"space must be one of {SPACES}, got {space!r}.")
        own = {"epsilon": "eps", "v_prediction": "v", "flow_prediction": "v", "sample": "x0"}[self.prediction_type]
        if space in ("model", own):
            return widened(output)
        denoised = self.denoised(model_input, output)
        if space == "x0":
            return denoised
        if self.sigma == 0:
            raise ValueError(f"at sigma = 0 there is no noise: {space} does not follow from {self.prediction_type}.")
        noise = (widened(model_input) - self.alpha * denoised) / self.sigma
        return noise if space == "eps" else self.alpha * noise - self.sigma * denoised
