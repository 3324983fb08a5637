"""Figures on cards: rounded alike, and none without a word of its spread."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hfnoise.intervals import wilson_interval

ONE_RUN = "one run, one seed"
# How long an evaluation took is no result.
_TIMINGS = ("runtime", "per_second", "num_tokens", "model_preparation_time")


@dataclass(frozen=True)
class Metric:
    """A row of the table of results.

    Args:
        name (`str`): of the metric.
        value (`str`): as it is shown.
        spread (`str`): how far it can be trusted; that there was one run, where nothing else is known.
    """

    name: str
    value: str
    spread: str = ONE_RUN


def number(value: float, digits: int = 4) -> str:
    """Return a figure with so many decimals, in words where it is none.

    Example:
        >>> from hfnoise.cards import number
        >>> number(0.12345), number(float("nan"))
        ('0.1235', 'not a number')
    """
    if math.isnan(value):
        return "not a number"
    return f"{value:.{digits}f}" if math.isfinite(value) else f"{'minus ' if value < 0 else ''}infinite"


def rate(name: str, share: float, count: int | None, of: str = "examples") -> Metric:
    """Return the row of a share of a known number of things, with the interval of 95 % (Wilson 1927).

    Args:
        name (`str`): of the metric.
        share (`float`): in [0, 1].
        count (`int`, *optional*): of the things; without it there is no interval.
        of (`str`, defaults to `"examples"`): what they are.

    Example:
        >>> from hfnoise.cards import rate
        >>> rate("accuracy", 0.75, 64, "pairs").spread
        '0.632 to 0.840 (95 % interval, 64 pairs)'
    """
    if not count or not 0.0 <= share <= 1.0:  # not a number, too
        return Metric(name, number(share))
    low, high = wilson_interval(share * count, count)
    return Metric(name, number(share), f"{low:.3f} to {high:.3f} (95 % interval, {count} {of})")


def share_text(share: float, count: int) -> str:
    """Return a share in percent with its interval of 95 %, for a cell of a table.

    Example:
        >>> from hfnoise.cards import share_text
        >>> share_text(0.75, 64)
        '75.0 % (63.2 to 84.0)'
    """
    if math.isnan(share):
        return number(share)
    low, high = wilson_interval(share * count, count)
    return f"{share:.1%} ({100 * low:.1f} to {100 * high:.1f})".replace("%", " %", 1)


def last_metrics(log_history: list[dict[str, Any]]) -> dict[str, float]:
    """Return the last value of each metric of evaluation, without `eval_` and without how long it took.

    Args:
        log_history (`list[dict]`): of the state of a Trainer.

    Example:
        >>> from hfnoise.cards import last_metrics
        >>> last_metrics([{"eval_loss": 2.0}, {"loss": 1.0}, {"eval_loss": 1.5, "eval_runtime": 3.0}])
        {'loss': 1.5}
    """
    found: dict[str, float] = {}
    for entry in log_history:
        found |= {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, (int, float)) and not name.endswith(_TIMINGS)
    }


def rows_of(dataset: Any, name: str = "") -> int | None:
    """Return how many rows a dataset has, where it says so.

    Args:
        dataset: of an evaluation, or a dictionary of such, of which nothing is said without a name.
        name (`str`, *optional*): of one of several.

    Example:
        >>> from hfnoise.cards import rows_of
        >>> rows_of([1, 2]), rows_of({"new": [1, 2, 3]}), rows_of({"new": [1, 2, 3]}, "new"), rows_of(iter([1]))
        (2, None, 3, None)
    """
    dataset = dataset.get(name) if isinstance(dataset, dict) else dataset
    return len(dataset) if dataset is not None and hasattr(dataset, "__len__") else None
