"""`hfnoise dp-budget`: what a private run costs, before it is started."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hfnoise.command_options import UsageParser
from hfnoise.errors import UsageError
from hfnoise.privacy.accounting import ACCOUNTANTS, Mechanism, accountant_description, compute_epsilon
from hfnoise.privacy.calibration import calibrate_noise_multiplier, epsilon_on_grid

# The other plans are computed on a grid wider than that of the reports: 0.15 % too pessimistic at most, and quick.
_PLAN_GRID = 3e-4
# What a reader can take in, and what can be computed in some seconds: a row costs about half a second.
_MOST_ROWS = 12


@dataclass(frozen=True)
class Plan:
    """A number of epochs or a batch, and what it costs.

    Args:
        epochs (`float`): passes over the data, of ceil(examples / batch) steps each.
        batch (`int`): the expected one.
        steps (`int`): of the optimizer.
        epsilon (`float`): at the noise multiplier of the budget.
        noise_multiplier (`float`): that the epsilon of the budget needs here.
        noise_per_coordinate (`float`, *optional*): with that multiplier; None without a clipping norm.
    """

    epochs: float
    batch: int
    steps: int
    epsilon: float
    noise_multiplier: float
    noise_per_coordinate: float | None


@dataclass(frozen=True)
class Budget:
    """What a private run costs; see [`privacy_budget`] for the fields with the names of its arguments.

    Args:
        noise_per_coordinate (`float`, *optional*): standard deviation of the noise of the averaged gradient,
            noise_multiplier * clip_norm / batch.
        noise_norm (`float`, *optional*): the expected norm of that noise, noise_per_coordinate * sqrt(parameters).
        noise_to_signal (`float`, *optional*): noise_norm over clip_norm, the largest norm the averaged gradient of an
            average batch can have. The true gradient is smaller: a bound from below.
        by_epochs (`tuple[Plan, ...]`): fewer and more epochs, up to twice as many.
        doubled_batch (`Plan`, *optional*): as many epochs with a batch twice as large; None if there are too few
            rows.
    """

    epsilon: float
    target_epsilon: float | None
    delta: float
    noise_multiplier: float
    sample_rate: float
    examples: int
    batch: int
    epochs: float
    steps: int
    accountant: str
    parameters: int | None
    clip_norm: float | None
    noise_per_coordinate: float | None
    noise_norm: float | None
    noise_to_signal: float | None
    by_epochs: tuple[Plan, ...]
    doubled_batch: Plan | None


def default_delta(examples: int) -> float:
    """Return min(1e-5, 1 / (10 * examples)): ten times less than the delta that would publish one row whole.

    Example:
        >>> from hfnoise.privacy.budget import default_delta
        >>> default_delta(5_000), default_delta(1_000_000)
        (1e-05, 1e-07)
    """
    return min(1e-5, 1 / (10 * examples))


def privacy_budget(
    examples: int,
    batch: int,
    epochs: float,
    *,
    target_epsilon: float | None = None,
    noise_multiplier: float | None = None,
    delta: float | None = None,
    accountant: str = "pld",
    parameters: int | None = None,
    clip_norm: float | None = None,
) -> Budget:
    """Return what a private run costs: noise for an epsilon, or epsilon for a noise, and what a change would buy.

    Formal guarantee: `epsilon` and `delta` hold for adding or removing one row when `steps` batches are
    Poisson-sampled with `sample_rate`; see [`compute_epsilon`]. Nothing private is read here.

    Args:
        examples (`int`): number of units in the dataset. A unit is called a row here; it may be a pair, or a user.
        batch (`int`): expected number of units in a batch, over all devices and accumulation steps.
        epochs (`float`): above 0; steps = ceil(epochs * ceil(examples / batch)), as many as the Trainer takes.
        target_epsilon (`float`, *optional*): this, or
        noise_multiplier (`float`, *optional*): this: exactly one of them.
        delta (`float`, *optional*): in (0, 1); [`default_delta`] if not given.
        accountant (`str`, defaults to `"pld"`): "pld" or "rdp".
        parameters (`int`, *optional*): trainable coordinates, for the norm of the noise.
        clip_norm (`float`, *optional*): the clipping bound, for the size of the noise.

    Raises:
        ValueError, TypeError: for what is no run.

    Example:
        >>> from hfnoise.privacy.budget import privacy_budget
        >>> budget = privacy_budget(2000, 2000, 1, noise_multiplier=20.0, parameters=10_000, clip_norm=0.1)
        >>> budget.steps, f"{budget.epsilon:.3f}", f"{budget.noise_to_signal:.1f}"
        (1, '0.160', '1.0')
    """
    _check_counts(examples, batch, epochs, parameters, clip_norm)
    if (target_epsilon is None) == (noise_multiplier is None):
        raise ValueError("give exactly one of target_epsilon and noise_multiplier; the other follows from it.")
    if noise_multiplier == 0:
        raise ValueError(
            "noise_multiplier=0 releases the gradients as they are: no epsilon holds; it must be above 0."
        )
    delta = default_delta(examples) if delta is None else delta

    def steps_of(number: float, size: int) -> int:
        return math.ceil(number * math.ceil(examples / size))

    steps = steps_of(epochs, batch)
    rate = batch / examples
    if noise_multiplier is None:
        assert target_epsilon is not None  # one of the two is given
        noise = calibrate_noise_multiplier(target_epsilon, delta, rate, steps, accountant=accountant)
    else:
        noise = noise_multiplier
    epsilon = compute_epsilon(noise, rate, steps, delta, accountant)
    target = epsilon if target_epsilon is None else target_epsilon

    def plan(number: float, size: int) -> Plan:
        count = steps_of(number, size)
        run = Mechanism(size / examples, noise, count)
        if (count, size) == (steps, batch):
            here, needed = epsilon, noise
        elif not 0 < target < math.inf:  # no noise, or so much that nothing can be seen
            here, needed = compute_epsilon(noise, run.sample_rate, count, delta, accountant), noise
        else:
            here = (
                epsilon_on_grid([run], delta, _PLAN_GRID * target)
                if accountant == "pld"
                else compute_epsilon(noise, run.sample_rate, count, delta, accountant)
            )
            needed = calibrate_noise_multiplier(
                target, delta, run.sample_rate, count, accountant=accountant, quick=True
            )
        return Plan(number, size, count, here, needed, None if clip_norm is None else needed * clip_norm / size)

    per_coordinate = None if clip_norm is None else noise * clip_norm / batch
    norm = None if per_coordinate is None or parameters is None else per_coordinate * math.sqrt(parameters)
    return Budget(
        epsilon=epsilon,
        target_epsilon=target_epsilon,
        delta=delta,
        noise_multiplier=noise,
        sample_rate=rate,
        examples=examples,
        batch=batch,
        epochs=epochs,
        steps=steps,
        accountant=accountant_description(accountant),
        parameters=parameters,
        clip_norm=clip_norm,
        noise_per_coordinate=per_coordinate,
        noise_norm=norm,
        noise_to_signal=None if norm is None or clip_norm is None else norm / clip_norm,
        by_epochs=tuple(plan(number, batch) for number in _epochs_shown(epochs)),
        doubled_batch=plan(epochs, 2 * batch) if 2 * batch <= examples else None,
    )


def _check_counts(examples: Any, batch: Any, epochs: Any, parameters: Any, clip_norm: Any) -> None:
    for name, count in (("examples", examples), ("batch", batch), ("parameters", parameters)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"{name}={count!r} must be an integer of at least 1.")
    if batch > examples:
        raise ValueError(
            f"batch={batch} is larger than examples={examples}, so no unit could be left out of a batch and the "
            "guarantee of sampling would be lost; the expected batch can be all examples at most."
        )
    for name, number in (("epochs", epochs), ("clip_norm", clip_norm)):
        if number is not None and not (math.isfinite(number) and number > 0):
            raise ValueError(f"{name}={number!r} must be above 0 and finite.")


def _epochs_shown(epochs: float) -> list[float]:
    """Return epochs 1, 2, ... up to twice as many as planned, the plan among them, thinned to a dozen."""
    stride = max(1, math.ceil(2 * epochs / _MOST_ROWS))
    return sorted({*(float(number) for number in range(stride, math.floor(2 * epochs) + 1, stride)), float(epochs)})


def _parser() -> UsageParser:
    parser = UsageParser(
        prog="hfnoise dp-budget",
        description="What a private run costs before it is started: noise, epsilon, and what a change would buy.",
        epilog="example: hfnoise dp-budget --target_epsilon 3 --examples 50000 --batch 512 --epochs 3",
        allow_abbrev=False,
    )
    parser.add_argument("--examples", type=int, required=True, help="units in the dataset: rows, pairs or users")
    parser.add_argument("--batch", type=int, required=True, help="expected units in a batch, over all devices")
    parser.add_argument(
        "--epochs", type=float, required=True, help="passes over the data, of ceil(examples / batch) steps"
    )
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--target_epsilon", type=float, help="the budget; the noise follows from it")
    either.add_argument(
        "--noise_multiplier", type=float, help="the noise over the clipping norm; epsilon follows from it"
    )
    parser.add_argument("--delta", type=float, help="by default min(1e-5, 1 / (10 * examples))")
    parser.add_argument("--accountant", choices=ACCOUNTANTS, default="pld", help="by default pld, the tight one")
    parser.add_argument("--parameters", type=int, help="trainable parameters, for the norm of the noise")
    parser.add_argument(
        "--clip_norm", type=float, help="clipping norm of a unit's gradient, for the size of the noise"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def render(budget: Budget) -> str:
    """Return the budget as plain text.

    Example:
        >>> from hfnoise.privacy.budget import privacy_budget, render
        >>> print(render(privacy_budget(2000, 2000, 1, noise_multiplier=20.0)).splitlines()[0])
        epsilon               0.16 at delta 1e-05, for adding or removing one row
    """
    lines = [
        f"epsilon               {budget.epsilon:.4g} at delta {budget.delta:g}, for adding or removing one row",
        f"noise multiplier      {budget.noise_multiplier:.4f}",
        f"steps                 {budget.steps} ({budget.epochs:g} epochs of {budget.examples} rows)",
        f"sample rate           {budget.sample_rate:.4g} (expected batch {budget.batch}; Poisson sampling)",
    ]
    if budget.noise_per_coordinate is not None:
        lines.append(
            f"noise per coordinate  {budget.noise_per_coordinate:.3g} (standard deviation, averaged gradient)"
        )
    if budget.noise_norm is not None:
        lines.append(
            f"noise to signal       {budget.noise_to_signal:.3g} at least: norm {budget.noise_norm:.3g} of the noise, "
            f"{budget.clip_norm:g} of the largest gradient"
        )
    lines += [
        f"accountant            {budget.accountant}",
        "",
        "What more epochs cost",
        *_table(list(budget.by_epochs), budget),
    ]
    if budget.doubled_batch is not None:
        doubled = budget.doubled_batch
        # Of the averaged gradient, and over the root of the steps, of the sum over the run: both fall.
        share = (
            (doubled.noise_multiplier / doubled.batch) / (budget.noise_multiplier / budget.batch)
            if budget.noise_multiplier
            else 1.0
        )
        lines += [
            "",
            f"What doubling the batch buys: {1 - share:.0%} less noise in each averaged gradient, in half the steps",
            *_table([doubled], budget),
        ]
    return "\n".join(lines)


def _table(plans: list[Plan], budget: Budget) -> list[str]:
    target = budget.epsilon if budget.target_epsilon is None else budget.target_epsilon
    header = ["epochs", "batch", "steps", "epsilon at this noise", f"noise multiplier for epsilon {target:.4g}"]
    rows = [
        [f"{plan.epochs:g}", str(plan.batch), str(plan.steps), f"{plan.epsilon:.4g}", f"{plan.noise_multiplier:.4f}"]
        for plan in plans
    ]
    if budget.clip_norm is not None:
        header.append("noise per coordinate")
        rows = [[*row, f"{plan.noise_per_coordinate:.3g}"] for row, plan in zip(rows, plans, strict=True)]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    return [
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]
    ]


def main(arguments: Sequence[str]) -> int:
    """Run `hfnoise dp-budget` and return its exit code.

    Raises:
        UsageError: for arguments that cannot be read, or that are no private run.

    Example:
        >>> from hfnoise.privacy.budget import main
        >>> main("--noise_multiplier 20 --examples 2000 --batch 2000 --epochs 1".split())
        epsilon               0.16 at delta 1e-05, for adding or removing one row
        ...
        0
    """
    try:
        options = vars(_parser().parse_args(list(arguments)))
    except SystemExit as done:  # --help
        return int(done.code or 0)
    as_json = options.pop("json")
    try:
        budget = privacy_budget(**options)
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(f"{error} (see hfnoise dp-budget --help)") from error
    if as_json:
        finite = json.loads(json.dumps(asdict(budget)), parse_constant=lambda _: None)  # JSON has no infinity
        print(json.dumps(finite, indent=2))
    else:
        print(render(budget))
    return 0
