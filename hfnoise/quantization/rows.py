"""Rows of a matrix on the grid, and gradients back through the mask: by a compiled kernel, or by torch.

All of training, export and inference comes through here, so within a process they agree bit by bit. Kernel and torch
sum a rotation in another order, which moves about one code in a million to the next level.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hfnoise.quantization.hadamard import computing_dtype, rotate_into, without_autocast
from hfnoise.quantization.kernels import rows as kernel
from hfnoise.quantization.kernels.library import Library
from hfnoise.quantization.kernels.selection import library
from hfnoise.quantization.row_quantizer import RowQuantizer, grid_blocks, row_blocks, row_steps


class QuantizedRows(NamedTuple):
    """Rows on a grid: `points` (float, in steps) and `codes` (uint8) if asked for, `step`, trust `mask`."""

    points: Tensor | None
    codes: Tensor | None
    step: Tensor
    mask: Tensor | None


@torch.no_grad()
def quantized_rows(
    x: Tensor, settings: RowQuantizer, *, points: bool = True, codes: bool = True, scaled: bool = False
) -> QuantizedRows:
    """Return the rows of a matrix on the grid; no gradient.

    Args:
        x (`torch.Tensor` of shape `(rows, length)`, floating).
        settings ([`RowQuantizer`]).
        points (`bool`, defaults to `True`): return the points, in steps.
        codes (`bool`, defaults to `True`): return the codes.
        scaled (`bool`, defaults to `False`): points are multiplied by the step.

    Returns:
        [`QuantizedRows`]: points in float32 (float64 for float64), codes in uint8; the mask in bool, `None` where
        everything is trusted. Points are NaN in rows that are not finite.

    Example:
        >>> import torch
        >>> from hfnoise.quantization.row_quantizer import row_quantizer
        >>> from hfnoise.quantization.rows import quantized_rows
        >>> x = torch.tensor([[1.0, -1.0]])
        >>> quantized_rows(x, row_quantizer(x, bits=1, hadamard_group=None)).codes.tolist()
        [[1, 0]]
    """
    masked = settings.trusted_steps is not None or settings.trust_radius is not None
    x = x.detach().contiguous()  # a Parameter is one more class of tensors
    inside = computing_dtype(x.dtype)
    made_points = torch.empty(x.shape, dtype=inside, device=x.device) if points else None
    made_codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device) if codes else None
    mask = torch.empty(x.shape, dtype=torch.bool, device=x.device) if masked else None
    compiled = None if settings.absmax or settings.trust_radius is not None else _compiled(x, settings.group)
    if compiled is not None:
        step = kernel.quantize(compiled, x.float(), settings, made_points, scaled, made_codes, mask)
        return QuantizedRows(made_points, made_codes, step, mask)
    step = row_steps(x, settings)
    half = (settings.levels - 1) / 2
    with without_autocast(x.device.type):
        for rows, found, trusted in grid_blocks(x, step, settings, out=made_points):
            if mask is not None and trusted is not None:
                mask[rows].copy_(trusted)
            if made_codes is not None:
                made_codes[rows].copy_(found + half)
            if scaled:
                found.mul_(step[rows])
    return QuantizedRows(made_points, made_codes, step, mask)


def masked_and_rotated(gradient: Tensor, mask: Tensor | None, group: int, overwrite: bool = False) -> Tensor:
    """Return (mask * gradient) rotated in groups, in float32 (float64 for float64): QuEST's backward pass.

    With `overwrite` the result may take the place of the gradient, which saves its memory.

    Example:
        >>> import torch
        >>> from hfnoise.quantization.rows import masked_and_rotated
        >>> masked_and_rotated(torch.ones(1, 2), torch.tensor([[True, False]]), 1).tolist()
        [[1.0, 0.0]]
    """
    inside = computing_dtype(gradient.dtype)
    if mask is None and group == 1:
        return gradient.to(inside)
    gradient = gradient.detach().contiguous()
    compiled = _compiled(gradient, group)
    if compiled is not None:
        source = gradient.float()
        out = source if overwrite or source is not gradient else torch.empty_like(source)
        return kernel.rotate_gradients(compiled, source, mask, group, out)
    result = torch.empty_like(gradient, dtype=inside)
    # As bytes: a product of floats and bools is three times as slow.
    trusted = None if mask is None else mask.view(torch.uint8)
    blocks = row_blocks(gradient)
    masked, scratch = torch.empty_like(result[blocks[0]]), torch.empty_like(result[blocks[0]])
    with without_autocast(gradient.device.type):
        for rows in blocks:
            block, out = gradient[rows].to(inside), result[rows]
            if trusted is not None:
                block = torch.mul(block, trusted[rows], out=out if group == 1 else masked[: len(out)])
            if group > 1:
                rotate_into(out, block, group, scratch[: len(out)])
    return result


def decoded_rows(codes: Tensor, levels: int, step: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the values of codes, (codes - (levels - 1) / 2) * step, computed in the dtype of the step.

    Args:
        codes (`torch.Tensor` of shape `(rows, length)`, uint8).
        levels (`int`): of the grid.
        step (`torch.Tensor` of shape `(rows, 1)`, *optional*): float32 or float64; `None`: the points, in steps.
        dtype (`torch.dtype`): of the result.

    Example:
        >>> import torch
        >>> from hfnoise.quantization.rows import decoded_rows
        >>> decoded_rows(torch.tensor([[0, 3]], dtype=torch.uint8), 4, None, torch.float32).tolist()
        [[-1.5, 1.5]]
    """
    inside = computing_dtype(dtype) if step is None else step.dtype
    if inside == torch.float32 and codes.is_contiguous() and (step is None or step.is_contiguous()):
        compiled = _compiled(codes, 1, any_length=True)
        if compiled is not None:
            return kernel.decode(compiled, codes, levels, step).to(dtype)
    values = codes.to(inside).sub_((levels - 1) / 2)
    return (values if step is None else values.mul_(step)).to(dtype)


def scaled_sums(sums: Tensor, step_x: Tensor, step_w: Tensor, bias: Tensor | None) -> Tensor:
    """Return sums step_x step_w^T + bias; `sums` is overwritten. In this order everywhere: it decides the last bit.

    Example:
        >>> import torch
        >>> from hfnoise.quantization.rows import scaled_sums
        >>> scaled_sums(torch.ones(1, 1), torch.full((1, 1), 2.0), torch.full((1, 1), 3.0), None)
        tensor([[6.]])
    """
    given = [sums, step_x, step_w] if bias is None else [sums, step_x, step_w, bias]
    if all(one.dtype == torch.float32 and one.is_contiguous() for one in given):
        compiled = _compiled(sums, 1, any_length=True)
        if compiled is not None:
            return kernel.scale(compiled, sums, step_x, step_w, bias)
    sums.mul_(step_x).mul_(step_w.T)
    return sums if bias is None else sums.add_(bias)


def _compiled(x: Tensor, group: int, any_length: bool = False) -> Library | None:
    """Return the kernels if they serve these rows and can read them: a traced or wrapped tensor has no memory."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.dtype == torch.float64:
        return None
    if x.device.type != "cpu" or not (any_length or kernel.serves(x, group)):
        return None
    try:
        x.data_ptr()
    except RuntimeError:  # of torch.func
        return None
    return library()
