"""What "works" means in the matrix: one check per kind, on runs of a few steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from tests.combinations.trainer_rows import IMAGES, PRIVATE, ROWS, Options

# The bias of a softmax over all places shifts nothing: its gradient is 0.
RESTING = ("pooler.attention.bias",)


@dataclass
class Run:
    """What a run leaves: losses by step, trained weights, and what was (not) trained."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    moved: set[str]
    frozen_moved: set[str]
    progress: tuple[float, float]


def build(row: str, path: str, folder: Path, options: Options) -> Any:
    """Return the Trainer of a cell."""
    torch.manual_seed(0)  # adapters begin at random
    return ROWS[row](path, folder, options)


def evaluated(row: str, trainer: Any) -> float:
    """Return a loss at which two moments of a run can be compared, where the training loss is not it."""
    if row == "FedSVD":
        return float(trainer.evaluate(log=False)["eval_loss"])
    return float(trainer.evaluate(trainer.train_dataset)["eval_loss"])


def trained(row: str, path: str, folder: Path, options: Options, resume: Any = None) -> Run:
    """Return what a run of a cell leaves."""
    trainer = build(row, path, folder, options)
    before = {name: one.detach().clone() for name, one in trainer.model.named_parameters()}
    measured = (row == "FedSVD" or row in IMAGES) and not options.stream
    start = evaluated(row, trainer) if measured else 0.0
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    end = evaluated(row, trainer) if measured else 0.0
    if row == "FedSVD":
        losses = [start, end]
    if not measured:
        half = len(losses) // 2
        start, end = sum(losses[:half]), sum(losses[-half:])
    after = dict(trainer.model.named_parameters())
    own = {name for name, one in after.items() if one.requires_grad}
    changed = {name for name in after if not torch.equal(after[name].detach(), before[name])}
    if row == "FedSVD":  # the server sets the frozen factors A: that is the method
        changed -= {name for name in changed if ".lora_A." in name}
    weights = {name: one.detach().float().clone() for name, one in after.items() if name in own}
    return Run(losses, weights, own & changed, changed - own, (start, end))


@cache
def plain(row: str, path: str, key: str, options: Any) -> Run:
    """Return the run that a cell is compared with; made once."""
    with TemporaryDirectory() as folder:
        return trained(row, path, Path(folder), options.value)


class Held:
    """Options as a key of a cache."""

    def __init__(self, value: Options) -> None:
        self.value, self.key = value, repr(value)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and self.key == other.key


def plain_run(row: str, path: str, options: Options) -> Run:
    """Return the run that a cell is compared with."""
    held = Held(options)
    return plain(row, path, held.key, held)


def check_same(row: str, path: str, folder: Path, variant: Options, base: Options, tolerance: float) -> None:
    """Losses of every step and trained weights are those without the setting."""
    assert_same(trained(row, path, folder, variant), plain_run(row, path, base), tolerance, row not in PRIVATE)


def assert_same(found: Run, expected: Run, tolerance: float, with_losses: bool) -> None:
    """Compare two runs; private losses are means over micro-batches, which are no part of the method."""
    assert len(found.losses) == len(expected.losses) >= 2
    if with_losses:
        assert found.losses == pytest.approx(expected.losses, rel=tolerance, abs=tolerance)
    assert found.weights.keys() == expected.weights.keys() and expected.moved
    for name, value in expected.weights.items():
        torch.testing.assert_close(found.weights[name], value, rtol=tolerance, atol=tolerance, msg=lambda m: m)


def check_learns(row: str, path: str, folder: Path, variant: Options, base: Options, tolerance: float) -> None:
    """The loss falls, every trained parameter moves, and no other."""
    run = trained(row, path, folder, variant)
    start, end = run.progress
    assert all(map(torch.isfinite, map(torch.tensor, run.losses))) and end < start, (start, end, run.losses)
    assert {name for name in run.weights if name not in run.moved and not name.endswith(RESTING)} == set()
    assert run.frozen_moved == set()


def check_has_effect(row: str, path: str, folder: Path, variant: Options, base: Options, tolerance: float) -> None:
    """The setting reaches the losses: they are finite and not those without it."""
    found, expected = trained(row, path, folder, variant), plain_run(row, path, base)
    assert all(map(torch.isfinite, map(torch.tensor, found.losses))) and len(found.losses) == len(expected.losses)
    assert max(abs(one - two) for one, two in zip(found.losses, expected.losses, strict=True)) > 1e-4


def check_close(row: str, path: str, folder: Path, variant: Options, base: Options, tolerance: float) -> None:
    """Losses within `tolerance`, and not equal; trained weights are float32."""
    found, expected = trained(row, path, folder, variant), plain_run(row, path, base)
    assert found.losses == pytest.approx(expected.losses, rel=tolerance) and found.losses != expected.losses
    with TemporaryDirectory() as other:
        model = build(row, path, Path(other), variant).model
    assert {one.dtype for one in model.parameters() if one.requires_grad} == {torch.float32}


def check_units(row: str, path: str, folder: Path, variant: Options, base: Options, tolerance: float) -> None:
    """Private: the gradients of units from one backward pass train as those of one unit at a time do."""
    assert row in PRIVATE
    leaf = trained(row, path, folder / "leaf", variant)
    more = {**variant.more, "dp": {**variant.more.get("dp", {}), "grad_mode": "loop"}}
    one = Options(variant.settings, variant.adapter, variant.base, variant.stream, more)
    loop = trained(row, path, folder / "loop", one)
    assert leaf.moved == set(leaf.weights) and leaf.frozen_moved == set()
    for name, value in loop.weights.items():
        torch.testing.assert_close(leaf.weights[name], value, rtol=tolerance, atol=tolerance)


def check_resumed(row: str, path: str, folder: Path, variant: Options, base: Options, tolerance: float) -> None:
    """A run that goes on from its first checkpoint ends with the same weights, to the bit."""
    if row == "FedSVD":
        _check_federation_resumed(path, folder, variant)
        return
    whole = trained(row, path, folder, variant)
    resumed = trained(row, path, folder, variant, resume=str(folder / "checkpoint-2"))
    assert resumed.losses == whole.losses  # those before the checkpoint are in it
    assert all(torch.equal(resumed.weights[name], value) for name, value in whole.weights.items())


def _check_federation_resumed(path: str, folder: Path, variant: Options) -> None:
    whole = trained("FedSVD", path, folder / "whole", variant)
    stopped = build("FedSVD", path, folder / "parts", variant)
    log = stopped._log_round

    def stop(record: Any) -> None:
        log(record)
        raise KeyboardInterrupt

    stopped._log_round = stop
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = build("FedSVD", path, folder / "parts", variant)
    resumed.train(resume_from_checkpoint=True)
    found = {name: one for name, one in resumed.model.named_parameters() if one.requires_grad}
    assert all(torch.equal(found[name], value) for name, value in whole.weights.items())


def check_processes(row: str, path: str, folder: Path, variant: Options, base: Options, tolerance: float) -> None:
    """Two processes with half of the batch each are one process."""
    from tests.conftest import run_processes

    run_processes(_in_both, row, path, folder, variant, plain_run(row, path, base), tolerance)


def _in_both(row: str, path: str, folder: Path, variant: Options, expected: Run, tolerance: float) -> None:
    import datasets
    from accelerate import PartialState
    from accelerate.utils import gather_object

    datasets.fingerprint._TEMP_DIR_FOR_TEMP_CACHE_FILES = None  # launched processes do not inherit this folder
    found = trained(row, path, folder, variant)
    assert PartialState().num_processes == 2
    assert_same(found, expected, tolerance, row not in PRIVATE)
    sums = gather_object([sum(float(value.double().sum()) for value in found.weights.values())])
    assert sums[0] == sums[1]


def check_average(row: str, path: str, folder: Path, variant: Options, base: Options, tolerance: float) -> None:
    """What is trained is the same to the bit, and what is evaluated another: the average."""
    found, expected = trained(row, path, folder, variant), plain_run(row, path, base)
    assert found.losses == expected.losses and found.progress[0] == expected.progress[0]
    assert all(torch.equal(found.weights[name], value) for name, value in expected.weights.items())
    assert found.progress[1] != expected.progress[1] and found.progress[1] < found.progress[0]


CHECKS = {
    "average": check_average,
    "same": check_same,
    "learns": check_learns,
    "has effect": check_has_effect,
    "close": check_close,
    "units": check_units,
    "resumed": check_resumed,
    "processes": check_processes,
}
