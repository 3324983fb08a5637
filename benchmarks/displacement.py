"""Likelihood displacement: what CHES costs in the reference pass, and whether it says which pairs displace likelihood.

`python -m hfnoise.benchmarks.displacement` prints two tables and writes displacement.json and .md.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback

from hfnoise import NoiseDPOConfig, NoiseDPOTrainer, score_dataset
from hfnoise.benchmarks.reporting import circumstances, markdown, mean_and_error, print_table, write_json
from hfnoise.folders import output_folder
from hfnoise.worlds import docstrings

SCORES = ("ln_ches", "ches")
PARTS = ("lowest", "second", "middle", "fourth", "highest")
SHOWN = ("lowest", "middle", "highest")
_BATCH = docstrings.DEMO_RECIPE.per_device_train_batch_size


@dataclass(frozen=True)
class Displacement:
    """What DPO on a fifth of the pairs does to the log-probabilities of these pairs, means over pairs.

    Args:
        chosen: change of the log-probability of the chosen answer; below 0 is displacement.
        rejected: the same of the rejected answer.
        falling: share of the pairs whose chosen answer became less likely.
        tokens: of the chosen answer.
        score: mean score of the fifth.
    """

    chosen: float
    rejected: float
    falling: float
    tokens: float
    score: float


def settings(seed: int = 0) -> dict[str, Any]:
    """Return the settings of a run: the recipe of the world, with stock DPO."""
    recipe = docstrings.DEMO_RECIPE
    return {
        "output_dir": tempfile.gettempdir(), "use_cpu": True, "bf16": False, "activation_checkpointing": False,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "seed": seed,
        "beta": recipe.beta, "learning_rate": recipe.learning_rate, "num_train_epochs": recipe.num_train_epochs,
        "max_length": recipe.max_length, "per_device_train_batch_size": _BATCH, "per_device_eval_batch_size": _BATCH,
        "precompute_ref_log_probs": True,
    }  # fmt: skip


def reference_pass(pairs: int, rounds: int) -> dict[str, Any]:
    """Return processor seconds and forward passes of the reference pass with and without CHES, taken in turn."""
    dataset = docstrings.preference_pairs("train", pairs, seed=0)
    trainer = NoiseDPOTrainer(docstrings.model_path(), args=NoiseDPOConfig(**settings()), train_dataset=dataset)
    forwards: list[int] = []
    trainer.model.base_model.register_forward_hook(lambda *_: forwards.append(1))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    counts = {}
    for turn in range(rounds + 1):
        for with_ches in (turn % 2 == 0, turn % 2 == 1):
            forwards.clear()
            start = time.process_time()
            trainer.reference_columns(trainer.train_dataset, _BATCH, with_ches)
            if turn:  # the first pass allocates
                seconds[with_ches].append(time.process_time() - start)
            counts[with_ches] = len(forwards)
    ratios = [ours / stock for ours, stock in zip(seconds[True], seconds[False], strict=True)]
    return {
        "pairs": pairs, "rounds": rounds, "forwards_without": counts[False], "forwards_with": counts[True],
        "seconds_without": statistics.median(seconds[False]), "seconds_with": statistics.median(seconds[True]),
        "ratio": statistics.median(ratios), "ratios": ratios,
    }  # fmt: skip


def displacement(dataset: Any, score: str, seed: int) -> Displacement:
    """Train DPO on the pairs and return what happened to them."""
    trainer = NoiseDPOTrainer(docstrings.model_path(), args=NoiseDPOConfig(**settings(seed)), train_dataset=dataset)
    trainer.remove_callback(PrinterCallback)  # with its bar disabled, the Trainer prints every log entry instead
    before = trainer.train_dataset
    trainer.train()
    # The trained model taken as a reference gives its log-probabilities.
    after = score_dataset(
        trainer.model, dataset, trainer.processing_class, batch_size=_BATCH, max_length=docstrings.MAX_TOKENS,
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    change = {
        name: torch.tensor(after[f"ref_{name}_logps"][:]) - torch.tensor(before[f"ref_{name}_logps"][:])
        for name in ("chosen", "rejected")
    }
    return Displacement(
        chosen=change["chosen"].mean().item(),
        rejected=change["rejected"].mean().item(),
        falling=(change["chosen"] < 0).double().mean().item(),
        tokens=statistics.fmean(map(len, before["chosen_ids"])),
        score=statistics.fmean(dataset[score]),
    )


def run(pairs: int, seeds: int) -> dict[str, dict[str, list[Displacement]]]:
    """Return the displacement for every score and fifth, one per seed, and for random pairs."""
    found: dict[str, dict[str, list[Displacement]]] = {score: {part: [] for part in SHOWN} for score in SCORES}
    found["random"] = {"any": []}
    with tqdm(total=seeds * (len(SCORES) * len(SHOWN) + 1), desc="DPO on fifths") as bar:
        for seed in range(seeds):
            scored = score_dataset(
                docstrings.model_path(), docstrings.preference_pairs("train", pairs, seed), batch_size=_BATCH,
                max_length=docstrings.MAX_TOKENS, use_cpu=True, disable_tqdm=True,
            )  # fmt: skip
            fifth = pairs // len(PARTS)
            for score in SCORES:
                values = scored[score][:]
                order = sorted(range(pairs), key=values.__getitem__)
                for part in SHOWN:
                    start = PARTS.index(part) * fifth
                    chosen = scored.select(sorted(order[start : start + fifth]))
                    found[score][part].append(displacement(chosen, score, seed))
                    bar.update()
            found["random"]["any"].append(displacement(scored.select(range(fifth)), "ln_ches", seed))
            bar.update()
    return found


def _table(found: dict[str, dict[str, list[Displacement]]]) -> tuple[list[str], list[list[str]]]:
    header = [
        "pairs by",
        "fifth",
        "mean score",
        "chosen log-prob",
        "rejected log-prob",
        "chosen fell",
        "chosen tokens",
    ]
    rows = []
    for score, by_part in found.items():
        for part, runs in by_part.items():
            columns = {name: mean_and_error([getattr(run, name) for run in runs]) for name in asdict(runs[0])}
            rows.append(
                [
                    score,
                    part,
                    f"{columns['score'][0]:.4g}",
                    _signed(columns["chosen"]),
                    _signed(columns["rejected"]),
                    f"{columns['falling'][0]:.0%}",
                    f"{columns['tokens'][0]:.1f}",
                ]
            )
    return header, rows


def _signed(value: tuple[float, float]) -> str:
    mean, error = value
    return f"{mean:+.2f}" if math.isnan(error) else f"{mean:+.2f} ± {error:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line."""
    parser = argparse.ArgumentParser(prog="python -m hfnoise.benchmarks.displacement", description=__doc__)
    parser.add_argument("--pairs", type=int, default=750, help="pairs that are scored; a run trains on a fifth")
    parser.add_argument("--seeds", type=int, default=2, help="runs for every fifth")
    parser.add_argument("--rounds", type=int, default=8, help="timed reference passes")
    parser.add_argument("--output_dir", default="benchmark_results", help="folder of the results")
    given = parser.parse_args(arguments)
    folder = output_folder(given.output_dir)
    torch.set_num_threads(1)  # these models are small, and two threads on busy cores wait for each other
    logging.getLogger("hfnoise").setLevel(logging.WARNING)
    cost = reference_pass(256, given.rounds)
    header = ["reference pass", "forward passes", "processor seconds"]
    rows = [
        [name, str(cost[f"forwards_{key}"]), f"{cost[f'seconds_{key}']:.2f}"]
        for name, key in (("log-probabilities", "without"), ("log-probabilities and CHES", "with"))
    ]
    print_table(f"{cost['pairs']} pairs; ratio {cost['ratio']:.3f}, median of {given.rounds}", header, rows)
    found = run(given.pairs, given.seeds)
    body = _table(found)
    title = f"change of log-probabilities by DPO on a fifth of {given.pairs} pairs, mean ± s.e. of {given.seeds} seeds"
    print_table(title, *body)
    results = {
        "reference_pass": cost,
        "displacement": {
            score: {part: [asdict(run) for run in runs] for part, runs in by_part.items()}
            for score, by_part in found.items()
        },
    }
    write_json(folder / "displacement.json", {**circumstances(range(given.seeds)), "results": results})
    ratio = f"Processor time with CHES / without: {cost['ratio']:.3f}, median of {given.rounds} passes taken in turn."
    text = f"{markdown(header, rows)}\n{ratio}\n\n{title}\n\n{markdown(*body)}"
    (folder / "displacement.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
