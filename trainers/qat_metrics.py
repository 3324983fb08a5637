"""What a quantised model loses and trusts, from its weights alone: no forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hfnoise.quantization.estimators import quantize_with_mask
from hfnoise.quantization.grids import grid_for
from hfnoise.quantization.hadamard import hadamard_rotate
from hfnoise.quantization.hf_export import master_layers
from hfnoise.quantization.linear import LinearQuantization
from hfnoise.quantization.lsq import lsq_quantize
from hfnoise.quantization.report import quantization_report


@dataclass(frozen=True)
class QuantizationMetrics:
    """What [`quantization_metrics`] returns.

    Args:
        trust_fraction (`float`): share of all quantised weights whose gradient is kept.
        errors (`dict[str, float]`): of each layer, |quantised - weight| / |weight| (Euclidean norms).
        bits_per_weight (`float`): of the whole model when packed, embeddings, norms and scales included.
    """

    trust_fraction: float
    errors: dict[str, float]
    bits_per_weight: float

    @property
    def mean_error(self) -> float:
        """Return the mean of the layers' errors."""
        return sum(self.errors.values()) / len(self.errors)

    @property
    def worst_layer(self) -> str:
        """Return the name of the layer with the largest error."""
        return max(self.errors, key=lambda name: self.errors[name])


@torch.no_grad()
def quantization_metrics(model: nn.Module) -> QuantizationMetrics:
    """Return trust, error and bits of a model with master weights; as dear as quantising its weights once.

    On normally distributed weights the error is sqrt(MSE) of the grid: 0.603 at 1 bit, 0.345 at 2, 0.107 at 4.

    Args:
        model (`torch.nn.Module`): after `prepare_qat`.

    Raises:
        ValueError: if it has no master weights.

    Example:
        >>> from torch import nn
        >>> from hfnoise import QuestConfig, prepare_qat
        >>> from hfnoise.trainers.qat_metrics import quantization_metrics
        >>> model = prepare_qat(nn.Sequential(nn.Linear(256, 64)), QuestConfig(bits=1))
        >>> 0.4 < quantization_metrics(model).errors["0"] < 0.7
        True
    """
    trusted = weights = 0
    errors = {}
    for name, (module, quantization) in master_layers(model).items():
        weight = module.weight.t() if getattr(module, "transposed", False) else module.weight
        rotated, quantized, mask = _quantized(module, weight.float(), quantization)
        count = weight.numel()
        weights += count
        trusted += count if mask is None else int(mask.sum())
        norm = float(rotated.norm())
        errors[name] = float((quantized - rotated).norm()) / norm if norm else 0.0
    return QuantizationMetrics(trusted / weights, errors, quantization_report(model).bits_per_weight)


def _quantized(
    module: nn.Module, weight: Tensor, quantization: LinearQuantization
) -> tuple[Tensor, Tensor, Tensor | None]:
    if quantization.estimator == "lsq":
        step: Tensor = module.weight_step.float()  # type: ignore[assignment]
        if not bool(step.any()):  # not set yet
            return weight, weight, None
        outermost = (grid_for(quantization.weight_bits).levels - 1) / 2
        return weight, lsq_quantize(weight, step, quantization.weight_bits), (weight / step).abs() <= outermost
    quantized, mask = quantize_with_mask(weight, *quantization.of(quantization.weight_bits))
    return hadamard_rotate(weight, quantization.hadamard_group), quantized, mask
