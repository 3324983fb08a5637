"""The one function that puts rows on a grid; training, export and inference all call it, so that they agree bit by bit.

(Computing (h / RMS) / d in one place and h / (RMS d) in another flips a code here and there.)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hfnoise.quantization.grids import check_positive, grid_for
from hfnoise.quantization.hadamard import check_rows, computing_dtype, effective_hadamard_group, rotate_groups

ESTIMATORS = ("quest", "ste", "ste_absmax")
# Entries per thread that a CPU handles at a time: 256 KiB of float32, so that the ten passes over a block stay in its
# cache. (Whole tensors at once take twice as long.)
_BLOCK_ENTRIES = 2**16


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


class GridRows(NamedTuple):
    """Rows on the grid: `points` (levels in steps: +-1/2, +-3/2 ... or -1, 0, 1), `step`, `mask` as 1.0 and 0.0."""

    points: Tensor
    step: Tensor
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
    widths = grid_for(bits, grid)
    if estimator == "lsq":
        raise ValueError("estimator is 'lsq', whose step is learned: call lsq_quantize(x, step, bits).")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}; choose one of {', '.join(map(repr, ESTIMATORS))}.")
    group = effective_hadamard_group(x.shape[-1], hadamard_group)
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


def quantize_rows(x: Tensor, settings: RowQuantizer) -> GridRows:
    """Return the rows of `x` on the grid, rotated: QuEST (arXiv 2502.05003), section 3, without a gradient.

    The order of casts: `x` to float32 (float64 stays), size and rotation of that, then one product with 1 / step, one
    rounding, one comparison. The RMS is taken before the rotation, which preserves it. Ties between two levels go up.

    Departure from the official code, which adds 1e-8 to the scale but not to the bound of the mask, so that rows of
    zeros (padding, zero-initialised weights) never get a gradient: here such rows quantise to 0 and are all trusted.

    Args:
        x (`torch.Tensor` of shape `(rows, length)`, floating).
        settings ([`RowQuantizer`]).

    Returns:
        [`GridRows`]: `points` and `mask` of the shape of `x`, `step` of shape `(rows, 1)`, in float32 (or float64). The
        quantised value is `points * step`. NaN if a row is not finite.

    Example:
        >>> import torch
        >>> from hfnoise.quantization.row_quantizer import quantize_rows, row_quantizer
        >>> x = torch.tensor([[1.0, -1.0]])
        >>> quantize_rows(x, row_quantizer(x, bits=1, hadamard_group=None)).points.tolist()
        [[0.5, -0.5]]
    """
    x = x.to(computing_dtype(x.dtype))
    rotated = rotate_groups(x, settings.group)
    if settings.absmax:
        size = rotated.abs().amax(-1, keepdim=True)
    else:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
    step = size * settings.unit
    vanishing = step < torch.finfo(step.dtype).tiny  # 1 / step would overflow
    per_step = step.reciprocal().masked_fill(vanishing, 0.0)
    # In place where the tensor is ours: a pass over memory costs as much as its arithmetic.
    in_steps = rotated.mul_(per_step) if settings.group > 1 else rotated * per_step
    mask = None
    if settings.trusted_steps is not None:
        mask = in_steps.abs().le_(settings.trusted_steps)
    original = None if settings.trust_radius is None else in_steps.clone()
    outermost = (settings.levels - 1) / 2
    if settings.levels % 2:
        points = in_steps.round_().clamp_(-outermost, outermost)
    else:
        points = in_steps.floor_().clamp_(-outermost - 0.5, outermost - 0.5).add_(0.5)
    if original is not None and settings.trust_radius is not None:
        mask = original.sub_(points).abs_().le_(settings.trust_radius).masked_fill_(vanishing, 1.0)
    return GridRows(points, step, mask)


def row_blocks(x: Tensor) -> list[slice]:
    """Return the slices of rows of a matrix to be handled at a time: everything at once but on a CPU in eager mode.

    Example:
        >>> import torch
        >>> from hfnoise.quantization.row_quantizer import row_blocks
        >>> row_blocks(torch.zeros(3, 8))
        [slice(0, 3, None)]
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return [slice(None)]
    rows, length = x.shape
    size = max(1, _BLOCK_ENTRIES * torch.get_num_threads() // length)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
