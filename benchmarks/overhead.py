"""What a loss costs: step time and peak memory of every loss against TRL's `sigmoid`, measured in one run."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed._tools.mem_tracker import MemTracker

from hfnoise.worlds import docstrings

STOCK = "TRL sigmoid"
_WARM_UP = 3  # the first steps allocate
LOSSES = ("sigmoid", "robust", "cdpo", "forward_corrected", "sym", "ropo", "holder", "dr_sigmoid")


def build(loss: str | None) -> Any:
    """Return a trainer ready to step: TRL's own for `None`, else ours with that loss."""
    from trl import DPOConfig, DPOTrainer

    from hfnoise import DrDPOConfig, DrDPOTrainer, NoiseDPOConfig, NoiseDPOTrainer

    recipe = docstrings.DEMO_RECIPE
    arguments = {
        "output_dir": tempfile.gettempdir(), "beta": recipe.beta, "max_length": recipe.max_length, "report_to": "none",
        "per_device_train_batch_size": recipe.per_device_train_batch_size, "bf16": False, "use_cpu": True,
        "activation_checkpointing": False, "precompute_ref_log_probs": True, "disable_tqdm": True,
    }  # fmt: skip
    pairs = docstrings.preference_pairs("train", 256, seed=0)
    if loss is None:
        trainer = DPOTrainer(docstrings.model_path(), args=DPOConfig(**arguments), train_dataset=pairs)
    elif loss.startswith("dr_"):
        trainer = DrDPOTrainer(docstrings.model_path(), args=DrDPOConfig(**arguments), train_dataset=pairs)
    else:
        rate = {"flip_rate": 0.2} if loss in ("robust", "cdpo", "forward_corrected") else {}
        config = NoiseDPOConfig(**arguments, loss_type=loss, **rate)
        trainer = NoiseDPOTrainer(docstrings.model_path(), args=config, train_dataset=pairs)
    trainer.create_optimizer()
    # What `train` sets before the first step.
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@dataclass(frozen=True)
class Cost:
    """What a loss costs.

    Args:
        step_time (`float`): median of step time / step time of the stock trainer on the same batch.
        own_share (`float`): median share of the step spent in our code around TRL's.
        peak_memory (`float`): of all tensors during a step, MB.
    """

    step_time: float
    own_share: float
    peak_memory: float


def measure(steps: int, losses: Sequence[str]) -> dict[str, Cost]:
    """Return the cost of the losses.

    The trainers take turns on the same batches, in an order that rotates, so that changes of the machine's speed hit
    all of them alike. A second stock trainer shows the resolution; where it is coarser than the cost, the share of the
    step that passes in our code is the sharper figure.

    Args:
        steps (`int`): that are timed.
        losses (`Sequence[str]`): of `LOSSES`.
    """
    trainers = {STOCK: build(None), f"{STOCK}, again": build(None), **{loss: build(loss) for loss in losses}}
    names = list(trainers)
    batches: dict[str, list[Any]] = {}
    for name, trainer in trainers.items():
        torch.manual_seed(0)  # the order of the pairs, hence the lengths of the batches
        batches[name] = list(trainer.get_train_dataloader())
    times: dict[str, list[float]] = {name: [] for name in names}
    for step in range(_WARM_UP + steps):
        for turn in range(len(names)):
            name = names[(step + turn) % len(names)]
            seconds = _step(trainers[name], batches[name][step % len(batches[name])])
            if step >= _WARM_UP:
                times[name].append(seconds)
    return {
        name: Cost(
            statistics.median(own / base for own, base in zip(times[name], times[STOCK], strict=True)),
            _own_share(trainers[name], batches[name]),
            _peak_memory(trainers[name], batches[name][0]),
        )
        for name in names
    }


def _own_share(trainer: Any, batches: list[Any]) -> float:
    """Return the median share of the step that passes in our `training_step` and `compute_loss` outside TRL's."""
    from trl import DPOTrainer

    seconds: dict[str, float] = {}

    def timed(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            seconds[name] = time.perf_counter() - start
            return result

        return call

    names = ("training_step", "compute_loss")
    shares = []
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(DPOTrainer, name, timed(f"TRL {name}", getattr(DPOTrainer, name))))
        for name in names:
            stack.enter_context(patch.object(trainer, name, timed(f"own {name}", getattr(trainer, name))))
        for batch in batches:
            step = _step(trainer, batch)
            shares.append(sum(seconds[f"own {name}"] - seconds[f"TRL {name}"] for name in names) / step)
    return statistics.median(shares)


def _peak_memory(trainer: Any, batch: dict[str, Any]) -> float:
    """Return the peak of all tensors during a step in MB, weights and moments included."""
    tracker = MemTracker()
    tracker.track_external(trainer.model, trainer.optimizer)
    with tracker:
        _step(trainer, batch)
    (device,) = tracker.get_tracker_snapshot("peak").values()
    return float(device["Total"]) / 2**20


def _step(trainer: Any, batch: dict[str, Any]) -> float:
    start = time.perf_counter()
    if hasattr(trainer, "dr_mechanism"):  # what the loop of the Trainer calls before the micro-batches of a step
        trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    trainer.training_step(trainer.model, dict(batch))
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return time.perf_counter() - start
