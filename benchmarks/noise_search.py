"""What searches of the noise win: best of N, zero-order search and paths against the plain run, at equal budgets.

`python -m hfnoise.benchmarks.noise_search` draws a digits world without guidance, searches by the verifier of its
checkpoint, and writes noise_search.json and .md: accuracy by verifier and by the judge, which is independent of it,
beside the 1 - (1 - p)^N of a verifier that is always right, Fréchet distance, diversity, and the cost. A budget of N
images is N times the steps of the plain run.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hfnoise.benchmarks.guidance_runs import Subject, add_subject_options, load_subject
from hfnoise.benchmarks.reporting import circumstances, judge, markdown, mean_and_error, print_table, show, write_json
from hfnoise.folders import output_folder
from hfnoise.pipelines import PathSearch, RandomSearch, ZeroOrderSearch
from hfnoise.worlds.digits_score import score_digit_images
from hfnoise.worlds.digits_verifier import digit_verifier

PLAIN = "plain"
HEADER = (
    "method", "images", "evaluations", "judge %", "1-(1-p)^N %", "verifier %", "verifier log p", "judge log p",
    "Fréchet distance", "diversity", "seconds",
)  # fmt: skip


def best_of(count: int) -> str:
    """Return the name of the random search among so many."""
    return PLAIN if count == 1 else f"best of {count}"


def methods(budgets: Sequence[int], cost: int, preview_steps: int, **options: Any) -> dict[str, tuple[int, Any]]:
    """Return images of the budget and search of every method; a search of one image is the plain run.

    Args:
        budgets (sequence of `int`): in images.
        cost (`int`): evaluations of an image.
        preview_steps (`int`): of the searches that compare previews.
        **options: of all searches.
    """
    found: dict[str, tuple[int, Any]] = {PLAIN: (1, RandomSearch(budget=cost, **options))}
    for count in budgets:
        found[best_of(count)] = count, RandomSearch(budget=count * cost, **options)
    for count in [count for count in budgets if count > 2]:
        found[f"zero-order, {count}"] = count, ZeroOrderSearch(budget=count * cost, neighbours=2, **options)
        found[f"paths, {count}"] = count, PathSearch(budget=count * cost, **options)
    largest = max(budgets)
    found[f"best of previews, {largest}"] = (
        largest, RandomSearch(budget=largest * cost, preview_steps=preview_steps, **options)
    )  # fmt: skip
    return found


def run(subject: Subject, search: Any, labels: torch.Tensor, seed: int, **call: Any) -> dict[str, float]:
    """Return what the images of a search are worth, and what it cost.

    Args:
        subject ([`~hfnoise.benchmarks.guidance_runs.Subject`]): who draws.
        search ([`~hfnoise.pipelines.RandomSearch`] or another one): of the noise.
        labels (`torch.Tensor` of shape `(count, attributes)`): what to ask for.
        seed (`int`): of the plain run's noise.
        **call: of the pipeline.
    """
    prompts = [subject.world.prompt(row) for row in labels.tolist()]
    begun = time.perf_counter()
    noise = search.latents(subject.pipe, prompts, latents=subject.noise(len(labels), seed), **call)
    seconds = time.perf_counter() - begun
    images = search.images
    if search.preview_steps is not None:  # compared were others
        images = subject.pipe(prompts, latents=noise, output_type="pt", **call).images
    (verifier,) = search.verifier.values()
    with torch.no_grad():
        chosen = {name: float(one(images, prompts).mean()) for name, one in (("verifier_score", verifier),
                                                                           ("judge_score", search.judge))}  # fmt: skip
    found = asdict(score_digit_images(images, labels, subject.name))
    found.pop("attribute_accuracy")
    trace = search.trace
    return {**found, **chosen, "evaluations": trace.evaluations, "candidates": trace.candidates, "seconds": seconds}


def bound(accuracy: float, count: int) -> float:
    """Return 1 - (1 - p)^N, the share of right images of a verifier that always finds a right one.

    Example:
        >>> from hfnoise.benchmarks.noise_search import bound
        >>> round(bound(0.8, 2), 4)
        0.96
    """
    return 1.0 - (1.0 - accuracy) ** count


def table(found: dict[str, list[dict[str, float]]], counts: dict[str, int]) -> list[list[str]]:
    """Return the rows of the table: means over the seeds with their standard error."""

    def column(runs: list[dict[str, float]], name: str) -> list[float]:
        return [one[name] for one in runs]

    plain = mean_and_error(column(found[PLAIN], "judge_accuracy"))[0]
    rows = []
    for name, runs in found.items():
        means = {key: mean_and_error(column(runs, key))[0] for key in runs[0]}
        limit = f"{100 * bound(plain, counts[name]):.1f}" if name in (PLAIN, best_of(counts[name])) else ""
        right = [show(mean_and_error(column(runs, f"{kind}_accuracy"))) for kind in ("judge", "verifier")]
        rows.append([
            name, str(counts[name]), f"{means['evaluations']:.0f}", right[0], limit, right[1],
            f"{means['verifier_score']:.3f}",
            f"{means['judge_score']:.3f}", f"{means['frechet_distance']:.2f}", f"{means['diversity']:.2f}",
            f"{means['seconds']:.1f}",
        ])  # fmt: skip
    return rows


def acceptance(
    found: dict[str, list[dict[str, float]]], counts: dict[str, int], cost: int, images: int
) -> list[tuple[str, bool]]:
    """Return what must hold: exact budgets, the bound of a perfect verifier, gains that grow with N."""

    def mean(name: str, key: str) -> float:
        return mean_and_error([one[key] for one in found[name]])[0]

    exact = all(one["evaluations"] == counts[name] * cost for name, runs in found.items() for one in runs)
    checks = [("every search spends its budget to the evaluation", exact)]
    plain = mean(PLAIN, "judge_accuracy")
    ordered = [name for name in found if name in (PLAIN, best_of(counts[name]))]
    scores = [mean(name, "verifier_score") for name in ordered]
    checks.append(("the verifier's score of the best of N grows with N", scores == sorted(scores)))
    for name in ordered[1:]:
        limit = bound(plain, counts[name])
        # p and the share of right images are both known to their sampling errors only.
        error = math.hypot(
            counts[name] * (1 - plain) ** (counts[name] - 1) * math.sqrt(plain * (1 - plain) / images),
            math.sqrt(limit * (1 - limit) / images),
        )
        reached = mean(name, "judge_accuracy")
        checks.append((f"{name}: {reached:.1%} by the judge, at most {limit:.1%} + 2 x {error:.1%}",
                       reached <= limit + 2 * error))  # fmt: skip
    worst = min((name for name in found if name != PLAIN), key=lambda name: mean(name, "judge_accuracy"))
    gain = mean(worst, "judge_accuracy") - plain
    checks.append((f"the judge finds more right images by every search; least by {worst}: {gain:+.1%}", gain > 0))
    return checks


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line; exit code 1 if an acceptance bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_subject_options(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the plain run's noise")
    parser.add_argument("--images", type=int, default=200, help="at least so many for each seed")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--scale", type=float, default=1.0, help="of guidance; 1 is none")
    parser.add_argument("--budgets", type=int, nargs="+", default=[2, 4, 8], help="in images of the plain run")
    parser.add_argument("--preview_steps", type=int, default=5, help="of the search that compares previews")
    parser.add_argument("--output_dir", default="benchmark_results", help="folder of the results")
    given = parser.parse_args(arguments)
    folder: Path = output_folder(given.output_dir)
    torch.set_num_threads(1)
    subject = load_subject(given.checkpoint, given.world)
    verifier, other = (digit_verifier(kind, given.checkpoint, subject.world) for kind in ("verifier", "judge"))
    cost = given.steps * (2 if given.scale > 1 else 1)
    chosen = methods(given.budgets, cost, given.preview_steps, verifier={"verifier": verifier}, judge=other)
    counts = {name: count for name, (count, _) in chosen.items()}
    labels = subject.labels(given.images)
    call = {"num_inference_steps": given.steps, "guidance_scale": given.scale}
    found: dict[str, list[dict[str, float]]] = {}
    for name, (_, search) in tqdm(chosen.items(), desc="searches"):
        found[name] = [run(subject, search, labels, seed, **call) for seed in given.seeds]
    rows = table(found, counts)
    title = f"{subject.name}, {given.steps} steps, scale {given.scale:g}, {len(labels)} images a seed"
    print_table(title, HEADER, rows)
    checks = acceptance(found, counts, cost, len(labels) * len(given.seeds))
    judged = judge(checks)
    options = {name: value for name, value in vars(given).items() if name != "output_dir"}
    content = {"checkpoint": subject.name, "images": len(labels), "runs": found, "options": options,
               "acceptance": [list(check) for check in checks]}  # fmt: skip
    write_json(folder / "noise_search.json", {**circumstances(given.seeds), **content})
    (folder / "noise_search.md").write_text(f"**{title}**\n\n{markdown(HEADER, rows)}\n{judged}", encoding="utf-8")
    return int(not all(passed for _, passed in checks))


if __name__ == "__main__":
    raise SystemExit(main())
