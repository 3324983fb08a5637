"""Noisy preference labels: every loss against stock DPO and TRL's robust loss, in one run.

`python -m hfnoise.benchmarks.preference_noise --parts features trainer overhead` prints tables and writes
preference_noise_features.json, .md and .png, and so on for the other parts.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hfnoise.benchmarks import frozen_features, overhead
from hfnoise.benchmarks.reporting import circumstances, markdown, mean_and_error, print_table, show, write_json
from hfnoise.folders import output_folder
from hfnoise.worlds import docstrings_run

FLIP_RATES = (0.0, 0.1, 0.2, 0.3, 0.4)
# Name in tables -> name for frozen_features.run; in brackets what the method is told.
FEATURE_METHODS = {
    "sigmoid (DPO)": "sigmoid",
    "cdpo [true rate]": "cdpo",
    "robust [true rate]": "robust",
    "robust [0.45 always]": "robust at 0.45",
    "exo_pair [true rate]": "exo_pair",
    "forward_corrected [true rate]": "forward_corrected",
    "forward_corrected [estimated rate]": "forward_corrected (estimated)",
    "sym, temperature 4 [nothing]": "sym at temperature 4",
    "sym, temperature 1 [nothing]": "sym",
    "ropo [nothing]": "ropo",
    "holder [nothing]": "holder",
    "Dr. DPO, whole batch of 64, dr_beta 0.5 [nothing]": "dr_sigmoid over 64 at 0.5",
    "Dr. DPO, whole batch of 64 [nothing]": "dr_sigmoid over 64 at 1.0",
    "Dr. DPO, 8 pairs at a time [nothing]": "dr_sigmoid over 8 at 1.0",
    "Dr. DPO, 2 pairs at a time [nothing]": "dr_sigmoid over 2 at 1.0",
    "information limit": "clean fraction",
}
ESTIMATED = "forward_corrected [estimated rate]"
TRAINER_RATES = (0.0, 0.3)

Runs = dict[str, dict[str, list[frozen_features.Result]]]

_COLOURS = (
    "#222222", "#bbbbbb", "#ee8866", "#882255", "#99ddff", "#4477aa", "#66ccee", "#117733", "#88cc88", "#aaaa00",
    "#aa3377", "#332288", "#999933", "#ddcc77", "#cc6677",
)  # fmt: skip
_STYLES: dict[str, dict[str, Any]] = {
    title: {"color": colour, "marker": "o", "markersize": 4}
    for title, colour in zip(FEATURE_METHODS, _COLOURS, strict=False)
} | {"information limit": {"color": "black", "linestyle": "--", "linewidth": 1}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=("features", "trainer", "overhead"), default=["features"])
    parser.add_argument("--seeds", type=int, default=10, help="runs on frozen features for every method and rate")
    parser.add_argument("--trainer_seeds", type=int, default=3, help="whole Trainer runs for every method and rate")
    parser.add_argument(
        "--trainer_methods", nargs="+", choices=list(docstrings_run.METHODS), default=list(docstrings_run.METHODS),
        metavar="METHOD", help="of the whole runs; by default all",
    )  # fmt: skip
    parser.add_argument("--trainer_pairs", type=int, help="training pairs of the same; by default the world's recipe")
    parser.add_argument("--trainer_rates", type=float, nargs="+", default=TRAINER_RATES, help="flip rates of the same")
    parser.add_argument("--pairs", type=int, default=1000, help="training pairs on frozen features")
    parser.add_argument("--steps", type=int, default=60, help="timed steps of every loss")
    parser.add_argument(
        "--losses", nargs="+", choices=overhead.LOSSES, default=overhead.LOSSES, help="whose steps are timed"
    )
    parser.add_argument("--output_dir", default="benchmark_results", help="folder of the results")
    given = parser.parse_args(arguments)
    if 0.0 in given.trainer_rates and "DPO" not in given.trainer_methods:
        parser.error("--trainer_methods must hold DPO where --trainer_rates holds 0: methods told it are DPO.")
    folder = output_folder(given.output_dir)
    torch.set_num_threads(2)
    logging.getLogger("hfnoise").setLevel(logging.WARNING)
    for part in given.parts:
        results, tables = _PARTS[part](given, folder)
        stem = f"preference_noise_{part}"
        seeds = range({"features": given.seeds, "trainer": given.trainer_seeds, "overhead": 1}[part])
        write_json(folder / f"{stem}.json", {**circumstances(seeds), "results": results})
        (folder / f"{stem}.md").write_text("\n".join(tables), encoding="utf-8")
    return 0


def _features(given: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    pool = frozen_features.extract("train", given.pairs * 3 + frozen_features.RATE_PAIRS)
    pool, test = frozen_features.normalised(pool, frozen_features.extract("validation", frozen_features.TEST_PAIRS))
    torch.set_num_threads(1)  # the head is too small for more
    accuracies, results, tables = {}, {}, []
    for regime in frozen_features.REGIMES:
        runs = _runs(given, regime, pool, test)
        accuracy = {
            title: {rate: mean_and_error([result.accuracy for result in found]) for rate, found in by_rate.items()}
            for title, by_rate in runs.items()
        }
        header = [f"{regime}: method [told]", *(f"{rate:.0%} flips" for rate in FLIP_RATES)]
        rows = [[title, *(show(value) for value in by_rate.values())] for title, by_rate in accuracy.items()]
        for title, (head, body) in {
            f"accuracy on clean pairs, per cent, mean ± s.e. of {given.seeds} seeds": (header, rows),
            "flip rate estimated from the held-out margins of sym": _rate_table(runs[ESTIMATED]),
            "share of true flips among the suspects, per cent": _suspect_table(runs),
        }.items():
            print_table(f"{regime}: {title}", head, body)
            tables.append(f"{regime}: {title}\n\n{markdown(head, body)}")
        accuracies[regime] = accuracy
        results[regime] = {
            title: {rate: [vars(result) for result in found] for rate, found in by_rate.items()}
            for title, by_rate in runs.items()
        }
    _plot(accuracies, folder / "preference_noise_features.png")
    return results, tables


def _runs(given: argparse.Namespace, regime: str, pool: Any, test: Any) -> Runs:
    """Return every method's results by flip rate; all methods see the same pairs and flips."""
    runs: Runs = {title: {str(rate): [] for rate in FLIP_RATES} for title in FEATURE_METHODS}
    cells = [(title, rate, seed) for title in FEATURE_METHODS for rate in FLIP_RATES for seed in range(given.seeds)]
    for title, rate, seed in tqdm(cells, desc=f"runs on frozen features, {regime}"):
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        train, held_out = pool.select(order[: given.pairs]), pool.select(order[-frozen_features.RATE_PAIRS :])
        result = frozen_features.run(FEATURE_METHODS[title], rate, seed, train, held_out, test, regime)
        runs[title][str(rate)].append(result)
    return runs


def _rate_table(runs: dict[str, list[frozen_features.Result]]) -> tuple[list[str], list[list[str]]]:
    header = ["true flip rate", "mean estimate", "mean absolute error", "interval holds the truth", "refused"]
    rows = []
    for rate, results in runs.items():
        estimates = [float(result.estimated_flip_rate or 0.0) for result in results]
        error = mean_and_error([abs(value - float(rate)) for value in estimates])[0]
        covered = sum(bool(result.truth_inside) for result in results)
        refused = sum(result.refused for result in results)
        count = len(results)
        mean = mean_and_error(estimates)[0]
        rows.append([rate, f"{mean:.3f}", f"{error:.3f}", f"{covered} of {count}", f"{refused} of {count}"])
    return header, rows


def _suspect_table(runs: Runs) -> tuple[list[str], list[list[str]]]:
    rates = [str(rate) for rate in FLIP_RATES if rate]
    rows = []
    for title, by_rate in runs.items():
        values = [[r.suspect_precision for r in by_rate[rate] if r.suspect_precision is not None] for rate in rates]
        if all(values):
            rows.append([title, *(show(mean_and_error(numbers)) for numbers in values)])
    return ["method [told]", *(f"{float(rate):.0%} flips" for rate in rates)], rows


def _plot(accuracies: dict[str, Any], path: Path) -> None:
    """Write accuracy against flip rate; above the dashed line a method does better than clean pairs would let it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(1, len(accuracies), sharey=True)
    for axes, (regime, accuracy) in zip(panels, accuracies.items(), strict=True):
        for title, by_rate in accuracy.items():
            means = [100 * mean for mean, _ in by_rate.values()]
            errors = [100 * error for _, error in by_rate.values()]
            axes.errorbar(FLIP_RATES, means, yerr=errors, capsize=2, label=title, **_STYLES[title])
        axes.set(xlabel="share of flipped training labels", title=regime)
    panels[0].set_ylabel("accuracy on clean held-out pairs, %")
    panels[0].legend(frameon=False, fontsize=8, loc="lower left")
    figure.suptitle("Preference learning from noisy labels, frozen features of the docstrings world")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _trainer(given: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Run whole Trainers; a cell that an interrupted run has finished is taken from its file."""
    partial = folder / "preference_noise_trainer.partial.json"
    found: dict[str, list[float]] = json.loads(partial.read_text()) if partial.is_file() else {}
    # With clean labels, told a rate of 0, both corrected losses are DPO to the bit: not run again.
    rates = given.trainer_rates
    cells = [
        (method, rate, seed)
        for method in given.trainer_methods
        for rate in rates
        for seed in range(given.trainer_seeds)
        if rate or not method.endswith("true rate")
    ]
    for method, rate, seed in tqdm(cells, desc="whole runs"):
        done = found.setdefault(f"{method} | {rate}", [])
        if seed < len(done):
            continue
        run = docstrings_run.run_trainer(
            method, rate, seed, train_size=given.trainer_pairs, disable_tqdm=True, logging_strategy="no"
        )
        done.append(run.accuracy)
        write_json(partial, found)
    header = ["method", *(f"{rate:.0%} flips" for rate in rates)]
    rows = [
        # Told a rate of 0, a method is DPO.
        [one, *(show(mean_and_error(found.get(f"{one} | {rate}") or found[f"DPO | {rate}"])) for rate in rates)]
        for one in given.trainer_methods
    ]
    print_table(f"whole runs: accuracy on clean pairs, per cent, {given.trainer_seeds} seeds", header, rows)
    partial.unlink(missing_ok=True)
    return found, [markdown(header, rows)]


def _overhead(given: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    costs = overhead.measure(given.steps, given.losses)
    stock = costs[overhead.STOCK].peak_memory
    header = ["loss", "step time / TRL sigmoid", "share of the step in our code", "peak memory / TRL sigmoid"]
    rows = [
        [name, f"{cost.step_time:.3f}", f"{cost.own_share:.2%}", f"{cost.peak_memory / stock:.3f}"]
        for name, cost in costs.items()
    ]
    print_table(f"overhead, median of {given.steps} steps taken in turn", header, rows)
    return {name: asdict(cost) for name, cost in costs.items()}, [markdown(header, rows)]


_PARTS = {"features": _features, "trainer": _trainer, "overhead": _overhead}


if __name__ == "__main__":
    raise SystemExit(main())
