"""How far one unit can move C g: the sensitivity of a strategy under a participation pattern.

With gradients clipped to norm 1, noise sigma * (sensitivity of C) * C^-1 Z gives the guarantee of one Gaussian
mechanism of noise multiplier sigma for the whole run. A unit that takes part in steps i and j is `j - i` steps apart
from itself; `min_separation` is the least of these distances that the sampler allows (1: every step).
"""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from hfnoise.privacy.toeplitz import Coefficients, check_coefficients, check_count

# Coefficients that are computed, as those of a banded inverse are, may rise by rounding errors.
_ROUNDING = 1e-12


def column_norms(coefficients: Coefficients, steps: int) -> Float64[Tensor, " steps"]:
    """Return the norms of the columns of C: of column t, sqrt(sum of c_j^2 over j <= steps - 1 - t).

    Args:
        coefficients (`torch.Tensor` of shape `(bands,)`, floating): of C; those beyond `steps` are not used.
        steps (`int`): size of C, at least 1.

    Returns:
        `torch.Tensor` of shape `(steps,)`, float64, non-increasing.

    Raises:
        ValueError: if the coefficients are no finite vector with a first entry that is not 0.

    Example:
        >>> import torch
        >>> from hfnoise.privacy.participation import column_norms
        >>> column_norms(torch.tensor([4.0, 3.0]), 3).tolist()
        [5.0, 5.0, 4.0]
    """
    return _padded(coefficients, steps).square().cumsum(0).flip(0).sqrt()


def single_participation_sensitivity(coefficients: Coefficients, steps: int | None = None) -> float:
    """Return the sensitivity of C if a unit takes part in one step at most: its largest column norm.

    Times the root of the number of participations it is also the sensitivity of a banded C whose units are at least
    `bands` steps apart, since the columns that such a unit moves are orthogonal (arXiv 2306.08153, theorem 2).

    Formal guarantee: exact. A C with a negative coefficient is refused although the formula holds for it, because no
    strategy of ours has one, and coefficients of C^-1 do: taken for C they would promise too much privacy.

    Args:
        coefficients (`torch.Tensor` of shape `(bands,)`, floating): of C, non-negative.
        steps (`int`, *optional*): size of C; defaults to the number of coefficients.

    Returns:
        `float`

    Raises:
        ValueError: for a negative coefficient, and as [`column_norms`].

    Example:
        >>> import torch
        >>> from hfnoise.privacy.participation import single_participation_sensitivity
        >>> single_participation_sensitivity(torch.tensor([4.0, 3.0]))
        5.0
    """
    _check_sign(coefficients)
    return column_norms(coefficients, coefficients.numel() if steps is None else steps)[0].item()


def min_separation_sensitivity(
    coefficients: Coefficients, min_separation: int, steps: int, max_participations: int | None = None
) -> float:
    """Return the sensitivity of C if a unit takes part at steps at least `min_separation` apart.

    |sum_j shift_(j * min_separation)(c)| over the participations j = 0, 1, ...: as many as fit, as early and as close
    as allowed (arXiv 2405.13763, theorem 2).

    Formal guarantee: exact for coefficients that are non-negative and non-increasing. Others are refused, but for
    rounding errors, where the least non-increasing majorant is used, which bounds from above.

    Args:
        coefficients (`torch.Tensor` of shape `(bands,)`, floating): of C, non-negative and non-increasing.
        min_separation (`int`): at least 1; the number of groups of the cyclic sampler.
        steps (`int`): size of C, at least 1.
        max_participations (`int`, *optional*): upper limit to the participations; defaults to what fits, which is
            ceil(steps / min_separation).

    Returns:
        `float`

    Raises:
        ValueError: for coefficients that are negative or rise, and numbers that are not whole or below 1.

    Example:
        >>> import torch
        >>> from hfnoise.privacy.participation import min_separation_sensitivity
        >>> min_separation_sensitivity(torch.ones(1), min_separation=1, steps=9)
        3.0
        >>> min_separation_sensitivity(torch.tensor([4.0, 3.0]), min_separation=2, steps=8)
        10.0
    """
    _check_sign(coefficients)
    column = _padded(coefficients, steps)
    rise = (column[1:] - column[:-1]).max().item() if steps > 1 else 0.0
    if rise > _ROUNDING * column[0].item():
        raise ValueError(
            f"the coefficients rise by {rise:.3g}: the formula for Toeplitz matrices would give too small a "
            "sensitivity and promise too much privacy. Use min_separation_sensitivity_bound with the whole matrix."
        )
    column = column.flip(0).cummax(0).values.flip(0)
    total = torch.zeros_like(column)
    for start in _participations(min_separation, steps, max_participations):
        total[start:] += column[: steps - start]
    return float(total.norm())


def min_separation_sensitivity_bound(
    strategy: Float64[Tensor, "steps steps"], min_separation: int, max_participations: int | None = None
) -> float:
    """Return an upper bound for the min-separation sensitivity of any matrix C.

    With X = |C^T C|, each row gets the largest sum over allowed participations, and then so do the rows' values
    (arXiv 2306.08153, algorithm 3, by dynamic programming). Memory O(steps^2), time O(steps^2 * participations).

    Formal guarantee: an upper bound, since the participations that maximise may differ from row to row; exact if
    columns `min_separation` apart are orthogonal.

    Args:
        strategy (`torch.Tensor` of shape `(steps, steps)`, floating): C, of any structure.
        min_separation (`int`): at least 1.
        max_participations (`int`, *optional*): upper limit; defaults to ceil(steps / min_separation).

    Returns:
        `float`

    Raises:
        ValueError: if C is not square or not finite, or a number is not whole or below 1.

    Example:
        >>> import torch
        >>> from hfnoise.privacy.participation import min_separation_sensitivity_bound
        >>> min_separation_sensitivity_bound(torch.eye(9), min_separation=1)
        3.0
    """
    if strategy.dim() != 2 or strategy.shape[0] != strategy.shape[1] or not strategy.isfinite().all():
        raise ValueError(
            f"strategy must be a square matrix without NaN or infinity, got shape {tuple(strategy.shape)}"
        )
    strategy = strategy.detach().double().cpu()
    gram = (strategy.T @ strategy).abs()
    count = len(_participations(min_separation, len(gram), max_participations))
    by_row = _largest_sum(gram, min_separation, count)
    return _largest_sum(by_row[None], min_separation, count).sqrt().item()


def _largest_sum(values: Float64[Tensor, "row steps"], min_separation: int, count: int) -> Float64[Tensor, " row"]:
    """Return, per row, the largest sum of at most `count` non-negative entries `min_separation` apart.

    best[i], with k entries left to choose from i on, is the larger of values[i] + best_(k-1)[i + min_separation] and
    best[i + 1].
    """
    rows, steps = values.shape
    best = values.new_zeros(rows, steps + min_separation)
    for _ in range(count):
        chosen = values + best[:, min_separation:]
        best[:, :steps] = chosen.flip(1).cummax(1).values.flip(1)
    return best[:, 0]


def _participations(min_separation: int, steps: int, max_participations: int | None) -> range:
    """Return the earliest steps at which one unit can take part."""
    starts = range(0, steps, check_count("min_separation", min_separation))
    return starts if max_participations is None else starts[: check_count("max_participations", max_participations)]


def _padded(coefficients: Coefficients, steps: int) -> Float64[Tensor, " steps"]:
    coefficients = check_coefficients(coefficients)[: check_count("steps", steps)]
    return torch.cat([coefficients, coefficients.new_zeros(steps - coefficients.numel())])


def _check_sign(coefficients: Coefficients) -> None:
    if (check_coefficients(coefficients) < 0).any():
        raise ValueError(
            "the coefficients of C must be non-negative, or the sensitivity and with it the guarantee would be wrong. "
            "If these are coefficients of C^-1 ('banded_inverse_sqrt'), pass inverse_coefficients(them, steps)."
        )
