"""Correlated noise against jax_privacy's numbers, a dense solve, and exhaustive search for sensitivities."""

from itertools import combinations
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfnoise.privacy.correlated_noise import CorrelatedNoise, choose_bands
from hfnoise.privacy.participation import (
    column_norms,
    min_separation_sensitivity,
    min_separation_sensitivity_bound,
    single_participation_sensitivity,
)
from hfnoise.privacy.toeplitz import inverse_coefficients, prefix_sum_error, toeplitz_strategy

VECTORS = Path(__file__).parent.parent / "vectors" / "privacy"
EXACT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(scope="module")
def vectors():
    return {name: torch.from_numpy(value) for name, value in numpy.load(VECTORS / "dev_mf.npz").items()}


@pytest.fixture(scope="module")
def meta(vectors):
    return dict(zip(("steps", "bands", "min_separation", "participations"), vectors["meta"].tolist(), strict=True))


def dense(coefficients, steps):
    matrix = torch.zeros(steps, steps, dtype=torch.float64)
    for lag, value in enumerate(coefficients.tolist()):
        matrix += value * torch.ones(steps, dtype=torch.float64).diag().roll(lag, 0).tril(-lag)
    return matrix


def rows(noise, order):
    return torch.stack([noise.at(step) for step in order])


# -- strategies and errors ------------------------------------------------------------------------------------------


def test_square_root(vectors, meta):
    strategy = toeplitz_strategy("sqrt", meta["steps"])
    torch.testing.assert_close(strategy, vectors["opt_strategy"], **EXACT)
    torch.testing.assert_close(inverse_coefficients(strategy, meta["steps"]), vectors["opt_noising"], **EXACT)


@pytest.mark.parametrize("nu", ["0.0", "0.05", "0.3"])
def test_nu(vectors, meta, nu):
    steps, prefix = meta["steps"], f"nu{nu}"
    strategy = toeplitz_strategy("nu", steps, nu=float(nu))
    torch.testing.assert_close(strategy, vectors[f"{prefix}_strategy"], **EXACT)
    torch.testing.assert_close(inverse_coefficients(strategy, steps), vectors[f"{prefix}_noising"], **EXACT)
    torch.testing.assert_close(prefix_sum_error(strategy, steps).squared_error, vectors[f"{prefix}_pqe"], **EXACT)
    single = single_participation_sensitivity(strategy)
    assert single**2 == pytest.approx(vectors[f"{prefix}_sens2_single"].item(), rel=1e-9)
    several = min_separation_sensitivity(strategy, meta["min_separation"], steps, meta["participations"])
    assert several**2 == pytest.approx(vectors[f"{prefix}_sens2_minsep"].item(), rel=1e-9)


def test_optimised_banded(vectors, meta):
    steps, bands = meta["steps"], meta["bands"]
    strategy = toeplitz_strategy("banded", steps, bands)
    error = prefix_sum_error(strategy, steps)
    assert strategy.norm().item() == pytest.approx(1, abs=1e-12)
    assert error.mean <= vectors["banded_loss_mean"].item() * (1 + 1e-9)
    theirs = prefix_sum_error(vectors["banded_strategy"], steps)
    assert theirs.mean == pytest.approx(vectors["banded_loss_mean"].item(), rel=1e-9)
    assert theirs.maximum == pytest.approx(vectors["banded_loss_max"].item(), rel=1e-9)
    squared = min_separation_sensitivity(vectors["banded_strategy"], meta["min_separation"], steps) ** 2
    assert squared == pytest.approx(vectors["banded_sens2_minsep"].item(), rel=1e-9)


@pytest.mark.parametrize(("steps", "bands"), [(2000, 2), (2000, 64), (400, 400), (3, 2), (1, 1)])
def test_no_direction_improves_the_optimised_strategy(steps, bands):
    strategy = toeplitz_strategy("banded", steps, bands)

    def loss(coefficients):
        return prefix_sum_error(coefficients, steps).mean * coefficients.square().sum().item()

    best = loss(strategy)
    truncated = loss(toeplitz_strategy("sqrt", steps, bands))
    # One band has nothing to optimise, and there "banded" is white noise.
    assert best <= truncated * (0.999 if bands > 1 else 1)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-1, 1e-2, 1e-3) * 5:
        step = torch.randn(bands, generator=generator, dtype=torch.float64) * strategy * size
        assert loss(strategy + step) >= best * (1 - 1e-9)


def test_optimised_strategies_are_not_shared():
    toeplitz_strategy("banded", 40, 4).zero_()
    assert toeplitz_strategy("banded", 40, 4).norm().item() == pytest.approx(1)


def test_unamplified_errors_of_the_specification():
    assert prefix_sum_error(torch.ones(1), 200).mean == 100.5
    assert prefix_sum_error(toeplitz_strategy("banded", 200, 8), 200).mean == pytest.approx(16.8, abs=0.05)


def test_banded_inverse_square_root(vectors, meta):
    noising = toeplitz_strategy("banded_inverse_sqrt", meta["steps"], meta["bands"])
    torch.testing.assert_close(noising, vectors["banded_inv_sqrt"], **EXACT)


@given(st.lists(st.floats(-0.9, 0.9), min_size=0, max_size=6), st.integers(1, 30))
@settings(max_examples=30)
def test_inverse(tail, steps):
    coefficients = torch.tensor([1.5, *tail], dtype=torch.float64)
    product = dense(coefficients[:steps], steps) @ dense(inverse_coefficients(coefficients, steps), steps)
    # The inverse may grow geometrically, and rounding with it.
    torch.testing.assert_close(product, torch.eye(steps, dtype=torch.float64), rtol=0, atol=1e-9 * 3.0**steps)


# -- sensitivity ----------------------------------------------------------------------------------------------------


def test_dense_sensitivities(vectors, meta):
    matrix = vectors["dense_C"]
    bound = min_separation_sensitivity_bound(matrix, meta["min_separation"], meta["participations"])
    assert bound == pytest.approx(vectors["dense_sens_minsep_ub"].item(), rel=1e-9)
    assert matrix.norm(dim=0).max().item() == pytest.approx(vectors["dense_sens_single"].item(), rel=1e-9)


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=7),
    st.integers(1, 4),
    st.integers(1, 8),
    st.one_of(st.none(), st.integers(1, 4)),
)
@settings(max_examples=40)
def test_sensitivity_is_that_of_the_worst_participation(values, separation, steps, limit):
    column = torch.tensor(sorted([*values, 1.0], reverse=True), dtype=torch.float64)
    matrix = dense(column[:steps], steps)
    most = limit or steps
    worst = max(
        matrix[:, list(chosen)].sum(dim=1).norm().item()
        for count in range(1, min(most, steps) + 1)
        for chosen in combinations(range(steps), count)
        if all(later - earlier >= separation for earlier, later in zip(chosen, chosen[1:], strict=False))
    )
    assert min_separation_sensitivity(column, separation, steps, limit) == pytest.approx(worst, rel=1e-9)
    assert min_separation_sensitivity_bound(matrix, separation, limit) >= worst * (1 - 1e-9)


def test_banded_sensitivity_grows_with_the_root_of_participations():
    strategy = toeplitz_strategy("banded", 100, 8)
    whole_columns, cut_off = 12, strategy[:4].square().sum().item()  # participations at 0, 8, ..., 96
    assert min_separation_sensitivity(strategy, 8, 100) ** 2 == pytest.approx(whole_columns + cut_off, rel=1e-9)
    assert min_separation_sensitivity_bound(dense(strategy, 100), 8) <= 13**0.5 * (1 + 1e-9)
    assert min_separation_sensitivity(strategy, 10, 100, max_participations=1) == pytest.approx(1)


def test_coefficients_of_the_inverse_are_not_taken_for_the_strategy():
    noising = toeplitz_strategy("banded_inverse_sqrt", 50, 4)
    for refused in (
        lambda: single_participation_sensitivity(noising),
        lambda: min_separation_sensitivity(noising, 4, 50),
        lambda: CorrelatedNoise(noising, 50, torch.zeros),
    ):
        with pytest.raises(ValueError, match="inverse_coefficients"):
            refused()
    strategy = inverse_coefficients(noising, 50)
    sensitivity = min_separation_sensitivity(strategy, 4, 50)
    assert single_participation_sensitivity(strategy) < sensitivity
    assert sensitivity == pytest.approx(min_separation_sensitivity_bound(dense(strategy, 50), 4), rel=1e-9)


# -- the stream -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("normalized", "name"), [(False, "CinvZ"), (True, "CinvZ_colnorm")])
def test_stream_equals_the_vectors(vectors, meta, normalized, name):
    noise = CorrelatedNoise(
        vectors["banded_strategy"], meta["steps"], vectors["Z"].__getitem__, column_normalized=normalized
    )
    torch.testing.assert_close(rows(noise, range(meta["steps"])), vectors[name], **EXACT)
    assert noise.sensitivity == pytest.approx(1, abs=1e-9)


@given(st.data())
@settings(max_examples=25)
def test_stream_equals_a_dense_solve_in_any_order(data):
    steps = data.draw(st.integers(1, 12))
    bands = data.draw(st.integers(1, steps))
    kind = data.draw(st.sampled_from(["sqrt", "banded", "banded_inverse_sqrt"]))
    normalized = data.draw(st.booleans())
    order = data.draw(st.lists(st.integers(0, steps - 1), min_size=1, max_size=8))
    white = torch.randn(steps, 2, 3, generator=torch.Generator().manual_seed(steps), dtype=torch.float64)
    coefficients = toeplitz_strategy(kind, steps, bands)
    inverse = kind == "banded_inverse_sqrt"
    matrix = dense(coefficients, steps)
    matrix = matrix.inverse() if inverse else matrix
    if normalized:
        matrix = matrix / matrix.norm(dim=0)
    expected = torch.linalg.solve(matrix, white.flatten(1)).view_as(white)
    noise = CorrelatedNoise(coefficients, steps, white.__getitem__, inverse=inverse, column_normalized=normalized)
    torch.testing.assert_close(rows(noise, order), expected[order], **EXACT)
    assert noise.sensitivity == pytest.approx(matrix.norm(dim=0).max().item(), rel=1e-9)


def test_cost_of_orders():
    calls = []

    def white(step):
        calls.append(step)
        return torch.zeros(3)

    noise = CorrelatedNoise(toeplitz_strategy("banded", 100, 8), 100, white)
    rows(noise, range(20))
    assert calls == list(range(20))  # in order: once each
    noise.at(30)
    assert calls == list(range(31))  # forward: those between
    noise.at(5)
    assert calls[31:] == list(range(6))  # back: from the beginning
    assert len(noise._past) == 6
    calls.clear()
    CorrelatedNoise(toeplitz_strategy("banded", 100, 1), 100, white).at(70)
    assert calls == [70]
    calls.clear()
    CorrelatedNoise(toeplitz_strategy("banded_inverse_sqrt", 100, 3), 100, white, inverse=True).at(70)
    assert calls == [70, 69, 68]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_follows_the_white_noise_and_results_are_the_callers_own(dtype):
    kept = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=dtype)
    before = kept.clone()
    strategy = toeplitz_strategy("banded", 6, 3)
    first, second = (CorrelatedNoise(strategy, 6, kept.__getitem__) for _ in range(2))
    for step in range(6):
        result = first.at(step)
        assert result.dtype == dtype
        assert torch.equal(result, second.at(step).clone())
        result.zero_()  # must reach neither the state nor the white noise
    assert torch.equal(kept, before)


def test_correlated_noise_cancels_in_the_sums():
    steps, strategy = 64, toeplitz_strategy("banded", 64, 16)
    white = torch.randn(steps, 4000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    noise = CorrelatedNoise(strategy, steps, white.__getitem__)
    measured = rows(noise, range(steps)).cumsum(0).square().mean(dim=1)
    torch.testing.assert_close(measured, prefix_sum_error(strategy, steps).squared_error, rtol=0.15, atol=0)
    assert measured.mean() < white.cumsum(0).square().mean() / 5


# -- choice of bands ------------------------------------------------------------------------------------------------


def test_choose_bands_balances_noise_and_cancellation():
    cheap = choose_bands(64, 64 * 40, 100, calibrate=lambda bands: 1.0)
    assert [option.bands for option in cheap.options] == [1, 2, 4, 8, 16, 32]  # 64 groups would be below one batch
    assert cheap.bands == 32
    assert [option.ratio for option in cheap.options] == sorted((o.ratio for o in cheap.options), reverse=True)
    assert (cheap.options[3].sample_rate, cheap.options[3].participations) == (8 / 40, 13)
    dear = choose_bands(64, 64 * 40, 100, calibrate=lambda bands: float(bands))
    assert (dear.bands, dear.noise_multiplier, dear.options[0].ratio) == (1, 1.0, 1.0)
    assert choose_bands(64, 64 * 40, 5, calibrate=lambda bands: 1.0).options[-1].bands == 4  # at most steps


# Units, batch, steps, epsilon, bands -> the ratio of the specification to white noise.
RATIOS = [
    (65536, 1024, 512, 3.0, 8, 0.84),
    (65536, 1024, 512, 8.0, 16, 0.63),
    (65536, 1024, 512, 8.0, 64, 0.60),
    (20000, 512, 400, 3.0, 4, 0.93),
    (20000, 512, 400, 8.0, 16, 0.72),
    (5000, 256, 200, 3.0, 4, 0.98),
    (5000, 256, 200, 8.0, 8, 0.82),
]


@pytest.mark.slow
@pytest.mark.parametrize(("units", "batch", "steps", "epsilon", "bands", "ratio"), RATIOS)
def test_ratios_of_the_specification(units, batch, steps, epsilon, bands, ratio):
    """Its ratios are those of the truncated square root with Rényi accounting; the optimised strategy is better."""
    from hfnoise.privacy.calibration import calibrate_noise_multiplier

    def calibrate(bands):
        return calibrate_noise_multiplier(epsilon, 1e-5, batch / units, steps, bands=bands, accountant="rdp")

    def ratio_of(kind):
        strategy = toeplitz_strategy(kind, steps, bands)
        error = prefix_sum_error(strategy / strategy.norm(), steps).rmse
        return error / prefix_sum_error(torch.ones(1), steps).rmse * calibrate(bands) / calibrate(1)

    assert ratio_of("sqrt") == pytest.approx(ratio, abs=0.021)
    assert ratio_of("banded") < ratio_of("sqrt") - 0.015
    if units == 5000:
        best = choose_bands(batch, units, steps, calibrate)
        assert best.bands == {3.0: 4, 8.0: 8}[epsilon]
        assert best.options[bands.bit_length() - 1].ratio == pytest.approx(ratio_of("banded"))


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("cubic", 10), {}, "kind must be one of sqrt"),
        (("sqrt", 0), {}, "steps must be"),
        (("sqrt", True), {}, "steps must be"),
        (("banded", 10), {}, "needs bands"),
        (("banded", 10, 11), {}, "exceeds steps"),
        (("banded", 10, 0), {}, "bands must be"),
        (("nu", 10), {}, "nu belongs"),
        (("sqrt", 10), {"nu": 0.1}, "nu belongs"),
        (("nu", 10), {"nu": 1.0}, r"in \[0, 1\)"),
    ],
)
def test_bad_strategies(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        toeplitz_strategy(*arguments, **options)


def test_bad_coefficients():
    for bad in (torch.zeros(3), torch.ones(2, 2), torch.tensor([1.0, float("nan")]), torch.ones(0), [1.0]):
        with pytest.raises(ValueError, match="coefficients must be"):
            inverse_coefficients(bad, 4)
    with pytest.raises(ValueError, match="rise by"):
        min_separation_sensitivity(torch.tensor([0.5, 1.0]), 1, 4)
    with pytest.raises(ValueError, match="square"):
        min_separation_sensitivity_bound(torch.ones(2, 3), 1)
    with pytest.raises(ValueError, match="min_separation"):
        min_separation_sensitivity(torch.ones(1), 0, 4)
    with pytest.raises(ValueError, match="max_participations"):
        min_separation_sensitivity(torch.ones(1), 1, 4, 0)
    assert column_norms(torch.ones(9), 2).tolist() == pytest.approx([2**0.5, 1.0])


def test_bad_streams():
    with pytest.raises(ValueError, match="Use fewer"):
        CorrelatedNoise(torch.ones(5), 4, torch.zeros)
    noise = CorrelatedNoise(torch.ones(2), 4, lambda step: torch.zeros(step + 1))
    for step in (4, -1, 1.0, True):
        with pytest.raises(ValueError, match="outside of the run"):
            noise.at(step)
    with pytest.raises(ValueError, match="guarantee"):
        noise.at(1)
    with pytest.raises(ValueError, match="floating"):
        CorrelatedNoise(torch.ones(2), 4, lambda step: torch.zeros(2, dtype=torch.int64)).at(0)
    for wrong in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="no noise multiplier"):
            choose_bands(1, 10, 10, calibrate=lambda bands, wrong=wrong: wrong)
    with pytest.raises(ValueError, match="units must be"):
        choose_bands(10, 9, 10, calibrate=lambda bands: 1.0)
