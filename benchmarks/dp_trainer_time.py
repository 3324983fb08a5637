"""A whole step of `DPSFTTrainer` against one of `trl.SFTTrainer`: draws, clipping, noise, ledger and optimizer too.

Both train the docstrings model with LoRA on the same code with the same micro-batches, AdamW, one thread. The time of
a step is the difference between a long and a short run, so that building Trainers, calibration and the checks before
the first step do not count; process time, because other work may be on the machine. A private batch is a Poisson
draw, whose last micro-batch is filled up: that waste is in the ratio.

    python -m hfnoise.benchmarks.dp_trainer_time --output_dir docs/results
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from hfnoise import DPConfig, DPSFTTrainer
from hfnoise.benchmarks import reporting
from hfnoise.worlds.code import code_texts
from hfnoise.worlds.docstrings import model_path

_MICRO_BATCH = 32
_KINDS: dict[str, dict[str, Any] | None] = {
    "trl.SFTTrainer": None,
    "DPSFTTrainer": {},
    "DPSFTTrainer, one unit at a time": {"grad_mode": "loop"},
}


def _train(kind: str, steps: int, max_length: int, batch: int, size: int) -> float:
    """Return the process time of `train()` in seconds."""
    private = _KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder, use_cpu=True, bf16=False, activation_checkpointing=False, max_steps=steps, report_to="none",
            per_device_train_batch_size=_MICRO_BATCH, gradient_accumulation_steps=batch // _MICRO_BATCH,
            learning_rate=1e-3, max_length=max_length, save_strategy="no", logging_steps=1000, disable_tqdm=True,
        )  # fmt: skip
        adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        rows = code_texts("train", size=size).select_columns("text")
        more = {"args": arguments, "train_dataset": rows, "peft_config": adapter}
        trainer: Any
        if private is None:
            trainer = SFTTrainer(model_path(), **more)
        else:
            config = DPConfig(noise_multiplier=1.0, clip_norm=0.1, unsafe_seed=0, **private)
            trainer = DPSFTTrainer(model_path(), dp_config=config, **more)
        started = time.process_time()
        trainer.train()
        return time.process_time() - started


def measure(kind: str, steps: tuple[int, int], repeats: int, max_length: int, batch: int, size: int) -> list[float]:
    """Return the seconds of a step, once for each repeat.

    Args:
        kind (`str`): one of the table's rows.
        steps (`tuple[int, int]`): of the short and of the long run.
        repeats (`int`): pairs of runs.
        max_length (`int`): tokens of a row at most.
        batch (`int`): rows of a step, on average where they are drawn.
        size (`int`): rows to draw from.
    """
    run = partial(_train, kind, max_length=max_length, batch=batch, size=size)
    short, long = steps
    run(1)  # imports, and what is computed once for a process
    return [(run(long) - run(short)) / (long - short) for _ in range(repeats)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="benchmark_results", help="folder of the results")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of a short and a long run")
    parser.add_argument("--steps", type=int, nargs=2, default=(2, 6), help="of the short and the long run")
    parser.add_argument("--max_length", type=int, default=64, help="tokens of a row at most")
    parser.add_argument("--batch", type=int, default=256, help=f"rows of a step, a multiple of {_MICRO_BATCH}")
    parser.add_argument("--rows", type=int, default=6000, help="of the training data")
    parser.add_argument("--kinds", nargs="*", default=list(_KINDS), choices=list(_KINDS), help="rows of the table")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("hfnoise").setLevel(logging.ERROR)
    if given.batch % _MICRO_BATCH:
        parser.error(f"--batch {given.batch} is no multiple of {_MICRO_BATCH}, the rows of a micro-batch.")
    shared = (tuple(given.steps), given.repeats, given.max_length, given.batch, given.rows)
    times = {kind: measure(kind, *shared) for kind in given.kinds}
    stock = statistics.median(times[given.kinds[0]])
    header = ["", "seconds of a step", f"by {given.kinds[0]}", "spread"]
    rows = [
        [
            kind,
            f"{statistics.median(found):.2f}",
            f"{statistics.median(found) / stock:.3f}",
            f"{min(found) / stock:.3f} to {max(found) / stock:.3f}",
        ]
        for kind, found in times.items()
    ]
    reporting.print_table(f"{given.batch} rows in a step, LoRA on all linear layers, one thread", header, rows)
    folder = Path(given.output_dir)
    content = {"seconds": times, "batch": given.batch, "micro_batch": _MICRO_BATCH, "max_length": given.max_length}
    reporting.write_json(folder / "dp_trainer_time.json", {**reporting.circumstances([0]), **content})
    (folder / "dp_trainer_time.md").write_text(reporting.markdown(header, rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
