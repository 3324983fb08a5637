"""The one way that rows get onto a grid: training, export and inference all take it, so that they agree bit by bit.

(Computing (h / RMS) / d in one place and h / (RMS d) in another flips a code here and there.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hfnoise.quantization.grids import check_positive, grid_for
from hfnoise.quantization.hadamard import (
    check_rows,
    computing_dtype,
    effective_hadamard_group,
    hadamard_rotate,
    rotate_into,
)

ESTIMATORS = ("quest", "ste", "ste_absmax")
# Entries per thread that a CPU handles at a time: 512 KiB of float32, so that the passes over it stay in the cache.
_BLOCK_ENTRIES = 2**17


class RowQuantizer(NamedTuple):
    """What rows are quantised by, as plain numbers (they pass through `torch.compile` as constants).

    `unit` is the step in units of the row's size: its RMS, or its largest magnitude if `absmax`. An entry u, in steps,
    is trusted if |u| <= `trusted_steps`, or, where `trust_radius` is given, if it lies within that many steps of its
    level; all are if both are `None`. `group` is the group of the rotation, 1 for none.
    """

    levels: int
    unit: float
    group: int
    absmax: bool
    trusted_steps: float | None
    trust_radius: float | None


class GridBlock(NamedTuple):
    """Rows on the grid: `points` (in steps: +-1/2, +-3/2 ..., or -1, 0, 1), and the trust mask as 1.0 and 0.0.

    Both lie in memory that the next block overwrites.
    """

    rows: slice
    points: Tensor
    mask: Tensor | None


def row_quantizer(
    x: Tensor,
    bits: float,
    estimator: str = "quest",
    hadamard_group: int | None = 128,
    grid: str = "exact",
    trust_factor: float | None = None,
    trust_radius: float | None = None,
) -> RowQuantizer:
    """Return the checked settings for `x`; the arguments are those of [`hfnoise.quantization.quantize`].

    Raises:
        TypeError: if `x` is not floating, or a setting of the wrong type.
        ValueError: for an unknown setting, or one that the estimator would ignore.

    Example:
        >>> import torch
        >>> from hfnoise.quantization.row_quantizer import row_quantizer
        >>> row_quantizer(torch.zeros(2, 64), bits=1).group
        64
    """
    check_rows(x)
    given = x.shape[-1], bits, estimator, hadamard_group, grid, trust_factor, trust_radius
    if torch.compiler.is_compiling():
        return _settings(*given)
    try:
        return _known_settings(*given)
    except TypeError:  # of what cannot be hashed; the error is to name the setting
        return _settings(*given)


def _settings(
    length: int,
    bits: float,
    estimator: str,
    hadamard_group: int | None,
    grid: str,
    trust_factor: float | None,
    trust_radius: float | None,
) -> RowQuantizer:
    widths = grid_for(bits, grid)
    if estimator == "lsq":
        raise ValueError("estimator is 'lsq', whose step is learned: call lsq_quantize(x, step, bits).")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}; choose one of {', '.join(map(repr, ESTIMATORS))}.")
    group = effective_hadamard_group(length, hadamard_group)
    if estimator != "quest":
        if trust_factor is not None or trust_radius is not None:
            raise ValueError(
                f"estimator={estimator!r} passes every gradient; leave out trust_factor and trust_radius."
            )
        absmax = estimator == "ste_absmax"
        unit = 2 / (widths.levels - 1) if absmax else widths.step
        return RowQuantizer(widths.levels, unit, group, absmax, None, None)
    if trust_radius is None:
        return RowQuantizer(widths.levels, widths.step, group, False, widths.trusted_steps(trust_factor), None)
    if trust_factor is not None:
        raise ValueError("trust_factor and trust_radius are two forms of one bound; give one of them.")
    radius = check_positive(trust_radius, "trust_radius") / widths.step
    return RowQuantizer(widths.levels, widths.step, group, False, None, radius)


# A layer asks in every forward: the checks take longer than a small product. True is not 1 here.
_known_settings = lru_cache(maxsize=1024, typed=True)(_settings)


def row_steps(x: Tensor, settings: RowQuantizer) -> Tensor:
    """Return the step of each row of a matrix: `settings.unit` times its RMS, or times its largest rotated magnitude.

    In float32 (float64 for float64), of shape `(rows, 1)`. The RMS is taken before the rotation, which preserves it.

    Example:
        >>> import torch
        >>> from hfnoise.quantization.row_quantizer import row_quantizer, row_steps
        >>> x = torch.tensor([[3.0, -1.0]])
        >>> row_steps(x, row_quantizer(x, bits=1, estimator="ste_absmax", hadamard_group=None)).tolist()
        [[6.0]]
    """
    x = x.to(computing_dtype(x.dtype))
    if settings.absmax:
        return hadamard_rotate(x, settings.group).abs().amax(-1, keepdim=True) * settings.unit
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm * (settings.unit / math.sqrt(x.shape[-1]))


def grid_blocks(x: Tensor, step: Tensor, settings: RowQuantizer, out: Tensor | None = None) -> Iterator[GridBlock]:
    """Yield the rows of `x` on the grid, rotated, block by block: QuEST (arXiv 2502.05003), section 3, no gradient.

    The order of casts: `x` to float32 (float64 stays), rotation, one product with 1 / step, one comparison, one
    rounding; ties go up (to zero on the ternary grid). The quantised value is `points * step`; NaN or infinite if the
    row is.

    Departure from the official code, which adds 1e-8 to the scale but not to the bound of the mask, so that rows of
    zeros (padding, zero-initialised weights) never get a gradient: here such rows quantise to 0 and are all trusted.

    Args:
        x (`torch.Tensor` of shape `(rows, length)`, floating, contiguous).
        step (`torch.Tensor` of shape `(rows, 1)`): of [`row_steps`].
        settings ([`RowQuantizer`]).
        out (`torch.Tensor`, *optional*): of the shape of `x` and the dtype of `step`, contiguous; where the points go.

    Returns:
        Iterator of [`GridBlock`], with `points` and `mask` of shape `(rows of the block, length)`, float32 or float64.

    Example:
        >>> import torch
        >>> from hfnoise.quantization.row_quantizer import grid_blocks, row_quantizer, row_steps
        >>> x = torch.tensor([[1.0, -1.0]])
        >>> settings = row_quantizer(x, bits=1, hadamard_group=None)
        >>> [block.points.tolist() for block in grid_blocks(x, row_steps(x, settings), settings)]
        [[[0.5, -0.5]]]
    """
    vanishing = step < torch.finfo(step.dtype).tiny  # 1 / step would overflow
    per_step = step.reciprocal().masked_fill(vanishing, 0.0)
    blocks = row_blocks(x)
    # Two buffers for all blocks, and everything in place: memory is what takes the time.
    scratch = torch.empty_like(x[blocks[0]], dtype=step.dtype)
    points = torch.empty_like(scratch) if out is None else out
    for rows in blocks:
        block = x[rows].to(step.dtype)
        spare = scratch[: len(block)]
        in_steps = points[: len(block)] if out is None else out[rows]
        if settings.group > 1:
            rotate_into(in_steps, block, settings.group, spare).mul_(per_step[rows])
        else:
            torch.mul(block, per_step[rows], out=in_steps)
        mask = None
        if settings.trust_radius is not None:
            mask = spare.copy_(in_steps)
            mask.sub_(_nearest(in_steps, settings.levels)).abs_().le_(settings.trust_radius)
            mask.masked_fill_(vanishing[rows], 1.0)
        elif settings.trusted_steps is not None:
            # Written as floats: comparisons that write bools are three times as slow.
            mask = torch.abs(in_steps, out=spare).le_(settings.trusted_steps)
            _nearest(in_steps, settings.levels)
        else:
            _nearest(in_steps, settings.levels)
        yield GridBlock(rows, in_steps, mask)


def _nearest(in_steps: Tensor, levels: int) -> Tensor:
    """Replace each entry by the level next to it."""
    if levels == 2:
        return in_steps.ge_(0).sub_(0.5)  # the rule below, in fewer passes
    outermost = (levels - 1) / 2
    if levels % 2:
        return in_steps.round_().clamp_(-outermost, outermost)
    return in_steps.floor_().clamp_(-outermost - 0.5, outermost - 0.5).add_(0.5)


def row_blocks(x: Tensor) -> list[slice]:
    """Return the slices of rows of a matrix to be handled at a time: everything at once but on a CPU in eager mode.

    Example:
        >>> import torch
        >>> from hfnoise.quantization.row_quantizer import row_blocks
        >>> row_blocks(torch.zeros(1024, 1024))[:2]
        [slice(0, ..., None), slice(...)]
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return [slice(None)]
    rows, length = x.shape
    size = max(1, _BLOCK_ENTRIES * torch.get_num_threads() // length)
    return [slice(start, start + size) for start in range(0, rows, size)] or [slice(None)]
