"""What the starts of the golden noise benchmark are worth: scores, win rates with intervals, bounds of a search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from hfnoise.benchmarks.golden_noise_starts import Plain, Start
from hfnoise.benchmarks.guidance_runs import Subject
from hfnoise.benchmarks.reporting import mean_and_error
from hfnoise.worlds.digits_score import score_digit_images
from hfnoise.worlds.digits_verifier import digit_verifier

# Of the normal distribution, for an interval of 95 %.
_QUANTILE = 1.959964
_SCORES = ("judge_accuracy", "verifier_accuracy", "frechet_distance", "diversity")


def share_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, after Wilson.

    Args:
        share (`float`): in [0, 1].
        count (`int`): of how many.

    Example:
        >>> from hfnoise.benchmarks.golden_noise_scores import share_interval
        >>> [round(end, 3) for end in share_interval(0.5, 100)]
        [0.404, 0.596]
    """
    square = _QUANTILE**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = _QUANTILE / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def scored(starts: Sequence[Start], labels: Tensor, subject: Subject, checkpoint: str) -> dict[str, Any]:
    """Return the scores of all seeds' images together, their standard errors over the seeds, and the mean costs.

    Of all together, since the Fréchet distance of few images is too large; the errors are those of the mean over the
    seeds. `log_probability` has the judge's of what was asked for, image by image.

    Args:
        starts (sequence of [`~hfnoise.benchmarks.golden_noise_starts.Start`]): one a seed.
        labels (`torch.Tensor`): of each seed.
        subject ([`~hfnoise.benchmarks.guidance_runs.Subject`]): who drew.
        checkpoint (`str`): whose judge is asked.
    """
    images, asked = torch.cat([start.images for start in starts]), labels.repeat(len(starts), 1)
    together = asdict(score_digit_images(images, asked, checkpoint))
    alone = [asdict(score_digit_images(start.images, labels, checkpoint)) for start in starts]
    found: dict[str, Any] = {}
    for name in _SCORES:
        error = mean_and_error([one[name] for one in alone])[1]
        found[name] = {"mean": together[name], "error": None if math.isnan(error) else error}
    found["accuracy_interval"] = share_interval(together["judge_accuracy"], len(images))
    found["evaluations"] = mean_and_error([start.evaluations for start in starts])[0]
    found["seconds_per_image"] = mean_and_error([start.seconds for start in starts])[0]
    words = [subject.world.prompt(row) for row in asked.tolist()]
    with torch.no_grad():
        found["log_probability"] = digit_verifier("judge", checkpoint, subject.world)(images, words)
    return found


def win_rate(own: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Return how often images are better than those of the same noise and prompt, by the judge's log-probability.

    A draw counts half.

    Args:
        own, other (`dict`): of [`scored`].
    """
    first, second = own["log_probability"], other["log_probability"]
    share = float(((first > second).double() + 0.5 * (first == second).double()).mean())
    low, high = share_interval(share, len(first))
    return {"mean": share, "low": low, "high": high}


def best_plain(plain: dict[Plain, dict[str, Any]], evaluations: float, score: str) -> Plain:
    """Return the best plain run of no more evaluations.

    It is chosen by the images that it is then reported by, which flatters it.

    Args:
        plain (`dict`): scores by run.
        evaluations (`float`): at most.
        score (`str`): `"judge_accuracy"`, of which more is better, or `"frechet_distance"`.
    """
    sign = -1 if score == "judge_accuracy" else 1
    allowed = [run for run in plain if run.evaluations <= evaluations]
    return min(allowed, key=lambda run: (sign * plain[run][score]["mean"], plain[run]["frechet_distance"]["mean"]))


def no_worse_plain(one: dict[str, Any], plain: dict[Plain, dict[str, Any]]) -> Plain | None:
    """Return the plain run nearest to real images of those that are as accurate for no more evaluations.

    `None` if none of them is at least as near: then the start gives what no plain run does for as much.

    Args:
        one (`dict`): of [`scored`], a refined start.
        plain (`dict`): scores by run.
    """
    accuracy, distance = (one[name]["mean"] for name in ("judge_accuracy", "frechet_distance"))
    good = [
        run for run, found in plain.items()
        if run.evaluations <= one["evaluations"]
        and found["judge_accuracy"]["mean"] >= accuracy
        and found["frechet_distance"]["mean"] <= distance
    ]  # fmt: skip
    return min(good, key=lambda run: plain[run]["frechet_distance"]["mean"], default=None)


def compared(one: dict[str, Any], base: Plain, plain: dict[Plain, dict[str, Any]]) -> dict[str, Any]:
    """Return the scores of a refined start, with what it wins over plain runs: its own one, and one of equal cost.

    Args:
        one (`dict`): of [`scored`].
        base ([`~hfnoise.benchmarks.golden_noise_starts.Plain`]): the run that was refined.
        plain (`dict`): scores of plain runs.
    """
    rival, nearest = (best_plain(plain, one["evaluations"], name) for name in ("judge_accuracy", "frechet_distance"))
    runs = {"most_accurate_plain": rival, "nearest_plain": nearest}
    return {
        **one, **runs, "wins_over_plain": win_rate(one, plain[base]),
        "wins_over_most_accurate_plain": win_rate(one, plain[rival]),
    }  # fmt: skip


def search_bound(accuracy: float, count: int) -> float:
    """Return how often the best of some images would be right if the verifier were, and all prompts equally hard.

    Example:
        >>> from hfnoise.benchmarks.golden_noise_scores import search_bound
        >>> search_bound(0.5, 2)
        0.75
    """
    return 1.0 - (1.0 - accuracy) ** count
