"""Noisy preference labels: every loss against stock DPO and TRL's robust loss, in one run.

`hfnoise bench --parts features trainer overhead` prints tables and writes preference_noise.json, .md and .png.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hfnoise.benchmarks import frozen_features, overhead
from hfnoise.benchmarks.reporting import circumstances, markdown, mean_and_error, print_table, show, write_json
from hfnoise.worlds import docstrings_run

FLIP_RATES = (0.0, 0.1, 0.2, 0.3, 0.4)
# Name in tables -> name for frozen_features.run; in brackets what the method is told.
FEATURE_METHODS = {
    "sigmoid (DPO)": "sigmoid",
    "cdpo [true rate]": "cdpo",
    "robust [true rate]": "robust",
    "exo_pair [true rate]": "exo_pair",
    "forward_corrected [true rate]": "forward_corrected",
    "forward_corrected [estimated rate]": "forward_corrected (estimated)",
    "sym [nothing]": "sym",
    "ropo [nothing]": "ropo",
    "holder [nothing]": "holder",
    "information limit": "clean fraction",
}
TRAINER_RATES = (0.0, 0.3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line."""
    parser = argparse.ArgumentParser(prog="hfnoise bench", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=("features", "trainer", "overhead"), default=["features"])
    parser.add_argument("--seeds", type=int, default=10, help="runs on frozen features for every method and rate")
    parser.add_argument("--trainer_seeds", type=int, default=3, help="whole Trainer runs for every method and rate")
    parser.add_argument("--pairs", type=int, default=1000, help="training pairs on frozen features")
    parser.add_argument("--steps", type=int, default=60, help="timed steps of every loss")
    parser.add_argument("--output_dir", default="benchmarks/results", help="folder of the results")
    given = parser.parse_args(arguments)
    torch.set_num_threads(2)
    logging.getLogger("hfnoise").setLevel(logging.WARNING)
    folder = Path(given.output_dir)
    for part in given.parts:
        results, tables = _PARTS[part](given, folder)
        stem = f"preference_noise_{part}"
        write_json(folder / f"{stem}.json", {**circumstances(range(given.seeds)), "results": results})
        (folder / f"{stem}.md").write_text("\n".join(tables), encoding="utf-8")
    return 0


def _features(given: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    pool = frozen_features.extract("train", given.pairs * 4 + frozen_features.RATE_PAIRS)
    pool, test = frozen_features.normalised(pool, frozen_features.extract("validation", 2000))
    runs: dict[str, dict[str, list[frozen_features.Result]]] = {}
    total = len(FEATURE_METHODS) * len(FLIP_RATES) * given.seeds
    with tqdm(total=total, desc="runs on frozen features") as bar:
        for title, name in FEATURE_METHODS.items():
            runs[title] = {str(rate): [] for rate in FLIP_RATES}
            for rate in FLIP_RATES:
                for seed in range(given.seeds):
                    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
                    train = pool.select(order[: given.pairs])
                    held_out = pool.select(order[-frozen_features.RATE_PAIRS :])
                    result = frozen_features.run(name, rate, seed, train, held_out, test)
                    runs[title][str(rate)].append(result)
                    bar.update()
    accuracy = {
        title: {rate: mean_and_error([result.accuracy for result in results]) for rate, results in by_rate.items()}
        for title, by_rate in runs.items()
    }
    header = ["method [told]", *(f"{rate:.0%} flips" for rate in FLIP_RATES)]
    rows = [[title, *(show(value) for value in by_rate.values())] for title, by_rate in accuracy.items()]
    print_table(f"accuracy on clean pairs, per cent, mean ± s.e. of {given.seeds} seeds", header, rows)
    rate_header, rate_rows = _rate_table(runs["forward_corrected [estimated rate]"])
    print_table("estimated flip rate", rate_header, rate_rows)
    suspect_header, suspect_rows = _suspect_table(runs)
    print_table("share of true flips among the suspects", suspect_header, suspect_rows)
    _plot(accuracy, folder / "preference_noise_features.png")
    results = {title: {rate: [vars(r) for r in rs] for rate, rs in by_rate.items()} for title, by_rate in runs.items()}
    return results, [
        markdown(header, rows), markdown(rate_header, rate_rows), markdown(suspect_header, suspect_rows),
    ]  # fmt: skip


def _rate_table(runs: dict[str, list[frozen_features.Result]]) -> tuple[list[str], list[list[str]]]:
    header = ["true flip rate", "mean estimate", "mean absolute error", "refused"]
    rows = []
    for rate, results in runs.items():
        used = [result.estimated_flip_rate for result in results if not result.refused]
        numbers = [value for value in used if value is not None]
        error = mean_and_error([abs(value - float(rate)) for value in numbers])[0] if numbers else float("nan")
        mean = mean_and_error(numbers)[0] if numbers else float("nan")
        rows.append([rate, f"{mean:.3f}", f"{error:.3f}", f"{len(results) - len(numbers)} of {len(results)}"])
    return header, rows


def _suspect_table(runs: dict[str, dict[str, list[frozen_features.Result]]]) -> tuple[list[str], list[list[str]]]:
    rates = [str(rate) for rate in FLIP_RATES if rate]
    rows = []
    for title, by_rate in runs.items():
        values = [[r.suspect_precision for r in by_rate[rate] if r.suspect_precision is not None] for rate in rates]
        if all(values):
            rows.append([title, *(show(mean_and_error(numbers)) for numbers in values)])
    return ["method [told]", *(f"{float(rate):.0%} flips" for rate in rates)], rows


def _plot(accuracy: dict[str, dict[str, tuple[float, float]]], path: Path) -> None:
    """Write accuracy against flip rate; the dashed line is what no method can beat."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    colours = ["#222222", "#bbbbbb", "#ee8866", "#99ddff", "#4477aa", "#66ccee", "#228833", "#aaaa00", "#aa3377"]
    for number, (title, by_rate) in enumerate(accuracy.items()):
        means = [100 * mean for mean, _ in by_rate.values()]
        errors = [100 * error for _, error in by_rate.values()]
        limit = title == "information limit"
        style: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1} if limit else {
            "color": colours[number], "marker": "o", "markersize": 4,
        }  # fmt: skip
        axes.errorbar(FLIP_RATES, means, yerr=errors, capsize=2, label=title, **style)
    axes.set(xlabel="share of flipped training labels", ylabel="accuracy on clean held-out pairs, %")
    axes.set_title("Preference learning from noisy labels, frozen features of the docstrings world")
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _trainer(given: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    found: dict[str, dict[str, list[float]]] = {}
    for method in docstrings_run.METHODS:
        found[method] = {}
        for rate in TRAINER_RATES:
            runs = [docstrings_run.run_trainer(method, rate, seed) for seed in range(given.trainer_seeds)]
            found[method][str(rate)] = [run.accuracy for run in runs]
    header = ["method", *(f"{rate:.0%} flips" for rate in TRAINER_RATES)]
    rows = [
        [method, *(show(mean_and_error(values)) for values in by_rate.values())] for method, by_rate in found.items()
    ]
    print_table(f"whole runs: accuracy on clean pairs, per cent, {given.trainer_seeds} seeds", header, rows)
    return found, [markdown(header, rows)]


def _overhead(given: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    ratios = overhead.time_steps(given.steps)
    stock = overhead.peak_memory(None)
    memory = {name: overhead.peak_memory(None if name == "TRL sigmoid" else name) for name in ratios}
    header = ["loss", "step time / TRL sigmoid", "peak memory / TRL sigmoid"]
    rows = [[name, f"{ratio:.3f}", f"{memory[name] / stock:.3f}"] for name, ratio in ratios.items()]
    print_table(f"overhead, median of {given.steps} steps taken in turn", header, rows)
    return {"step_time_ratio": ratios, "peak_memory_mb": memory}, [markdown(header, rows)]


_PARTS = {"features": _features, "trainer": _trainer, "overhead": _overhead}


if __name__ == "__main__":
    raise SystemExit(main())
