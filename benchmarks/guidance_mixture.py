"""Skipped evaluations on a mixture of Gaussians whose denoiser is exact: error of the end point against evaluations.

`python -m hfnoise.benchmarks.guidance_mixture` writes guidance_mixture.json, .md and .png. Every method is run over a
range of its setting (threshold, last guided step, number of steps), so that methods can be compared at matched error,
relative to the end points of full guidance in 20 steps. On a smooth denoiser fewer steps of full guidance are hard to
beat; a trained model is not that smooth.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfnoise.benchmarks.reporting import circumstances, markdown, mean_and_error, print_table, write_json
from hfnoise.folders import output_folder
from hfnoise.guidance import (
    EstimateKey,
    UpdateHistory,
    cosine_similarity,
    evaluated_steps,
    fit_linear_coefficients,
    schedule_digest,
)
from hfnoise.worlds.gaussian_mixture import GaussianMixture, random_mixture

STEPS, SCALE = 20, 7.5
THRESHOLDS = (0.9, 0.95, 0.98, 0.991, 0.995, 0.998, 0.999, 0.9995, 0.9999)
ERRORS = (0.01, 0.02, 0.05)
_FITTED = 200  # trajectories, as LinearAG has them


@dataclass(frozen=True)
class Point:
    """A method at one setting.

    Args:
        method, setting (`str`): names.
        evaluations (`float`): per sample.
        error (`float`): of the end points, relative to those of full guidance.
    """

    method: str
    setting: str
    evaluations: float
    error: float


class _Rule:
    """A rule of guidance on x0 that counts its evaluations."""

    def __init__(self, count: int) -> None:
        self.evaluations = torch.zeros(count)

    def combine(self, cond: Tensor, update: Tensor, evaluated: Tensor) -> Tensor:
        self.evaluations += 1 + evaluated.float()
        return cond + (SCALE - 1) * update


def _adaptive(threshold: float, count: int, space: str = "x0") -> tuple[_Rule, Callable[..., Tensor]]:
    rule, converged = _Rule(count), torch.zeros(count, dtype=torch.bool)

    def guide(step: int, cond: Tensor, uncond: Tensor, x: Tensor) -> Tensor:
        update = torch.where(converged[:, None], 0.0, cond - uncond)
        guided = rule.combine(cond, update, ~converged)
        # On eps, (x - x0) / sigma, the sigma makes no difference.
        pair = (cond, uncond) if space == "x0" else (x - cond, x - uncond)
        converged.logical_or_(cosine_similarity(*pair) >= threshold)
        return guided

    return rule, guide


def _cut_off(guided_steps: int, count: int) -> tuple[_Rule, Callable[..., Tensor]]:
    rule = _Rule(count)

    def guide(step: int, cond: Tensor, uncond: Tensor, x: Tensor) -> Tensor:
        guided = torch.full((count,), step < guided_steps)
        return rule.combine(cond, (cond - uncond) * guided[:, None], guided)

    return rule, guide


def _linear(history: UpdateHistory, policy: str, steps: int, count: int) -> tuple[_Rule, Callable[..., Tensor]]:
    rule, evaluated = _Rule(count), evaluated_steps(policy, steps)

    def guide(step: int, cond: Tensor, uncond: Tensor, x: Tensor) -> Tensor:
        update = cond - uncond if evaluated[step] else history.estimate(step).to(cond.dtype)
        history.append(update)
        return rule.combine(cond, update, torch.full((count,), evaluated[step]))

    return rule, guide


def fitted(mixture: GaussianMixture, seed: int) -> Any:
    """Return coefficients of an AR(2), fitted on runs of their own seed."""
    x, y = mixture.starts(_FITTED, seed)
    updates: list[Tensor] = []

    def record(step: int, cond: Tensor, uncond: Tensor, x: Tensor) -> Tensor:
        updates.append(cond - uncond)
        return cond + (SCALE - 1) * updates[-1]

    mixture.run(x, y, record)
    digest = schedule_digest(mixture.sigmas.tolist())
    return fit_linear_coefficients(updates, EstimateKey("mixture", "Euler", mixture.steps, SCALE, digest))


def measure(seed: int, fitting_seed: int, samples: int) -> list[Point]:
    """Return all methods at all settings, for one seed of mixture and noise."""
    mixture = random_mixture(STEPS, seed)
    x, y = mixture.starts(samples, seed)
    full = mixture.run(x, y, _cut_off(STEPS, samples)[1])
    found = []

    def note(method: str, setting: str, rule: _Rule, guide: Callable[..., Tensor], run_by: Any = mixture) -> None:
        end = run_by.run(x, y, guide)
        error = float((end - full).norm() / full.norm())
        found.append(Point(method, setting, float(rule.evaluations.mean()), error))

    for threshold in THRESHOLDS:
        note("Adaptive Guidance on x0", f"threshold {threshold:g}", *_adaptive(threshold, samples))
    note("Adaptive Guidance on eps", "threshold 0.991", *_adaptive(0.991, samples, "eps"))
    for guided in range(6, 18):
        note("fixed cut-off", f"{guided} steps guided", *_cut_off(guided, samples))
    for steps in range(10, STEPS):
        note("CFG, fewer steps", f"{steps} steps", *_cut_off(steps, samples), random_mixture(steps, seed))
    coefficients = fitted(mixture, fitting_seed)
    for policy in ("alternate", "alternate_then_estimate"):
        note("hold the last update", policy, *_linear(UpdateHistory(), policy, STEPS, samples))
        note("AR(2)", policy, *_linear(UpdateHistory(coefficients), policy, STEPS, samples))
    return found


def evaluations_at(points: Sequence[Point], error: float) -> float | None:
    """Return how many evaluations a method needs for an error, between its settings by interpolation of log error.

    Args:
        points (`Sequence[Point]`): of one method.
        error (`float`): relative, above 0.

    Returns:
        `None` if none of its settings is that exact, or all are more exact.
    """
    ordered = sorted(points, key=lambda point: point.evaluations)
    for less, more in zip(ordered, ordered[1:], strict=False):
        if more.error <= error <= less.error and more.error < less.error:
            share = math.log(less.error / error) / math.log(less.error / max(more.error, 1e-300))
            return less.evaluations + share * (more.evaluations - less.evaluations)
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of mixture and noise")
    parser.add_argument("--fitting_seed", type=int, default=99, help="of the noise that AR(2) is fitted on")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--output_dir", default="benchmark_results", help="folder of the results")
    given = parser.parse_args(arguments)
    folder: Path = output_folder(given.output_dir)
    torch.set_num_threads(1)
    runs = [measure(seed, given.fitting_seed, given.samples) for seed in given.seeds]
    header = ["method", "setting", "evaluations of 40", "error to full guidance, %"]
    rows, points = [], []
    for seeds in zip(*runs, strict=True):
        evaluations = mean_and_error([one.evaluations for one in seeds])[0]
        error, spread = mean_and_error([one.error for one in seeds])
        points.append(Point(seeds[0].method, seeds[0].setting, evaluations, error))
        shown = f"{100 * error:.2f}" + ("" if math.isnan(spread) else f" ± {100 * spread:.2f}")
        rows.append([seeds[0].method, seeds[0].setting, f"{evaluations:.1f}", shown])
    print_table(f"{STEPS} steps, scale {SCALE:g}", header, rows)
    by_method: dict[str, list[Point]] = {}
    for point in points:
        by_method.setdefault(point.method, []).append(point)
    matched_header = ["evaluations at matched error", *(f"{100 * error:g} %" for error in ERRORS)]
    ranges = ("Adaptive Guidance on x0", "fixed cut-off", "CFG, fewer steps")
    matched = {name: [evaluations_at(by_method[name], error) for error in ERRORS] for name in ranges}
    matched_rows = [
        [name, *("-" if one is None else f"{one:.1f}" for one in values)] for name, values in matched.items()
    ]
    print_table("matched error", matched_header, matched_rows)
    content = {
        "runs": [[vars(point) for point in run] for run in runs], "matched": matched, "matched_errors": ERRORS,
        "samples": given.samples, "steps": STEPS, "guidance_scale": SCALE, "fitting_seed": given.fitting_seed,
    }  # fmt: skip
    write_json(folder / "guidance_mixture.json", {**circumstances(given.seeds), **content})
    text = f"{markdown(header, rows)}\n{markdown(matched_header, matched_rows)}"
    (folder / "guidance_mixture.md").write_text(text, encoding="utf-8")
    _plot(by_method, folder / "guidance_mixture.png")
    return 0


def _plot(by_method: dict[str, list[Point]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, (name, points) in enumerate(by_method.items()):
        ordered = sorted(points, key=lambda point: point.evaluations)
        style = "-" if len(points) > 2 else ""
        axes.plot(
            [point.evaluations for point in ordered], [100 * point.error for point in ordered],
            marker="os^vDP"[number % 6], linestyle=style, label=name,
        )  # fmt: skip
    axes.set(xlabel="evaluations a sample, of 40", ylabel="error to full guidance, %", yscale="log", ylim=(0.1, 1000))
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    raise SystemExit(main())
