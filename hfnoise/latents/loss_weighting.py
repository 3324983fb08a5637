"""What the squared error of a diffusion model counts at each noise level: uniform, min-SNR, P2, Debias.

A weighting is one objective, whatever the model predicts. With x_t = alpha x0 + sigma eps, SNR = alpha^2 / sigma^2 and
an error of x0 of size D, the errors of the other predictions of the same x_t are

    eps: SNR D^2        v = alpha eps - sigma x0: (SNR + 1) D^2        flow = eps - x0: (sqrt(SNR) + 1)^2 D^2

so a weight w of the eps loss is the same objective as w SNR of the x0 loss, w SNR / (SNR + 1) of the v loss and
w SNR / (sqrt(SNR) + 1)^2 of the flow loss (there alpha = 1 - sigma).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfnoise.guidance.denoising_point import PREDICTION_TYPES

# What kohya-ss/sd-scripts cuts the SNR at, in apply_debiased_estimation.
_KOHYA_LARGEST_SNR = 1000.0


class LossWeighting(ABC):
    """Weights of the squared error by noise level; the members are its subclasses, by name in `LossWeighting.named`.

    Example:
        >>> import torch
        >>> from hfnoise import LossWeighting
        >>> LossWeighting.named("min_snr").weights(torch.tensor([0.0, 1.0, 50.0]), "epsilon").tolist()
        [1.0, 1.0, 0.1]
    """

    @classmethod
    def named(cls, name: str, **settings: Any) -> LossWeighting:
        """Return a weighting by its name.

        Args:
            name (`str`): `"uniform"`, `"min_snr"`, `"p2"`, `"debias"` or `"kohya"`, the last being Debias as
                kohya-ss/sd-scripts computes it.
            **settings: of the class: `gamma` of min-SNR, `k` and `gamma` of P2.

        Raises:
            ValueError: for another name, or a setting that the weighting does not have or allow.
        """
        known: dict[str, tuple[type[LossWeighting], dict[str, Any]]] = {
            "uniform": (UniformWeighting, {}),
            "min_snr": (MinSNRWeighting, {}),
            "p2": (P2Weighting, {}),
            "debias": (DebiasWeighting, {}),
            "kohya": (DebiasWeighting, {"kohya": True}),
        }
        if name not in known:
            raise ValueError(f"loss_weighting is {name!r}; choose {', '.join(known)}.")
        kind, fixed = known[name]
        allowed = set(getattr(kind, "__dataclass_fields__", ())) - {"kohya"}
        if set(settings) - allowed:
            raise ValueError(
                f"loss_weighting={name!r} has no settings {sorted(set(settings) - allowed)}; "
                f"it has {sorted(allowed) or 'none'}."
            )
        return kind(**fixed, **settings)

    def weights(self, snr: Tensor, prediction_type: str) -> Tensor:
        """Return the weight of the squared error of a prediction, computed in float64.

        Args:
            snr (`Tensor` of any shape): alpha^2 / sigma^2, at least 0; infinite where there is no noise.
            prediction_type (`str`): `"epsilon"`, `"v_prediction"`, `"sample"` (x0) or `"flow_prediction"`.

        Returns:
            `Tensor` of the same shape, float64, at least 0. At SNR 0 and infinity it is the limit.

        Raises:
            ValueError: for another prediction type, an SNR that is negative or NaN, or where the limit is infinite.
        """
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type must be one of {PREDICTION_TYPES}, got {prediction_type!r}.")
        exact = snr.to(torch.float64)
        if not bool((exact >= 0).all()):  # NaN too
            raise ValueError("an SNR is negative or NaN; it is alpha^2 / sigma^2, so at least 0.")
        result = self._weights(exact, prediction_type)
        bad = ~result.isfinite()
        if bool(bad.any()):
            raise ValueError(
                f"the weight {self} of a prediction of type {prediction_type!r} is infinite at SNR "
                f"{float(exact[bad][0])}. Use prediction_type='v_prediction', which is made for that end of the "
                "schedule, or another loss_weighting."
            )
        return result

    def _weights(self, snr: Tensor, prediction_type: str) -> Tensor:
        """Convert the weight of the eps loss or of the x0 loss, whichever is finite on that side of SNR 1."""
        of_eps, of_x0 = self.epsilon_weights(snr), self.sample_weights(snr)
        if prediction_type == "epsilon":
            return of_eps
        if prediction_type == "sample":
            return of_x0
        if prediction_type == "v_prediction":
            return torch.where(snr <= 1, of_x0 / (1 + snr), of_eps / (1 + 1 / snr))
        ratio = snr.sqrt()
        return torch.where(snr <= 1, of_x0 / (1 + ratio) ** 2, of_eps / (1 + 1 / ratio) ** 2)

    @abstractmethod
    def epsilon_weights(self, snr: Tensor) -> Tensor:
        """Return the weight of the eps loss; `snr` is float64 and at least 0."""

    @abstractmethod
    def sample_weights(self, snr: Tensor) -> Tensor:
        """Return the weight of the x0 loss: that of the eps loss times the SNR."""


@dataclass(frozen=True)
class UniformWeighting(LossWeighting):
    """1 on the loss of what the model predicts, which is another objective for each prediction type.

    Example:
        >>> import torch
        >>> from hfnoise.latents import UniformWeighting
        >>> UniformWeighting().weights(torch.tensor([0.0, 9.0]), "v_prediction").tolist()
        [1.0, 1.0]
    """

    def _weights(self, snr: Tensor, prediction_type: str) -> Tensor:
        return torch.ones_like(snr)

    def epsilon_weights(self, snr: Tensor) -> Tensor:
        """Return ones."""
        return torch.ones_like(snr)

    def sample_weights(self, snr: Tensor) -> Tensor:
        """Return ones."""
        return torch.ones_like(snr)


@dataclass(frozen=True)
class MinSNRWeighting(LossWeighting):
    """min(SNR, gamma) on the x0 loss: the low-noise end no longer outweighs the rest (min-SNR, arXiv 2303.09556).

    It is `snr_gamma` of diffusers' training scripts, for eps, v and x0. Departures: at SNR 0 the eps weight is its
    limit 1, where the scripts divide 0 by 0; and the flow loss has the weight of the same objective.

    Args:
        gamma (`float`, defaults to `5.0`): above 0; the paper's value.

    Raises:
        ValueError: if gamma is not above 0.

    Example:
        >>> import torch
        >>> from hfnoise.latents import MinSNRWeighting
        >>> MinSNRWeighting(gamma=5.0).weights(torch.tensor([0.0, 4.0, 9.0]), "v_prediction").tolist()
        [0.0, 0.8, 0.5]
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        _check_positive("gamma of min-SNR (snr_gamma)", self.gamma)

    def epsilon_weights(self, snr: Tensor) -> Tensor:
        """Return min(SNR, gamma) / SNR, at 0 its limit 1."""
        return (self.gamma / snr).clamp(max=1)

    def sample_weights(self, snr: Tensor) -> Tensor:
        """Return min(SNR, gamma)."""
        return snr.clamp(max=self.gamma)


@dataclass(frozen=True)
class P2Weighting(LossWeighting):
    """1 / (k + SNR)^gamma on the eps loss: less weight on imperceptible detail (P2, arXiv 2204.00227, equation 8).

    Args:
        k (`float`, defaults to `1.0`): above 0.
        gamma (`float`, defaults to `1.0`): at least 0; the paper uses 0.5 and 1, and 0 is no weighting.

    Raises:
        ValueError: for a value out of range.

    Example:
        >>> import torch
        >>> from hfnoise.latents import P2Weighting
        >>> P2Weighting(k=1, gamma=1).weights(torch.tensor([0.0, 3.0]), "epsilon").tolist()
        [1.0, 0.25]
    """

    k: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("k of P2", self.k)
        _check_positive("gamma of P2", self.gamma, or_zero=True)

    def epsilon_weights(self, snr: Tensor) -> Tensor:
        """Return 1 / (k + SNR)^gamma."""
        return (self.k + snr) ** -self.gamma

    def sample_weights(self, snr: Tensor) -> Tensor:
        """Return SNR / (k + SNR)^gamma."""
        # The same, where the first is infinity times 0.
        large = snr ** (1 - self.gamma) * (1 + self.k / snr) ** -self.gamma
        return torch.where(snr <= 1, snr * (self.k + snr) ** -self.gamma, large)


@dataclass(frozen=True)
class DebiasWeighting(LossWeighting):
    """1 / sqrt(SNR) on the eps loss (Debias, arXiv 2310.08442).

    `kohya=True` is what kohya-ss/sd-scripts calls debiased estimation: the SNR is cut at 1000, and the v loss has the
    weight 1 / (SNR + 1). That is another objective: the v weight of the same one is sqrt(SNR) / (SNR + 1).

    Args:
        kohya (`bool`, defaults to `False`): kohya's variant, for eps and v only.

    Example:
        >>> import torch
        >>> from hfnoise.latents import DebiasWeighting
        >>> snr = torch.tensor([4.0, 9.0])
        >>> DebiasWeighting().weights(snr, "v_prediction").tolist()
        [0.4, 0.3]
        >>> DebiasWeighting(kohya=True).weights(snr, "v_prediction").tolist()
        [0.2, 0.1]
    """

    kohya: bool = False

    def _weights(self, snr: Tensor, prediction_type: str) -> Tensor:
        if not self.kohya:
            return super()._weights(snr, prediction_type)
        cut = snr.clamp(max=_KOHYA_LARGEST_SNR)
        if prediction_type == "epsilon":
            return self.epsilon_weights(cut)
        if prediction_type == "v_prediction":
            return 1 / (cut + 1)
        raise ValueError(
            f"kohya's debiased estimation is for eps and v predictions, not for {prediction_type!r}. Use 'debias'."
        )

    def epsilon_weights(self, snr: Tensor) -> Tensor:
        """Return 1 / sqrt(SNR)."""
        return snr**-0.5

    def sample_weights(self, snr: Tensor) -> Tensor:
        """Return sqrt(SNR)."""
        return snr.sqrt()


def _check_positive(name: str, value: float, or_zero: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (value == 0 and not or_zero):
        raise ValueError(f"{name} is {value!r}; give a number {'of at least' if or_zero else 'above'} 0.")
