"""The constants of the grids, recomputed; the trust rule; what is refused."""

import math

import pytest

from hfnoise.quantization import grid_for
from hfnoise.quantization.grids import EXACT_HALF_RANGES, UPSTREAM_HALF_RANGES


def fixed_point(half_range, levels):
    """Return sum(u M1) / sum(u^2 P) over the cells of the grid with this half-range, for a standard normal."""
    units = [2 * index / (levels - 1) - 1 for index in range(levels)]
    edges = [
        -math.inf,
        *(half_range * (left + right) / 2 for left, right in zip(units, units[1:], strict=False)),
        math.inf,
    ]
    density = [math.exp(-edge * edge / 2) / math.sqrt(2 * math.pi) for edge in edges]
    # Upper tails, with their full relative precision.
    above = [math.erfc(edge / math.sqrt(2)) / 2 for edge in edges]
    first_moments = [left - right for left, right in zip(density, density[1:], strict=False)]
    probabilities = [left - right for left, right in zip(above, above[1:], strict=False)]
    return sum(map(math.prod, zip(units, first_moments, strict=True))) / sum(
        unit * unit * probability for unit, probability in zip(units, probabilities, strict=True)
    )


@pytest.mark.parametrize("bits", EXACT_HALF_RANGES)
def test_exact_half_ranges_minimise_the_squared_error(bits):
    grid = grid_for(bits)
    low, high = 0.9 * grid.half_range, 1.1 * grid.half_range
    while high - low > 1e-14:  # alpha grows past its fixed point
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if fixed_point(middle, grid.levels) > middle else (low, middle)
    assert grid.half_range == pytest.approx(low, abs=1e-12)


def test_upstream_half_ranges_are_those_of_the_official_code(vectors):
    table = dict(
        zip(vectors("constants")["bits"].tolist(), vectors("constants")["upstream_scale"].tolist(), strict=True)
    )
    table[1.58] = table.pop(1.585)
    assert table == UPSTREAM_HALF_RANGES


def test_steps_and_parity():
    assert [grid_for(bits).levels for bits in EXACT_HALF_RANGES] == [2, 3, 4, 8, 16, 32, 64, 128, 256]
    assert grid_for(1.58).step == grid_for(1.58).half_range and not grid_for(1.58).mid_rise
    assert grid_for(4).step == 2 * EXACT_HALF_RANGES[4] / 15 and grid_for(4).mid_rise
    assert grid_for(4.0) is grid_for(4)


@pytest.mark.parametrize("bits", EXACT_HALF_RANGES)
def test_trust_is_half_a_step_beyond_the_outermost_level(bits):
    grid = grid_for(bits)
    beyond = 1 + grid.step / (2 * grid.half_range)
    expected = 1.30 if bits == 1 else beyond
    assert grid.trusted_steps() * grid.step / grid.half_range == pytest.approx(expected, rel=1e-15)
    assert grid.trusted_steps(beyond) == pytest.approx(grid.levels / 2, rel=1e-15)


@pytest.mark.parametrize("bits", [0, 9, 16, 1.5, 1.585, 2.5, -1, True, "4", None, float("nan")])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match=r"allowed are 1, 1.58, 2, 3, 4, 5, 6, 7, 8"):
        grid_for(bits)


def test_other_settings_are_refused():
    with pytest.raises(ValueError, match="'exact' or 'upstream'"):
        grid_for(4, "optimal")
    for value in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="above 0"):
            grid_for(4).trusted_steps(value)
    for value in (True, "1.3"):
        with pytest.raises(TypeError, match="a number above 0"):
            grid_for(4).trusted_steps(value)
