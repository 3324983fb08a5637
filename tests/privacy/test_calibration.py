"""Noise and steps for a budget: never above it, and close to what it allows, whatever was spent before."""

import math
import time
from dataclasses import replace

import pytest

from hfnoise.privacy import accounting, loss_distribution
from hfnoise.privacy.accounting import Mechanism, composed_epsilon
from hfnoise.privacy.calibration import LEAST_NOISE, calibrate_noise_multiplier, largest_step_count
from tests.privacy.vectors import accounting_vectors

DELTA = 1e-5


def is_tight(target, run, spent=(), accountant="pld", delta=DELTA):
    """Return whether a mechanism is inside the budget, and 0.3 % less noise would be outside."""
    less = replace(run, noise_multiplier=run.noise_multiplier * 0.997)
    inside, outside = (composed_epsilon([*spent, one], delta, accountant) for one in (run, less))
    return inside <= target < outside


@pytest.mark.parametrize("column", [4, 5], ids=["rdp", "pld"])
@pytest.mark.parametrize("row", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_calibration_matches_the_vectors(row, column):
    rate, steps, delta, target, *expected = accounting_vectors()["calibration"][row]
    accountant = {4: "rdp", 5: "pld"}[column]
    noise = calibrate_noise_multiplier(target, delta, rate, int(steps), accountant=accountant)
    # The vectors were made with a grid ten times wider, which asks for up to 0.2 % more noise.
    assert noise == pytest.approx(expected[column - 4], rel=4e-3)
    assert is_tight(target, Mechanism(rate, noise, int(steps)), accountant=accountant, delta=delta)


CASES = [(0.05, 300, 1.0), (1.0, 10, 3.0)]
SLOW_CASES = [
    (0.2, 50, 0.3),
    (0.01, 1000, 3.0),
    (1e-4, 20_000, 1.0),
    (0.05, 300, 20.0),
    (1.0, 1, 0.05),
]


@pytest.mark.parametrize(
    ("rate", "steps", "target"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)]
)
def test_calibration_is_tight(rate, steps, target):
    noise = calibrate_noise_multiplier(target, DELTA, rate, steps)
    assert is_tight(target, Mechanism(rate, noise, steps))


@pytest.mark.parametrize(("rate", "steps", "target"), CASES)
def test_calibration_by_renyi_is_tight(rate, steps, target):
    noise = calibrate_noise_multiplier(target, DELTA, rate, steps, accountant="rdp")
    assert is_tight(target, Mechanism(rate, noise, steps), accountant="rdp")
    assert noise > calibrate_noise_multiplier(target, DELTA, rate, steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "steps"), [(0.01, 1000), (0.001, 5000), (1e-4, 20_000), (0.05, 300), (1.0, 10)], ids=str
)
def test_calibration_takes_at_most_three_seconds(rate, steps):
    for cache in (accounting._epsilon, loss_distribution._composed, loss_distribution._one_round):
        cache.cache_clear()
    start = time.process_time()
    calibrate_noise_multiplier(3.0, 1e-6, rate, steps)
    assert time.process_time() - start < 3


SPENT = (Mechanism(0.05, 4.0, 200), Mechanism(1.0, 30.0, 1))


def test_calibration_beside_what_is_spent():
    alone = calibrate_noise_multiplier(1.0, DELTA, 0.05, 200, bands=4)
    noise = calibrate_noise_multiplier(1.0, DELTA, 0.05, 200, bands=4, spent=SPENT)
    assert noise > 1.01 * alone
    assert is_tight(1.0, Mechanism(0.05, noise, 200, bands=4), SPENT)


@pytest.mark.parametrize("search", ["noise", "steps"])
def test_what_is_spent_already_is_named(search):
    with pytest.raises(
        ValueError, match=r"spent: .* epsilon 0\.6\d+ at delta=1e-05 \(Mechanism\(sample_rate=0.05, no"
    ):
        if search == "noise":
            calibrate_noise_multiplier(0.5, DELTA, 0.05, 10, spent=SPENT)
        else:
            largest_step_count(0.5, DELTA, Mechanism(0.05, 4.0, 0), spent=SPENT)


@pytest.mark.slow
def test_a_budget_that_cannot_be_used_up_still_gets_noise():
    # One step that draws a unit with probability 1e-6 is (0, 1e-5)-private by itself.
    assert calibrate_noise_multiplier(8.0, DELTA, 1e-6, 1, accountant="rdp") > LEAST_NOISE
    assert calibrate_noise_multiplier(8.0, DELTA, 1e-6, 1) == LEAST_NOISE


@pytest.mark.parametrize(
    ("mechanism", "spent", "accountant"),
    [
        (Mechanism(0.2, 9.0, 0), (), "pld"),
        (Mechanism(1.0, 12.0, 0), (), "pld"),
        (Mechanism(0.05, 6.0, 0, bands=4), SPENT, "pld"),
        (Mechanism(0.01, 1.5, 0), (), "rdp"),
        pytest.param(Mechanism(0.05, 4.0, 0), (), "pld", marks=pytest.mark.slow),
        pytest.param(Mechanism(0.001, 0.7, 0), (), "pld", marks=pytest.mark.slow),
    ],
)
def test_largest_step_count_is_the_largest(mechanism, spent, accountant):
    steps = largest_step_count(1.0, DELTA, mechanism, spent=spent, accountant=accountant, at_most=20_000)
    assert steps > 0 and steps % mechanism.bands == 0
    inside, outside = (replace(mechanism, steps=count) for count in (steps, steps + 1))
    assert composed_epsilon([*spent, inside], DELTA, accountant) <= 1.0
    assert composed_epsilon([*spent, outside], DELTA, accountant) > 1.0


def test_step_count_of_a_calibrated_run_is_its_steps(monkeypatch):
    noise = calibrate_noise_multiplier(1.0, DELTA, 0.05, 300)
    # The calibration has asked for the same number, so nothing is left to compute on the grid of the reports.
    monkeypatch.setattr(accounting, "loss_distribution_epsilon", None)
    assert largest_step_count(1.0, DELTA, Mechanism(0.05, noise, 0), at_most=300) == 300


def test_step_counts_at_the_ends():
    assert largest_step_count(0.1, DELTA, Mechanism(0.5, 2.0, 0), at_most=10) == 0
    assert largest_step_count(1.0, DELTA, Mechanism(0.5, 0.0, 0)) == 0
    assert largest_step_count(1.0, DELTA, Mechanism(0.5, 9.0, 0), at_most=0) == 0
    # The last cycle of a run may be cut short.
    assert largest_step_count(1.0, DELTA, Mechanism(0.05, 9.0, 0, bands=4), at_most=37) == 37


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"target_epsilon": 0.0}, ValueError, "target_epsilon=0.0 is no privacy budget"),
        ({"target_epsilon": math.inf}, ValueError, "target_epsilon=inf"),
        ({"target_epsilon": "3"}, TypeError, "target_epsilon='3' is a str"),
        ({"target_delta": 0}, ValueError, "target_delta=0 "),
        ({"steps": 0}, ValueError, "steps=0 releases nothing"),
        ({"steps": 1.5}, TypeError, "steps=1.5"),
        ({"bands": 3}, ValueError, "at most 2 bands"),
        ({"accountant": "gdp"}, ValueError, "'gdp' is unknown"),
    ],
)
def test_bad_arguments(change, error, match):
    with pytest.raises(error, match=match):
        calibrate_noise_multiplier(
            **({"target_epsilon": 1.0, "target_delta": 1e-5, "sample_rate": 0.5, "steps": 10} | change)
        )


@pytest.mark.slow
def test_a_target_out_of_reach_is_an_error():
    with pytest.raises(ValueError, match="no noise multiplier up to 1e\\+06 reaches target_epsilon=1e-09"):
        calibrate_noise_multiplier(1e-9, 1e-12, 1.0, 10)


@pytest.mark.slow
def test_quick_noise_is_enough_and_little_more():
    noise = calibrate_noise_multiplier(1.0, DELTA, 0.05, 300)
    assert noise * 0.997 <= calibrate_noise_multiplier(1.0, DELTA, 0.05, 300, quick=True) <= noise * 1.005


def test_other_step_count_arguments():
    with pytest.raises(ValueError, match="steps=-1"):
        largest_step_count(1.0, DELTA, Mechanism(0.5, 2.0, 0), at_most=-1)
