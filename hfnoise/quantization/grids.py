"""The value grids: uniform levels in units of a row's root mean square, and which entries a gradient trusts.

Notation of this package: `levels` is N, `half_range` alpha the outermost level in units of the RMS, `step` d the
distance of two levels, d = 2 alpha / (N - 1). Code c in 0 .. N - 1 stands for the value (c - (N - 1) / 2) d RMS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# The half-range that minimises the mean squared error of N evenly spaced, symmetric levels on a standard normal: the
# fixed point of alpha = sum(u M1) / sum(u^2 P), u = linspace(-1, 1, N), with P the probability and M1 the first moment
# of the cell of each level. Recomputed to 1e-12 by tests/quantization/test_grids.py.
EXACT_HALF_RANGES: dict[float, float] = {
    1: 0.797884560802865,  # sqrt(2 / pi)
    1.58: 1.224006361924962,
    2: 1.493530028915260,
    3: 2.051068045052204,
    4: 2.514004591499794,
    5: 2.916151249338744,
    6: 3.277984797423445,
    7: 3.611097196279850,
    8: 3.922204416746528,
}
# The table of the official code (IST-DASLab/QuEST at c295afda, OPTIMAL_GAUSSIAN_SCALES; 1.585 there). Its optimiser
# stopped early: at 8 bits the half-range is 1 % too small and the error 0.16 % above the minimum.
UPSTREAM_HALF_RANGES: dict[float, float] = {
    1: 0.7978845587140913,
    1.58: 1.2240089519030855,
    2: 1.4935346200015913,
    3: 2.051068354131873,
    4: 2.513930578568423,
    5: 2.9160938834961225,
    6: 3.276597282593217,
    7: 3.6010497188221655,
    8: 3.884938678807525,
}
TERNARY_BITS = 1.58
# The clip scale of all 1-bit runs of the paper that rotate (for_plots/runs_for_scaling.json of the official code; 1.25
# in those that do not).
# Half a step, the rule of the other widths, would be a factor of 2 here: it trusts nearly everything and learns less.
ONE_BIT_TRUST_FACTOR = 1.30


@dataclass(frozen=True)
class Grid:
    """A symmetric uniform grid: `bits`, the number of `levels` and the outermost level `half_range`, in RMS units.

    An even number of levels is mid-rise (no zero level: +-d/2, +-3d/2, ...), the three of the ternary grid mid-tread.

    Example:
        >>> from hfnoise.quantization import grid_for
        >>> grid = grid_for(2)
        >>> grid.levels, round(grid.step, 6), grid.mid_rise
        (4, 0.995687, True)
    """

    bits: float
    levels: int
    half_range: float

    @property
    def step(self) -> float:
        """Return the distance of two levels, in RMS units: 2 half_range / (levels - 1)."""
        return 2 * self.half_range / (self.levels - 1)

    @property
    def mid_rise(self) -> bool:
        """Return whether zero lies halfway between two levels (every width but the ternary one)."""
        return self.levels % 2 == 0

    def trusted_steps(self, trust_factor: float | None = None) -> float:
        """Return how far from zero, in steps, an entry may lie and keep its gradient: trust_factor alpha / d.

        QuEST (arXiv 2502.05003, section 3) keeps the gradient of |q - x| <= T, T = d / 2. Every entry inside the grid
        satisfies that, so it says |x| <= alpha + d / 2: a trust factor of 1 + 1 / (N - 1), the default but at 1 bit.

        Args:
            trust_factor (`float`, *optional*): the bound in units of the outermost level: entries of
                |x| <= trust_factor * half_range * RMS keep their gradient. Above 0. `None` is 1.30 at 1 bit, the value
                of the paper's own runs, and half a step beyond the outermost level at every other width.

        Returns:
            `float`: the bound in steps, to be compared with |x| / (step RMS).

        Raises:
            TypeError: if `trust_factor` is no number.
            ValueError: if it is not positive and finite.

        Example:
            >>> from hfnoise.quantization import grid_for
            >>> grid_for(4).trusted_steps(), grid_for(4).trusted_steps(1.0), grid_for(1).trusted_steps()
            (8.0, 7.5, 0.65)
        """
        if trust_factor is None:
            if self.bits != 1:
                return self.levels / 2  # (1 + 1 / (N - 1)) (N - 1) / 2, without its rounding
            trust_factor = ONE_BIT_TRUST_FACTOR
        return check_positive(trust_factor, "trust_factor") * (self.levels - 1) / 2


def check_positive(value: float, name: str) -> float:
    """Return `value`; raise a TypeError if it is no number, a ValueError if it is not positive and finite.

    Example:
        >>> from hfnoise.quantization.grids import check_positive
        >>> check_positive(1.3, "trust_factor")
        1.3
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; give a number above 0, or None for the rule of the bit width.")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value}; it has to be finite and above 0, or None for the rule of the bit width.")
    return float(value)


def _grids(half_ranges: dict[float, float]) -> dict[float, Grid]:
    levels = {bits: 3 if bits == TERNARY_BITS else 2 ** int(bits) for bits in half_ranges}
    return {bits: Grid(bits, levels[bits], half_range) for bits, half_range in half_ranges.items()}


_GRIDS = {"exact": _grids(EXACT_HALF_RANGES), "upstream": _grids(UPSTREAM_HALF_RANGES)}


def grid_for(bits: float, grid: str = "exact", name: str = "bits") -> Grid:
    """Return the grid of a bit width (QuEST, arXiv 2502.05003, section 3: the least squared error on a normal).

    Departure: the constants of `"exact"` are the optimum to 15 digits; those of the official code are `"upstream"`.

    Args:
        bits (`int` or `float`): 1 to 8, or 1.58 for the ternary grid {-1, 0, 1}.
        grid (`str`, defaults to `"exact"`): or `"upstream"`, to compare with the official code.
        name (`str`, defaults to `"bits"`): of the setting, for the error.

    Returns:
        [`Grid`].

    Raises:
        ValueError: for another width or table.

    Example:
        >>> from hfnoise.quantization import grid_for
        >>> grid_for(1).half_range, grid_for(1.58).levels
        (0.797884560802865, 3)
    """
    if grid not in _GRIDS:
        raise ValueError(f"grid is {grid!r}; choose 'exact' or 'upstream' (the constants of the official code).")
    if isinstance(bits, bool) or not isinstance(bits, (int, float)) or bits not in _GRIDS[grid]:
        allowed = ", ".join(str(width) for width in _GRIDS[grid])
        raise ValueError(f"{name} is {bits!r}; allowed are {allowed} (1.58 is the ternary grid -1, 0, 1).")
    return _GRIDS[grid][bits]
