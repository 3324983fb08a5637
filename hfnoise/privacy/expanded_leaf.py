"""Per-unit gradients from ordinary autograd: the gradient of a parameter that is expanded to one copy per unit.

A parameter W of a layer is given to its forward as a leaf E = W.expand(units, *W.shape): copies with stride 0, which
take no memory. What backward leaves in `E.grad` is then the gradient of the loss with respect to the copy of each
unit, that is its per-unit gradient, from the one backward pass that also makes the gradients of the earlier layers.
The matrix product is the one of the ordinary weight gradient, batched over rows instead of summed over them. Whatever
sums gradients in autograd (a module used twice, two forwards, recomputation under checkpointing) sums here, before a
norm is taken, so these cases are right by construction.

The functions here are the layers' forwards with such leaves. W itself takes no part in them and gets no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class RowsOfUnits:
    """Which unit each row of a micro-batch belongs to, and how much the row counts.

    Args:
        unit (`torch.Tensor` of shape `(rows,)`, int64): unit of each row, in [0, units).
        row_weight (`torch.Tensor` of shape `(rows,)`, float32): factor of the row's part in the gradient of its unit;
            0 removes it, whatever it holds.
        units (`int`): number of units, at least 1.
        row_is_unit (`bool`): whether `unit` is 0, 1, ..., units - 1, so that nothing has to be summed.
    """

    unit: Tensor
    row_weight: Tensor
    units: int
    row_is_unit: bool


def expanded_leaf(parameter: Tensor, units: int) -> Tensor:
    """Return a leaf of shape `(units, *parameter.shape)` whose copies all are the parameter's own storage.

    Args:
        parameter (`torch.Tensor`): the parameter; updated in place, it changes the leaf too.
        units (`int`): number of units, at least 1.

    Example:
        >>> import torch
        >>> from hfnoise.privacy.expanded_leaf import expanded_leaf
        >>> leaf = expanded_leaf(torch.zeros(2, 3), units=5)
        >>> leaf.shape, leaf.stride(), leaf.requires_grad
        (torch.Size([5, 2, 3]), (0, 3, 1), True)
    """
    return parameter.detach().expand(units, *parameter.shape).requires_grad_()


def sum_into_units(per_row: Tensor, rows: RowsOfUnits) -> Tensor:
    """Return the gradients of units from those of rows, each row weighted; `per_row` is overwritten.

    Args:
        per_row (`torch.Tensor` of shape `(rows, ...)`, float32): gradient of each row.
        rows (`RowsOfUnits`): units and weights of the rows.

    Returns:
        `torch.Tensor` of shape `(units, ...)`, float32: exactly 0 where no row with a weight other than 0 belongs.

    Example:
        >>> import torch
        >>> from hfnoise.privacy.expanded_leaf import RowsOfUnits, sum_into_units
        >>> rows = RowsOfUnits(torch.tensor([1, 0, 1]), torch.tensor([1.0, 0.0, 2.0]), units=2, row_is_unit=False)
        >>> sum_into_units(torch.tensor([3.0, float("nan"), 4.0]), rows)
        tensor([ 0., 11.])
    """
    weight = rows.row_weight.reshape(-1, *[1] * (per_row.dim() - 1))
    # A product with 0 would keep NaN.
    per_row.mul_(weight).masked_fill_(weight == 0, 0.0)
    if rows.row_is_unit:
        return per_row
    return per_row.new_zeros(rows.units, *per_row.shape[1:]).index_add_(0, rows.unit, per_row)


def _check_rows(gradient: Tensor, rows: RowsOfUnits, layer: str) -> None:
    """Refuse outputs whose first dimension is not the rows: their gradients would go to the wrong units."""
    if gradient.dim() < 2 or gradient.shape[0] != rows.unit.shape[0]:
        raise ValueError(
            f"the output of {layer} has shape {tuple(gradient.shape)}, but the micro-batch has {rows.unit.shape[0]} "
            "rows: the first dimension must be the rows, else gradients are charged to the wrong units and clipping "
            "bounds no unit's influence. Experts of a mixture, packed rows and padding-free batches flatten the "
            'batch: switch that off, freeze the layer, or use grad_mode="loop".'
        )


def _in_autocast_dtype(tensor: Tensor) -> Tensor:
    """Return what autocast gives to a matrix product, so that it, and no copy in float32, is kept for backward."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype == torch.float32:
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def _batched_outer(gradient: Tensor, inputs: Tensor) -> Tensor:
    """Return the sum over positions of gradient x input per row, `(rows, out, in)` in float32."""
    # As (rows, positions, features): a row may have several dimensions of positions, or none.
    gradient = gradient.reshape(gradient.shape[0], -1, gradient.shape[-1])
    inputs = inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
    if gradient.dtype == inputs.dtype != torch.float32 and gradient.is_cuda:
        # The cores multiply in 16 bits and sum in float32; on the CPU there is no such product.
        return torch.bmm(gradient.mT, inputs, out_dtype=torch.float32)
    gradient, inputs = gradient.float(), inputs.float()
    if inputs.shape[-1] < gradient.shape[-1]:
        # Half the time on the CPU: the product is faster with its shorter side first.
        return torch.bmm(inputs.mT, gradient).mT.contiguous()
    return torch.bmm(gradient.mT, inputs)


class ExpandedLinear(torch.autograd.Function):
    """`F.linear` whose weight, bias or both are expanded leaves; forward and input gradient equal stock."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_leaf: Tensor | None,
        bias_leaf: Tensor | None,
        rows: RowsOfUnits,
        layer: str,
    ) -> Tensor:
        inputs = _in_autocast_dtype(inputs)
        ctx.save_for_backward(inputs if weight_leaf is not None else None, weight)
        ctx.rows, ctx.layer, ctx.leaves = rows, layer, (weight_leaf is not None, bias_leaf is not None)
        return F.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        _check_rows(gradient, ctx.rows, ctx.layer)
        input_gradient = weight_gradient = bias_gradient = None
        # Autocast may still be on here and would round the float32 operands.
        with torch.autocast(gradient.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                input_gradient = gradient @ weight.to(gradient.dtype)
            if ctx.leaves[0]:
                weight_gradient = sum_into_units(_batched_outer(gradient, inputs), ctx.rows)
            if ctx.leaves[1]:
                positions = tuple(range(1, gradient.dim() - 1))
                per_row = gradient.sum(positions, dtype=torch.float32) if positions else gradient.float().clone()
                bias_gradient = sum_into_units(per_row, ctx.rows)
        return input_gradient, None, None, weight_gradient, bias_gradient, None, None


class ExpandedLayerNorm(torch.autograd.Function):
    """`F.layer_norm` whose weight, bias or both are expanded leaves; forward and input gradient equal stock."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_leaf: Tensor | None,
        bias_leaf: Tensor | None,
        epsilon: float,
        rows: RowsOfUnits,
        layer: str,
    ) -> Tensor:
        # Autocast computes layer norms in float32, but on the CPU leaves them as they are.
        if inputs.device.type != "cpu" and torch.is_autocast_enabled(inputs.device.type):
            inputs = inputs.float()
        output, mean, inverse_deviation = torch.native_layer_norm(inputs, weight.shape, weight, bias, epsilon)
        ctx.save_for_backward(inputs, weight, bias, mean, inverse_deviation)
        ctx.rows, ctx.layer, ctx.leaves = rows, layer, (weight_leaf is not None, bias_leaf is not None)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, bias, mean, inverse_deviation = ctx.saved_tensors
        _check_rows(gradient, ctx.rows, ctx.layer)
        input_gradient = weight_gradient = bias_gradient = None
        positions = tuple(range(1, gradient.dim() - weight.dim()))
        if ctx.needs_input_grad[0]:
            input_gradient, _, _ = torch.ops.aten.native_layer_norm_backward(
                gradient.contiguous(),
                inputs,
                weight.shape,
                mean,
                inverse_deviation,
                weight,
                bias,
                [True, False, False],
            )
        if ctx.leaves[0]:
            per_row = gradient.float() * (inputs.float() - mean) * inverse_deviation
            weight_gradient = sum_into_units(per_row.sum(positions) if positions else per_row, ctx.rows)
        if ctx.leaves[1]:
            per_row = gradient.sum(positions, dtype=torch.float32) if positions else gradient.float().clone()
            bias_gradient = sum_into_units(per_row, ctx.rows)
        return input_gradient, None, None, weight_gradient, bias_gradient, None, None, None


class CopyOfEachRow(torch.autograd.Function):
    """The leaf's values, one copy per row, for layers that multiply elementwise by their weight: shape `(rows, ...)`.

    Ordinary autograd then makes the gradient of each row's copy, and this function sums those of a unit.
    """

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, rows: RowsOfUnits) -> Tensor:
        ctx.rows = rows
        return leaf[:1].expand(rows.unit.shape[0], *leaf.shape[1:]).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return sum_into_units(gradient.float().clone(), ctx.rows), None
