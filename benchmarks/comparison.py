"""One figure of the report: what hfnoise costs, or gets wrong, beside something else; and how ratios are taken."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hfnoise.benchmarks.reporting import mean_and_error

STOCK, PEER = "stock", "peer"


@dataclass(frozen=True)
class Ratio:
    """A ratio with its spread.

    Args:
        value (`float`): ours / theirs.
        low (`float`): lower end of the spread; NaN if there is one run only.
        high (`float`): upper end.
        spread (`str`): what the ends are.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    spread: str = ""


@dataclass(frozen=True)
class Comparison:
    """A cost or an error of ours beside another's. A ratio below 1 is in our favour, whatever is measured.

    Args:
        method (`str`): class or setting of hfnoise.
        quantity (`str`): a cost or an error: less is better. The same words in every size of the run.
        against (`str`): what it is compared with.
        kind (`str`): `STOCK`, what Hugging Face's users have today, or `PEER`, another way to the same end.
        ours (`str`): the figure, with its unit.
        theirs (`str`): that of the other.
        ratio ([`Ratio`]): ours / theirs.
        package (`str`): that the other needs, if it is no requirement of hfnoise.
    """

    method: str
    quantity: str
    against: str
    kind: str
    ours: str
    theirs: str
    ratio: Ratio
    package: str = ""


def divided(ours: float, theirs: float) -> float:
    """Return the ratio, or NaN where there is nothing to take it of; the report leaves that comparison out."""
    return ours / theirs if theirs > 0 and ours >= 0 else math.nan


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Return the ratio of the means of runs with the same seeds, with its standard error.

    The error is that of the residuals `ours - ratio * theirs`, so that what the two runs of a seed share cancels.
    """
    ours_mean, theirs_mean = mean_and_error(ours)[0], mean_and_error(theirs)[0]
    ratio = divided(ours_mean, theirs_mean)
    count = len(ours)
    if math.isnan(ratio) or count < 2 or len(theirs) != count:
        return Ratio(ratio, spread="one run" if count < 2 else "")
    residuals = [one - ratio * other for one, other in zip(ours, theirs, strict=True)]
    error = mean_and_error(residuals)[1] / theirs_mean
    return Ratio(ratio, ratio - error, ratio + error, f"s.e. of {count} seeds")


def median(ratios: Sequence[float], of: str) -> Ratio:
    """Return the median of ratios that were measured in turn, and their range."""
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), f"range of {len(ratios)} {of}")


def geometric(ratios: Sequence[float], of: str) -> Ratio:
    """Return the geometric mean of the ratios of several cases, and their range."""
    mean = math.exp(math.fsum(math.log(one) for one in ratios) / len(ratios))
    return Ratio(mean, min(ratios), max(ratios), f"range of {len(ratios)} {of}")


def percent(values: Sequence[float]) -> str:
    """Return the mean share in per cent."""
    return f"{100 * mean_and_error(values)[0]:.1f} %"


def of_summaries(ours: dict[str, Any], theirs: dict[str, Any], spread: str) -> Ratio:
    """Return the ratio of two means with its standard error, where only `mean` and `error` were kept.

    First order, as if the two were independent: on the safe side for runs from the same noise.
    """
    ratio = divided(ours["mean"], theirs["mean"])
    if math.isnan(ratio) or ours["error"] is None or theirs["error"] is None:
        return Ratio(ratio)
    error = math.hypot(ours["error"] / theirs["mean"], ratio * theirs["error"] / theirs["mean"])
    return Ratio(ratio) if math.isnan(error) else Ratio(ratio, ratio - error, ratio + error, spread)
