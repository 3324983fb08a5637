"""What was quantised, what was not and why, and how many bits a model takes in all."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hfnoise.quantization.grids import grid_for
from hfnoise.quantization.linear import LinearQuantization
from hfnoise.quantization.packed_linear import QuestPackedLinear
from hfnoise.quantization.packing import packed_length

_SCALE_BITS = 32


@dataclass(frozen=True)
class LayerReport:
    """One parameter of the model: its `name`, number of `weights`, `bits` in all, and why it is as it is (`note`)."""

    name: str
    weights: int
    bits: int
    quantized: bool
    note: str = ""


@dataclass(frozen=True)
class QuantizationReport:
    """What [`quantization_report`] returns; `print` shows it.

    Args:
        layers (`tuple[LayerReport, ...]`): every parameter, and every packed weight.
    """

    layers: tuple[LayerReport, ...]

    @property
    def quantized_bits_per_weight(self) -> float:
        """Return the bits of a quantised weight, scales included; 0 if there is none."""
        chosen = [layer for layer in self.layers if layer.quantized]
        return sum(layer.bits for layer in chosen) / max(1, sum(layer.weights for layer in chosen))

    @property
    def bits_per_weight(self) -> float:
        """Return the bits of all of the model, embeddings and norms included, over its weights."""
        return sum(layer.bits for layer in self.layers) / max(1, sum(layer.weights for layer in self.layers))

    @property
    def skipped(self) -> dict[str, str]:
        """Return the matrices that were not quantised, and why."""
        return {layer.name: layer.note for layer in self.layers if not layer.quantized and layer.note}

    def __str__(self) -> str:
        quantized = [layer for layer in self.layers if layer.quantized]
        lines = [
            f"{len(quantized)} weights quantised: {sum(layer.weights for layer in quantized):,} entries at "
            f"{self.quantized_bits_per_weight:.3f} bits; the whole model at {self.bits_per_weight:.3f} bits"
        ]
        lines += [f"  not quantised: {name}: {note}" for name, note in self.skipped.items()]
        return "\n".join(lines)


def weight_bits_of(rows: int, length: int, quantization: LinearQuantization) -> int:
    """Return the bits that a weight of shape `(rows, length)` takes when packed, its scales included.

    Example:
        >>> from hfnoise.quantization import LinearQuantization
        >>> from hfnoise.quantization.report import weight_bits_of
        >>> weight_bits_of(1, 4096, LinearQuantization(1, 1)) / 4096
        1.0078125
    """
    grid_for(quantization.weight_bits)
    return rows * (8 * packed_length(length, quantization.weight_bits) + _SCALE_BITS)


def quantization_report(model: nn.Module) -> QuantizationReport:
    """Return what is quantised in a model, at how many bits, and which matrices are not, with the reason.

    Bits are those of the packed form, also while master weights are trained; other parameters count at their dtype.

    Args:
        model (`torch.nn.Module`): after `from_pretrained` with a [`hfnoise.QuestConfig`], or `prepare_qat`.

    Returns:
        [`QuantizationReport`].

    Example:
        >>> from torch import nn
        >>> from hfnoise.quantization import LinearQuantization, QuestLinear, quantization_report
        >>> model = nn.Sequential(nn.Embedding(10, 64), QuestLinear(64, 64, bias=False))
        >>> quantization_report(model).skipped
        {'0.weight': 'an embedding'}
    """
    reasons: dict[str, str] = getattr(model, "quest_skipped", {})
    found: list[LayerReport] = []
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        quantization = getattr(module, "quantization", None)
        if isinstance(module, QuestPackedLinear):
            rows, length = module.out_features, module.in_features
            bits = weight_bits_of(rows, length, module.quantization)
            found.append(LayerReport(f"{prefix}weight", rows * length, bits, True))
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            count, full = parameter.numel(), f"{prefix}{name}"
            if isinstance(quantization, LinearQuantization) and name == "weight":
                length = parameter.shape[0] if getattr(module, "transposed", False) else parameter.shape[1]
                bits = weight_bits_of(count // length, length, quantization)
                found.append(LayerReport(full, count, bits, True))
                continue
            note = _why_not(module, parameter, reasons.get(module_name, "")) if parameter.ndim > 1 else ""
            found.append(LayerReport(full, count, count * parameter.element_size() * 8, False, note))
    return QuantizationReport(tuple(found))


def _why_not(module: nn.Module, parameter: nn.Parameter, reason: str) -> str:
    if reason:
        return reason
    if isinstance(module, nn.Embedding):
        return "an embedding"
    if parameter.ndim == 3:
        return f"stacked experts or another weight of three dimensions, in {type(module).__name__}"
    return f"a weight of {type(module).__name__}, which is no linear layer"
