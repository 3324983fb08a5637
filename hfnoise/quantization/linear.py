"""QuestLinear: a linear layer with float master weights that is quantised in every forward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from hfnoise.quantization.activation_sharing import quantized_activation
from hfnoise.quantization.estimators import quantize
from hfnoise.quantization.grids import check_positive, grid_for
from hfnoise.quantization.hadamard import computing_dtype, hadamard_rotate
from hfnoise.quantization.linear_function import QuantizedLinear
from hfnoise.quantization.lsq import lsq_initial_step, lsq_quantize
from hfnoise.quantization.row_quantizer import ESTIMATORS, row_quantizer
from hfnoise.quantization.rows import QuantizedRows, quantized_rows
from hfnoise.quantization.weight_cache import kept_between_steps

LAYER_ESTIMATORS = (*ESTIMATORS, "lsq")


class LinearQuantization(NamedTuple):
    """How a linear layer is quantised; the fields are those of [`hfnoise.QuestConfig`].

    Example:
        >>> from hfnoise.quantization import LinearQuantization
        >>> LinearQuantization(weight_bits=1, activation_bits=1).hadamard_group
        128
    """

    weight_bits: float = 4
    activation_bits: float | None = 4
    estimator: str = "quest"
    hadamard_group: int | None = 128
    grid: str = "exact"
    trust_factor: float | None = None

    def check(self) -> None:
        """Raise a ValueError or TypeError for what is not allowed, or would be ignored."""
        grid_for(self.weight_bits, self.grid, "weight_bits")
        if self.activation_bits is not None:
            grid_for(self.activation_bits, self.grid, "activation_bits")
        if self.trust_factor is not None:
            check_positive(self.trust_factor, "trust_factor")
        group = self.hadamard_group
        if group is not None and (isinstance(group, bool) or not isinstance(group, int) or group < 0):
            raise ValueError(f"hadamard_group is {group!r}; give a whole number, or None for no rotation.")
        if self.estimator not in LAYER_ESTIMATORS:
            raise ValueError(f"estimator is {self.estimator!r}; choose {', '.join(LAYER_ESTIMATORS)}.")
        if self.estimator != "quest" and self.trust_factor is not None:
            raise ValueError(f"trust_factor is read by estimator='quest' only; this one is {self.estimator!r}.")
        if self.estimator == "lsq" and self.grid != "exact":
            raise ValueError(
                f"grid is {self.grid!r}, and estimator='lsq' learns its steps: it reads no table of grids."
            )

    def weight_levels(self) -> int:
        """Return the number of levels of a weight."""
        return grid_for(self.weight_bits).levels

    def activation_levels(self) -> int:
        """Return the number of levels of an input."""
        return 0 if self.activation_bits is None else grid_for(self.activation_bits).levels

    def of(self, bits: float) -> tuple[float, str, int | None, str, float | None]:
        """Return the arguments of `quantize` after its tensor."""
        return bits, self.estimator, self.hadamard_group, self.grid, self.trust_factor


class QuestLinear(nn.Linear):
    """A linear layer whose weight, and by `activation_bits` whose input, is on a grid in every forward (QuEST).

    The weight stays a float Parameter, trained by any optimizer and saved under its stock name. With quantised inputs
    the product is exact integer arithmetic (`hfnoise/quantization/linear_function.py`), so the packed layer computes
    the same to the last bit. Without (`activation_bits=None`) the quantised weight is rotated back and the layer is a
    stock one with that weight: what [`hfnoise.dequantize`] writes computes the same to the last bit too.

    Departure from the official code, which rotates by a dense K x K matrix and needs K to be a multiple of 128.

    Args:
        in_features, out_features, bias, device, dtype: of `torch.nn.Linear`.
        quantization ([`LinearQuantization`]): bits of weights and inputs, estimator, rotation, trust.

    Raises:
        TypeError, ValueError: for settings that are not allowed.

    Example:
        >>> import torch
        >>> from hfnoise.quantization import LinearQuantization, QuestLinear
        >>> layer = QuestLinear(64, 8, quantization=LinearQuantization(weight_bits=1, activation_bits=1))
        >>> layer(torch.randn(2, 64)).shape
        torch.Size([2, 8])
    """

    quantization: LinearQuantization

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        quantization: LinearQuantization = LinearQuantization(),  # noqa: B008  (immutable)
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        prepare_layer(self, quantization)

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output in the dtype of `input` (that of autocast under autocast)."""
        return quantized_forward(self, input, self.weight)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {describe(self.quantization)}"


def describe(quantization: LinearQuantization) -> str:
    """Return a short form for `print(model)`.

    Example:
        >>> from hfnoise.quantization.linear import LinearQuantization, describe
        >>> describe(LinearQuantization(2, None))
        'weight_bits=2, activation_bits=None, estimator=quest'
    """
    return (
        f"weight_bits={quantization.weight_bits}, activation_bits={quantization.activation_bits}, "
        f"estimator={quantization.estimator}"
    )


def prepare_layer(layer: Any, quantization: LinearQuantization) -> None:
    """Give a layer what [`quantized_forward`] reads: the settings, and for LSQ the learned steps.

    Example:
        >>> from torch import nn
        >>> from hfnoise.quantization.linear import LinearQuantization, prepare_layer
        >>> layer = nn.Linear(8, 8)
        >>> prepare_layer(layer, LinearQuantization(estimator="lsq"))
        >>> [name for name, _ in layer.named_parameters()]
        ['weight', 'bias', 'weight_step', 'activation_step']
    """
    quantization.check()
    layer.quantization = quantization
    if quantization.estimator == "lsq":
        weight: Tensor = layer.weight
        # Zero means: not set yet. A flag outside of the state dict is lost on resume, as in the official code, whose
        # step is then multiplied by its first value again.
        for name in ("weight_step", "activation_step"):
            step = torch.zeros(1, device=weight.device, dtype=computing_dtype(weight.dtype))
            layer.register_parameter(name, nn.Parameter(step))


def quantized_forward(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Return x weight^T + bias with `weight` of shape `(out, in)`, and by the layer's settings `x`, on their grids.

    Example:
        >>> import torch
        >>> from hfnoise.quantization.linear import LinearQuantization, QuestLinear, quantized_forward
        >>> layer = QuestLinear(8, 4, quantization=LinearQuantization(3, None))
        >>> quantized_forward(layer, torch.ones(1, 8), layer.weight).shape
        torch.Size([1, 4])
    """
    quantization: LinearQuantization = layer.quantization
    bias: Tensor | None = layer.bias
    if quantization.estimator == "lsq":
        return _lsq_forward(layer, x, weight)
    if quantization.activation_bits is None:
        if weight.requires_grad and torch.is_grad_enabled():  # through it, so that nothing can be kept
            return functional.linear(x, float_weight(layer, weight), bias)
        kept: Tensor = kept_between_steps(layer, (weight,), quantization, lambda: float_weight(layer, weight).detach())
        return functional.linear(x, kept, bias)
    dtype = output_dtype(x)
    points, codes, step = quantized_activation(x, row_quantizer(x, *quantization.of(quantization.activation_bits)))
    rows = _weight_rows(layer, weight)
    levels = quantization.activation_levels(), quantization.weight_levels()
    group = row_quantizer(weight, *quantization.of(quantization.weight_bits)).group
    output = QuantizedLinear.apply(points, codes, step, weight, bias, *rows, levels, group, dtype)  # type: ignore[no-untyped-call]
    return output.view(*x.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]


def float_weight(layer: Any, weight: Tensor) -> Tensor:
    """Return the quantised weight as a float one: on its grid, rotated back, in the dtype of `weight`, differentiable.

    Example:
        >>> from hfnoise.quantization.linear import LinearQuantization, QuestLinear, float_weight
        >>> layer = QuestLinear(4, 2, quantization=LinearQuantization(1, None, hadamard_group=None))
        >>> [len(row.abs().unique()) for row in float_weight(layer, layer.weight)]
        [1, 1]
    """
    quantization: LinearQuantization = layer.quantization
    exact = weight.to(computing_dtype(weight.dtype))
    on_grid = quantize(exact, *quantization.of(quantization.weight_bits))
    return hadamard_rotate(on_grid, quantization.hadamard_group).to(weight.dtype)


def output_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that a stock linear layer would compute in: that of autocast, if it is on, or of `x`.

    Example:
        >>> import torch
        >>> from hfnoise.quantization.linear import output_dtype
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     output_dtype(torch.ones(1))
        torch.bfloat16
    """
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _weight_rows(layer: Any, weight: Tensor) -> QuantizedRows:
    quantization: LinearQuantization = layer.quantization

    def make() -> QuantizedRows:
        return quantized_rows(weight.detach(), row_quantizer(weight, *quantization.of(quantization.weight_bits)))

    rows: QuantizedRows = kept_between_steps(layer, (weight,), quantization, make)
    return rows


def _lsq_forward(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    quantization: LinearQuantization = layer.quantization
    bits = quantization.weight_bits
    weight = lsq_quantize(weight, _lsq_step(layer.weight_step, weight, bits), bits)
    if quantization.activation_bits is not None:
        step = _lsq_step(layer.activation_step, x, quantization.activation_bits)
        x = lsq_quantize(x, step, quantization.activation_bits)
    return functional.linear(x, weight, layer.bias)


def _lsq_step(step: Tensor, x: Tensor, bits: float) -> Tensor:
    """Return the learned step, set from the first tensor that it meets."""
    if not bool(step.detach().any()):
        with torch.no_grad():
            step.copy_(lsq_initial_step(x.detach(), bits).to(step))
    return step
