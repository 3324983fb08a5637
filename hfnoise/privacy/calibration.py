"""How much noise a privacy budget asks for, and how many steps it buys.

The searches start on coarse grids, where one evaluation takes milliseconds, and end on the grid of the reports: what
is returned is always checked with [`composed_epsilon`], the function that reports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from hfnoise.privacy.accounting import (
    Mechanism,
    Search,
    check_accountant,
    check_delta,
    composed_epsilon,
    split_searches,
)
from hfnoise.privacy.loss_distribution import FINEST_INTERVAL, grid_interval, loss_distribution_epsilon
from hfnoise.privacy.renyi import Releases

# Below it a step hides next to nothing, and loss distributions no longer fit in memory.
LEAST_NOISE = 0.05
_MOST_NOISE = 1e6
# Grids relative to the target: on the first, epsilon is at most 3 % too large, on the second 0.15 %.
_COARSE, _MEDIUM = 3e-3, 3e-4
# Of the noise multiplier: the width at which the coarse search ends, and what the later ones leave on the table.
_COARSE_WIDTH, _MEDIUM_SLACK, _FINAL_SLACK = 0.02, 3e-4, 2e-3
# How far beyond the predicted multiplier the next one is tried, so that it mostly passes.
_MARGIN = 1e-4
MOST_STEPS = 1_000_000
# How many times more steps loss distributions may allow before they are tried outright.
_MOST_OF_RENYI = 4


def calibrate_noise_multiplier(
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    steps: int,
    *,
    bands: int = 1,
    spent: Sequence[Mechanism | Search] = (),
    accountant: str = "pld",
    quick: bool = False,
) -> float:
    """Return the smallest noise multiplier, within 0.3 %, at which a run stays inside the budget.

    Formal guarantee: `composed_epsilon([*spent, the run], target_delta, accountant)` does not exceed `target_epsilon`;
    it, or with `quick` an upper bound of it, has been evaluated for the very number that is returned.

    Args:
        target_epsilon (`float`): above 0, of everything spent and this run together.
        target_delta (`float`): in (0, 1).
        sample_rate (`float`): expected batch over number of units, in (0, 1].
        steps (`int`): at least 1.
        bands (`int`, defaults to 1): of the correlated noise; see [`Mechanism`].
        spent (`Sequence[Mechanism | Search]`, *optional*): what the ledger of these units holds already.
        accountant (`str`, defaults to `"pld"`): "pld" or "rdp".
        quick (`bool`, defaults to False): stop on a grid wider than that of the reports, for tables of plans: up to
            0.5 % more noise than needed, four times quicker.

    Returns:
        `float`: noise standard deviation over sensitivity, at least 0.05, which is also what is returned where less
        would do (few steps on tiny samples).

    Raises:
        TypeError, ValueError: for bad arguments, and if what is spent leaves nothing.
        ImportError: without dp-accounting.

    Example:
        >>> from hfnoise.privacy.calibration import calibrate_noise_multiplier
        >>> f"{calibrate_noise_multiplier(1.0, 1e-5, sample_rate=0.05, steps=200):.2f}"
        '2.84'
    """
    target_epsilon, target_delta, spent = _without_searches(target_epsilon, target_delta, spent)
    _check_target(target_epsilon, target_delta, spent, accountant)
    run = Mechanism(sample_rate, 1.0, steps, bands)
    if not run.rounds:
        raise ValueError("steps=0 releases nothing, so no noise can be calibrated for it; give at least 1.")

    def reported(noise: float) -> float:
        return composed_epsilon([*spent, replace(run, noise_multiplier=noise)], target_delta, accountant)

    def on_grid(relative: float) -> Callable[[float], float]:
        def epsilon(noise: float) -> float:
            mechanisms = [*spent, replace(run, noise_multiplier=noise)]
            return epsilon_on_grid(mechanisms, target_delta, relative * target_epsilon)

        return reported if accountant == "rdp" else epsilon

    noise, power = _bracket(on_grid(_COARSE), target_epsilon)
    if accountant == "pld" and _MEDIUM * target_epsilon > FINEST_INTERVAL:
        noise, power = _tighten(on_grid(_MEDIUM), target_epsilon, noise, power, _MEDIUM_SLACK)
        if quick:
            return noise
    return _tighten(reported, target_epsilon, noise, power, _FINAL_SLACK)[0]


def largest_step_count(
    target_epsilon: float,
    target_delta: float,
    mechanism: Mechanism,
    *,
    spent: Sequence[Mechanism | Search] = (),
    accountant: str = "pld",
    at_most: int = MOST_STEPS,
) -> int:
    """Return how many steps of a mechanism the budget allows, beside what is spent.

    Formal guarantee: so many steps and what is spent stay inside the budget, by [`composed_epsilon`], which was
    evaluated for this number; one more round would not (or `at_most` is reached).

    Args:
        target_epsilon (`float`): above 0, of everything spent and this run together.
        target_delta (`float`): in (0, 1).
        mechanism (`Mechanism`): its rate, noise and bands; its number of steps is not read. The steps of a run
            count from its first: after a resume ask with the run's own part left out of `spent`.
        spent (`Sequence[Mechanism | Search]`, *optional*): what the ledger of these units holds already.
        accountant (`str`, defaults to `"pld"`): "pld" or "rdp".
        at_most (`int`, defaults to 1,000,000): the steps that are planned; if all fit, one evaluation is enough.

    Returns:
        `int`: 0 if not even one step fits.

    Raises:
        TypeError, ValueError, ImportError: as [`calibrate_noise_multiplier`].

    Example:
        >>> from hfnoise.privacy.accounting import Mechanism
        >>> from hfnoise.privacy.calibration import largest_step_count
        >>> largest_step_count(1.0, 1e-5, Mechanism(sample_rate=0.05, noise_multiplier=4.0, steps=0), at_most=300)
        300
    """
    target_epsilon, target_delta, spent = _without_searches(target_epsilon, target_delta, spent)
    _check_target(target_epsilon, target_delta, spent, accountant)
    replace(mechanism, steps=at_most)  # refuses what is no number of steps
    if mechanism.noise_multiplier == 0 or not at_most:
        return 0

    def epsilon_by(method: str) -> Callable[[int], float]:
        def epsilon(rounds: int) -> float:
            run = replace(mechanism, steps=min(rounds * mechanism.bands, at_most))
            return composed_epsilon([*spent, run], target_delta, method)

        return epsilon

    def on_grid(rounds: int) -> float:
        mechanisms = [*spent, replace(mechanism, steps=rounds * mechanism.bands)]
        return epsilon_on_grid(mechanisms, target_delta, _MEDIUM * target_epsilon)

    most = -(-at_most // mechanism.bands)
    # Rényi accounting finds a count that passes in no time; loss distributions of far too many steps take long.
    count = _largest(epsilon_by("rdp"), target_epsilon, most, most)
    if accountant == "pld":
        start = most if most <= _MOST_OF_RENYI * count else max(count, 1)
        count = _largest(on_grid, target_epsilon, most, start) if most > 1 else most
        count = _largest(epsilon_by("pld"), target_epsilon, most, count)
    return min(count * mechanism.bands, at_most)


def _without_searches(
    target_epsilon: float, target_delta: float, spent: Sequence[Mechanism | Search]
) -> tuple[float, float, Sequence[Mechanism]]:
    """Return what searches leave of a budget, and the other runs; as [`composed_epsilon`] will count them."""
    if not any(isinstance(one, Search) for one in spent):
        return target_epsilon, target_delta, spent  # type: ignore[return-value]
    check_delta(target_delta, "target_delta")
    epsilon, left, runs = split_searches(spent, target_delta, and_runs=True)
    if epsilon >= target_epsilon:
        raise ValueError(
            f"target_epsilon={target_epsilon:g} is spent: the searches on these units come to epsilon {epsilon:.4g} "
            f"at delta={target_delta - left:g}. No step can keep the guarantee; set a target agreed on for all runs "
            "together, or use other units."
        )
    return target_epsilon - epsilon, left, runs


def _check_target(target_epsilon: float, target_delta: float, spent: Sequence[Mechanism], accountant: str) -> None:
    check_delta(target_delta, "target_delta")
    check_accountant(accountant)
    if isinstance(target_epsilon, bool) or not isinstance(target_epsilon, (int, float)):
        raise TypeError(
            f"target_epsilon={target_epsilon!r} is a {type(target_epsilon).__name__}; give a number above 0."
        )
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise ValueError(f"target_epsilon={target_epsilon!r} is no privacy budget; it must be above 0 and finite.")
    already = composed_epsilon(spent, target_delta, accountant)
    if already >= target_epsilon:
        shown = "; ".join(map(str, spent))
        raise ValueError(
            f"target_epsilon={target_epsilon:g} is spent: the earlier runs on these units come to epsilon "
            f"{already:.4g} at delta={target_delta:g} ({shown}). No further step can keep the guarantee; set a target "
            "agreed on for all runs together, or use other units."
        )


def epsilon_on_grid(mechanisms: Sequence[Mechanism], delta: float, interval: float) -> float:
    """Return epsilon by loss distributions on a grid of that width, or on that of the reports where it is wider.

    A width of 3e-4 epsilon gives at most 0.15 % more than the reports, ten times quicker, and never less.

    Example:
        >>> from hfnoise.privacy.accounting import Mechanism
        >>> from hfnoise.privacy.calibration import epsilon_on_grid
        >>> f"{epsilon_on_grid([Mechanism(0.05, 3.0, 300)], 1e-5, 1e-3):.4f}"  # 1.1591 on the grid of the reports
        '1.1594'
    """
    releases = [
        Releases(one.sampling_probability, float(one.noise_multiplier), one.rounds) for one in mechanisms if one.rounds
    ]
    return loss_distribution_epsilon(releases, delta, max(interval, grid_interval(releases, delta)))


def _bracket(epsilon: Callable[[float], float], target: float) -> tuple[float, float]:
    """Return a noise multiplier that passes, 2 % above one that fails, and the power by which epsilon falls there."""
    noise, value = 1.0, epsilon(1.0)
    failing, passing = (noise, math.inf) if value > target else (0.0, noise)
    values = {noise: value}
    while passing == math.inf:
        noise = 2 * failing
        if noise > _MOST_NOISE:
            raise ValueError(
                f"no noise multiplier up to {_MOST_NOISE:g} reaches target_epsilon={target:g} in so many steps; "
                "what was spent or the rounding of the accountant's grid leaves nothing. Raise the target."
            )
        values[noise] = epsilon(noise)
        failing, passing = (noise, passing) if values[noise] > target else (failing, noise)
    while failing == 0.0:
        noise = max(passing / 2, LEAST_NOISE)
        if passing <= LEAST_NOISE:
            return LEAST_NOISE, 1.0
        values[noise] = epsilon(noise)
        failing, passing = (noise, passing) if values[noise] > target else (failing, noise)
    while passing > failing * (1 + _COARSE_WIDTH):
        noise = math.sqrt(failing * passing)
        values[noise] = epsilon(noise)
        failing, passing = (noise, passing) if values[noise] > target else (failing, noise)
    return passing, _power(failing, values[failing], passing, values[passing])


def _power(noise: float, value: float, other_noise: float, other_value: float) -> float:
    """Return a with epsilon ~ noise^-a through two points, inside what occurs: 1/2 to 50."""
    if not (0 < value < math.inf and 0 < other_value < math.inf) or noise == other_noise:
        return 2.0
    return min(max(-math.log(other_value / value) / math.log(other_noise / noise), 0.5), 50.0)


def _tighten(
    epsilon: Callable[[float], float], target: float, noise: float, power: float, slack: float
) -> tuple[float, float]:
    """Return a noise multiplier that passes, with at most `slack` to gain, and the power: Newton in logarithms."""
    best = math.inf
    value = epsilon(noise)
    for _ in range(20):  # two or three do
        shift = math.log(value / target) / power if value > 0 else -0.1
        if value <= target:
            best = min(best, noise)
            if shift >= -slack or noise <= LEAST_NOISE:
                break
        following = max(noise * math.exp(max(min(shift, 0.1), -0.1) + _MARGIN), LEAST_NOISE)
        following_value = epsilon(following)
        power = _power(noise, value, following, following_value) if abs(shift) > 10 * _MARGIN else power
        noise, value = following, following_value
    while math.isinf(best):  # not seen; a larger multiplier passes in the end, and none that fails is returned
        noise *= 1 + _FINAL_SLACK
        best = noise if epsilon(noise) <= target else best
    return best, power


def _largest(epsilon: Callable[[int], float], target: float, most: int, start: int) -> int:
    """Return the largest count, from 0 to `most`, whose epsilon is inside the target; `start` is tried first."""
    low, low_value, high, high_value, guess = 0, 0.0, most + 1, math.inf, start
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        value = epsilon(guess)
        if value <= target:
            low, low_value = guess, value
        else:
            high, high_value = guess, value
        if low_value == 0 or high_value > 4 * target:  # too far apart for a straight line
            guess = math.isqrt(max(low, 1) * high)
            if low_value > 0 and math.isinf(high_value):
                # Epsilon grows at least like the root of the count: one per cent beyond it ends the doubt from above.
                guess = math.ceil(low * (target / low_value) ** 2 * 1.01)
        else:  # false position
            guess = low + round((target - low_value) / (high_value - low_value) * (high - low))
    return low
