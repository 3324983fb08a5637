"""Rows on the grid by one Triton kernel: size, rotation, rounding and mask without a tensor in between.

Triton is imported at the first call; nothing else of hfnoise needs it. The kernel runs on CUDA, and anywhere under
`TRITON_INTERPRET=1` (slowly, to test it).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hfnoise.quantization.row_quantizer import RowQuantizer

# tl.dot takes matrices of 16 rows and columns or more.
_ROWS = 16
# At 128 a program takes 82 KiB of shared memory (compiled for sm_80 and sm_90); at 256 it would be 256 KiB, which no
# GPU has.
_LARGEST_GROUP = 128
# Without a rotation, columns are taken so many at a time.
_COLUMNS = 256
# Triton looks up among the globals what its kernels name; set when it is imported.
tl: Any = None  # triton.language
_rotated: Any = None  # _rotate, compiled


class TritonRows(NamedTuple):
    """What [`triton_quantize_rows`] returns: `codes`, `step` and `mask`, as `quantized_rows` does."""

    codes: Tensor
    step: Tensor
    mask: Tensor | None


def triton_quantize_rows(x: Tensor, settings: RowQuantizer) -> TritonRows:
    """Return the codes, steps and trust mask of the rows of `x`: QuEST (arXiv 2502.05003), section 3.

    What `quantized_rows` computes, but that sums are added up in another order: where an entry lies between two levels
    to within that rounding, its code may be the other one. A model is to be exported and run by one of the two.

    Args:
        x (`torch.Tensor` of shape `(rows, length)`, float16, bfloat16 or float32; on CUDA).
        settings ([`RowQuantizer`]): of `row_quantizer`; a group of at most 128.

    Returns:
        [`TritonRows`]: codes in uint8 and mask in bool (`None` for the straight-through estimators) of the shape of
        `x`, step in float32 of shape `(rows, 1)`. Codes of a row that is not finite mean nothing; its step is not
        finite either.

    Raises:
        ImportError: if Triton is not installed.
        TypeError: for another dtype.
        ValueError: for another shape or a larger group.
    """
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"x is {x.dtype}; the kernel takes float16, bfloat16 and float32, quantized_rows every dtype.")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; give (rows, length), with at least one entry a row.")
    if settings.group > _LARGEST_GROUP or x.shape[1] % settings.group:
        raise ValueError(
            f"group is {settings.group} for rows of {x.shape[1]}; the kernel takes powers of two up to "
            f"{_LARGEST_GROUP} that divide the length, quantized_rows every one that does."
        )
    kernel = _kernel()
    x = x.contiguous()
    rows, length = x.shape
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    step = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    masked = settings.trusted_steps is not None or settings.trust_radius is not None
    mask = torch.empty(x.shape if masked else (1, 1), dtype=torch.uint8, device=x.device)
    if rows:
        kernel[(-(-rows // _ROWS),)](
            x, codes, step, mask, rows,
            settings.unit, math.sqrt(length), 1 / math.sqrt(settings.group),
            float(settings.trusted_steps or 0), float(settings.trust_radius or 0),
            LENGTH=length,
            LEVELS=settings.levels,
            GROUP=settings.group,
            COLUMNS=_COLUMNS if settings.group == 1 else settings.group,
            ABSMAX=settings.absmax,
            TRUST="steps" if settings.trusted_steps is not None else "radius" if masked else "all",
            ROWS=_ROWS,
            TINY=torch.finfo(torch.float32).tiny,
        )  # fmt: skip
    return TritonRows(codes, step, mask.view(torch.bool) if masked else None)


@cache
def _kernel() -> Any:
    global tl, _rotated
    try:
        import triton
        import triton.language
    except ImportError as error:
        raise ImportError("Triton is not installed: `pip install triton`, or use quantized_rows.") from error
    tl = triton.language
    _rotated = triton.jit(_rotate)
    return triton.jit(_quantize_block)


# What follows is read by Triton, not run by Python.


def _rotate(x, GROUP: tl.constexpr, factor):  # type: ignore
    """Rows of one group times the Hadamard matrix in Sylvester's order: entry (i, j) is (-1)^popcount(i and j)."""
    if GROUP == 1:
        rotated = x
    else:
        index = tl.arange(0, GROUP)
        both = index[:, None] & index[None, :]
        both ^= both >> 4
        both ^= both >> 2
        both ^= both >> 1
        matrix = tl.where((both & 1) == 0, factor, -factor)
        if GROUP >= 16:
            rotated = tl.dot(x, matrix, input_precision="ieee")  # TF32 would flip codes
        else:
            rotated = tl.sum(x[:, :, None] * matrix[None, :, :], axis=1)
    return rotated


def _quantize_block(  # type: ignore
    x_pointer,
    codes_pointer,
    step_pointer,
    mask_pointer,
    rows,
    unit,
    root_of_length,
    factor,
    trusted_steps,
    trust_radius,
    LENGTH: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    ABSMAX: tl.constexpr,
    TRUST: tl.constexpr,
    ROWS: tl.constexpr,
    TINY: tl.constexpr,
):
    """Sixteen rows: their size in one pass over the columns, codes and mask in another, which finds them cached."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    size = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, LENGTH, COLUMNS):
        inside = (row < rows)[:, None] & (start + column < LENGTH)[None, :]
        place = row[:, None] * LENGTH + (start + column)[None, :]
        x = tl.load(x_pointer + place, mask=inside, other=0.0).to(tl.float32)
        if ABSMAX:
            size = tl.maximum(size, tl.max(tl.abs(_rotated(x, GROUP, factor)), axis=1))
        else:  # the rotation preserves it
            size += tl.sum(x * x, axis=1)
    if not ABSMAX:
        size = tl.div_rn(tl.sqrt_rn(size), root_of_length)
    step = size * unit
    vanishing = step < TINY  # 1 / step would overflow
    per_step = tl.where(vanishing, 0.0, tl.div_rn(1.0, tl.where(vanishing, 1.0, step)))
    tl.store(step_pointer + row, step, mask=row < rows)
    outermost = (LEVELS - 1) / 2
    for start in range(0, LENGTH, COLUMNS):
        inside = (row < rows)[:, None] & (start + column < LENGTH)[None, :]
        place = row[:, None] * LENGTH + (start + column)[None, :]
        x = tl.load(x_pointer + place, mask=inside, other=0.0).to(tl.float32)
        in_steps = _rotated(x, GROUP, factor) * per_step[:, None]
        if LEVELS % 2 == 1:
            near = tl.minimum(tl.maximum(in_steps, -outermost - 1), outermost + 1)
            # 1.5 2^23: there float32 has integers only, and rounds ties to the even one, as torch.round does.
            points = (near + 12582912.0) - 12582912.0
            points = tl.minimum(tl.maximum(points, -outermost), outermost)
        else:
            points = tl.floor(in_steps)
            points = tl.minimum(tl.maximum(points, -outermost - 0.5), outermost - 0.5) + 0.5
        tl.store(codes_pointer + place, (points + outermost).to(tl.int32).to(tl.uint8), mask=inside)
        if TRUST == "steps":
            trusted = tl.abs(in_steps) <= trusted_steps
            tl.store(mask_pointer + place, trusted.to(tl.uint8), mask=inside)
        elif TRUST == "radius":
            trusted = (tl.abs(in_steps - points) <= trust_radius) | vanishing[:, None]
            tl.store(mask_pointer + place, trusted.to(tl.uint8), mask=inside)
