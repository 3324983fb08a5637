"""Federated LoRA side by side: five aggregations, two starts of FFA-LoRA, and refresh, without privacy and with it.

`python -m hfnoise.benchmarks.fedsvd` prints a table and writes fedsvd.json, .md and .png. Six clients with skewed
labels, three of them in a round, train the docstrings Llama to tell what an expression of code is there for
(`hfnoise.worlds.expressions`). Every method and privacy gets its own learning rate, chosen by climbing a grid of
factors of 3 on a seed and on held-out rows of their own, which are not reported.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging as hf_logging

from hfnoise.benchmarks.fedsvd_runs import BASELINE, DELTA, METHODS, Outcome, Setup, run_federation
from hfnoise.benchmarks.reporting import circumstances, markdown, mean_and_error, print_table, show, write_json
from hfnoise.errors import UsageError
from hfnoise.folders import output_folder

# Where the climb begins; it goes on until both neighbours are worse, so these only save runs.
_FIRST_RATES = {"sgd": 6.0, "adamw_torch": 6e-3}
_FACTOR = 3.0
_MOST_STEPS = 4  # away from the first rate, either way
NO_PRIVACY = "no privacy"


def climb(score: Callable[[float], float], first: float) -> tuple[float, dict[float, float]]:
    """Return the best point of a grid of factors of 3, and the scores of all that were tried.

    The climb ends where both neighbours are worse, so that the best rate is never at the edge of what was tried.
    """
    tried: dict[int, float] = {}

    def at(step: int) -> float:
        if abs(step) > _MOST_STEPS:
            return -math.inf
        if step not in tried:
            tried[step] = score(first * _FACTOR**step)
        return tried[step]

    best = 0
    while True:
        following = max((best, best + 1, best - 1), key=at)
        if following == best:
            return first * _FACTOR**best, {first * _FACTOR**step: tried[step] for step in sorted(tried)}
        best = following


def baseline_of(name: str) -> str:
    """Return the method that a difference is taken to: FFA-LoRA from the same rows with the same optimizer."""
    return BASELINE if METHODS[name].optim == "sgd" else f"{BASELINE}, AdamW"


def show_difference(values: Sequence[float]) -> str:
    """Return mean and standard error of paired differences, in points."""
    mean, error = mean_and_error(values)
    # Adding zero takes the sign from what is rounded to nothing.
    return f"{round(100 * mean, 1) + 0.0:+.1f}" + ("" if math.isnan(error) else f" ± {100 * error:.1f}")


def table(outcomes: dict[str, dict[str, list[Outcome]]], rates: dict[str, dict[str, float]]) -> tuple[Any, Any]:
    """Return header and rows: accuracy, paired difference, bytes and epsilon of every method."""
    privacies = list(next(iter(outcomes.values())))
    header = ["method"]
    for privacy in privacies:
        header += [f"{privacy}: accuracy, %", f"to {BASELINE}", "learning rate"]
    header += ["bytes down (largest)", "bytes up", "largest epsilon"]
    rows = []
    for name, found in outcomes.items():
        row = [name]
        for privacy in privacies:
            accuracies = [one.accuracy for one in found[privacy]]
            base = [one.accuracy for one in outcomes.get(baseline_of(name), {}).get(privacy, [])]
            pairs = list(zip(accuracies, base, strict=bool(base)))
            difference = "" if baseline_of(name) == name or not base else show_difference([a - b for a, b in pairs])
            row += [show(mean_and_error(accuracies)), difference, f"{rates[name][privacy]:.3g}"]
        every = [one for runs in found.values() for one in runs]
        down = sorted(value for one in every for value in one.bytes_down)
        epsilons = [value for one in every for value in one.epsilons.values()]
        largest = f" ({down[-1]:,})" if down[-1] > down[0] else ""
        row += [f"{down[len(down) // 2]:,}{largest}", f"{every[0].bytes_up:,}"]
        rows.append([*row, f"{max(epsilons):.4f}" if epsilons else ""])
    return header, rows


def plot(outcomes: dict[str, dict[str, list[Outcome]]], path: Path) -> None:
    """Write the accuracies: a dot for each seed, a bar for mean and standard error, the baseline as a line."""
    from matplotlib.figure import Figure

    names, privacies = list(outcomes), list(next(iter(outcomes.values())))
    figure = Figure(figsize=(10, 0.8 + 0.42 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(privacies), sharey=True, squeeze=False)[0]
    for axes, privacy in zip(panels, privacies, strict=True):
        for place, name in enumerate(names):
            values = [100 * one.accuracy for one in outcomes[name][privacy]]
            mean, error = mean_and_error(values)
            color = "C1" if METHODS[name].aggregation == "fedsvd" else "C0"
            axes.errorbar(mean, place, xerr=0.0 if math.isnan(error) else error, fmt="o", capsize=3, color=color)
            axes.plot(values, [place + 0.22] * len(values), "|", color=color, alpha=0.6)
            if name == BASELINE:
                axes.axvline(mean, color="0.6", linewidth=0.8, linestyle="--")
        axes.set(xlabel="accuracy on held-out rows, %", title=privacy)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def learning_rates(
    names: Sequence[str], privacies: dict[str, float | None], setup: Setup, seed: int
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Return the learning rate of every method and privacy, and what was tried for it."""
    rates: dict[str, dict[str, float]] = {}
    tried: dict[str, Any] = {}
    bar = tqdm(total=len(names) * len(privacies), desc="learning rates")
    for name in names:
        for privacy, epsilon in privacies.items():
            method = METHODS[name]
            best, scores = climb(
                lambda rate: run_federation(method, setup, seed, rate, epsilon, tuning=True).accuracy,  # noqa: B023
                _FIRST_RATES[method.optim],
            )
            rates.setdefault(name, {})[privacy] = best
            tried.setdefault(name, {})[privacy] = {f"{rate:.3g}": score for rate, score in scores.items()}
            bar.update()
    return rates, tried


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="reported, the same for all methods")
    parser.add_argument("--tuning_seed", type=int, default=99, help="for the learning rates; not reported")
    parser.add_argument("--epsilon", type=float, default=6.0, help="budget of every client in the private runs")
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD", help="by default all"
    )
    parser.add_argument("--rates_from", type=Path, help="a fedsvd.json whose learning rates are used; no tuning then")
    parser.add_argument("--rate", type=float, help="learning rate of all methods; no tuning then")
    parser.add_argument("--rounds", type=int, default=Setup.rounds, help="of every federation")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmark_results"), help="folder of the results")
    given = parser.parse_args(arguments)
    given.output_dir = output_folder(given.output_dir)
    if given.tuning_seed in given.seeds:
        raise UsageError(f"--tuning_seed {given.tuning_seed} is among --seeds: the rates would be chosen on a result.")
    if given.rate is not None and given.rates_from is not None:
        raise UsageError("--rate and --rates_from both say the learning rates; give one of them.")
    _be_quiet()
    setup = replace(Setup(), rounds=given.rounds)
    tried: dict[str, Any] = {}
    privacies = {NO_PRIVACY: None, f"epsilon {given.epsilon:g}": given.epsilon}
    if given.rate is not None:
        rates = {name: dict.fromkeys(privacies, given.rate) for name in given.methods}
    elif given.rates_from is None:
        rates, tried = learning_rates(given.methods, privacies, setup, given.tuning_seed)
    else:
        earlier = json.loads(given.rates_from.read_text(encoding="utf-8"))
        rates, tried = earlier["learning_rates"], earlier["tuning"]
        missing = [f"{name}, {one}" for name in given.methods for one in privacies if one not in rates.get(name, {})]
        if missing:
            raise UsageError(
                f"{given.rates_from} has no learning rate of: {'; '.join(missing)}. Leave it out to tune."
            )
    outcomes: dict[str, dict[str, list[Outcome]]] = {name: {one: [] for one in privacies} for name in given.methods}
    cells = [(seed, privacy, name) for seed in given.seeds for privacy in privacies for name in given.methods]
    for seed, privacy, name in tqdm(cells, desc="federations"):
        outcome = run_federation(METHODS[name], setup, seed, rates[name][privacy], privacies[privacy])
        outcomes[name][privacy].append(outcome)
    header, rows = table(outcomes, rates)
    print_table(f"{len(given.seeds)} paired seeds", header, rows)
    folder = given.output_dir
    results = {
        name: {privacy: [asdict(one) for one in runs] for privacy, runs in found.items()}
        for name, found in outcomes.items()
    }
    report = {
        "setup": asdict(setup), "delta": DELTA, "methods": {name: asdict(METHODS[name]) for name in given.methods},
        "learning_rates": rates, "tuning": tried, "tuning_seed": given.tuning_seed, "results": results,
    }  # fmt: skip
    write_json(folder / "fedsvd.json", {**circumstances(given.seeds), **json.loads(json.dumps(report))})
    (folder / "fedsvd.md").write_text(markdown(header, rows), encoding="utf-8")
    plot(outcomes, folder / "fedsvd.png")
    return 0


def _be_quiet() -> None:
    import datasets

    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # Every private client says that its seed is no secret; here that is the point: runs must be the same again.
    logging.getLogger("hfnoise").setLevel(logging.ERROR)


if __name__ == "__main__":
    raise SystemExit(main())
