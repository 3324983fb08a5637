"""QuestPackedLinear: a linear layer whose weight is stored at its bits, for inference and for adapters on top."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hfnoise.quantization.activation_sharing import quantized_activation
from hfnoise.quantization.codes import decode, encode
from hfnoise.quantization.kernels.layer import kernel_linear
from hfnoise.quantization.kernels.products import PreparedWeight, kernel_for, prepare_weight
from hfnoise.quantization.linear import LinearQuantization, describe, output_dtype
from hfnoise.quantization.linear_function import QuantizedLinear
from hfnoise.quantization.packing import pack, packed_length, unpack
from hfnoise.quantization.row_quantizer import row_quantizer
from hfnoise.quantization.rows import QuantizedRows, decoded_rows
from hfnoise.quantization.weight_cache import kept_between_steps


class QuestPackedLinear(nn.Linear):
    """A linear layer with packed weights: what a [`QuestLinear`] computes, to the last bit, at 1 to 8 bits a weight.

    Version 1 of the format: `weight` is uint8 of shape `(1, out_features, bytes of a row)`, codes of the rotated
    weight as [`hfnoise.quantization.pack`] writes them; `weight_scale` is the step of each row in float32. The
    leading 1 keeps stock code, which knows nothing of this, from loading 8-bit codes as a float weight of the same
    shape.

    The weight takes no gradient, the input does, so adapters on top can be trained.

    Args:
        in_features (`int`): K.
        out_features (`int`): N.
        bias (`bool`, defaults to `True`): a float bias.
        device, dtype: of the bias.
        quantization ([`LinearQuantization`]): how; estimator `"lsq"` has no packed form.

    Raises:
        ValueError: for settings that are not allowed.

    Example:
        >>> from hfnoise.quantization import LinearQuantization, QuestPackedLinear
        >>> layer = QuestPackedLinear(64, 8, quantization=LinearQuantization(weight_bits=1, activation_bits=1))
        >>> tuple(layer.weight.shape), tuple(layer.weight_scale.shape)
        ((1, 8, 8), (8,))
    """

    weight: Tensor
    weight_scale: Tensor
    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        quantization: LinearQuantization = LinearQuantization(),  # noqa: B008  (immutable)
        transposed: bool = False,
    ) -> None:
        # An nn.Linear by class, since libraries choose layers by it (PEFT's "all-linear"); not by its float weight.
        nn.Module.__init__(self)
        quantization.check()
        if quantization.estimator == "lsq":
            raise ValueError("estimator 'lsq' has no packed form; train with 'quest' to pack.")
        self.in_features, self.out_features = in_features, out_features
        self.quantization, self.transposed = quantization, transposed
        row = packed_length(in_features, quantization.weight_bits)
        self.register_buffer("weight", torch.zeros(1, out_features, row, dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.zeros(out_features, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.prepared: tuple[Tensor, int, PreparedWeight] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output in the dtype of `input` (that of autocast under autocast)."""
        quantization = self.quantization
        if quantization.activation_bits is None:
            return functional.linear(input, self._kept(lambda: self.float_weight(input.dtype), input.dtype), self.bias)
        settings = row_quantizer(input, *quantization.of(quantization.activation_bits))
        if input.shape[-1] != self.in_features or input.device != self.weight.device:
            # The kernels read memory: they would take other rows, or addresses of another device.
            raise ValueError(
                f"input has shape {tuple(input.shape)} on {input.device}; the layer takes rows of {self.in_features} "
                f"on {self.weight.device}."
            )
        trains = input.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if not (trains and torch.is_grad_enabled()) and type(input) in (Tensor, nn.Parameter):
            prepared = self._prepared()
            if prepared is not None:
                flat, step_w = input.reshape(-1, self.in_features), self.weight_scale[:, None]
                output = kernel_linear(flat, settings, prepared, step_w, self.bias, output_dtype(input))
                return output.view(*input.shape[:-1], self.out_features)
        points, codes, step = quantized_activation(input, settings)
        rows = self._kept(lambda: self._rows(points.dtype), points.dtype)
        levels = quantization.activation_levels(), quantization.weight_levels()
        output = QuantizedLinear.apply(  # type: ignore[no-untyped-call]
            points, codes, step, None, self.bias, *rows, levels, 1, output_dtype(input)
        )
        return output.view(*input.shape[:-1], self.out_features)  # type: ignore[no-any-return]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # `.half()`, `.to(torch.bfloat16)` and layer-wise casting to 8 bits are meant for what computes in that dtype.
        scale = self.weight_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def codes(self) -> Tensor:
        """Return the codes, uint8 of shape `(out_features, in_features)`, of the rotated weight."""
        return unpack(self.weight[0], self.quantization.weight_bits, self.in_features)

    def float_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight that the codes stand for, out of the rotated space, `(out_features, in_features)`."""
        quantization = self.quantization
        return decode(
            self.codes(),
            self.weight_scale[:, None],
            quantization.weight_bits,
            quantization.hadamard_group,
            dtype=dtype,
        )

    def set_weight(self, weight: Tensor) -> None:
        """Quantise and pack a float weight of shape `(out_features, in_features)`."""
        packed, scale = pack_weight(weight, self.quantization)
        self.weight, self.weight_scale = packed, scale

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{describe(self.quantization)}"
        )

    def _rows(self, dtype: torch.dtype) -> QuantizedRows:
        codes = self.codes()
        points = decoded_rows(codes, self.quantization.weight_levels(), None, dtype)
        return QuantizedRows(points, codes, self.weight_scale[:, None].to(dtype), None)

    def _prepared(self) -> PreparedWeight | None:
        """Return the weight as the kernels of this machine read it, made once, or `None` if floats serve as well."""
        quantization, weight = self.quantization, self.weight
        assert quantization.activation_bits is not None  # only then there is a product of codes
        widths = quantization.weight_bits, quantization.activation_bits
        version = 0 if weight.is_inference() else weight._version
        known = self.prepared
        if known is not None and known[0] is weight and known[1] == version and not torch.compiler.is_compiling():
            return known[2]
        if kernel_for(self.in_features, *widths, weight.device) is None:
            return None
        self.prepared = weight, version, prepare_weight(weight, *widths, self.in_features)
        return self.prepared[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "prepared": None}  # made again where it is loaded, for that machine

    def _kept(self, make: Callable[[], Any], dtype: torch.dtype) -> Any:
        """Return what `make` returns; inside of `cached_weights` it is called once."""
        return kept_between_steps(self, (self.weight, self.weight_scale), dtype, make)


def pack_weight(weight: Tensor, quantization: LinearQuantization) -> tuple[Tensor, Tensor]:
    """Return a float weight as the two tensors of a [`QuestPackedLinear`].

    Args:
        weight (`torch.Tensor` of shape `(out_features, in_features)`, floating; float64 is rounded to float32).
        quantization ([`LinearQuantization`]).

    Returns:
        `tuple`: uint8 of shape `(1, out_features, bytes of a row)`, and float32 of shape `(out_features,)`.

    Raises:
        ValueError: if the weight has NaN or infinite entries, or another number of dimensions.

    Example:
        >>> import torch
        >>> from hfnoise.quantization import LinearQuantization, pack_weight
        >>> packed, scale = pack_weight(torch.tensor([[1.0, -1.0]]), LinearQuantization(1, 1, hadamard_group=None))
        >>> packed.tolist()
        [[[1]]]
    """
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; a linear layer's has two dimensions.")
    weight = weight.detach()
    codes, scale, _ = encode(
        weight.float() if weight.dtype == torch.float64 else weight, *quantization.of(quantization.weight_bits)
    )
    return pack(codes, quantization.weight_bits)[None], scale[:, 0].contiguous()
