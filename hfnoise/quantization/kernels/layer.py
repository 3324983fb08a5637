"""The forward pass of a quantised layer through the kernels, without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from hfnoise.quantization.grids import grid_for
from hfnoise.quantization.kernels import bit_planes
from hfnoise.quantization.kernels.products import PreparedWeight, integer_product, is_exact_in_float32, level_sums
from hfnoise.quantization.kernels.selection import library
from hfnoise.quantization.row_quantizer import RowQuantizer
from hfnoise.quantization.rows import quantized_rows, scaled_sums


@torch.no_grad()
def kernel_linear(
    x: Tensor,
    settings: RowQuantizer,
    weight: PreparedWeight,
    step_w: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return what [`hfnoise.quantization.QuestLinear`] returns for rows of inputs, to the last bit; no gradient.

    Inputs are quantised by the same function as in training; only their codes are made, no floats.

    Args:
        x (`torch.Tensor` of shape `(tokens, length)`, floating).
        settings ([`RowQuantizer`]): of `row_quantizer(x, activation_bits, ...)`.
        weight ([`PreparedWeight`]): of `prepare_weight`.
        step_w (`torch.Tensor` of shape `(rows, 1)`): the weight's steps, in float32.
        bias (`torch.Tensor` of shape `(rows,)`, *optional*).
        dtype (`torch.dtype`, *optional*): that the layer computes in and returns; by default that of `x`.

    Returns:
        `torch.Tensor` of shape `(tokens, rows)`.

    Raises:
        ValueError: if `settings` are of other bits than the weight was prepared for, or if the float product rounds:
            `kernel_for` is `None` then.

    Example:
        >>> import torch
        >>> from hfnoise.quantization import encode, pack
        >>> from hfnoise.quantization.kernels import kernel_linear, prepare_weight
        >>> from hfnoise.quantization.row_quantizer import row_quantizer
        >>> x, weight = torch.ones(1, 64), torch.eye(8, 64)
        >>> codes, step, _ = encode(weight, bits=1)
        >>> prepared = prepare_weight(pack(codes, 1), weight_bits=1, activation_bits=1, length=64)
        >>> kernel_linear(x, row_quantizer(x, bits=1), prepared, step).shape
        torch.Size([1, 8])
    """
    dtype = x.dtype if dtype is None else dtype
    levels = grid_for(weight.activation_bits).levels, grid_for(weight.weight_bits).levels
    if settings.levels != levels[0]:
        raise ValueError(
            f"settings have {settings.levels} levels; the weight was prepared for inputs of {weight.activation_bits} "
            f"bits, {levels[0]} levels."
        )
    if not is_exact_in_float32(weight.length, *levels):
        raise ValueError(
            f"sums of {weight.length} products of {weight.activation_bits} and {weight.weight_bits} bits round in "
            "float32, in an order that kernels do not share; use the layer's float product."
        )
    untrusted = settings._replace(trusted_steps=None, trust_radius=None)  # a mask is for gradients
    _, all_codes, step, _ = quantized_rows(x, untrusted, points=False)
    assert all_codes is not None  # asked for by default
    compiled = library() if weight.route == "bit_planes" else None
    plain = all(tensor is None or tensor.dtype == torch.float32 for tensor in (step, step_w, bias))
    if compiled is not None and plain and dtype == torch.float32 and x.shape[1] == weight.length:
        if step_w.shape != (weight.rows, 1) or (bias is not None and bias.shape != (weight.rows,)):
            shapes = tuple(step_w.shape), None if bias is None else tuple(bias.shape)
            raise ValueError(f"step_w and bias have shapes {shapes}; {weight.rows} rows need (rows, 1) and (rows,).")
        return bit_planes.linear(compiled, all_codes, int(weight.activation_bits), weight.operand, step, step_w, bias)
    sums = integer_product(all_codes, weight, weight.weight_bits, weight.activation_bits)
    return scaled_sums(level_sums(sums, weight.length, levels, dtype), step, step_w, bias).to(dtype)
