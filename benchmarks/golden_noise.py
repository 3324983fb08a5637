"""Refined starts without training against plain runs, at equal numbers of network evaluations.

`python -m hfnoise.benchmarks.golden_noise` draws a digits world from plain noise and from noise refined by ReDenoise,
Noise Level Guidance, SeedVariation and ConditioningNoise, at several guidance scales, and writes golden_noise.json and
.md (named after the checkpoint): accuracy by the judge, Fréchet distance, diversity, evaluations an image, seconds.

The plain rows at the evaluations of ReDenoise spend them on more steps, or on guidance: refinement acts as guidance
does, alignment up and diversity down, and is flattered without these rows. `--images 300 --seeds 1` takes two minutes
of one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from hfnoise.benchmarks.guidance_runs import Subject, add_subject_options, draw, load_subject, scores, summary
from hfnoise.benchmarks.reporting import circumstances, judge, markdown, print_table, write_json
from hfnoise.folders import output_folder
from hfnoise.pipelines import ConditioningNoise, InitialNoise, NoiseLevelGuidance, ReDenoise, SeedVariation, guide

PLAIN, GOLDEN = "plain", "ReDenoise"
# The paper's largest step of Noise Level Guidance, 0.5, in units of the norm of 256 numbers.
PAPER_STEP = 0.5 / 16
# Points of judge accuracy that ReDenoise must gain without guidance.
GAIN = 0.10
_OTHER_SEEDS = 10_000


def members() -> dict[str, InitialNoise]:
    """Return what refines the start, by name."""
    return {
        GOLDEN: ReDenoise(),
        "ReDenoise, a step of 50": ReDenoise(50),
        "Noise Level Guidance, 5 steps": NoiseLevelGuidance(5, max_relative_step=PAPER_STEP),
        "Noise Level Guidance, 20 steps": NoiseLevelGuidance(20, max_relative_step=PAPER_STEP),
        "SeedVariation 0.5": SeedVariation(0.5),
        "ConditioningNoise 0.5": ConditioningNoise(0.5),
    }


def plain_rivals(steps: int, scale: float) -> dict[str, tuple[int, float]]:
    """Return steps and scale of plain runs with about as many evaluations as ReDenoise has, by name."""
    evaluations = 3 + steps * (1 if scale == 1 else 2)
    if scale == 1:
        return {f"plain, {evaluations} steps": (evaluations, 1.0), "plain, CFG 2": (evaluations // 2, 2.0)}
    return {f"plain, {evaluations // 2} steps": (evaluations // 2, scale), "plain, 1.5 x CFG": (steps, 1.5 * scale)}


def measured(subject: Subject, checkpoint: str, seed: int, count: int, steps: int, scale: float) -> dict[str, Any]:
    """Return the scores of every start at one scale, by name.

    Args:
        subject ([`Subject`]): who draws.
        checkpoint (`str`): whose judge is asked.
        seed (`int`): of the noise.
        count (`int`): images.
        steps (`int`): of the scheduler.
        scale (`float`): of guidance.
    """
    labels, found = subject.labels(count), {}
    rivals = {PLAIN: (steps, scale), **plain_rivals(steps, scale)}
    for name, (own_steps, own_scale) in rivals.items():
        begin = time.perf_counter()
        drawn = draw(subject, labels, seed, own_steps, own_scale)
        found[name] = {**scores(drawn, labels, checkpoint), "seconds": time.perf_counter() - begin}
    for name, member in members().items():
        begin = time.perf_counter()
        with guide(subject.pipe, initial_noise=member):
            # Of noise beside that which all start from.
            generator = torch.Generator().manual_seed(_OTHER_SEEDS + seed)
            drawn = draw(subject, labels, seed, steps, scale, generator=generator)
        found[name] = {**scores(drawn, labels, checkpoint), "seconds": time.perf_counter() - begin}
        report: Any = getattr(member, "report", None)
        found[name]["evaluations"] += report.evaluations
    return found


def table(results: dict[float, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of means over seeds."""
    header = ["CFG", "start", "evaluations", "judge", "Fréchet distance", "diversity", "seconds"]
    rows = []
    for scale, starts in results.items():
        for name, found in starts.items():
            mean = {key: value["mean"] for key, value in found.items()}
            numbers = [f"{mean['evaluations']:.0f}", f"{100 * mean['judge_accuracy']:.1f} %"]
            numbers += [f"{mean[key]:.2f}" for key in ("frechet_distance", "diversity")] + [f"{mean['seconds']:.1f}"]
            rows.append([f"{scale:g}", name, *numbers])
    return header, rows


def acceptance(results: dict[float, dict[str, Any]]) -> list[tuple[str, bool]]:
    """Return statements, and whether they hold; none where there was no run without guidance."""
    if 1.0 not in results:
        return []
    golden, plain = (
        {key: results[1.0][name][key]["mean"] for key in ("judge_accuracy", "frechet_distance")}
        for name in (GOLDEN, PLAIN)
    )
    gain = golden["judge_accuracy"] - plain["judge_accuracy"]
    distances = golden["frechet_distance"], plain["frechet_distance"]
    return [
        (f"ReDenoise gains {100 * gain:.1f} points of accuracy at CFG 1, at least {100 * GAIN:.0f}", gain >= GAIN),
        ("with a Fréchet distance of {:.2f}, not above {:.2f}".format(*distances), distances[0] <= distances[1]),
    ]


def main(args: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if a bound is missed.

    Args:
        args (sequence of `str`, *optional*): of the command line.
    """
    parser = argparse.ArgumentParser(prog="hfnoise.benchmarks.golden_noise", description=__doc__.split("\n")[0])
    add_subject_options(parser)
    parser.add_argument("--images", type=int, default=500, help="of each start, scale and seed")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output_dir", default="benchmark_results", help="folder of the results")
    given = parser.parse_args(args)
    subject, folder = load_subject(given.checkpoint, given.world), output_folder(given.output_dir)
    subject.pipe.set_progress_bar_config(disable=True)
    results: dict[float, dict[str, Any]] = {}
    for scale in tqdm(given.scales, desc="guidance scales"):
        runs = [
            measured(subject, given.checkpoint, seed, given.images, given.steps, scale) for seed in range(given.seeds)
        ]
        results[scale] = {name: summary([run[name] for run in runs]) for name in runs[0]}
    header, rows = table(results)
    print_table(f"{subject.name}, {given.steps} steps", header, rows)
    checks = acceptance(results)
    text = markdown(header, rows) + "\n" + judge(checks)
    settings = {name: getattr(given, name) for name in ("checkpoint", "images", "steps", "scales", "seeds")}
    write_json(
        folder / f"golden_noise_{subject.stem}.json",
        {
            **circumstances(range(given.seeds)),
            "settings": settings,
            "results": {str(key): value for key, value in results.items()},
        },
    )
    (folder / f"golden_noise_{subject.stem}.md").write_text(text, encoding="utf-8")
    return 0 if all(passed for _, passed in checks) else 1


if __name__ == "__main__":
    raise SystemExit(main())
