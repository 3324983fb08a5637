"""Epsilon against golden vectors of dp-accounting, and the properties that it must have whatever the numbers."""

import builtins
import logging
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfnoise.privacy.accounting import Mechanism, accountant_description, composed_epsilon, compute_epsilon
from hfnoise.privacy.loss_distribution import grid_interval, loss_distribution_epsilon
from hfnoise.privacy.renyi import Releases, renyi_curve
from tests.privacy.vectors import accounting_vectors

TABLE = accounting_vectors()["table"]
RATE, NOISE, STEPS, DELTA = TABLE[5, :4]  # the cheapest with sampling
# Together 0.3 s; the others take another four.
ROWS = [pytest.param(row, marks=() if row[0] >= 0.2 else pytest.mark.slow, id=f"q={row[0]:.3g}") for row in TABLE]


@pytest.mark.parametrize("row", ROWS)
def test_loss_distributions_match_the_vectors(row):
    rate, noise, steps, delta, _, expected = row[:6]
    assert compute_epsilon(noise, rate, int(steps), delta) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"q={row[0]:.3g}")
def test_renyi_matches_the_vectors(row):
    rate, noise, steps, delta, expected = row[:5]
    assert compute_epsilon(noise, rate, int(steps), delta, "rdp") == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("index", range(len(TABLE)))
def test_renyi_curves_match_the_vectors(index):
    rate, noise, steps = TABLE[index, :3]
    orders = tuple(float(order) for order in accounting_vectors()["rdp_orders"])
    curve = [steps * value for value in renyi_curve(rate, noise, orders)]
    assert curve == pytest.approx(list(accounting_vectors()["rdp_curves"][index]), rel=1e-9)


def gaussian_delta(mu, epsilon):
    """Return delta of the Gaussian mechanism with sensitivity over noise mu (arXiv 1805.06530, theorem 8)."""
    from scipy.stats import norm

    return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))


@pytest.mark.parametrize("delta", [1e-5, 1e-9])
@pytest.mark.parametrize("steps", [1, 400])
def test_without_sampling_it_is_the_exact_gaussian(steps, delta):
    epsilon = compute_epsilon(5.0, 1.0, steps, delta)
    mu = math.sqrt(steps) / 5
    # Never below the truth, and at most a grid cell above.
    assert gaussian_delta(mu, epsilon) <= delta < gaussian_delta(mu, epsilon - 1e-4)


def test_rounding_of_many_rounds_is_never_optimistic():
    # A rate just below 1 takes the path of the transforms, and can only be more private than the whole Gaussian: at
    # this delta the bare transform would state an epsilon smaller by 2e-4 than the truth.
    epsilon = compute_epsilon(100.0, 1 - 1e-12, 10_000, 1e-11)
    assert gaussian_delta(1.0, epsilon) <= 1e-11


def test_delta_that_rounding_hides_is_refused():
    with pytest.raises(ValueError, match="no guarantee; use a larger delta, or accountant='rdp'"):
        compute_epsilon(30.0, 0.5, 100_000, 1e-11)
    assert compute_epsilon(30.0, 0.5, 100_000, 1e-11, "rdp") > 0


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_nothing_released_and_nothing_hidden(accountant):
    assert compute_epsilon(1.0, 0.1, 0, 1e-5, accountant) == 0.0
    assert compute_epsilon(0.0, 0.1, 0, 1e-5, accountant) == 0.0
    assert compute_epsilon(0.0, 0.1, 1, 1e-5, accountant) == math.inf
    assert composed_epsilon([], 1e-5, accountant) == 0.0
    assert composed_epsilon([Mechanism(0.1, 2.0, 3), Mechanism(0.1, 0.0, 1)], 1e-5, accountant) == math.inf


rates = st.sampled_from([0.01, 0.05, 0.3, 1.0])
noises = st.floats(4.0, 20.0)
counts = st.integers(1, 100)
accountants = st.sampled_from(["pld", "rdp"])
few = settings(max_examples=4, derandomize=True)


@few
@given(rates, noises, st.floats(1.05, 2.0), counts, accountants)
def test_more_noise_is_more_private(rate, noise, factor, steps, accountant):
    epsilon = compute_epsilon(noise, rate, steps, DELTA, accountant)
    assert compute_epsilon(noise * factor, rate, steps, DELTA, accountant) <= epsilon


@few
@given(rates, noises, counts, counts, accountants)
def test_more_steps_are_less_private_and_two_parts_are_one_whole(rate, noise, steps, more, accountant):
    whole = compute_epsilon(noise, rate, steps + more, DELTA, accountant)
    assert whole >= compute_epsilon(noise, rate, steps, DELTA, accountant)
    parts = [Mechanism(rate, noise, steps), Mechanism(rate, noise, more)]
    assert composed_epsilon(parts, DELTA, accountant) == whole


@pytest.mark.slow
@few
@given(noises, counts, counts)
def test_parts_of_different_noise_compose_to_less_than_their_sum(noise, steps, more):
    one, other = Mechanism(0.05, noise, steps), Mechanism(1.0, 2 * noise, more)
    together = composed_epsilon([one, other], 2 * DELTA)
    assert together == pytest.approx(composed_epsilon([other, one], 2 * DELTA), rel=1e-9)
    assert together >= composed_epsilon([other], 2 * DELTA)
    # Basic composition bounds it.
    assert together <= composed_epsilon([one], DELTA) + composed_epsilon([other], DELTA) + 1e-9


def test_different_gaussians_compose_like_one():
    # Noise 3 and 4 together is one Gaussian of 1 / sqrt(1/9 + 1/16).
    together = composed_epsilon([Mechanism(1.0, 3.0, 1), Mechanism(1.0, 4.0, 1)], 1e-6)
    assert together == pytest.approx(compute_epsilon(2.4, 1.0, 1, 1e-6), rel=1e-4)


@pytest.mark.parametrize(("steps", "rounds"), [(0, 0), (1, 1), (8, 1), (9, 2), (1000, 125)])
def test_bands_count_cycles_of_the_larger_rate(steps, rounds):
    banded = Mechanism(sample_rate=0.01, noise_multiplier=2.0, steps=steps, bands=8)
    assert (banded.rounds, banded.sampling_probability) == (rounds, 0.08)
    assert composed_epsilon([banded], 1e-5) == compute_epsilon(2.0, 0.08, rounds, 1e-5)


def test_event_is_what_is_accounted_for():
    from dp_accounting.pld import PLDAccountant

    banded = Mechanism(sample_rate=0.05, noise_multiplier=4.0, steps=10, bands=4)
    assert PLDAccountant().compose(banded.event).get_epsilon(1e-5) == pytest.approx(composed_epsilon([banded], 1e-5))
    assert PLDAccountant().compose(Mechanism(0.05, 2.0, 0).event).get_epsilon(1e-5) == 0


def test_as_many_bands_as_batches_is_no_sampling():
    assert Mechanism(0.1, 1.0, 10, bands=10).sampling_probability == 1.0
    assert Mechanism(1 / 49, 1.0, 10, bands=49).sampling_probability == 1.0  # 49 * (1 / 49) is below 1
    with pytest.raises(ValueError, match="groups smaller than the expected batch .* at most 10 bands"):
        Mechanism(0.1, 1.0, 10, bands=11)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"sample_rate": 0.0}, ValueError, "sample_rate=0.0 .* in \\(0, 1\\]: the expected batch over"),
        ({"sample_rate": 1.01}, ValueError, "sample_rate=1.01"),
        ({"sample_rate": "0.1"}, TypeError, "sample_rate='0.1' is a str"),
        ({"noise_multiplier": -1.0}, ValueError, "noise_multiplier=-1.0 .* at least 0"),
        ({"noise_multiplier": math.nan}, ValueError, "noise_multiplier=nan"),
        ({"noise_multiplier": math.inf}, ValueError, "noise_multiplier=inf .* finite"),
        ({"noise_multiplier": True}, TypeError, "noise_multiplier=True is a bool"),
        ({"steps": -1}, ValueError, "steps=-1 .* at least 0"),
        ({"steps": 2.0}, TypeError, "steps=2.0 is a float; give an integer"),
        ({"delta": 0.0}, ValueError, "delta=0.0"),
        ({"delta": 1.0}, ValueError, "delta=1.0 .* in \\(0, 1\\)"),
        ({"accountant": "prv"}, ValueError, "accountant='prv' is unknown; use one of 'pld', 'rdp'"),
    ],
)
def test_bad_arguments(change, error, match):
    with pytest.raises(error, match=match):
        compute_epsilon(**({"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 10, "delta": 1e-5} | change))


def test_bad_mechanisms():
    with pytest.raises(ValueError, match="bands=0"):
        Mechanism(0.1, 1.0, 10, bands=0)
    with pytest.raises(TypeError, match="holds a tuple; give instances of Mechanism"):
        composed_epsilon([(0.1, 1.0, 10)], 1e-5)


def test_tiny_noise_does_not_fill_the_memory():
    # 100,000 nats of privacy loss: on the finest grid a thousand million points.
    assert grid_interval([Releases(0.5, 0.01, 10)], 1e-5) > 1e-2
    assert 1e4 < compute_epsilon(0.01, 0.5, 10, 1e-5) < 1e5
    assert compute_epsilon(0.01, 0.5, 10**6, 1e-5) == math.inf


def test_a_wider_grid_is_never_optimistic():
    releases = [Releases(float(RATE), float(NOISE), int(STEPS))]
    fine, coarse = (loss_distribution_epsilon(releases, float(DELTA), width) for width in (1e-4, 1e-2))
    assert fine < coarse < 1.05 * fine


def test_repeated_questions_cost_nothing(monkeypatch):
    epsilon = compute_epsilon(4.25, 0.3, 7, 1e-5)
    monkeypatch.setattr("hfnoise.privacy.accounting.loss_distribution_epsilon", None)
    assert compute_epsilon(4.25, 0.3, 7, 1e-5) == epsilon


def test_unconverged_orders_are_silent(caplog):
    with caplog.at_level(logging.INFO):
        assert compute_epsilon(0.5, 0.5, 100, 1e-5, "rdp") > 0  # six orders fail to converge
        assert math.inf in renyi_curve(0.5, 0.5)
    assert caplog.records == []


def test_description():
    text = accountant_description("pld")
    assert "dp-accounting 0." in text and "grid 0.0001" in text and "one unit added or removed" in text
    assert "orders 1.1 to 1024" in accountant_description("rdp")
    with pytest.raises(ValueError, match="accountant='x'"):
        accountant_description("x")


def test_without_the_library(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("dp_accounting"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"no guarantee: pip install 'hfnoise\[dp\]'"):
        compute_epsilon(4.75, 0.3, 7, 1e-5)


def test_importing_the_core_does_not_import_the_library():
    code = "import sys, hfnoise.privacy.accounting, hfnoise.privacy.calibration as _; "
    code += "print([name for name in ('dp_accounting', 'scipy', 'numpy', 'torch') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
