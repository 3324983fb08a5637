"""What a loss costs: step time and peak memory of every loss against TRL's `sigmoid`, measured in one run."""

from __future__ import annotations

import statistics
import tempfile
import time
from itertools import cycle
from typing import Any

from torch.distributed._tools.mem_tracker import MemTracker

from hfnoise.worlds import docstrings

LOSSES = ("sigmoid", "robust", "cdpo", "forward_corrected", "sym", "ropo", "holder")


def build(loss: str | None) -> Any:
    """Return a trainer ready to step: TRL's own for `None`, else ours with that loss."""
    from trl import DPOConfig, DPOTrainer

    from hfnoise import NoiseDPOConfig, NoiseDPOTrainer

    recipe = docstrings.DEMO_RECIPE
    arguments = {
        "output_dir": tempfile.gettempdir(), "beta": recipe.beta, "max_length": recipe.max_length, "report_to": "none",
        "per_device_train_batch_size": recipe.per_device_train_batch_size, "bf16": False, "use_cpu": True,
        "activation_checkpointing": False, "precompute_ref_log_probs": True, "disable_tqdm": True,
    }  # fmt: skip
    pairs = docstrings.preference_pairs("train", 256, seed=0)
    if loss is None:
        trainer = DPOTrainer(docstrings.model_path(), args=DPOConfig(**arguments), train_dataset=pairs)
    else:
        rate = {"flip_rate": 0.2} if loss in ("robust", "cdpo", "forward_corrected") else {}
        config = NoiseDPOConfig(**arguments, loss_type=loss, **rate)
        trainer = NoiseDPOTrainer(docstrings.model_path(), args=config, train_dataset=pairs)
    trainer.create_optimizer()
    # What `train` sets before the first step.
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def time_steps(steps: int) -> dict[str, float]:
    """Return the median, over the steps, of the time of a step with each loss divided by that of the stock step.

    The trainers take turns on the same batch, so that a change of the machine's speed hits all of them alike.
    """
    trainers = {"TRL sigmoid": build(None), **{loss: build(loss) for loss in LOSSES}}
    streams = {name: cycle(list(trainer.get_train_dataloader())) for name, trainer in trainers.items()}
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for step in range(steps + 2):
        for name, trainer in trainers.items():
            seconds = _step(trainer, next(streams[name]))
            if step >= 2:  # the first steps allocate
                times[name].append(seconds)
    stock = times["TRL sigmoid"]
    return {
        name: statistics.median(own / base for own, base in zip(seconds, stock, strict=True))
        for name, seconds in times.items()
    }


def _step(trainer: Any, batch: dict[str, Any]) -> float:
    start = time.perf_counter()
    trainer.training_step(trainer.model, dict(batch))
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return time.perf_counter() - start


def peak_memories() -> dict[str, float]:
    """Return, for every loss, the peak of all tensors during a step in MB, weights and moments included."""
    return {name or "TRL sigmoid": _peak_memory(build(name)) for name in (None, *LOSSES)}


def _peak_memory(trainer: Any) -> float:
    batches = cycle(list(trainer.get_train_dataloader()))
    _step(trainer, next(batches))  # the optimizer makes its moments
    tracker = MemTracker()
    tracker.track_external(trainer.model, trainer.optimizer)
    with tracker:
        _step(trainer, next(batches))
    (device,) = tracker.get_tracker_snapshot("peak").values()
    return float(device["Total"]) / 2**20
