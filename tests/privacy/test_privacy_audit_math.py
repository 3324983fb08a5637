"""The one-run audit against jax_privacy's numbers, simulated mechanisms of known epsilon, and bad input."""

import math
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hfnoise.privacy.audit import (
    audit_epsilon_ceiling,
    audit_epsilon_lower_bound,
    audit_epsilon_lower_bound_gaussian,
    audit_p_value,
    audit_scores,
    auroc,
    default_guesses,
    roc_corners,
    tpr_at_fpr,
)
from hfnoise.privacy.audit_bounds import gaussian_epsilon

VECTORS = Path(__file__).parent.parent / "vectors" / "privacy"
DELTA = 1e-5


@pytest.fixture(scope="module")
def vectors():
    return dict(numpy.load(VECTORS / "dev_audit.npz"))


def counts(m, guesses, correct):
    return int(m), int(guesses), int(correct)


# -- p-values and bounds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", range(5))
def test_table(vectors, row):
    *numbers, delta, epsilon, p_value, bound = vectors["table"][row]
    assert audit_p_value(*counts(*numbers), delta, epsilon) == pytest.approx(p_value, abs=1e-9)
    assert audit_epsilon_lower_bound(*counts(*numbers), delta) == pytest.approx(bound, abs=1e-4)


@pytest.mark.parametrize(("m", "ceiling"), [(100, 3.49), (500, 5.10), (1000, 5.78), (5000, 7.28)])
def test_ceilings_of_the_specification(m, ceiling):
    assert audit_epsilon_ceiling(m, DELTA) == pytest.approx(ceiling, abs=0.005)


@given(st.integers(1, 3000), st.data())
@settings(max_examples=60)
def test_p_value_is_the_formula(m, data):
    from scipy.stats import binom

    guesses = data.draw(st.integers(0, m))
    correct = data.draw(st.integers(0, guesses))
    epsilon, delta = data.draw(st.floats(0, 8)), data.draw(st.sampled_from([0.0, 1e-8, 1e-5, 1e-2, 1.0]))
    tails = binom.sf(numpy.arange(-1, correct), guesses, 1 / (1 + math.exp(-epsilon)))
    steps = numpy.arange(1, correct + 1)
    slope = ((tails[correct - steps] - tails[correct]) / steps).max(initial=0)
    # Their differences of tails lose digits where both are near 1; ours are sums.
    expected = min(1.0, tails[correct] + 2 * m * delta * slope)
    assert audit_p_value(m, guesses, correct, delta, epsilon) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(st.integers(1, 400), st.data())
@settings(max_examples=60)
def test_p_value_is_monotone(m, data):
    guesses = data.draw(st.integers(1, m))
    correct = data.draw(st.integers(1, guesses))
    epsilon, delta = data.draw(st.floats(0, 6)), data.draw(st.sampled_from([0.0, 1e-5, 1e-3]))
    p_value = audit_p_value(m, guesses, correct, delta, epsilon)
    assert 0 <= p_value <= 1
    assert audit_p_value(m + 1, guesses, correct, delta, epsilon) >= p_value
    assert audit_p_value(m, guesses, correct, 2 * delta, epsilon) >= p_value
    if delta == 0:
        assert audit_p_value(m, guesses, correct, 0.0, epsilon + 0.5) >= p_value * (1 - 1e-9)
        assert audit_p_value(m, guesses, correct - 1, 0.0, epsilon) >= p_value * (1 - 1e-9)
    # With delta the formula falls with epsilon and rises with correct guesses only where it could refute anything.
    if p_value < 0.3:
        assert audit_p_value(m, guesses, correct - 1, delta, epsilon) >= p_value * (1 - 1e-9)
        assert audit_p_value(m, guesses, correct, delta, epsilon + 0.5) >= p_value * (1 - 1e-9)


@given(st.integers(1, 2000), st.data())
@settings(max_examples=40)
@example(m=16, data=None)
def test_bound_is_where_the_p_value_crosses_and_never_above_the_ceiling(m, data):
    guesses = data.draw(st.integers(1, m)) if data else m
    correct = data.draw(st.integers(0, guesses)) if data else m
    delta = data.draw(st.sampled_from([0.0, 1e-6, 1e-4])) if data else 0.0
    bound = audit_epsilon_lower_bound(m, guesses, correct, delta)
    assert 0 <= bound <= audit_epsilon_ceiling(m, delta, guesses=guesses)
    assert audit_p_value(m, guesses, correct, delta, bound + 1e-6) > 0.05
    if bound > 0:
        assert audit_p_value(m, guesses, correct, delta, bound) <= 0.05
    assert audit_epsilon_lower_bound(m, guesses, correct, delta, significance=0.01) <= bound
    if delta > 0:
        gaussian = audit_epsilon_lower_bound_gaussian(m, guesses, correct, delta)
        assert gaussian <= audit_epsilon_ceiling(m, delta, guesses=guesses, assume_gaussian=True)


@pytest.mark.parametrize("epsilon", [0.0, 1e-9, 30.0, 700.0, 1e6])
@pytest.mark.parametrize("correct", [0, 1, 50_000, 100_000])
def test_extreme_numbers(epsilon, correct):
    p_value = audit_p_value(100_000, 100_000, correct, DELTA, epsilon)
    assert 0 <= p_value <= 1
    expected = 0.0 if epsilon < 1 and correct == 100_000 else 1.0
    if (epsilon, correct) not in {(0.0, 50_000), (1e-9, 50_000)}:
        # All right at epsilon 0 has a p-value of 2 m delta over m / 2: the mass lies that far below.
        assert p_value == pytest.approx(expected, abs=4.1 * DELTA)


def test_infinite_epsilon_is_never_refuted():
    assert audit_p_value(10, 10, 10, 0.0, math.inf) == 1.0


def test_gaussian_epsilon():
    from scipy.stats import norm

    for mu, delta in ((0.1, 1e-5), (1.0, 1e-5), (5.0, 1e-10), (40.0, 0.1)):
        epsilon = gaussian_epsilon(mu, delta)
        second = math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))
        assert norm.cdf(mu / 2 - epsilon / mu) - second == pytest.approx(delta, rel=1e-5)
    assert gaussian_epsilon(0.0, 1e-5) == 0
    assert gaussian_epsilon(0.1, 0.5) == 0


# -- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(3))
def test_jax_privacy_on_scores(vectors, case):
    """Their thresholds: all corners of the ROC hull, significance divided by the number of these.

    That is no union bound over all thresholds (the hull is chosen by looking), so it is here, not in the library.
    """
    inside, outside = (torch.from_numpy(vectors[f"{side}{case}"]) for side in ("in", "out"))
    corners = roc_corners(inside, outside)
    hull = corners if corners[0] == (0.0, 0.0) else [(0.0, 0.0), *corners]
    for name, bound in (
        ("eps_one_run_bonf", audit_epsilon_lower_bound),
        ("eps_one_run_fdp_bonf", audit_epsilon_lower_bound_gaussian),
    ):
        best = 0.0
        for false, true in hull[1:]:
            true_count, guesses = round(400 * true), round(400 * true) + round(400 * false)
            best = max(best, bound(800, guesses, true_count, DELTA, 0.05 / len(hull)))
        assert best == pytest.approx(float(vectors[f"{name}{case}"]), abs=1e-4)
    true_count = int((inside >= 1).sum())
    fixed = audit_epsilon_lower_bound(800, true_count + int((outside >= 1).sum()), true_count, DELTA)
    assert fixed == pytest.approx(float(vectors[f"eps_one_run_thr1_{case}"]), abs=1e-4)
    assert tpr_at_fpr(inside, outside, 0.01) == pytest.approx(float(vectors[f"tpr_at_fpr_0.01_{case}"]), abs=1e-9)
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(hull, hull[1:], strict=False))
    assert area == pytest.approx(float(vectors[f"auroc{case}"]), abs=1e-9)
    assert auroc(inside, outside) <= area


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.lists(st.integers(0, 9), min_size=1, max_size=30))
@settings(max_examples=40)
def test_auroc_and_hull(inside, outside):
    pairs = [(i > o) + 0.5 * (i == o) for i in inside for o in outside]
    assert auroc(inside, outside) == pytest.approx(sum(pairs) / len(pairs))
    for threshold in range(11):
        rate = sum(o >= threshold for o in outside) / len(outside)
        assert tpr_at_fpr(inside, outside, rate) >= sum(i >= threshold for i in inside) / len(inside) - 1e-9


def test_fixed_guesses():
    estimate = audit_scores([5.0, 4, 3, -9], [2.0, 1, 0, 9], delta=0.0, guesses_in=3, guesses_out=2)
    assert (estimate.correct, estimate.canaries, estimate.included) == (2 + 1, 8, 4)
    assert estimate.epsilon_lower_bound == audit_epsilon_lower_bound(8, 5, 3, 0.0)
    assert estimate.epsilon_ceiling == audit_epsilon_ceiling(8, 0.0, guesses=5)
    only_in = audit_scores([5.0, 4, 3, -9], [2.0, 1, 0, 9], delta=0.0, guesses_in=3)
    assert (only_in.guesses_out, only_in.correct, only_in.candidates) == (0, 2, 1)


def test_the_union_bound_is_paid():
    inside, outside = torch.arange(500.0) + 250, torch.arange(500.0)
    free = audit_scores(inside, outside, DELTA, guesses_in=125, guesses_out=125)
    paid = audit_scores(inside, outside, DELTA, candidates=[(125, 125), (10, 10), (500, 500)])
    assert (paid.guesses_in, paid.correct, paid.candidates) == (125, 250, 3)
    assert paid.epsilon_lower_bound == audit_epsilon_lower_bound(1000, 250, 250, DELTA, 0.05 / 3)
    assert paid.epsilon_lower_bound < free.epsilon_lower_bound
    assert default_guesses(1000) == [(500, 500), (250, 250), (125, 125), (62, 62), (31, 31), (15, 15)]
    assert audit_scores(inside, outside, DELTA).candidates == 6


def test_equal_scores_prove_nothing():
    constant = audit_scores([1.0] * 100, [1.0] * 100, delta=DELTA, guesses_in=50, guesses_out=50)
    assert (constant.correct, constant.epsilon_lower_bound, constant.auroc) == (0, 0.0, 0.5)
    half = audit_scores([2.0, 1, 1], [1.0, 1, 0], delta=0.0, guesses_in=3, guesses_out=2)
    assert half.correct == 1 + 1  # the top one and the bottom one are sure; four equal ones go against the auditor


def test_a_leaking_run_is_caught_and_the_report_says_what_could_be():
    leak = audit_scores(torch.arange(400.0) + 1000, torch.arange(400.0), DELTA)
    assert leak.refutes(3.0) and leak.auroc == 1 and leak.tpr_at_fpr == 1
    assert leak.epsilon_lower_bound == leak.epsilon_ceiling
    assert leak.could_refute(4.0) and not leak.could_refute(8.0)
    sharper = audit_scores(torch.arange(400.0) + 1000, torch.arange(400.0), DELTA, assume_gaussian=True)
    assert sharper.epsilon_lower_bound > leak.epsilon_lower_bound


def coins(m, generator):
    return torch.rand(m, generator=generator) < 0.5


@pytest.mark.parametrize("assume_gaussian", [False, True])
def test_bounds_hold_for_mechanisms_of_known_epsilon(assume_gaussian):
    """Of 100 audits of a Gaussian mechanism at epsilon 2, about 5 may exceed it; 14 would be 4 deviations more."""
    generator = torch.Generator().manual_seed(0)
    mu = 0.5
    while gaussian_epsilon(mu, DELTA) < 2:
        mu *= 1.001
    epsilon, found = gaussian_epsilon(mu, DELTA), []
    for _ in range(100):
        included = coins(600, generator)
        scores = mu * included + torch.randn(600, generator=generator)
        estimate = audit_scores(
            scores[included], scores[~included], DELTA, assume_gaussian=assume_gaussian, guesses_in=50, guesses_out=50
        )
        found.append(estimate.epsilon_lower_bound)
    assert sum(bound > epsilon for bound in found) < 14
    assert 0.2 < sum(found) / len(found) < epsilon  # it finds something


def test_bound_is_tight_for_randomised_response():
    """The mechanism that the theorem is sharp for: each coin is shown truly with probability e^eps / (1 + e^eps)."""
    generator = torch.Generator().manual_seed(1)
    above, found = 0, []
    for _ in range(150):
        truth = coins(2000, generator)
        shown = torch.where(torch.rand(2000, generator=generator) < 1 / (1 + math.exp(-1.0)), truth, ~truth)
        bound = audit_epsilon_lower_bound(2000, 2000, int((shown == truth).sum()), 0.0)
        found.append(bound)
        above += bound > 1.0
    assert above < 19  # 8 expected, 4 deviations
    assert sum(found) / 150 == pytest.approx(1.0, abs=0.15)


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "numbers", [(0, 0, 0), (10, 11, 5), (10, 5, 6), (10, 5, -1), (10, -1, 0), (10.0, 5, 5), (True, 1, 1)]
)
def test_impossible_counts(numbers):
    for function in (audit_epsilon_lower_bound, audit_epsilon_lower_bound_gaussian):
        with pytest.raises(ValueError, match="impossible|whole number"):
            function(*numbers, DELTA)
    with pytest.raises(ValueError, match="impossible|whole number"):
        audit_p_value(*numbers, DELTA, 1.0)


def test_bad_claims():
    for delta in (-0.1, 1.1, float("nan"), "0"):
        with pytest.raises(ValueError, match="delta"):
            audit_p_value(10, 5, 5, delta, 1.0)
    for epsilon in (-1.0, float("nan"), None):
        with pytest.raises(ValueError, match="epsilon"):
            audit_p_value(10, 5, 5, DELTA, epsilon)
    for significance in (0, 1, 2, -0.5):
        with pytest.raises(ValueError, match="significance"):
            audit_epsilon_lower_bound(10, 5, 5, DELTA, significance)
    with pytest.raises(ValueError, match=r"delta in \(0, 1\)"):
        audit_epsilon_lower_bound_gaussian(10, 5, 5, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guesses_in": 30, "guesses_out": 11}, "between 1 and 40"),
        ({"guesses_in": 0}, "between 1 and 40"),
        ({"guesses_in": -1}, "guesses_in"),
        ({"guesses_in": 3, "candidates": [(1, 1)]}, "one of the two"),
        ({"candidates": []}, "empty"),
        ({"fpr": 2.0}, "fpr"),
    ],
)
def test_bad_audits(options, message):
    with pytest.raises(ValueError, match=message):
        audit_scores(range(20), range(20), DELTA, **options)


def test_bad_scores():
    for bad in ([], [float("nan")], [[1.0]]):
        with pytest.raises(ValueError, match="out_scores"):
            audit_scores([1.0], bad, DELTA)
    with pytest.raises(ValueError, match="fair coins"):
        audit_scores(range(300), range(100), DELTA)
    assert audit_scores([math.inf, 1.0], [-math.inf, 0.0], 0.0, guesses_in=1, guesses_out=1).correct == 2
