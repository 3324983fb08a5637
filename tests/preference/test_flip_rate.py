"""The flip-rate estimate: error, coverage and refusals on several kinds of margins; limits; bad input."""

import dataclasses
import math
import time

import numpy
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hfnoise.preference import estimate_flip_rate, posterior_flip
from hfnoise.preference.flip_rate_likelihood import SHAPE_DEVIATION

RATES = (0.0, 0.1, 0.2, 0.3)


def bradley_terry(random, log_odds):
    """Sign the log-odds by a label drawn from them: margins of a perfectly calibrated model."""
    return numpy.where(random.random(len(log_odds)) < numpy.exp(-numpy.logaddexp(0, -log_odds)), log_odds, -log_odds)


def normal(deviation, factor):
    return lambda random, count: factor * bradley_terry(random, random.normal(0, deviation, count))


def separated(random, count):
    return random.normal(2, 1.5, count)


def saturating(random, count):
    return 8 * numpy.tanh(normal(6, 1)(random, count) / 4)


def heavy_tailed(random, count):
    return bradley_terry(random, 2 * random.standard_t(3, count))


def bent(random, count):
    margins = normal(3, 1)(random, count)
    return numpy.sign(margins) * numpy.abs(margins) ** 0.7


def noisy_view(random, count):
    """Labels are certain, but the model sees their score through noise: its log-odds are not logistic."""
    score = random.normal(0, 1, count)
    return numpy.sign(score) * (score + 0.5 * random.normal(0, 1, count))


GENERATORS = {
    "normal 3": normal(3, 0.05),
    "normal 6": normal(6, 20.0),
    "separated": separated,
    "saturating": saturating,
    "heavy tails": heavy_tailed,
    "noisy view": noisy_view,
}
HARDER = {"normal 1.5": normal(1.5, 1.0), "bent": bent}


def noisy_margins(generator, flip_rate, seed, count=1000):
    random = numpy.random.default_rng(seed)
    margins = generator(random, count)
    return numpy.where(random.random(count) < flip_rate, -margins, margins)


def measure(generator, flip_rate, seeds):
    """Return, per seed, the error, whether the interval covers the truth, and whether the estimate was refused."""
    estimates = [estimate_flip_rate(noisy_margins(generator, flip_rate, seed)) for seed in seeds]
    return numpy.array(
        [
            (
                estimate.flip_rate - flip_rate,
                estimate.interval[0] <= flip_rate <= estimate.interval[1],
                estimate.refused,
            )
            for estimate in estimates
        ]
    )


@pytest.fixture(scope="module")
def measured():
    """Measure 12 samples of 1000 pairs per rate, two from each generator, no two of them with the same seed."""
    return {
        rate: numpy.concatenate(
            [
                measure(generator, rate, (1000 * row + 10 * column, 1000 * row + 10 * column + 1))
                for column, generator in enumerate(GENERATORS.values())
            ]
        )
        for row, rate in enumerate(RATES)
    }


@pytest.mark.parametrize("flip_rate", RATES)
def test_mean_error_from_1000_pairs(measured, flip_rate):
    errors, _, refused = measured[flip_rate].T
    assert numpy.abs(errors).mean() <= 0.035  # the promise is 0.05
    assert numpy.abs(errors[refused == 0]).max() <= 0.1  # what refusal at a half-width of 0.10 is for
    assert refused.mean() <= (0.0 if flip_rate <= 0.1 else 0.5)


def test_interval_covers_nine_tenths_of_the_truths(measured):
    assert numpy.concatenate(list(measured.values()))[:, 1].mean() >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["normal 3", "separated", "saturating", "heavy tails", *HARDER])
def test_error_and_coverage_of_every_generator(name):
    results = [
        measure({**GENERATORS, **HARDER}[name], rate, range(20 * row, 20 * row + 20)) for row, rate in enumerate(RATES)
    ]
    assert numpy.concatenate(results)[:, 1].mean() >= 0.9
    if name in GENERATORS:
        assert max(numpy.abs(result[:, 0]).mean() for result in results) <= 0.05
    # 1000 pairs of the harder ones hold too little: at rates of 0.2 and more the mean error is 0.05 to 0.08, and most
    # of them are refused. What is not refused keeps the promise.
    errors, _, refused = numpy.concatenate(results).T
    assert numpy.abs(errors[refused == 0]).mean() <= 0.05


@pytest.mark.parametrize("name", [*GENERATORS, "bent"])
def test_clean_labels_give_a_rate_near_zero_and_an_interval_that_contains_it(name):
    estimate = estimate_flip_rate(noisy_margins({**GENERATORS, **HARDER}[name], 0.0, seed=7))
    assert estimate.flip_rate <= 0.03
    assert estimate.interval[0] == 0.0


def brute_force(margins, bend):
    """Maximise the penalised likelihood over a dense grid of c and g, for every rate on a grid."""
    rates = numpy.linspace(0, 0.5, 251)[:, None]
    profile = numpy.full((len(rates), 2), -numpy.inf)
    for log_shape in bend:
        for log_scale in numpy.linspace(-4, 5, 181):
            logit = numpy.sign(margins) * numpy.exp(numpy.exp(log_shape) * (log_scale + numpy.log(abs(margins))))
            agreement = 1 / (1 + numpy.exp(-logit.clip(-300, 300)))
            value = numpy.log(rates + (1 - 2 * rates) * agreement).sum(1) - (log_shape / SHAPE_DEVIATION) ** 2 / 2
            better = value > profile[:, 0]
            profile[better] = numpy.stack([value[better], numpy.full(better.sum(), log_scale)], 1)
    return rates[:, 0], profile[:, 0], numpy.exp(profile[:, 1])


@pytest.mark.parametrize("flip_rate", [0.0, 0.2])
def test_fit_equals_a_search_of_the_whole_grid(flip_rate):
    margins = noisy_margins(normal(3, 1.0), flip_rate, seed=2, count=200)
    estimate = estimate_flip_rate(margins)
    rates, values, scales = brute_force(margins, bend=[0.0])
    best = values.argmax()
    assert estimate.flip_rate == pytest.approx(rates[best], abs=0.002)
    assert estimate.scale == pytest.approx(scales[best], rel=0.05)
    _, bent_values, _ = brute_force(margins, bend=numpy.linspace(-0.4, 0.4, 9))
    inside = rates[2 * (bent_values.max() - bent_values) <= 3.8415]
    assert estimate.interval == pytest.approx((inside[0], inside[-1]), abs=0.006)
    if best > 0:
        curvature = numpy.diff(values[best - 8 : best + 9 : 8], n=2).item()
        assert estimate.standard_error == pytest.approx(0.016 / math.sqrt(-curvature), rel=0.1)


def test_labels_that_the_margins_separate_give_the_binomial_answer():
    sizes = numpy.abs(numpy.random.default_rng(0).normal(2, 1.5, 1000))
    flipped = numpy.arange(1000) % 5 == 0
    estimate = estimate_flip_rate(numpy.where(flipped, -sizes, sizes))
    assert estimate.flip_rate == pytest.approx(0.2, abs=0.005)
    assert estimate.standard_error == pytest.approx(math.sqrt(0.2 * 0.8 / 1000), rel=0.1)
    assert estimate.interval[1] == pytest.approx(0.2256, abs=0.005)
    assert not estimate.refused


def test_anchor_stands_beside_the_likelihood_and_is_biased_upwards():
    estimates = [estimate_flip_rate(noisy_margins(normal(1.5, 1.0), 0.1, seed)) for seed in range(5)]
    alone = estimate_flip_rate(noisy_margins(normal(1.5, 1.0), 0.1, 0), method="anchor")
    assert alone.flip_rate == estimates[0].cross_check
    assert (alone.method, alone.count, alone.scale, alone.cross_check) == ("anchor", 100, 1.0, None)
    assert 0.12 < numpy.mean([estimate.cross_check for estimate in estimates]) < 0.2


@pytest.mark.parametrize(("disagreements", "count"), [(0, 50), (1, 100), (40, 200), (80, 1000)])
def test_audit_has_the_interval_of_wilson(disagreements, count):
    estimate = estimate_flip_rate(None, audit=[True] * disagreements + [False] * (count - disagreements))
    share = disagreements / count
    assert (estimate.method, estimate.flip_rate, estimate.count) == ("audit", share, count)
    for end in estimate.interval:  # Wilson's ends are where the share lies 1.96 standard deviations away
        assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count), abs=1e-7)
    assert not estimate.refused


def test_auto_prefers_the_audit():
    margins = noisy_margins(separated, 0.3, seed=0)
    assert estimate_flip_rate(margins, audit=torch.tensor([True, False] * 10)).method == "audit"
    assert estimate_flip_rate(margins).method == "likelihood"


SOME_MARGINS = noisy_margins(normal(3, 1.0), 0.2, seed=11, count=300)


@settings(max_examples=12)
@given(exponent=st.floats(-30, 30), seed=st.integers(0, 2**32 - 1))
def test_neither_unit_nor_order_of_the_margins_matters(exponent, seed):
    before = estimate_flip_rate(SOME_MARGINS)
    factor = 10.0**exponent
    after = estimate_flip_rate(factor * numpy.random.default_rng(seed).permutation(SOME_MARGINS))
    assert after.flip_rate == pytest.approx(before.flip_rate, abs=1e-6)
    assert after.interval == pytest.approx(before.interval, abs=1e-6)
    assert after.standard_error == pytest.approx(before.standard_error, rel=1e-4)
    assert after.scale * factor == pytest.approx(before.scale, rel=1e-4)
    assert (after.cross_check, after.refused) == (before.cross_check, before.refused)


@settings(max_examples=15)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
@example([0.0, 5e-324])  # the smallest number: its reciprocal is infinite
def test_any_finite_margins_give_finite_numbers_in_range(margins):
    estimate = estimate_flip_rate(margins * 4)
    assert 0 <= estimate.interval[0] <= estimate.flip_rate <= estimate.interval[1] <= 0.5
    assert estimate.flip_rate < 0.5
    assert estimate.standard_error > 0
    assert 0 < estimate.scale < math.inf
    assert estimate.refused == bool(estimate.reason)


def test_container_dtype_and_autograd_mode_do_not_matter():
    expected = estimate_flip_rate(SOME_MARGINS)
    assert estimate_flip_rate(SOME_MARGINS.tolist()) == expected
    with torch.inference_mode():
        assert estimate_flip_rate(torch.tensor(SOME_MARGINS)) == expected
    rounded = estimate_flip_rate(torch.tensor(SOME_MARGINS, dtype=torch.float32, requires_grad=True))
    assert rounded.flip_rate == pytest.approx(expected.flip_rate, abs=1e-5)


def test_zero_margins_carry_no_information():
    with_zeros = estimate_flip_rate(numpy.concatenate([SOME_MARGINS, numpy.zeros(200)]))
    without = estimate_flip_rate(SOME_MARGINS)
    assert with_zeros.flip_rate == pytest.approx(without.flip_rate, abs=1e-6)
    assert with_zeros.interval == pytest.approx(without.interval, abs=1e-6)


def test_a_hundred_thousand_pairs_are_quick_and_precise():
    margins = noisy_margins(normal(3, 1.0), 0.25, seed=0, count=100_000)
    start = time.process_time()
    estimate = estimate_flip_rate(margins)
    assert time.process_time() - start < 2
    assert estimate.flip_rate == pytest.approx(0.25, abs=4 * estimate.standard_error)
    assert estimate.standard_error < 0.005


COIN_FLIPS = numpy.random.default_rng(0).normal(0, 2, 1000)


@pytest.mark.parametrize(
    ("margins", "options", "reason"),
    [
        (SOME_MARGINS[:99], {}, "too few"),
        (numpy.zeros(1000), {}, "same|size 0.0"),
        (numpy.where(numpy.arange(1000) % 5 == 0, -1.0, 1.0), {}, "look alike"),
        (COIN_FLIPS - 0.1, {}, "signed by the recorded label"),
        (numpy.abs(COIN_FLIPS) * numpy.where(numpy.arange(1000) % 20 < 9, -1, 1), {}, "reaches 0.5|exceeds 0.4"),
        (noisy_margins(normal(1.5, 1.0), 0.3, seed=1), {}, "too wide|coin flips"),
        (None, {"audit": [True] * 10 + [False] * 40}, "re-label more pairs"),
        (None, {"audit": [True] * 90 + [False] * 110}, "exceeds 0.4"),
        (None, {"audit": [True] * 200}, "exceeds 0.4"),
        (None, {"audit": [False] * 20}, "re-label more pairs"),
        (SOME_MARGINS, {"method": "anchor"}, "more held-out pairs"),
    ],
)
def test_refusals_say_why_and_raise_nothing(margins, options, reason):
    estimate = estimate_flip_rate(margins, **options)
    assert estimate.refused
    assert any(part in estimate.reason for part in reason.split("|")), estimate.reason
    assert 0 <= estimate.flip_rate < 0.5


def test_an_interval_cut_off_at_zero_does_not_pass_for_a_narrow_one():
    # The rate is 0.2; the fit runs to the boundary, and the interval is only as short as 0.18 because 0 cuts it.
    estimate = estimate_flip_rate(noisy_margins(normal(1.5, 0.05), 0.2, seed=3))
    assert estimate.interval[0] == 0.0
    assert estimate.refused


@pytest.mark.parametrize(
    ("margins", "options", "message"),
    [
        ([], {}, "shape \\(0,\\)"),
        ([[1.0, -1.0]], {}, "one-dimensional"),
        (1.0, {}, "one-dimensional"),
        (None, {}, "cannot be read"),
        (["a"], {}, "cannot be read"),
        ([True, False], {}, "torch.bool"),
        ([1j], {}, "complex"),
        ([1.0, 2.0, math.nan, math.inf], {}, "margins\\[2\\] = nan"),
        (torch.tensor([1.0, -math.inf]), {}, "margins\\[1\\] = -inf"),
        ([1.0], {"method": "moments"}, "'auto', 'audit', 'likelihood', 'anchor'"),
        ([1.0], {"method": "audit"}, "needs audit"),
        ([1.0], {"method": "likelihood", "audit": [True]}, "does not read audit"),
        ([1.0], {"audit": []}, "shape \\(0,\\)"),
        ([1.0], {"audit": [0.0, 0.5]}, "audit\\[1\\] = 0.5"),
        ([1.0], {"audit": [0.0, math.nan]}, "audit\\[1\\] = nan"),
    ],
)
def test_bad_input_raises_what_was_given_and_what_is_allowed(margins, options, message):
    with pytest.raises(ValueError, match=message):
        estimate_flip_rate(margins, **options)


def test_the_estimate_cannot_be_edited():
    with pytest.raises(dataclasses.FrozenInstanceError):
        estimate_flip_rate(SOME_MARGINS).flip_rate = 0.1


@pytest.mark.parametrize("flip_rate", [0.1, 0.3])
def test_posterior_equals_the_closed_form(preference_vectors, flip_rate):
    vectors = preference_vectors("derived_losses")
    margins, expected = torch.tensor(vectors["h"]), torch.tensor(vectors[f"posterior_flip_{flip_rate}"])
    torch.testing.assert_close(posterior_flip(margins, flip_rate), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(posterior_flip(margins / 4, flip_rate, scale=4.0), expected, rtol=1e-10, atol=1e-10)
    rates = torch.full_like(margins, flip_rate)
    torch.testing.assert_close(posterior_flip(margins, rates), expected, rtol=1e-10, atol=1e-10)
    single = posterior_flip(margins.float(), flip_rate)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_posterior_is_never_nan(dtype):
    largest = torch.finfo(dtype).max
    margins = torch.tensor([-largest, -700.0, -1.0, 0.0, 700.0, largest], dtype=dtype)
    for rate in (0.0, 1e-300, 0.2, 0.499999):
        posterior = posterior_flip(margins, rate, scale=20.0)
        assert bool(((posterior >= 0) & (posterior <= 1)).all())
    mixed = posterior_flip(margins, torch.tensor([0.0, 0.0, 0.2, 0.2, 0.0, 0.1]))
    assert mixed[[0, 1, 4, 5]].tolist() == [0.0] * 4
    assert mixed[3].item() == pytest.approx(0.2)


def test_posterior_of_the_true_model_is_calibrated():
    random = numpy.random.default_rng(0)
    clean = normal(3, 1.0)(random, 100_000)
    flipped = random.random(100_000) < 0.2
    posterior = posterior_flip(torch.tensor(numpy.where(flipped, -clean, clean)), 0.2).numpy()
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        chosen = (posterior >= low) & (posterior < low + 0.2)
        deviation = math.sqrt(0.25 / chosen.sum())
        assert flipped[chosen].mean() == pytest.approx(posterior[chosen].mean(), abs=4 * deviation)


@pytest.mark.parametrize(
    ("flip_rate", "scale", "message"),
    [
        (0.5, 1.0, "flip_rate"),
        (-0.1, 1.0, "flip_rate"),
        (math.nan, 1.0, "flip_rate"),
        (torch.tensor([0.1, 0.6]), 1.0, "flip_rate"),
        (torch.tensor([0.1, 0.2, 0.3]), 1.0, "shape"),
        (0.1, 0.0, "scale"),
        (0.1, math.nan, "scale"),
        (0.1, math.inf, "scale"),
    ],
)
def test_posterior_refuses_bad_rates_and_scales(flip_rate, scale, message):
    with pytest.raises(ValueError, match=message):
        posterior_flip(torch.tensor([1.0, -1.0]), flip_rate, scale)


def test_a_refused_estimate_has_a_stand_in():
    usable = estimate_flip_rate(None, audit=[True] * 40 + [False] * 160)
    assert usable.rate_for_posterior() == usable.flip_rate
    refused = estimate_flip_rate(None, audit=[True] * 190 + [False] * 10)
    assert refused.rate_for_posterior() == 0.45
    wide = estimate_flip_rate(None, audit=[True, False, False, False])
    assert wide.refused and wide.rate_for_posterior() == pytest.approx(sum(wide.interval) / 2)


def test_a_rate_just_above_the_limit_is_shown_above_it():
    estimate = estimate_flip_rate(None, audit=[True] * 4001 + [False] * 5999)
    assert estimate.reason.startswith("the rate 0.4001 exceeds 0.4:")


def test_the_way_out_of_a_refusal_is_named_in_both_worlds():
    reason = estimate_flip_rate([1.0, 2.0, -1.0]).reason
    assert "audit_column of RobustDPOConfig" in reason and "estimate_flip_rate with method='audit'" in reason
