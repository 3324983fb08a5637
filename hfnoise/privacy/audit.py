"""From canary scores to an audit: guesses that are fixed before looking, the bound, and what could have been found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from hfnoise.privacy.audit_bounds import (
    DEFAULT_SIGNIFICANCE,
    audit_epsilon_ceiling,
    audit_epsilon_lower_bound,
    audit_epsilon_lower_bound_gaussian,
    audit_p_value,
)
from hfnoise.privacy.toeplitz import check_count

__all__ = [
    "AuditEstimate",
    "audit_epsilon_ceiling",
    "audit_epsilon_lower_bound",
    "audit_epsilon_lower_bound_gaussian",
    "audit_p_value",
    "audit_scores",
    "auroc",
    "default_guesses",
    "tpr_at_fpr",
]

Scores = Float64[Tensor, " canary"]

_FEWEST_GUESSES = 8  # a side; 16 right guesses of 16 prove an epsilon of 1.6
# Fair coins give so lopsided a split once in a thousand million audits.
_COIN_SIGNIFICANCE = 1e-9


@dataclass(frozen=True)
class AuditEstimate:
    """What an audit found, and what it was able to find."""

    epsilon_lower_bound: float
    epsilon_ceiling: float  # the bound if every guess had been right
    canaries: int  # m, in and out
    included: int
    guesses_in: int  # those with the highest scores, guessed as in
    guesses_out: int  # those with the lowest scores, guessed as out
    correct: int
    delta: float
    significance: float  # of the whole audit
    candidates: int  # numbers of guesses tried; each was tested at significance / candidates
    assume_gaussian: bool
    auroc: float
    fpr: float
    tpr_at_fpr: float

    def refutes(self, claimed_epsilon: float) -> bool:
        """Return whether the run contradicts a claimed epsilon (at this delta, with this significance).

        Example:
            >>> from hfnoise.privacy.audit import audit_scores
            >>> estimate = audit_scores(range(100, 200), range(100), delta=1e-5, guesses_in=50, guesses_out=50)
            >>> estimate.refutes(1.0), estimate.refutes(8.0)
            (True, False)
        """
        return self.epsilon_lower_bound > claimed_epsilon

    def could_refute(self, claimed_epsilon: float) -> bool:
        """Return whether so many canaries and guesses could have contradicted a claimed epsilon at all.

        Example:
            >>> from hfnoise.privacy.audit import audit_scores
            >>> audit_scores(range(100, 200), range(100), delta=1e-5).could_refute(8.0)
            False
        """
        return self.epsilon_ceiling > claimed_epsilon


def audit_scores(
    in_scores: Sequence[float] | Tensor,
    out_scores: Sequence[float] | Tensor,
    delta: float,
    *,
    significance: float = DEFAULT_SIGNIFICANCE,
    guesses_in: int | None = None,
    guesses_out: int | None = None,
    candidates: Sequence[tuple[int, int]] | None = None,
    assume_gaussian: bool = False,
    fpr: float = 0.01,
) -> AuditEstimate:
    """Return the lower bound on epsilon that canary scores prove, and what the audit could have found.

    The canaries with the highest scores are guessed to be in, those with the lowest to be out, the rest is left open
    (arXiv 2305.08846, section 6). How many is fixed before looking: either by `guesses_in` and `guesses_out`, or all
    of `candidates` are tried, each at significance / len(candidates) (union bound), and the largest bound counts.
    Equal scores at the border are counted against the auditor, since any order among them that knows who was in
    would be a leak of the answer.

    Formal guarantee: that of [`audit_epsilon_lower_bound`], or with `assume_gaussian` that of
    [`audit_epsilon_lower_bound_gaussian`]: with probability at least 1 - significance the bound does not exceed the
    true epsilon, if the numbers of guesses were chosen without a look at the scores and each canary was in by its own
    fair coin. Scores must be functions of what the training released and of the canaries, not of who was in.

    Args:
        in_scores (sequence of `float` or `torch.Tensor` of shape `(included,)`): scores of the canaries that were in;
            higher means more likely in, for example by how much training lowered the loss. At least one.
        out_scores (the same, of shape `(left out,)`): of those that were not.
        delta (`float`): of the claim, in [0, 1].
        significance (`float`, defaults to 0.05): probability of a bound that is too large, in (0, 1).
        guesses_in (`int`, *optional*): guesses "in"; 0 if only `guesses_out` is given.
        guesses_out (`int`, *optional*): guesses "out"; 0 if only `guesses_in` is given.
        candidates (`Sequence[tuple[int, int]]`, *optional*): pairs of the two; by default [`default_guesses`].
        assume_gaussian (`bool`, defaults to `False`): audit Gaussian privacy, a stronger assumption.
        fpr (`float`, defaults to 0.01): false positive rate at which the true positive rate is reported.

    Returns:
        [`AuditEstimate`]

    Raises:
        ValueError: for scores that are empty or NaN, more guesses than canaries, or numbers in and out that fair
            coins do not give.

    Example:
        >>> from hfnoise.privacy.audit import audit_scores
        >>> estimate = audit_scores(range(60, 160), range(100), delta=1e-5, guesses_in=50, guesses_out=50)
        >>> estimate.correct, f"{estimate.epsilon_lower_bound:.2f} of {estimate.epsilon_ceiling:.2f}"
        (100, '3.49 of 3.49')
    """
    inside, outside = _checked_scores("in_scores", in_scores), _checked_scores("out_scores", out_scores)
    included, m = inside.numel(), inside.numel() + outside.numel()
    _check_coins(included, m)
    tried = _tried_guesses(m, guesses_in, guesses_out, candidates)
    level = significance / len(tried)
    bound = audit_epsilon_lower_bound_gaussian if assume_gaussian else audit_epsilon_lower_bound
    found: list[tuple[float, int, int, int]] = []
    for high, low in tried:
        correct = _correct_guesses(inside, outside, high, low)
        found.append((bound(m, high + low, correct, delta, level), correct, high, low))
    epsilon, correct, high, low = max(found)
    return AuditEstimate(
        epsilon_lower_bound=epsilon,
        epsilon_ceiling=max(
            audit_epsilon_ceiling(m, delta, level, guesses, assume_gaussian=assume_gaussian)
            for guesses in {high + low for high, low in tried}
        ),
        canaries=m,
        included=included,
        guesses_in=high,
        guesses_out=low,
        correct=correct,
        delta=delta,
        significance=significance,
        candidates=len(tried),
        assume_gaussian=assume_gaussian,
        auroc=auroc(inside, outside),
        fpr=fpr,
        tpr_at_fpr=tpr_at_fpr(inside, outside, fpr),
    )


def default_guesses(m: int) -> list[tuple[int, int]]:
    """Return the numbers of guesses that are tried by default: as many in as out, m / 2, m / 4, ..., at least 8 each.

    They depend on the number of canaries only, so they are fixed before looking; the union bound over them
    is the price for not knowing the best one.

    Example:
        >>> from hfnoise.privacy.audit import default_guesses
        >>> default_guesses(100)
        [(50, 50), (25, 25), (12, 12)]
    """
    sides = [check_count("m", m, least=2) // 2]
    while sides[-1] // 2 >= _FEWEST_GUESSES:
        sides.append(sides[-1] // 2)
    return [(side, side) for side in sides]


def auroc(in_scores: Sequence[float] | Tensor, out_scores: Sequence[float] | Tensor) -> float:
    """Return the probability that a canary that was in scores above one that was not; ties count one half.

    Args:
        in_scores (sequence of `float` or `torch.Tensor`): as for [`audit_scores`].
        out_scores (sequence of `float` or `torch.Tensor`): as for [`audit_scores`].

    Returns:
        `float`: 0.5 for guessing. jax_privacy's `attack_auroc` is the area under the convex hull of the same curve,
        which is larger, also for guessing.

    Raises:
        ValueError: for scores that are empty or NaN.

    Example:
        >>> from hfnoise.privacy.audit import auroc
        >>> auroc([2.0, 3.0], [1.0, 2.0])
        0.875
    """
    inside, outside = _checked_scores("in_scores", in_scores), _checked_scores("out_scores", out_scores)
    ordered = outside.sort().values
    below, upto = torch.searchsorted(ordered, inside), torch.searchsorted(ordered, inside, right=True)
    return (below + upto).double().mean().item() / (2 * outside.numel())


def tpr_at_fpr(in_scores: Sequence[float] | Tensor, out_scores: Sequence[float] | Tensor, fpr: float = 0.01) -> float:
    """Return the true positive rate of the best threshold rule with a false positive rate of at most `fpr`.

    Rules may draw between two thresholds, so the curve is the convex hull of the thresholds' points, as in
    jax_privacy. The best rule is chosen on the same scores: a description, not a bound.

    Args:
        in_scores (sequence of `float` or `torch.Tensor`): as for [`audit_scores`].
        out_scores (sequence of `float` or `torch.Tensor`): as for [`audit_scores`].
        fpr (`float`, defaults to 0.01): in [0, 1].

    Returns:
        `float`

    Raises:
        ValueError: for scores that are empty or NaN, or `fpr` out of range.

    Example:
        >>> from hfnoise.privacy.audit import tpr_at_fpr
        >>> tpr_at_fpr([2.0, 3.0], [1.0, 2.0], fpr=0.25)
        0.75
    """
    if isinstance(fpr, bool) or not 0 <= fpr <= 1:
        raise ValueError(f"fpr must be in [0, 1], got {fpr!r}.")
    corners = roc_corners(_checked_scores("in_scores", in_scores), _checked_scores("out_scores", out_scores))
    for (left, low), (right, high) in zip(corners, corners[1:], strict=False):
        if left <= fpr < right:
            return low + (fpr - left) / (right - left) * (high - low)
    return 1.0


def roc_corners(inside: Scores, outside: Scores) -> list[tuple[float, float]]:
    """Return the corners (false, true positive rate) of the convex hull of the ROC curve, from left to right.

    Example:
        >>> import torch
        >>> from hfnoise.privacy.audit import roc_corners
        >>> roc_corners(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
        [(0.0, 0.5), (0.5, 1.0), (1.0, 1.0)]
    """
    thresholds = torch.cat([inside, outside]).sort(descending=True).values
    true = inside.numel() - torch.searchsorted(inside.sort().values, thresholds)
    false = outside.numel() - torch.searchsorted(outside.sort().values, thresholds)
    corners: list[tuple[int, int]] = [(0, 0)]
    for point in zip(false.tolist(), true.tolist(), strict=True):
        # Andrew's monotone chain, in whole numbers: the last corner goes if it lies on or below the new edge. At the
        # left end that also removes (0, 0) where a threshold finds canaries without a false positive.
        while corners and (corners[-1][0] == point[0] or _below(corners[-2:], point)):
            corners.pop()
        corners.append(point)
    return [(x / outside.numel(), y / inside.numel()) for x, y in corners]


def _below(corners: list[tuple[int, int]], point: tuple[int, int]) -> bool:
    """Return whether the second of two corners is on or below the line from the first to a point."""
    if len(corners) < 2:
        return False
    (first_x, first_y), (x, y) = corners
    return (y - first_y) * (point[0] - x) <= (point[1] - y) * (x - first_x)


def _correct_guesses(inside: Scores, outside: Scores, high: int, low: int) -> int:
    """Return the right ones among `high` guesses "in" and `low` guesses "out", the fewest that ties allow."""
    return _found_on_top(inside, outside, high) + _found_on_top(-outside, -inside, low)


def _found_on_top(wanted: Scores, others: Scores, count: int) -> int:
    """Return how many of the `count` highest scores are wanted ones, if of equal scores the others come first."""
    if count == 0:
        return 0
    border = torch.cat([wanted, others]).topk(count).values[-1]
    certain = int((wanted > border).sum())
    return certain + max(0, count - certain - int((others >= border).sum()))


def _tried_guesses(
    m: int, guesses_in: int | None, guesses_out: int | None, candidates: Sequence[tuple[int, int]] | None
) -> list[tuple[int, int]]:
    fixed = guesses_in is not None or guesses_out is not None
    if fixed and candidates is not None:
        raise ValueError("guesses_in and guesses_out fix one audit, candidates are several. Give one of the two.")
    if fixed:
        candidates = [(guesses_in or 0, guesses_out or 0)]
    tried = default_guesses(m) if candidates is None else list(candidates)
    for high, low in tried:
        check_count("guesses_in", high, least=0)
        check_count("guesses_out", low, least=0)
        if not 1 <= high + low <= m:
            raise ValueError(
                f"{high} guesses in and {low} guesses out for {m} canaries: together they must be between 1 and {m}."
            )
    if not tried:
        raise ValueError("candidates is empty; name at least one pair (guesses in, guesses out).")
    return tried


def _checked_scores(name: str, scores: Sequence[float] | Tensor) -> Scores:
    values = torch.as_tensor(scores if isinstance(scores, Tensor) else list(scores)).detach().double().cpu()
    if values.dim() != 1 or values.numel() == 0 or values.isnan().any():
        raise ValueError(
            f"{name} must be a non-empty vector without NaN, one score per canary; got shape {tuple(values.shape)} "
            f"with {int(values.isnan().sum())} NaN. Give a canary without a score the lowest one, whoever it was."
        )
    return values


def _check_coins(included: int, m: int) -> None:
    fewer = min(included, m - included)
    # Two-sided: P[Binomial(m, 1/2) <= fewer or >= m - fewer].
    if 2 * audit_p_value(m, m, m - fewer, 0.0, 0.0) < _COIN_SIGNIFICANCE:
        raise ValueError(
            f"{included} of {m} canaries were in, which fair coins do not give: the bound holds for canaries that are "
            "each included with probability 1/2, independently. Draw one coin per canary."
        )
