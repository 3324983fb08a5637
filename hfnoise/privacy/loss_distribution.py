"""Accounting by privacy loss distributions (PLD): tight for Poisson-sampled Gaussians, rounded pessimistically.

The distribution of the privacy loss lies on a grid (Connect the Dots, arXiv 2207.04380) and is composed by fast
Fourier transforms (arXiv 1906.03049); that dominating pairs compose, also adaptively, is theorem 10 of arXiv
2106.08567. All of it is dp-accounting's; this file chooses the grid and keeps what is used again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from hfnoise.privacy.dp_library import dp_accounting
from hfnoise.privacy.renyi import Releases, renyi_epsilon

FINEST_INTERVAL = 1e-4  # dp-accounting's default; from 1e-3 to it epsilon falls by 0.15 % at most, beyond it by less
# Above an epsilon of 10 a wider grid has the same relative error, and distributions of the same size.
_INTERVAL_PER_EPSILON = 1e-5
# Beyond it nothing is guaranteed, and exp(interval) of its grid would overflow.
_MOST_EPSILON = 1e6
# Their sums are short and always converge; fractional orders cost up to 0.1 s for each new noise multiplier.
_QUICK_ORDERS = (2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0)
# One round's distribution then takes about 40 MB. Reached by noise multipliers below about 0.3.
_MOST_POINTS = 200_000
# The logarithm of the mass that dp-accounting cuts off the tails of the noise, and the quantile where it lies.
_TAIL_QUANTILE = 10.0
# By rounding, the transform of n rounds errs in delta by up to 2.4e-17 n, also downwards: measured against the
# Gaussian mechanism, whose delta is known, for n from 100 to 10 million. Half a unit in the last place per round is
# four times that, and is taken off the delta that is asked for.
_ROUNDING_PER_ROUND = 2.0**-53


def loss_distribution_epsilon(releases: Sequence[Releases], delta: float, interval: float | None = None) -> float:
    """Return the epsilon of all the releases together, by privacy loss distributions.

    Formal guarantee: the releases together are (epsilon, delta)-differentially private under adding or removing one
    unit, in both directions. The grid rounds upwards; rounding of the transforms is taken off `delta` beforehand
    (2^-53 a round, four times the largest error measured).

    Args:
        releases (`Sequence[Releases]`): composed; none of them gives 0.
        delta (`float`): in (0, 1).
        interval (`float`, *optional*): width of the grid; [`grid_interval`] by default. A wider one gives a larger
            epsilon, quicker.

    Raises:
        ValueError: if `delta` is too small for 64-bit transforms of so many rounds.

    Example:
        >>> from hfnoise.privacy.loss_distribution import loss_distribution_epsilon
        >>> from hfnoise.privacy.renyi import Releases
        >>> f"{loss_distribution_epsilon([Releases(0.05, 3.0, 300)], 1e-5):.3f}"
        '1.159'
    """
    if not releases:
        return 0.0
    rounds = sum(release.rounds for release in releases)
    rounding = _ROUNDING_PER_ROUND * rounds
    if rounding > delta / 2:
        raise ValueError(
            f"delta={delta} cannot be told from the rounding of {rounds} composed rounds "
            f"({rounding:.1e}), and an epsilon for it would be no guarantee; use a larger delta, or "
            "accountant='rdp', which composes exactly."
        )
    width = grid_interval(releases, delta) if interval is None else interval
    if math.isinf(width):
        return math.inf
    return _epsilon_of(_composed(tuple(releases), width), delta - rounding)


def grid_interval(releases: Sequence[Releases], delta: float) -> float:
    """Return the width of the grid: 1e-4, and wider where epsilon exceeds 10 or the noise is tiny, to bound memory.

    Infinity, for an epsilon that is infinity, where the Rényi bound is above a million.

    Example:
        >>> from hfnoise.privacy.loss_distribution import grid_interval
        >>> from hfnoise.privacy.renyi import Releases
        >>> grid_interval([Releases(0.01, 1.0, 1000)], 1e-5)
        0.0001
    """
    least = max(FINEST_INTERVAL, max(_loss_range(release) for release in releases) / _MOST_POINTS)
    # The Rényi bound costs milliseconds, and may be far too large: a distribution on a coarser grid says more.
    bound = min(
        renyi_epsilon(releases, delta, _QUICK_ORDERS),
        sum(release.rounds * _loss_range(release) for release in releases),
    )
    if bound > _MOST_EPSILON:
        return math.inf
    if bound * _INTERVAL_PER_EPSILON > least:
        coarse = _composed(tuple(releases), _rounded_up(10 * bound * _INTERVAL_PER_EPSILON))
        bound = min(bound, _epsilon_of(coarse, delta))
    return _rounded_up(max(least, bound * _INTERVAL_PER_EPSILON))


def _epsilon_of(distribution: Any, delta: float) -> float:
    import numpy

    # Above an epsilon of 709 a quotient of masses may overflow: to infinity, which is an upper bound still.
    with numpy.errstate(over="ignore"):
        return float(distribution.get_epsilon_for_delta(delta))


def _rounded_up(interval: float) -> float:
    """Return the next 1e-4 * 2^n, so that the grids of similar mechanisms agree."""
    return FINEST_INTERVAL * 2.0 ** max(0, math.ceil(math.log2(interval / FINEST_INTERVAL) - 1e-9))


def _loss_range(release: Releases) -> float:
    """Return about the largest privacy loss of one round within dp-accounting's tails (of all rounds, unsampled)."""
    rate, noise, rounds = release
    if rate == 1:
        noise /= math.sqrt(rounds)
    largest = _TAIL_QUANTILE / noise + 0.5 / noise**2
    return 2 * largest if rate == 1 else max(largest + math.log(rate), 0.0) - math.log1p(-rate)


@lru_cache(maxsize=4)
def _composed(releases: tuple[Releases, ...], interval: float) -> Any:
    """Return the composed distribution; what comes before the last release is kept for the next question."""
    *earlier, last = releases
    if last.sampling_probability == 1:  # n Gaussians are one with the noise divided by sqrt(n)
        composed = _one_round(1.0, last.noise_multiplier / math.sqrt(last.rounds), interval)
    else:
        composed = _one_round(last.sampling_probability, last.noise_multiplier, interval).self_compose(last.rounds)
    return _composed(tuple(earlier), interval).compose(composed) if earlier else composed


# Two, because they are large, and searches over the number of rounds ask for the same one again.
@lru_cache(maxsize=2)
def _one_round(sampling_probability: float, noise_multiplier: float, interval: float) -> Any:
    dp_accounting()
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier, sampling_prob=sampling_probability, value_discretization_interval=interval
    )
