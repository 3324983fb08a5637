"""Bound the influence of every unit on a sum of gradients: flat, automatic and per-layer clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

CLIPPINGS = ("flat", "auto", "per_layer")
# Keeps the quotient defined for a gradient of 0, and only makes the factor smaller.
_TINY = 1e-12
# gamma of automatic clipping; arXiv 2206.07136 uses this value in all its experiments.
_AUTOMATIC_GAMMA = 0.01
# How many squares are summed in float32 before the sum goes on in float64: its error then stays near 1e-6.
_PIECE = 4096


class ClippedSum(NamedTuple):
    """What [`clip_per_unit`] returns.

    Args:
        summed: sum over the units of their clipped gradients, in the structure of `grads`.
        norms (`torch.Tensor`, float32): of each unit's gradient before clipping, `(units,)`; for
            `clipping="per_layer"` of each of its tensors, `(units, tensors)`.
    """

    summed: Any
    norms: Tensor


def clip_per_unit(
    grads: Any,
    max_norm: float,
    clipping: str = "flat",
    *,
    weights: Tensor | None = None,
    accumulate_into: Any = None,
    dtype: torch.dtype = torch.float32,
) -> ClippedSum:
    """Return the sum of per-unit gradients, each scaled so that its norm is at most C = `max_norm`, and their norms.

    With n the norm of a unit's gradient over all tensors, its factor is, for `"flat"`, min(1, C / (n + 1e-12))
    (arXiv 1607.00133, algorithm 1); for `"auto"`, C / (n + 0.01) (automatic clipping, arXiv 2206.07136, eq. 4.1
    with gamma = 0.01, times C), which also scales small gradients up, to nearly C, so that C needs no tuning; for
    `"per_layer"`, the flat factor of each of L tensors for itself with C / sqrt(L), so that the whole is at most C.
    Departures: a unit whose norm is not finite (NaN, or an overflow above 1.8e19) is left out instead of stopping the
    step, which would depend on the data; Opacus adds 1e-6 in the place of 1e-12, both stay within C.

    Formal guarantee: adding or removing one unit changes `summed` by at most C in the Euclidean norm, for each of the
    three, as long as a unit's gradient does not depend on which others are there. The norms that are returned are
    private numbers. Norms are taken from the very numbers that are summed,
    in float32, so C is exceeded by at most their relative rounding error (about 1e-6).

    Args:
        grads (`dict`, `list` or `tuple` of `torch.Tensor`, each `(units, ...)`, floating): per-unit gradients, as
            [`~hfnoise.privacy.per_unit_gradients`] returns them. Not changed.
        max_norm (`float`): C > 0.
        clipping (`str`, defaults to `"flat"`): `"flat"`, `"auto"` or `"per_layer"`.
        weights (`torch.Tensor` of shape `(units,)`, *optional*): factor of each unit's gradient before its norm is
            taken, such as 1 / its number of tokens.
        accumulate_into (*optional*): tensors of the structure of `grads` without the units; the sums are added to
            them in place, and `summed` is this object.
        dtype (`torch.dtype`, defaults to `torch.float32`): of the sums. `torch.float64` makes them independent of how
            units are dealt to micro-batches and processes, but for the last bit of float64.

    Returns:
        `ClippedSum`: the sums and the norms.

    Raises:
        ValueError: if a number is out of range, shapes do not match, or there is no tensor.

    Example:
        >>> import torch
        >>> from hfnoise.privacy import clip_per_unit
        >>> clip_per_unit({"w": torch.tensor([[3.0, 4.0], [0.0, 0.5]])}, max_norm=1.0)
        ClippedSum(summed={'w': tensor([0.6000, 1.3000])}, norms=tensor([5.0000, 0.5000]))
    """
    tensors = _tensors(grads)
    _check(tensors, max_norm, clipping, weights)
    # As matrices, so that a norm and a sum are one pass each over the memory.
    flat = [tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None] for tensor in tensors]
    norms, factors = _norms_and_factors(flat, max_norm, clipping, weights)
    sums = [
        _weighted_sum(matrix, factor.to(matrix.device), dtype) for matrix, factor in zip(flat, factors, strict=True)
    ]
    sums = [total.reshape(tensor.shape[1:]) for total, tensor in zip(sums, tensors, strict=True)]
    if accumulate_into is None:
        return ClippedSum(_like(grads, sums), norms)
    targets = _tensors(accumulate_into)
    if [target.shape for target in targets] != [total.shape for total in sums]:
        raise ValueError(
            f"accumulate_into must hold tensors of shapes {[tuple(total.shape) for total in sums]}, those of grads "
            f"without the units; got {[tuple(target.shape) for target in targets]}."
        )
    for target, total in zip(targets, sums, strict=True):
        target.add_(total)
    return ClippedSum(accumulate_into, norms)


def _norms_and_factors(
    flat: list[Tensor], max_norm: float, clipping: str, weights: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Return the norms and, for each tensor, the factors of the units; NaN where a norm is not finite."""
    device = flat[0].device
    norms = torch.stack([_norms(matrix).to(device) for matrix in flat], dim=1)
    if clipping != "per_layer":
        norms = torch.linalg.vector_norm(norms, dim=1, keepdim=True)
    norms = norms.float()
    scale = torch.ones_like(norms[:, :1]) if weights is None else weights.to(norms).reshape(-1, 1)
    norms = norms * scale.abs()
    if clipping == "auto":
        factors = max_norm / (norms + _AUTOMATIC_GAMMA)
    else:
        bound = max_norm / math.sqrt(len(flat)) if clipping == "per_layer" else max_norm
        factors = (bound / (norms + _TINY)).clamp(max=1.0)
    # One tensor that overflowed takes the whole unit out: the others came from the same pass.
    factors = torch.where(norms.isfinite().all(dim=1, keepdim=True), factors * scale, torch.nan)
    if clipping == "per_layer":
        return norms, list(factors.unbind(1))
    return norms.squeeze(1), [factors.squeeze(1)] * len(flat)


def _norms(matrix: Tensor) -> Tensor:
    """Return the norm of each row in float64, from sums in float32 (float64 for float64) over pieces of it.

    One float32 sum over a long row loses small terms: with 22 million numbers the norm came out 0.12 % too small on
    the CPU, and the clipped gradient as much too large.
    """
    long = matrix.shape[1] // _PIECE * _PIECE
    pieces = [matrix[:, :long].view(len(matrix), -1, _PIECE)] if long else []
    if long < matrix.shape[1] or not long:
        pieces.append(matrix[:, None, long:])
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    norms = [torch.linalg.vector_norm(piece, dim=2, dtype=dtype) for piece in pieces]
    total: Tensor = torch.linalg.vector_norm(torch.cat(norms, dim=1), dim=1, dtype=torch.float64)
    return total


def _weighted_sum(matrix: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over units of factor x gradient; a unit with the factor NaN is left out."""
    finite = factors.isfinite()
    # On the CPU a look costs nothing; elsewhere it would wait for the device.
    if not (matrix.device.type == "cpu" and bool(finite.all())):
        # Set to 0, not multiplied: 0 times NaN is NaN.
        matrix = torch.where(finite[:, None], matrix, 0.0)
        factors = torch.where(finite, factors, 0.0)
    return torch.mv(matrix.to(dtype).mT, factors.to(dtype))


def _tensors(grads: Any) -> list[Tensor]:
    values = list(grads.values()) if isinstance(grads, Mapping) else grads
    if not isinstance(values, (list, tuple)) or not values or not all(isinstance(value, Tensor) for value in values):
        raise ValueError(
            f"gradients must be a dict, list or tuple of at least one tensor, got {type(grads).__name__}"
            f"{' without any' if values is not None and not values else ''}."
        )
    return list(values)


def _like(grads: Any, values: list[Tensor]) -> Any:
    if isinstance(grads, Mapping):
        return dict(zip(grads, values, strict=True))
    return tuple(values) if isinstance(grads, tuple) else values


def _check(tensors: list[Tensor], max_norm: float, clipping: str, weights: Tensor | None) -> None:
    if isinstance(max_norm, bool) or not isinstance(max_norm, (int, float)) or not 0 < max_norm < math.inf:
        raise ValueError(
            f"max_norm must be a finite number above 0, got {max_norm!r}: it is the sensitivity that the noise is "
            "scaled by, and without it no (epsilon, delta) holds."
        )
    if clipping not in CLIPPINGS:
        raise ValueError(f"clipping must be one of {list(CLIPPINGS)}, got {clipping!r}.")
    units = tensors[0].shape[:1]
    if not all(tensor.dim() and tensor.is_floating_point() and tensor.shape[:1] == units for tensor in tensors):
        raise ValueError(
            "gradients must be floating, with the same number of units as first dimension; got "
            f"{[(tuple(tensor.shape), tensor.dtype) for tensor in tensors]}."
        )
    if weights is not None and weights.shape != units:
        raise ValueError(f"weights must have one number per unit, shape {tuple(units)}; got {tuple(weights.shape)}.")
