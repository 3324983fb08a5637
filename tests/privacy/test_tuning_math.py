"""The cost of a private search: pins, dp-accounting, and the exact privacy of a search whose law is known."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfnoise.privacy.renyi import renyi_curve, renyi_orders
from hfnoise.privacy.trial_counts import PoissonCount, TruncatedNegativeBinomial, trial_count
from hfnoise.privacy.tuning import tuned_epsilon, tuned_epsilon_from_curve

DELTA = 1e-5
# One run: sample rate 0.01, noise multiplier 1, 1000 steps; expected trials -> eta of -0.5, 0, 1, and Poisson.
PINS = {10: (3.16, 3.53, 4.11, 3.55), 50: (3.63, 4.09, 4.94, 7.93), 200: (4.00, 4.52, 5.60, 16.6)}
ORDERS = [1 + k / 10 for k in range(1, 100)] + [11 + k / 2 for k in range(100)]


def gaussian_curve(mu):
    return [order * mu**2 / 2 for order in ORDERS]


# -- the law of K ---------------------------------------------------------------------------------------------------


@given(st.floats(1, 60), st.floats(-0.9, 4), st.booleans())
@settings(max_examples=60)
def test_law_sums_to_one_with_its_mean(expected, eta, poisson):
    law = trial_count(expected, eta, "poisson" if poisson else "negative_binomial")
    assert law.mean == pytest.approx(expected, rel=1e-9)
    last = 2000
    total = math.fsum(law.pmf(k) for k in range(last))
    assert total <= 1 + 1e-9
    steep = max(law._ratio(last), law._last_ratio())
    tail = law.pmf(last) / (1 - steep) if steep < 1 else 1.0
    assert total + tail >= 1 - 1e-9
    if tail * last < 1e-9:
        assert math.fsum(k * law.pmf(k) for k in range(last)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("eta", [-0.7, -0.5, 0.0, 1e-12, 0.5, 1.0, 3.0])
def test_law_is_the_formula(eta):
    law = trial_count(12, eta)
    gamma, kept = law.gamma, 1 - law.gamma
    for k in (1, 2, 3, 17):
        if abs(eta) < 1e-6:
            expected = kept**k / (k * math.log(1 / gamma))
        else:
            product = math.prod((index + eta) / (index + 1) for index in range(k))
            expected = kept**k / (gamma**-eta - 1) * product
        assert law.pmf(k) == pytest.approx(expected, rel=1e-6 if eta == 1e-12 else 1e-9)
    assert law.pmf(0) == law.pmf(-3) == 0


def test_half_of_all_searches_try_one_candidate():
    """The warning of the specification: P[K = 1] = (1 + sqrt(gamma)) / 2 at eta = -0.5."""
    law = trial_count(200, eta=-0.5)
    assert law.pmf(1) == pytest.approx((1 + math.sqrt(law.gamma)) / 2)


@given(st.floats(1, 40), st.floats(-0.8, 3), st.booleans(), st.floats(0, 1, exclude_max=True))
@settings(max_examples=60)
def test_sample_inverts_the_distribution(expected, eta, poisson, uniform):
    law = trial_count(expected, eta, "poisson" if poisson else "negative_binomial")
    k = law.sample(uniform)
    below = math.fsum(law.pmf(index) for index in range(law.least, k))
    assert below <= uniform + 1e-12
    assert below + law.pmf(k) > uniform - 1e-12


def test_sampled_mean():
    law = trial_count(20, eta=0.0)
    count = 4000
    drawn = [law.sample((index + 0.5) / count) for index in range(count)]
    # Midpoints of a long tail: a little below the mean.
    assert sum(drawn) / count == pytest.approx(20, rel=0.02)


def test_ends_of_the_laws():
    certain = trial_count(1.0, eta=0.5)
    assert (certain.pmf(1), certain.pmf(2), certain.sample(0.999)) == (1.0, 0.0, 1)
    assert trial_count(10, eta=-0.5).sample(0.0) == 1
    assert PoissonCount(3.0).sample(0.0) == 0
    # Probabilities at 0 that underflow must not stop the search for k.
    assert abs(trial_count(2000, distribution="poisson").sample(0.5) - 2000) <= 1
    geometric = trial_count(100, eta=1.0)
    assert geometric.sample(1 - 1e-10) == pytest.approx(10 * math.log(10) / -math.log1p(-0.01), abs=1)
    assert geometric.sample(1 - 2**-53) > 3000  # ends, although rounding hides what is left of the law


# -- epsilon --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("expected_trials", "pins"), PINS.items())
def test_pins(expected_trials, pins):
    for eta, pin in zip((-0.5, 0.0, 1.0), pins[:3], strict=True):
        assert tuned_epsilon(1.0, 0.01, 1000, DELTA, expected_trials, eta) == pytest.approx(pin, rel=0.01)


@pytest.mark.slow
def test_poisson_pins():
    """The pins are of whole orders: with tenths, the one for 200 trials falls by 3 %."""
    from dp_accounting.pld import privacy_loss_distribution

    one = privacy_loss_distribution.from_gaussian_mechanism(1.0, sampling_prob=0.01)
    run = one.self_compose(1000)
    whole = tuple(float(order) for order in range(2, 64))
    curve = [1000 * value for value in renyi_curve(0.01, 1.0, whole)]
    for expected_trials, (*_, pin) in PINS.items():
        options = {"distribution": "poisson", "delta_of": lambda epsilons: run.get_delta_for_epsilon(list(epsilons))}
        epsilon = tuned_epsilon_from_curve(whole, curve, DELTA, expected_trials, **options)
        assert epsilon == pytest.approx(pin, rel=0.002)
        ours = tuned_epsilon(1.0, 0.01, 1000, DELTA, expected_trials, distribution="poisson")
        assert pin * 0.97 < ours <= epsilon * (1 + 1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, math.inf])
def test_agrees_with_dp_accounting(eta):
    """It has eta of at least 0, no order 1 on the side of the selection, and Poisson with deltas from the curve."""
    from dp_accounting import GaussianDpEvent, rdp
    from dp_accounting.dp_event import RepeatAndSelectDpEvent

    for sigma, trials in ((2.0, 10), (5.0, 100)):
        accountant = rdp.RdpAccountant(ORDERS)
        accountant.compose(RepeatAndSelectDpEvent(GaussianDpEvent(sigma), trials, eta))
        theirs = accountant.get_epsilon(DELTA)
        law = {"distribution": "poisson"} if eta == math.inf else {"eta": eta}
        ours = tuned_epsilon_from_curve(ORDERS, gaussian_curve(1 / sigma), DELTA, trials, **law)
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_more_trials_cost_more_and_one_costs_nothing():
    curve = gaussian_curve(0.3)
    alone = min(
        value + math.log1p(-1 / order) - (math.log(DELTA) + math.log(order)) / (order - 1)
        for order, value in zip(ORDERS, curve, strict=True)
    )
    assert tuned_epsilon_from_curve(ORDERS, curve, DELTA, 1.0) == pytest.approx(alone)
    for law in ({"eta": -0.5}, {"eta": 0.0}, {"eta": 1.0}, {"distribution": "poisson"}):
        costs = [tuned_epsilon_from_curve(ORDERS, curve, DELTA, trials, **law) for trials in (1, 2, 10, 100)]
        assert costs == sorted(costs) and costs[0] >= alone * (1 - 1e-12) and costs[-1] > 1.2 * alone
    by_eta = [tuned_epsilon_from_curve(ORDERS, curve, DELTA, 50, eta) for eta in (-0.5, 0.0, 1.0, 2.0)]
    assert by_eta == sorted(by_eta)


def searched(cumulative, law):
    """Return the probabilities of the best of K outcomes, ranked by index: differences of E[F^K]."""
    if isinstance(law, PoissonCount):
        generating = torch.exp(-law.mu * (1 - cumulative))
        return generating.diff(prepend=torch.zeros(1, dtype=torch.float64))  # K = 0 gives the lowest outcome
    gamma, eta = law.gamma, law.eta
    inner = 1 - (1 - gamma) * cumulative
    generating = torch.log(inner) / math.log(gamma) if eta == 0 else (inner**-eta - 1) / (gamma**-eta - 1)
    return generating.diff(prepend=torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("mu", [0.2, 1.0])
@pytest.mark.parametrize("trials", [1.5, 10, 200])
@pytest.mark.parametrize("kind", [-0.5, 0.0, 1.0, 3.0, "poisson"])
def test_the_bound_holds_for_a_search_that_can_be_computed(mu, trials, kind):
    """A run releases the grid cell of N(0, 1) or N(mu, 1), and the highest wins: the worst case for selection."""
    law = {"distribution": "poisson"} if kind == "poisson" else {"eta": kind}
    epsilon = tuned_epsilon_from_curve(ORDERS, gaussian_curve(mu), DELTA, trials, **law)
    edges = torch.linspace(-8, 9, 3000, dtype=torch.float64)
    edges[-1] = math.inf
    first, second = (searched(torch.special.ndtr(edges - shift), trial_count(trials, **law)) for shift in (0.0, mu))
    assert first.sum().item() == pytest.approx(1, abs=1e-9)
    for one, other in itertools.permutations((first, second)):
        assert (one - math.exp(epsilon) * other).clamp(min=0).sum().item() <= DELTA
    # And it is no empty promise: a quarter of it is not kept.
    if trials >= 10:
        assert (
            max(
                (one - math.exp(epsilon / 4) * other).clamp(min=0).sum().item()
                for one, other in itertools.permutations((first, second))
            )
            > DELTA
        )


def test_failed_orders_are_left_out():
    curve = gaussian_curve(0.3)
    whole = tuned_epsilon_from_curve(ORDERS, curve, DELTA, 10)
    broken = [value if index % 3 else math.inf for index, value in enumerate(curve)]
    broken[1] = math.nan
    assert whole <= tuned_epsilon_from_curve(ORDERS, broken, DELTA, 10) <= whole * 1.05
    with pytest.raises(ValueError, match="no order"):
        tuned_epsilon_from_curve([2.0, 3.0], [math.inf, math.nan], DELTA, 10)


def test_large_rates_are_quiet_and_quick(caplog):
    """Fractional orders at a rate of 0.3 are where dp-accounting logs hundreds of lines."""
    epsilon = tuned_epsilon(5.0, 0.3, 100, DELTA, expected_trials=20, eta=-0.5)
    assert tuned_epsilon(5.0, 0.3, 100, DELTA, expected_trials=1) < epsilon < 10
    assert not caplog.records
    assert min(renyi_orders()) < 2


def test_bands_are_the_accountants():
    banded = tuned_epsilon(2.0, 0.01, 1000, DELTA, 10, -0.5, bands=10)
    assert banded == tuned_epsilon(2.0, 0.1, 100, DELTA, 10, -0.5)
    assert banded > tuned_epsilon(2.0, 0.01, 1000, DELTA, 10, -0.5)


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0.5,), {}, "expected_trials"),
        ((math.inf,), {}, "expected_trials"),
        ((True,), {}, "expected_trials"),
        (("10",), {}, "expected_trials"),
        ((10, -1.0), {}, "eta"),
        ((10, math.nan), {}, "eta"),
        ((10,), {"distribution": "fixed"}, "negative_binomial"),
        ((1e9, -0.99), {}, "larger eta"),
    ],
)
def test_bad_laws(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        trial_count(*arguments, **options)


def test_bad_searches():
    for uniform in (1.0, -0.1, math.nan, True):
        with pytest.raises(ValueError, match="uniform"):
            TruncatedNegativeBinomial(0.0, 2.0).sample(uniform)
    with pytest.raises(ValueError, match="noise_multiplier=0"):
        tuned_epsilon(0.0, 0.01, 100, DELTA, 10)
    with pytest.raises(ValueError, match="delta"):
        tuned_epsilon(1.0, 0.01, 100, 0.0, 10)
    with pytest.raises(ValueError, match="as many"):
        tuned_epsilon_from_curve([2.0], [1.0, 2.0], DELTA, 10)
    for orders, curve in (([1.0], [1.0]), ([2.0], [-1.0]), ([math.inf], [1.0])):
        with pytest.raises(ValueError, match="orders must be"):
            tuned_epsilon_from_curve(orders, curve, DELTA, 10)
