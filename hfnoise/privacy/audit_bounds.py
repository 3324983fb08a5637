"""What correct guesses about canaries prove: lower bounds on epsilon from one training run.

m canaries, each included by an independent fair coin that the training never sees. After training somebody guesses for
some of them whether they were in. If the training is (epsilon, delta)-private, the number of correct guesses is nearly
Binomial(guesses, e^epsilon / (1 + e^epsilon)) at most; more of them refute the claim (arXiv 2305.08846). Everything
is float64 on the CPU.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from statistics import NormalDist

import torch
from jaxtyping import Float64
from torch import Tensor

from hfnoise.privacy.toeplitz import check_count

DEFAULT_SIGNIFICANCE = 0.05
_EPSILON_TOLERANCE = 1e-9
_STANDARD_NORMAL = NormalDist()


def audit_p_value(m: int, guesses: int, correct: int, delta: float, epsilon: float) -> float:
    """Return the p-value of the claim that a training run is (epsilon, delta)-private, given correct guesses.

    f(v) + 2 m delta max_(1 <= i <= v) (f(v - i) - f(v)) / i, at most 1, with f(v) = P[Binomial(guesses, q) >= v] and
    q = e^epsilon / (1 + e^epsilon) (arXiv 2305.08846, theorem 5.2). The binomial probabilities are exact to
    1e-11: they are computed from their mode outwards by ratios, so nothing overflows, and differences of tails are
    sums.

    Formal guarantee: if the claim holds, this value is at most p with probability at most p, provided that: each of
    the m canaries was included by its own fair coin; a canary is one unit, in the sense of the claim; the number of
    guesses was fixed before looking at the scores; and the guesses depend on the coins through the released model
    only. It is m, not `guesses`, that multiplies delta.

    Args:
        m (`int`): canaries, in and out, at least 1.
        guesses (`int`): canaries that a guess was made for, in [0, m].
        correct (`int`): right guesses, in [0, guesses].
        delta (`float`): of the claim, in [0, 1].
        epsilon (`float`): of the claim, at least 0.

    Returns:
        `float`: in [0, 1].

    Raises:
        ValueError: for numbers that cannot have come from an audit.

    Example:
        >>> from hfnoise.privacy.audit_bounds import audit_p_value
        >>> f"{audit_p_value(m=100, guesses=100, correct=75, delta=0.0, epsilon=1.0986122887):.4f}"
        '0.5535'
    """
    _check_counts(m, guesses, correct)
    _check_fraction("delta", delta, 0, 1)
    if isinstance(epsilon, bool) or not isinstance(epsilon, numbers.Real) or not epsilon >= 0:
        raise ValueError(f"epsilon must be a number of at least 0, got {epsilon!r}.")
    if correct == 0 or epsilon == math.inf:
        return 1.0
    probability = _binomial(guesses, float(epsilon))
    tail = probability[correct:].sum().item()
    if delta == 0:
        return min(1.0, tail)
    # f(v - i) - f(v) = P[v - i <= Binomial < v], summed from v - 1 down.
    below = probability[:correct].flip(0).cumsum(0)
    steepest = (below / torch.arange(1, correct + 1, dtype=torch.float64)).max().item()
    return min(1.0, tail + 2 * m * delta * steepest)


def audit_epsilon_lower_bound(
    m: int, guesses: int, correct: int, delta: float, significance: float = DEFAULT_SIGNIFICANCE
) -> float:
    """Return the largest epsilon that correct guesses refute: that with [`audit_p_value`] equal to `significance`.

    It bounds from below what the training can claim. It certifies nothing: with a perfect attack it stays far below
    the truth, about half of it with 1000 canaries, so a small bound is no sign of privacy.

    Formal guarantee: with probability at least 1 - significance, no training that is (epsilon, delta)-private for an
    epsilon below the returned one gives it, under the conditions of [`audit_p_value`]. No assumption about the shape
    of the mechanism.

    Args:
        m (`int`): canaries, in and out, at least 1.
        guesses (`int`): number of guesses, in [0, m], fixed before looking.
        correct (`int`): right guesses, in [0, guesses].
        delta (`float`): in [0, 1].
        significance (`float`, defaults to 0.05): probability of a bound that is too large, in (0, 1).

    Returns:
        `float`: at least 0; accurate to 1e-9, rounded down.

    Raises:
        ValueError: for numbers that cannot have come from an audit.

    Example:
        >>> from hfnoise.privacy.audit_bounds import audit_epsilon_lower_bound
        >>> f"{audit_epsilon_lower_bound(m=1000, guesses=100, correct=75, delta=1e-4):.3f}"
        '0.673'
    """
    _check_counts(m, guesses, correct)
    _check_fraction("delta", delta, 0, 1)
    _check_significance(significance)
    return _largest(lambda epsilon: audit_p_value(m, guesses, correct, delta, epsilon) <= significance)


def audit_epsilon_lower_bound_gaussian(
    m: int, guesses: int, correct: int, delta: float, significance: float = DEFAULT_SIGNIFICANCE
) -> float:
    """Return the lower bound on epsilon at `delta` if the whole training is as private as one Gaussian mechanism.

    The audit of f-differential privacy (arXiv 2410.22235, `audit_rh_with_cap`) with the trade-off function of the
    mu-Gaussian mechanism, whose blow-up inverse is Phi(Phi^-1(x) - mu): it finds the largest mu that the guesses
    refute, and returns the epsilon at which that mechanism is (epsilon, delta)-private (arXiv 1805.06530, theorem 8).
    Tighter than [`audit_epsilon_lower_bound`] because it uses the whole trade-off curve and not one point of it.

    Formal guarantee: as [`audit_epsilon_lower_bound`], but only against mechanisms whose trade-off curve is Gaussian.
    That of DP-SGD is so only for sample rate 1, and nearly so after many steps; for others this refutes "as private
    as the Gaussian mechanism with this (epsilon, delta)", which is a stronger claim than (epsilon, delta) itself.

    Args:
        m (`int`): canaries, in and out, at least 1.
        guesses (`int`): number of guesses, in [0, m], fixed before looking.
        correct (`int`): right guesses, in [0, guesses].
        delta (`float`): in (0, 1); the Gaussian mechanism has no epsilon at 0.
        significance (`float`, defaults to 0.05): in (0, 1).

    Returns:
        `float`: at least 0.

    Raises:
        ValueError: for numbers that cannot have come from an audit, and delta of 0.

    Example:
        >>> from hfnoise.privacy.audit_bounds import audit_epsilon_lower_bound_gaussian
        >>> f"{audit_epsilon_lower_bound_gaussian(m=1000, guesses=100, correct=75, delta=1e-4):.3f}"
        '0.842'
    """
    _check_counts(m, guesses, correct)
    _check_fraction("delta", delta, 0, 1)
    if delta in (0, 1):
        raise ValueError(f"delta={delta}: a Gaussian mechanism has an epsilon for delta in (0, 1) only.")
    _check_significance(significance)
    if correct == 0:
        return 0.0
    mu = _largest(lambda mu: _refutes_gaussian(mu, m, guesses, correct, significance))
    return gaussian_epsilon(mu, delta)


def audit_epsilon_ceiling(
    m: int,
    delta: float,
    significance: float = DEFAULT_SIGNIFICANCE,
    guesses: int | None = None,
    *,
    assume_gaussian: bool = False,
) -> float:
    """Return the lower bound that an audit reaches if all guesses are right: what it is able to detect at most.

    A run that leaks everything is not told from one of this epsilon. Quote it beside every bound.

    Args:
        m (`int`): canaries, at least 1.
        delta (`float`): as for the bound.
        significance (`float`, defaults to 0.05): in (0, 1).
        guesses (`int`, *optional*): in [0, m]; defaults to m. With delta > 0 fewer guesses can give a larger ceiling.
        assume_gaussian (`bool`, defaults to `False`): of [`audit_epsilon_lower_bound_gaussian`].

    Returns:
        `float`

    Raises:
        ValueError: for numbers that cannot come from an audit.

    Example:
        >>> from hfnoise.privacy.audit_bounds import audit_epsilon_ceiling
        >>> [f"{audit_epsilon_ceiling(m, delta=1e-5):.2f}" for m in (100, 1000)]
        ['3.49', '5.78']
    """
    guesses = m if guesses is None else guesses
    bound = audit_epsilon_lower_bound_gaussian if assume_gaussian else audit_epsilon_lower_bound
    return bound(m, guesses, guesses, delta, significance)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the epsilon of the mu-Gaussian mechanism (sensitivity over noise is mu) at `delta`, in (0, 1).

    The root of delta = Phi(mu / 2 - epsilon / mu) - e^epsilon Phi(-mu / 2 - epsilon / mu) (arXiv 1805.06530, eq. 6).

    Example:
        >>> from hfnoise.privacy.audit_bounds import gaussian_epsilon
        >>> f"{gaussian_epsilon(1.0, 1e-5):.3f}"
        '4.377'
    """
    if mu == 0:
        return 0.0

    def exceeds(epsilon: float) -> bool:
        # e^epsilon alone can overflow, and the tail underflow; their product is at most 1.
        tail = torch.special.log_ndtr(torch.tensor(-mu / 2 - epsilon / mu, dtype=torch.float64)).item()
        return _normal_cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + tail) >= delta

    return _largest(exceeds)


def _binomial(trials: int, epsilon: float) -> Float64[Tensor, " outcome"]:
    """Return P[Binomial(trials, 1 / (1 + e^-epsilon)) = k] for k = 0 ... trials.

    P[k + 1] / P[k] = (trials - k) / (k + 1) e^epsilon. The logs are added up from the mode outwards, where they are
    small, and the probabilities scaled to sum to 1: no logarithm of a factorial, whose rounding grows with trials.
    """
    index = torch.arange(trials, dtype=torch.float64)
    log_ratio = torch.log((trials - index) / (index + 1)) + epsilon
    mode = min(trials, math.floor((trials + 1) / (1 + math.exp(-epsilon))))
    below = -log_ratio[:mode].flip(0).cumsum(0).flip(0)
    above = log_ratio[mode:].cumsum(0)
    weights = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).exp()
    return weights / weights.sum()


def _refutes_gaussian(mu: float, m: int, guesses: int, correct: int, significance: float) -> bool:
    """Return whether the guesses refute mu-Gaussian privacy (arXiv 2410.22235, `audit_rh_with_cap`).

    If the claim fails with probability `significance`, h and r follow how much probability each smaller number of
    correct guesses must have; they may sum to guesses / m at most.
    """
    right = significance * correct / m
    wrong = significance * (guesses - correct) / m
    for count in range(correct - 1, -1, -1):
        shifted = 0.0 if right <= 0 else 1.0 if right >= 1 else _normal_cdf(_STANDARD_NORMAL.inv_cdf(right) - mu)
        if shifted <= wrong:
            break  # neither will change any more
        right = min(1.0, right + count / (guesses - count) * (shifted - wrong))
        wrong = shifted
    return right + wrong > guesses / m


def _normal_cdf(value: float) -> float:
    # NormalDist.cdf is 1 + erf in some versions, which loses the lower tail.
    return 0.5 * math.erfc(-value / math.sqrt(2))


def _largest(holds: Callable[[float], bool]) -> float:
    """Return the largest value of at least 0 for which a statement holds that is true below it and false above."""
    if not holds(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while holds(high):
        low, high = high, 2 * high
    while high - low > _EPSILON_TOLERANCE * max(1.0, low):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _check_counts(m: int, guesses: int, correct: int) -> None:
    check_count("m, the number of canaries,", m)
    check_count("guesses", guesses, least=0)
    check_count("correct", correct, least=0)
    if not correct <= guesses <= m:
        raise ValueError(
            f"{correct} correct of {guesses} guesses about m={m} canaries is impossible: there is at most one guess "
            "per canary, and at most all are right. m counts the canaries that were left out, too."
        )


def _check_significance(significance: float) -> None:
    _check_fraction("significance", significance, 0, 1)
    if significance in (0, 1):
        raise ValueError(f"significance is the probability of a wrong bound, in (0, 1), got {significance}.")


def _check_fraction(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not low <= value <= high:
        raise ValueError(f"{name} must be a number in [{low}, {high}], got {value!r}.")
