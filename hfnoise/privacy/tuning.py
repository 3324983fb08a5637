"""What a private hyper-parameter search costs: a random number of trials, of which only the best is released.

Papernot & Steinke, arXiv 2110.03620. K is drawn from a known law and kept secret; K times a candidate is drawn
independently from the search space and the whole private training is run; the run with the best score is released,
and nothing else: not K, not the losers, not a score or a log.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from hfnoise.privacy.accounting import Mechanism, Search, check_delta, composed_epsilon
from hfnoise.privacy.dp_library import dp_accounting
from hfnoise.privacy.loss_distribution import grid_interval
from hfnoise.privacy.renyi import Releases, renyi_curve, renyi_orders
from hfnoise.privacy.trial_counts import PoissonCount, TruncatedNegativeBinomial, trial_count

# The series of fractional orders between 1 and 2 does not converge at large sample rates, and costs a second to try.
_LARGE_RATE = 0.1
# Rounding of the transforms that compose privacy loss distributions, per round: four times the largest error
# measured, as in loss_distribution.py.
_ROUNDING_PER_ROUND = 2.0**-53
_MOST_NOISE, _LEAST_NOISE = 1e6, 2.0**-6
_SLACK = 0.003  # of a calibrated noise multiplier, relative


def tuned_epsilon(
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    expected_trials: float,
    eta: float = 0.0,
    distribution: str = "negative_binomial",
    *,
    bands: int = 1,
) -> float:
    """Return the epsilon of a whole hyper-parameter search over private trainings of one noise, rate and length.

    Formal guarantee: the released run is (epsilon, delta)-private under adding or removing one unit, if K follows
    the law `trial_count(expected_trials, eta, distribution)` and is secret, as is all but the winner; candidates are
    drawn independently of the data and of each other; the score of a run is part of what that run releases privately
    (computed from its released model on public data, or with noise that is accounted for); and every candidate has a
    Rényi curve that is at most that of these numbers: learning rate, clip norm, optimiser, rank and schedule may
    differ, sample rate, noise and steps only towards more privacy. A search that adapts to earlier scores (TPE), has
    a fixed number of trials or shows its losses (as `Trainer.hyperparameter_search`) is not covered.

    Args:
        noise_multiplier (`float`): of every run, above 0.
        sample_rate (`float`): expected batch over number of units, in (0, 1].
        steps (`int`): of every run, at least 1.
        delta (`float`): in (0, 1).
        expected_trials (`float`): E[K], at least 1.
        eta (`float`, defaults to 0.0): above -1. Smaller costs less and draws few trials more often.
        distribution (`str`, defaults to `"negative_binomial"`): or `"poisson"`, for small epsilon or few trials.
        bands (`int`, defaults to 1): bands of correlated noise.

    Returns:
        `float`: in nats.

    Raises:
        TypeError, ValueError: for bad arguments.
        ImportError: without dp-accounting.

    Example:
        >>> from hfnoise.privacy.tuning import tuned_epsilon
        >>> f"{tuned_epsilon(2.0, 1.0, 1, 1e-5, expected_trials=10, eta=-0.5):.2f}"
        '3.21'
    """
    mechanism = Mechanism(sample_rate, noise_multiplier, steps, bands)
    if noise_multiplier == 0:
        raise ValueError("noise_multiplier=0 gives no run a guarantee, and a search over such runs has none either.")
    probability, rounds = mechanism.sampling_probability, mechanism.rounds
    orders = tuple(order for order in renyi_orders() if order >= 2 or probability <= _LARGE_RATE or probability == 1)
    curve = [rounds * value for value in renyi_curve(probability, float(noise_multiplier), orders)]
    delta_of = None
    if distribution == "poisson" and rounds:

        def delta_of(epsilons: Sequence[float]) -> list[float]:
            return _loss_distribution_deltas(mechanism, epsilons, delta)

    return tuned_epsilon_from_curve(orders, curve, delta, expected_trials, eta, distribution, delta_of=delta_of)


def calibrate_search_noise(
    target_epsilon: float,
    target_delta: float,
    search: Search,
    *,
    spent: Sequence[Mechanism | Search] = (),
    accountant: str = "pld",
) -> float:
    """Return the noise multiplier with which a whole search, and what is spent, stay inside a budget.

    Formal guarantee: [`~hfnoise.privacy.accounting.composed_epsilon`] of the search with the returned noise and of
    `spent` is at most `target_epsilon`; it was evaluated for this number, which is within 0.3 % of the least.

    Args:
        target_epsilon (`float`): above 0.
        target_delta (`float`): in (0, 1).
        search ([`Search`]): its noise multiplier is not read.
        spent (`Sequence[Mechanism | Search]`, *optional*): what the ledger of these units holds already.
        accountant (`str`, defaults to `"pld"`): of what is spent.

    Returns:
        `float`

    Raises:
        TypeError, ValueError: for bad arguments, and if no noise is enough.

    Example:
        >>> from hfnoise.privacy.accounting import Mechanism, Search
        >>> from hfnoise.privacy.tuning import calibrate_search_noise
        >>> f"{calibrate_search_noise(3.21, 1e-5, Search(Mechanism(1.0, 1.0, 1), 10, eta=-0.5)):.2f}"
        '2.01'
    """
    check_delta(target_delta, "target_delta")
    if isinstance(target_epsilon, bool) or not 0 < target_epsilon < math.inf:
        raise ValueError(f"target_epsilon={target_epsilon!r} is no privacy budget; it must be above 0 and finite.")

    def passes(noise: float) -> bool:
        whole = replace(search, mechanism=replace(search.mechanism, noise_multiplier=noise))
        return composed_epsilon([*spent, whole], target_delta, accountant) <= target_epsilon

    high = 1.0
    while not passes(high):
        high *= 2
        if high > _MOST_NOISE:
            raise ValueError(
                f"no noise multiplier up to {_MOST_NOISE:g} keeps a search with expected_trials="
                f"{search.expected_trials:g} inside target_epsilon={target_epsilon:g}, beside what is spent. Expect "
                "fewer trials, or raise the target to what you accept in all."
            )
    low = high / 2
    while high == 1.0 and passes(low) and low > _LEAST_NOISE:
        low /= 2
    while high / low > 1 + _SLACK:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


def tuned_epsilon_from_curve(
    orders: Sequence[float],
    divergences: Sequence[float],
    delta: float,
    expected_trials: float,
    eta: float = 0.0,
    distribution: str = "negative_binomial",
    *,
    delta_of: Callable[[Sequence[float]], Sequence[float]] | None = None,
) -> float:
    """Return the epsilon of a hyper-parameter search whose runs all obey one Rényi curve.

    With e(a) the curve, c(b) = (1 + eta) ((1 - 1 / b) e(b) + ln(1 / gamma) / b) and E = E[K], the search has the curve
    e(a) + min_b c(b) + ln(E) / (a - 1) for the truncated negative binomial (theorem 2), and
    e(a) + E d + ln(E) / (a - 1), where a run is (ln(1 + 1 / (a - 1)), d)-private, for Poisson (theorem 6). It is
    converted to epsilon by arXiv 2004.00010, proposition 12, at the best order.

    Formal guarantee: that of [`tuned_epsilon`], if the curve bounds the Rényi divergence of every run in both
    directions of adding and removing one unit.

    Args:
        orders (`Sequence[float]`): above 1.
        divergences (`Sequence[float]`): of one whole run at each order, at least 0, in nats; infinity or NaN where
            it is not known (an order whose series did not converge), which leaves the order out.
        delta (`float`): in (0, 1).
        expected_trials (`float`): E[K], at least 1.
        eta (`float`, defaults to 0.0): above -1.
        distribution (`str`, defaults to `"negative_binomial"`): or `"poisson"`.
        delta_of (`Callable`, *optional*): returns, for ascending epsilons, the deltas of one run; for `"poisson"`. By
            default they follow from the curve, which is looser than privacy loss distributions.

    Returns:
        `float`

    Raises:
        ValueError: for bad arguments, or if no order is left.

    Example:
        >>> from hfnoise.privacy.tuning import tuned_epsilon_from_curve
        >>> orders = [1 + k / 10 for k in range(1, 500)]
        >>> curve = [order / 50 for order in orders]  # one Gaussian of noise multiplier 5
        >>> [f"{tuned_epsilon_from_curve(orders, curve, 1e-5, trials):.2f}" for trials in (1, 10)]
        ['0.79', '1.42']
    """
    check_delta(delta)
    if len(orders) != len(divergences):
        raise ValueError(f"{len(orders)} orders and {len(divergences)} divergences; they must be as many.")
    if any(not 1 < order < math.inf for order in orders) or any(divergence < 0 for divergence in divergences):
        raise ValueError("orders must be finite and above 1, and divergences at least 0, or the bound would not hold.")
    known = zip(orders, divergences, strict=True)
    # From large orders to small, so that the epsilons asked of `delta_of` ascend, as dp-accounting wants them.
    curve = sorted(((float(order), float(value)) for order, value in known if math.isfinite(value)), reverse=True)
    if not curve:
        raise ValueError(
            "no order has a finite divergence, so nothing bounds the search. Give orders such as those of "
            "hfnoise.privacy.renyi.renyi_orders(), and more noise."
        )
    law = trial_count(expected_trials, eta, distribution)
    if isinstance(law, TruncatedNegativeBinomial):
        constant = _selection_cost(curve, law)
        costs = [constant] * len(curve)
    else:
        assert isinstance(law, PoissonCount)
        allowed = [math.log1p(1 / (order - 1)) for order, _ in curve]
        deltas = [_curve_delta(curve, epsilon) for epsilon in allowed] if delta_of is None else delta_of(allowed)
        costs = [law.mu * value for value in deltas]
    log_trials = math.log(expected_trials)
    return min(
        max(0.0, _converted(order, divergence + cost + log_trials / (order - 1), delta))
        for (order, divergence), cost in zip(curve, costs, strict=True)
    )


def _selection_cost(curve: Sequence[tuple[float, float]], law: TruncatedNegativeBinomial) -> float:
    """Return the smallest (1 + eta) ((1 - 1 / b) e(b) + ln(1 / gamma) / b), b = 1 included: it needs no e(1)."""
    return (1 + law.eta) * min(
        law.log_inverse_gamma,
        *((1 - 1 / order) * divergence + law.log_inverse_gamma / order for order, divergence in curve),
    )


def _converted(order: float, divergence: float, delta: float) -> float:
    return divergence + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)


def _curve_delta(curve: Sequence[tuple[float, float]], epsilon: float) -> float:
    """Return the delta of one run at an epsilon: [`_converted`] solved for delta, at the best order."""
    return min(
        1.0,
        *(
            math.exp(min(0.0, (order - 1) * (divergence - epsilon + math.log1p(-1 / order)) - math.log(order)))
            for order, divergence in curve
        ),
    )


def _loss_distribution_deltas(mechanism: Mechanism, epsilons: Sequence[float], delta: float) -> list[float]:
    """Return the deltas of one run at epsilons, by privacy loss distributions: pessimistic, in both directions."""
    dp_accounting()
    from dp_accounting.pld import privacy_loss_distribution

    probability, noise, rounds = mechanism.sampling_probability, mechanism.noise_multiplier, mechanism.rounds
    one_round = privacy_loss_distribution.from_gaussian_mechanism(
        noise,
        sampling_prob=probability,
        value_discretization_interval=grid_interval([Releases(probability, noise, rounds)], delta),
    )
    composed = one_round.self_compose(rounds)
    rounding = _ROUNDING_PER_ROUND * rounds
    return [min(1.0, float(value) + rounding) for value in composed.get_delta_for_epsilon(list(epsilons))]
