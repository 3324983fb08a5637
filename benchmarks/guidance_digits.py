"""What skipped evaluations cost: Adaptive Guidance, fixed cut-offs and linear estimates against full guidance.

`python -m hfnoise.benchmarks.guidance_digits` draws a digits world by every method from the same noise, and writes
guidance_digits.json, .md and .png (named after the checkpoint): evaluations saved, accuracy by verifier and judge,
Fréchet distance, diversity, SSIM to the image of full guidance, and the wall-clock, on one thread, in batches that are
compute-bound. The methods at matched evaluations have as many as Adaptive Guidance with threshold 0.99 had. Peers of
diffusers run beside.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hfnoise.benchmarks.guidance_peers import peers
from hfnoise.benchmarks.guidance_runs import (
    Drawn,
    Subject,
    add_subject_options,
    draw,
    load_subject,
    paired_saving,
    paired_times,
    scores,
    summary,
)
from hfnoise.benchmarks.guidance_tables import acceptance, plot, table, timing_table
from hfnoise.benchmarks.reporting import circumstances, judge, markdown, print_table, write_json
from hfnoise.errors import UsageError
from hfnoise.folders import output_folder
from hfnoise.pipelines import AdaptiveGuidance, GuidanceRecorder, LinearGuidance, ProjectedGuidance

FULL = "full CFG"
ADAPTIVE = "Adaptive Guidance, 0.99"  # the threshold for this world
# What is drawn at the other scales; the rest only at the main one.
AT_ALL_SCALES = (FULL, ADAPTIVE, "Adaptive Guidance, 0.999")


def recorded_coefficients(subject: Subject, seed: int, images: int, steps: int, scale: float) -> Any:
    """Return coefficients of an AR(2) of the update, fitted on images of their own seed."""
    recorder = GuidanceRecorder().bind(subject.pipe)
    draw(subject, subject.labels(images), seed, steps, scale, recorder)
    return recorder.coefficients()


def methods(steps: int, coefficients: Any) -> dict[str, tuple[int, Any]]:
    """Return number of steps and guider of every method that chooses its evaluations itself; no guider is stock."""
    linear = partial(LinearGuidance, coefficients=coefficients)
    paper = "alternate_then_estimate"
    return {
        FULL: (steps, None),
        ADAPTIVE: (steps, AdaptiveGuidance(threshold=0.99)),
        "Adaptive Guidance, 0.999": (steps, AdaptiveGuidance(threshold=0.999)),
        "hold the last update, alternate": (steps, LinearGuidance()),
        "hold, alternate, none in the second half": (steps, LinearGuidance(stop=0.5)),
        "AR(2), alternate": (steps, linear()),
        "AR(2), LinearAG's policy": (steps, linear(policy=paper)),
        "Adaptive Guidance, 0.99 + AR(2), alternate": (steps, AdaptiveGuidance(threshold=0.99, inner=linear())),
    }


def matched_methods(steps: int, evaluations: float) -> dict[str, tuple[int, Any]]:
    """Return the methods that are given a number of evaluations: fewer steps, and a cut-off at a fixed step."""
    fewer, guided = round(evaluations / 2), round(evaluations - steps)
    # Half a step later than the step itself, so that no rounding of the share moves it.
    cut_off = ProjectedGuidance(eta=1.0, stop=min(1.0, (guided + 0.5) / steps))  # neutral, but for its end
    return {f"CFG, {fewer} steps": (fewer, None), f"CFG in the first {guided} steps": (steps, cut_off)}


def compare(
    subject: Subject, checkpoint: str, seeds: Sequence[int], images: int, steps: int, scale: float, coefficients: Any
) -> dict[str, list[dict[str, float]]]:
    """Return the scores of every method, by seed. Without coefficients only what is drawn at all scales."""
    labels = subject.labels(images)
    chosen = methods(steps, coefficients)
    if coefficients is None:
        chosen = {name: chosen[name] for name in AT_ALL_SCALES}
    found: dict[str, list[dict[str, float]]] = {}
    full: dict[int, Drawn] = {}

    def run(name: str, count: int, guider: Any) -> None:
        for seed in seeds:
            drawn = draw(subject, labels, seed, count, scale, guider)
            full.setdefault(seed, drawn)
            found.setdefault(name, []).append(scores(drawn, labels, checkpoint, full[seed]))

    for name, (count, guider) in tqdm(chosen.items(), desc=f"{steps} steps, scale {scale:g}"):
        run(name, count, guider)
    spent = summary(found[ADAPTIVE])["evaluations"]["mean"]
    for name, (count, guider) in matched_methods(steps, spent).items():
        run(name, count, guider)
    return found


def time_methods(
    subject: Subject, seed: int, images: int, steps: int, scale: float, coefficients: Any, spent: float, repeats: int
) -> dict[str, dict[str, Any]]:
    """Return rows and wall-clock that every method saves, the whole call of the pipeline counted, decoder included."""
    labels = subject.labels(images)
    every = {**methods(steps, coefficients), **matched_methods(steps, spent)}
    rows: dict[str, float] = {}

    def run(name: str) -> None:
        count, guider = every[name]
        rows[name] = draw(subject, labels, seed, count, scale, guider).evaluations

    seconds = paired_times({name: partial(run, name) for name in every}, repeats)
    found = {}
    for name in every:
        saved = 1 - rows[name] / rows[FULL]
        time_saved = paired_saving(seconds[name], seconds[FULL])
        found[name] = {
            "rows_saved": saved, "time_saved": time_saved, "seconds": sorted(seconds[name])[len(seconds[name]) // 2],
            "time_saved_per_rows_saved": time_saved / saved if saved else None,
        }  # fmt: skip
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line; exit code 1 if an acceptance bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_subject_options(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the noise that is reported")
    parser.add_argument("--fitting_seed", type=int, default=99, help="of the runs that AR(2) is fitted on")
    parser.add_argument("--fitted_images", type=int, default=100, help="of those runs")
    parser.add_argument("--images", type=int, default=300, help="at least so many for each seed")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 10])
    parser.add_argument(
        "--scales", type=float, nargs="+", default=[4.0, 2.0, 7.5], help="all methods run at the first"
    )
    parser.add_argument("--timed_images", type=int, default=100, help="in the batches whose wall-clock is taken")
    parser.add_argument("--repeats", type=int, default=7, help="turns of every method that are timed")
    parser.add_argument("--output_dir", default="benchmark_results", help="folder of the results")
    given = parser.parse_args(arguments)
    if given.fitting_seed in given.seeds:
        raise UsageError(f"--fitting_seed {given.fitting_seed} is among --seeds; fit on runs that are not reported.")
    folder: Path = output_folder(given.output_dir)
    torch.set_num_threads(1)
    subject = load_subject(given.checkpoint, given.world)
    found: dict[str, Any] = {}
    times: dict[str, Any] = {}
    for steps in given.steps:
        for scale in given.scales:
            main_scale = scale == given.scales[0]
            coefficients = None
            if main_scale:
                coefficients = recorded_coefficients(subject, given.fitting_seed, given.fitted_images, steps, scale)
            runs = compare(subject, given.checkpoint, given.seeds, given.images, steps, scale, coefficients)
            found[f"{steps} steps, scale {scale:g}"] = runs
            if main_scale:
                spent = summary(runs[ADAPTIVE])["evaluations"]["mean"]
                times[f"{steps} steps, scale {scale:g}"] = time_methods(
                    subject, given.seeds[0], given.timed_images, steps, scale, coefficients, spent, given.repeats
                )
    seen = peers(subject, given.seeds[0], given.steps[0], given.scales[0], given.repeats)
    text = ""
    for title, (header, rows) in {
        **{name: table(runs, FULL) for name, runs in found.items()},
        **{f"{name}: rows and wall-clock": timing_table(one) for name, one in times.items()},
        "peers, one image at a time": seen.table(),
    }.items():
        print_table(title, header, rows)
        text += f"**{title}**\n\n{markdown(header, rows)}\n"
    checks = acceptance(found, times, FULL, ADAPTIVE)
    judged = judge(checks)
    content = {
        "checkpoint": subject.name, "images": len(subject.labels(given.images)), "runs": found, "times": times,
        "summary": {name: {one: summary(runs[one]) for one in runs} for name, runs in found.items()},
        "peers": seen.as_dict(), "acceptance": [list(check) for check in checks],
        "timed_images": len(subject.labels(given.timed_images)), "fitting_seed": given.fitting_seed,
    }  # fmt: skip
    stem = f"guidance_{subject.stem}"
    write_json(folder / f"{stem}.json", {**circumstances(given.seeds), **content})
    (folder / f"{stem}.md").write_text(text + judged, encoding="utf-8")
    plot(found, FULL, folder / f"{stem}.png")
    return int(not all(passed for _, passed in checks))


if __name__ == "__main__":
    raise SystemExit(main())
