"""The product of quantised inputs and quantised weights: exact integer arithmetic, then two scales.

Levels are half-integers in units of a row's step, so that a product of rows is a sum of quarter-integers: exact in
float32 as long as K (N_x - 1)(N_w - 1) < 2^24 (up to 4 bits for every K below 74 000). Up to there the result does
not depend on the order of the sum: not on threads, on the split of a batch, on the device, nor on whether a kernel
counts bits or multiplies floats. Training, packed and fast forward agree bit by bit because of it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hfnoise.quantization.hadamard import computing_dtype, without_autocast
from hfnoise.quantization.row_quantizer import RowQuantizer
from hfnoise.quantization.rows import decoded_rows, masked_and_rotated, quantized_rows, scaled_sums

_FLOAT16_LIMIT = 2.0**15


class QuantizeActivation(torch.autograd.Function):
    """Rows of inputs on the grid, once for all layers that read them (query, key and value; gate and up).

    Returns `points`, `codes`, `step`. The gradient that comes back for `points` is taken as that of the quantised
    value points * step, of which the step is a constant: [`QuantizedLinear`] sends it so, and autograd adds up what
    the layers send, before one mask and one rotation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
        rows = quantized_rows(x, RowQuantizer(*settings))
        ctx.group, ctx.dtype = settings[2], x.dtype
        ctx.masked = rows.mask is not None
        ctx.save_for_backward(*([] if rows.mask is None else [rows.mask]))
        points, codes = rows.points, rows.codes
        assert points is not None and codes is not None  # asked for by default
        ctx.mark_non_differentiable(codes, rows.step)
        ctx.set_materialize_grads(False)
        return points, codes, rows.step

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        nothing = (None,) * len(RowQuantizer._fields)
        ctx.spent = True  # the mask may be freed after this: see `activation_sharing`
        if gradient is None:
            return None, *nothing
        mask = ctx.saved_tensors[0] if ctx.masked else None
        return masked_and_rotated(gradient, mask, ctx.group).to(ctx.dtype), *nothing


class QuantizedLinear(torch.autograd.Function):
    """y = (points_x points_w^T) step_x step_w^T + bias, and its gradients: QuEST (arXiv 2502.05003), section 3.

    Both gradients use the quantised operand; that of the weight passes its mask and is rotated back. For the backward
    pass one byte an entry is kept of inputs and of weights, where nn.Linear keeps four of its inputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        points_x: Tensor,
        codes_x: Tensor,
        step_x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        points_w: Tensor,
        codes_w: Tensor,
        step_w: Tensor,
        mask_w: Tensor | None,
        levels: tuple[int, int],
        group: int,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.levels, ctx.group, ctx.dtype = levels, group, dtype
        ctx.weight_dtype = None if weight is None else weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(codes_x, step_x, codes_w, step_w, mask_w)
        sums = exact_product(points_x, points_w, levels, dtype)
        return scaled_sums(sums, step_x, step_w, None if bias is None else bias.to(sums.dtype)).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        codes_x, step_x, codes_w, step_w, mask_w = ctx.saved_tensors
        dtype = gradient.dtype
        grad_x = grad_weight = grad_bias = None
        with without_autocast(gradient.device.type):
            if ctx.needs_input_grad[0]:
                grad_x = (gradient @ decoded_rows(codes_w, ctx.levels[1], step_w, dtype)).to(computing_dtype(dtype))
            if ctx.weight_dtype is not None and ctx.needs_input_grad[3]:
                of_quantized = gradient.T @ decoded_rows(codes_x, ctx.levels[0], step_x, dtype)
                grad_weight = masked_and_rotated(of_quantized, mask_w, ctx.group, overwrite=True).to(ctx.weight_dtype)
            if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
                grad_bias = gradient.sum(0, dtype=computing_dtype(dtype)).to(ctx.bias_dtype)
        return grad_x, None, None, grad_weight, grad_bias, None, None, None, None, None, None, None


def exact_product(points_x: Tensor, points_w: Tensor, levels: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return points_x points_w^T; computed in `dtype`, whose rounding comes after the sum, returned in float32.

    Half-integers up to 127.5 are exact in every dtype. float16 ends at 65504, so there the inputs are divided by a
    power of two, which is exact, and the sum multiplied by it.

    Example:
        >>> import torch
        >>> from hfnoise.quantization.linear_function import exact_product
        >>> exact_product(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.5, -1.5]]), (2, 4), torch.float32)
        tensor([[-0.5000]])
    """
    with without_autocast(points_x.device.type):
        if dtype != torch.float16:
            return (points_x.to(dtype) @ points_w.to(dtype).T).to(computing_dtype(dtype))
        largest = points_x.shape[1] * (levels[0] - 1) * (levels[1] - 1) / 4
        power = 2.0 ** max(0, math.ceil(math.log2(largest / _FLOAT16_LIMIT)))
        return ((points_x / power).half() @ points_w.half().T).float() * power
