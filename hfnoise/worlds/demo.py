"""`hfnoise demo`: preference learning with a third of the labels flipped, on real text, in minutes and offline."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import TrainerCallback

from hfnoise.command_options import UsageParser
from hfnoise.errors import UsageError
from hfnoise.folders import output_folder
from hfnoise.worlds import docstrings
from hfnoise.worlds.docstrings_run import RunResult, run_trainer

SHOWN = ("DPO", "TRL robust, true rate", "Dr. DPO, rate unknown", "RobustDPO, rate unknown")
PROMPT = "Return a new list containing"


class StepBar(TrainerCallback):
    """Moves one bar through the steps of all runs."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.bar.update()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo from a command line: train, print the table, write demo.png, save and reload the best of ours.

    Raises:
        UsageError: for options out of range, or a folder that cannot be written; before anything is trained.
    """
    parser = UsageParser(prog="hfnoise demo", description=__doc__)
    parser.add_argument("--flip_rate", type=float, default=docstrings.DEMO_RECIPE.flip_rate, help="share of flips")
    parser.add_argument("--seed", type=int, default=0, help="seed of pairs, flips and runs")
    parser.add_argument("--output_dir", default="demo_output", help="folder for table, plot and model")
    given = parser.parse_args(arguments)
    if not 0 < given.flip_rate < 0.5:
        raise UsageError(f"--flip_rate must be above 0 and below 0.5, got {given.flip_rate}.")
    folder = output_folder(given.output_dir)
    _be_quiet()
    start = time.perf_counter()
    results: dict[str, dict[float, RunResult]] = {name: {} for name in SHOWN}
    # With clean labels TRL's robust loss is DPO itself, the same numbers: it is not run twice.
    cells = [(name, rate) for rate in (0.0, given.flip_rate) for name in SHOWN if rate or name != SHOWN[1]]
    recipe = docstrings.DEMO_RECIPE
    steps = math.ceil(recipe.train_size / recipe.per_device_train_batch_size) * recipe.num_train_epochs
    with tqdm(total=steps * len(cells), unit="step") as bar:
        for name, rate in cells:
            bar.set_description(f"{name}, {rate:.0%} flipped")
            results[name][rate] = run_trainer(
                name, rate, given.seed, str(folder / "model"), [StepBar(bar)], disable_tqdm=True, logging_strategy="no"
            )
    results[SHOWN[1]][0.0] = results[SHOWN[0]][0.0]
    _report(results, given.flip_rate, folder, time.perf_counter() - start)
    return 0


def _be_quiet() -> None:
    """Leave the terminal to the demo's own bar and table."""
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging as transformers_logging

    disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("hfnoise").setLevel(logging.WARNING)


def _report(results: dict[str, dict[float, RunResult]], flip_rate: float, folder: Path, seconds: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = Table(
        "method", "clean labels", f"{flip_rate:.0%} flipped", "lost", title="accuracy on clean held-out pairs"
    )
    for name, by_rate in results.items():
        clean, noisy = by_rate[0.0].accuracy, by_rate[flip_rate].accuracy
        table.add_row(name, f"{clean:.1%}", f"{noisy:.1%}", f"{100 * (clean - noisy):.1f} points")
    console = Console()
    console.print(table)
    best = results[SHOWN[-1]][flip_rate]
    console.print(_estimate_line(best, flip_rate))
    accuracies = {
        name: {str(rate): run.accuracy for rate, run in by_rate.items()} for name, by_rate in results.items()
    }
    (folder / "demo.json").write_text(json.dumps(accuracies, indent=1) + "\n", encoding="utf-8")
    _plot(results, flip_rate, folder / "demo.png")
    best.trainer.save_model(str(folder / "model"))
    best.trainer.create_model_card(model_name="docstrings-robust-dpo")
    console.print(f"model and card saved to {folder / 'model'}; reloaded with from_pretrained, it continues")
    console.print(f"  {PROMPT!r}\n  {answer(str(folder / 'model'), PROMPT)!r}", markup=False)
    console.print(f"plot: {folder / 'demo.png'}; one seed, {seconds / 60:.1f} minutes; `hfnoise bench` has the spread")


def _estimate_line(run: RunResult, flip_rate: float) -> str:
    estimate = run.estimate
    if estimate.refused:
        return f"flip rate: not estimated ({estimate.reason})"
    low, high = estimate.interval
    return (
        f"flip rate, estimated without being told: {estimate.flip_rate:.3f} (95 % interval {low:.3f} to {high:.3f}); "
        f"injected: {flip_rate:.3f}"
    )


def _plot(results: dict[str, dict[float, RunResult]], flip_rate: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4), layout="constrained")
    axes = figure.subplots()
    for number, (rate, colour) in enumerate(((0.0, "#bbccee"), (flip_rate, "#4477aa"))):
        heights = [100 * by_rate[rate].accuracy for by_rate in results.values()]
        places = [place + 0.4 * (number - 0.5) for place in range(len(results))]
        bars = axes.bar(places, heights, width=0.38, color=colour, label=f"{rate:.0%} of labels flipped")
        axes.bar_label(bars, fmt="%.1f", fontsize=9)
    axes.axhline(50, color="black", linewidth=0.8, linestyle=":")
    axes.text(1.01, 50, "coin\nflip", va="center", fontsize=9, transform=axes.get_yaxis_transform())
    axes.set(
        ylim=(40, 100), ylabel="accuracy on clean held-out pairs, %\n(the axis starts at 40)",
        xticks=range(len(results)),
        title=f"What {flip_rate:.0%} of flipped preference labels cost, by method",
    )  # fmt: skip
    axes.set_xticklabels(results)
    axes.legend(frameon=False, ncols=2, loc="upper center")
    figure.savefig(path, dpi=120)


def answer(folder: str, prompt: str) -> str:
    """Return what the saved model continues a prompt with, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False, max_new_tokens=32
        )
    return str(tokenizer.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))
