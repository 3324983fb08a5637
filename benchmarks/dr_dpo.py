"""Dr. DPO over the global batch: does the gradient depend on how the batch is split, and what flips weigh in it.

`python -m hfnoise.benchmarks.dr_dpo` prints two tables and writes dr_dpo.json and dr_dpo.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

from hfnoise.benchmarks.reporting import circumstances, markdown, print_table, write_json
from hfnoise.preference import dr_dpo_weights, pair_loss
from hfnoise.worlds import docstrings

PAIRS = 16
# Processes x pairs per process and micro-batch x micro-batches.
SPLITS = ("1x16x1", "1x8x2", "1x4x4", "1x2x8", "1x1x16", "2x8x1", "2x4x2", "2x2x4", "2x1x8")
DR_BETAS = (0.2, 1.0)
_PLAIN = 1e6  # a dr_beta at which Dr. DPO is DPO
# The policy has left the reference by this share of the spread of each weight tensor, so that losses differ.
_DEPARTURE = 0.03
# Simulated margins of a trained policy, of which 30 % have their label flipped: h ~ N(2, 1.5^2).
_MARGIN_MEAN, _MARGIN_SPREAD, _FLIPS, _SIMULATED = 2.0, 1.5, 0.3, 2**16


class KeepGradient(TrainerCallback):
    """Keeps the gradient that the optimizer is about to be given."""

    gradient: Tensor

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()


def gradient_of(size: int, accumulation: int, dr_beta: float, scope: str) -> Tensor:
    """Return the gradient of one optimizer step on 16 pairs, split as said."""
    from hfnoise import DrDPOConfig, DrDPOTrainer

    reference = AutoModelForCausalLM.from_pretrained(docstrings.model_path())
    policy = AutoModelForCausalLM.from_pretrained(docstrings.model_path())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += _DEPARTURE * parameter.std() * torch.randn(parameter.shape, generator=generator)
    keeper = KeepGradient()
    args = DrDPOConfig(
        tempfile.mkdtemp(), use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none", max_steps=1,
        per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_grad_norm=0.0, beta=2.0,
        dr_beta=dr_beta, dr_scope=scope, max_length=96, save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = DrDPOTrainer(
        policy, reference, args=args, train_dataset=docstrings.preference_pairs("train", PAIRS, seed=0),
        processing_class=AutoTokenizer.from_pretrained(docstrings.model_path()), callbacks=[keeper],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return keeper.gradient


def _in_processes(size: int, accumulation: int, dr_beta: float, scope: str, file: str) -> None:
    from accelerate import PartialState

    torch.set_num_threads(1)
    gradient = gradient_of(size, accumulation, dr_beta, scope)
    assert PartialState().num_processes == 2
    if PartialState().is_main_process:
        torch.save(gradient, file)


def _gradient(processes: int, size: int, accumulation: int, dr_beta: float, scope: str) -> Tensor:
    from accelerate import debug_launcher
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    if processes == 1:
        return gradient_of(size, accumulation, dr_beta, scope)
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        debug_launcher(_in_processes, (size, accumulation, dr_beta, scope, file.name), num_processes=processes)
        gradient: Tensor = torch.load(file.name, weights_only=True)
    return gradient


def split_errors(splits: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return, for each split and setting, the relative distance to the gradient of all pairs at once.

    Plain DPO shows what the order of sums and the padding do to float32 without any weights.

    Args:
        splits (`Sequence[str]`): of `SPLITS`.
    """
    errors: dict[str, dict[str, float]] = {}
    # One micro-batch that holds all pairs is the definition.
    whole = {dr_beta: _gradient(1, PAIRS, 1, dr_beta, "micro_batch") for dr_beta in (*DR_BETAS, _PLAIN)}
    for name in tqdm(splits, desc="splits"):
        processes, size, accumulation = (int(number) for number in name.split("x"))
        split = partial(_gradient, processes, size, accumulation)
        row = errors.setdefault(f"{processes} x {size} x {accumulation}", {})
        plain = split(_PLAIN, "global")
        row["DPO"] = _distance(plain, whole[_PLAIN])
        for dr_beta in DR_BETAS:
            row[f"ours, dr_beta {dr_beta:g}"] = _distance(split(dr_beta, "global"), whole[dr_beta])
            # The official code does not refuse single pairs: with them it is plain DPO.
            official = plain if size == 1 else split(dr_beta, "micro_batch")
            row[f"official, dr_beta {dr_beta:g}"] = _distance(official, whole[dr_beta])
    return errors


def _distance(found: Tensor, whole: Tensor) -> float:
    return ((found - whole).norm() / whole.norm()).item()


def flipped_mass(dr_beta: float, pairs: int) -> float:
    """Return the share of the gradient mass on flipped pairs with `pairs` weighed at a time; 0 means plain DPO."""
    generator = torch.Generator().manual_seed(0)
    clean = _MARGIN_MEAN + _MARGIN_SPREAD * torch.randn(_SIMULATED, generator=generator, dtype=torch.float64)
    flipped = torch.rand(_SIMULATED, generator=generator) < _FLIPS
    margins = torch.where(flipped, -clean, clean)
    slope = torch.sigmoid(-margins)
    if pairs:
        losses = pair_loss("sigmoid", margins).split(pairs)
        slope = slope * torch.cat([dr_dpo_weights(part, dr_beta) for part in losses])
    return (slope[flipped].sum() / slope.sum()).item()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS, metavar="SPLIT", help="by default all")
    parser.add_argument("--output_dir", default="benchmark_results", help="folder of the results")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a process forked after OpenMP started its pool would hang
    errors = split_errors(given.splits)
    columns = list(next(iter(errors.values())))
    header = ["processes x pairs x micro-batches", *columns]
    rows = [[split, *(f"{row[name]:.1e}" for name in columns)] for split, row in errors.items()]
    print_table("relative distance to the gradient of all 16 pairs at once", header, rows)
    mass = {
        f"{beta:g}": {str(n): flipped_mass(beta, n) for n in (0, 1, 2, 4, 8, 64, _SIMULATED)} for beta in (1.0, 0.5)
    }
    names = {"0": "DPO", "1": "1 (DPO)", str(_SIMULATED): "all"}
    mass_header = ["dr_beta", *(names.get(n, n) for n in mass["1"])]
    mass_rows = [[beta, *(f"{value:.3f}" for value in row.values())] for beta, row in mass.items()]
    print_table("share of the gradient mass on flipped pairs, by pairs weighed at a time", mass_header, mass_rows)
    folder = Path(given.output_dir)
    results = {"split_errors": errors, "flipped_mass": mass}
    write_json(folder / "dr_dpo.json", {**circumstances([0]), "results": json.loads(json.dumps(results))})
    tables = [markdown(header, rows), markdown(mass_header, mass_rows)]
    (folder / "dr_dpo.md").write_text("\n".join(tables), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
