"""The privacy report of a run: what is guaranteed, for whom, by which mechanism, and what is not covered."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback

from hfnoise.cards import versions_by_library
from hfnoise.privacy.accounting import accountant_description
from hfnoise.privacy.hf_card import format_epsilon
from hfnoise.trainers.private_run import UNSAFE, PrivateRun, RunState

logger = logging.getLogger(__name__)

REPORT_FILE = "dp_report.json"
_VERSION = 1
# A word that `float` reads, in Python and in JavaScript, where JSON has no number.
INFINITE = "Infinity"

_NOT_COVERED = (
    "hyperparameters: learning rate, clip_norm, batch size and the like must not have been chosen by other runs on "
    "the private data; every such run is on the ledger only if it was private itself (see total_epsilon, dp_tune)",
    "evaluation: eval_dataset, metrics on it, and decisions taken by them",
    "the base model: what it was pretrained on, and whether that overlaps with the private data",
    "the number of units and what follows from it (sample rate, length of an epoch) are published as they are",
    "people with several units: k units of one person have k times this epsilon, and a larger delta",
    "side channels: run time and memory depend on the sizes of the random batches; whoever reads the secret of the "
    "noise, the memory of the process or the optimizer's input before the noise is outside of the model",
    "floating point: the proof is for real numbers; noise is drawn and added in float64 and the result is rounded",
)


def privacy_report(trainer: Any) -> dict[str, Any]:
    """Return everything that a reader needs to judge the guarantee of a private Trainer's weights.

    Formal guarantee: none of its own; it states the one of the weights as they are now. `lineage_epsilon`, the same as
    `trainer.epsilon()`, covers every step whose result is in these weights; `total_epsilon` everything on the ledger
    of the dataset. `epsilon`, which the statement and the card name, is the former, but of a run that branched off
    from a checkpoint, or of a second `train()` of the same Trainer, the latter: what the later steps of the first run
    have shown may be why it was done. Nothing in the report is a function of the private data beyond the number of
    units: the fingerprint of the dataset stays out,
    since it would confirm a guess of the whole dataset.

    Args:
        trainer ([`~hfnoise.DPTrainerMixin`]): a private Trainer; `trainer.audit_result` and `trainer.tune_result` are
            taken in if they are set.

    Returns:
        `dict`, whose values JSON can hold: an infinite epsilon is the string `"Infinity"`, which `float` reads.

    Raises:
        ValueError: if the Trainer is not a private one.
        ImportError: without dp-accounting.

    Example:
        >>> from hfnoise.trainers.private_report import privacy_report
        >>> privacy_report("a string")
        Traceback (most recent call last):
        ...
        ValueError: a privacy report needs a private Trainer, got str.
    """
    if not getattr(trainer, "_is_private", False):
        raise ValueError(f"a privacy report needs a private Trainer, got {type(trainer).__name__}.")
    run: PrivateRun = trainer.private_run
    state, step = run.state, trainer.state.global_step
    epsilon = run.epsilon(step)
    total = max(run.total_epsilon(step), epsilon)  # the ledger may be another one than that of the earlier steps
    epsilon = total if state.earlier else epsilon
    audit, tuning = getattr(trainer, "audit_result", None), getattr(trainer, "tune_result", None)
    if tuning is not None:  # the winner of a search has the guarantee of the search
        epsilon, total = tuning["epsilon"], tuning["total_epsilon"]
    report: dict[str, Any] = {
        "format": REPORT_FILE,
        "version": _VERSION,
        "private": math.isfinite(epsilon) and not _is_unsafe(state),
        "statement": "",
        "epsilon": epsilon,
        "delta": state.delta,
        "lineage_epsilon": trainer.epsilon(),
        "total_epsilon": total,
        "target_epsilon": state.target_epsilon,
        **_unit(state),
        **_mechanism(state, step),
        "accountant": state.accountant,
        "accountant_description": accountant_description(state.accountant),
        "secret": f"UNSAFE: {state.secret}" if _is_unsafe(state) else "32 bytes from the operating system",
        "trained_parameters": _trained_parameters(trainer.model),
        "private_metrics_logged": trainer.dp_config.log_private_metrics,
        "chosen_by_evaluation": _chosen_by_evaluation(trainer),
        "not_covered": _not_covered(trainer, state),
        "audit": audit,
        "tuning": tuning,
        "versions": versions_by_library(),
    }
    report["statement"] = _statement(report)
    result: dict[str, Any] = _json_value(report)
    return result


def write_report(trainer: Any, folder: Path) -> None:
    """Write `dp_report.json`, whole or not at all; the main process only, which keeps the ledger.

    Args:
        trainer ([`~hfnoise.DPTrainerMixin`]): a private Trainer.
        folder (`Path`): of the weights; made if it is missing.
    """
    if not trainer.is_world_process_zero():
        return
    text = json.dumps(privacy_report(trainer), indent=2, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{REPORT_FILE}.{os.getpid()}"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(f"{text}\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / REPORT_FILE)


def _is_unsafe(state: RunState) -> bool:
    return state.secret.startswith(UNSAFE)


def _unit(state: RunState) -> dict[str, Any]:
    return {
        "adjacency": "add or remove one unit",
        "unit": state.unit,
        "units": state.units,
        "rows_per_unit_and_step": state.max_rows_per_unit,
    }


def _mechanism(state: RunState, step: int) -> dict[str, Any]:
    q, bands = state.sample_rate, state.bands
    if bands == 1:
        sampler = f"Poisson: in every step each unit with probability {q:.6g}, independently"
    else:
        sampler = (
            f"cyclic Poisson: units split at random into {bands} groups, one group a step in turn, each unit of it "
            f"with probability {min(1.0, bands * q):.6g}, independently"
        )
    return {
        "expected_batch_size": state.expected_batch_size,
        "sample_rate": q,
        "steps": max(0, step - state.first_step),
        "steps_of_an_earlier_run": sum(steps for _, _, steps, _ in state.earlier),
        "noise_multiplier": state.noise_multiplier,
        "clip_norm": state.clip_norm,
        "clipping": state.clipping,
        "noise": state.noise,
        "bands": bands,
        "sampler": sampler,
    }


def _trained_parameters(model: Any) -> dict[str, Any]:
    """Return how many numbers are trained, and of which kinds: each had its per-unit gradients clipped."""
    kinds: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kinds[_kind(model, name)] += parameter.numel()
    return {"count": sum(kinds.values()), "kinds": dict(sorted(kinds.items()))}


def _kind(model: Any, name: str) -> str:
    found = re.search(r"\b(lora_\w+|modules_to_save|prompt_embeddings)\b", name)
    if found:
        return found[1]
    module, _, attribute = name.rpartition(".")
    return f"{type(model.get_submodule(module)).__name__}.{attribute}"


def _chosen_by_evaluation(trainer: Any) -> list[str]:
    """Return the ways in which evaluation decided which weights these are; empty if it did not."""
    args = trainer.args
    found = []
    if args.load_best_model_at_end:
        found.append("load_best_model_at_end: the best of several checkpoints was kept")
    if str(getattr(args.save_strategy, "value", args.save_strategy)) == "best":
        found.append("save_strategy='best': a checkpoint was written where evaluation improved")
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if schedule in ("reduce_lr_on_plateau", "greedy"):
        found.append(f"lr_scheduler_type={schedule!r}: evaluation decided about the learning rate")
    if any(isinstance(callback, EarlyStoppingCallback) for callback in trainer.callback_handler.callbacks):
        found.append("EarlyStoppingCallback: evaluation decided when to stop")
    return found


def _not_covered(trainer: Any, state: RunState) -> list[str]:
    found = list(_NOT_COVERED)
    if trainer.dp_config.log_private_metrics:
        found.insert(0, "log_private_metrics=True: losses and rewards of private batches were logged without noise")
    if state.delta >= 1.0 / state.units:
        found.insert(0, f"delta={state.delta:g} is not below 1 / units: one unit could be published outright")
    return found


def _statement(report: dict[str, Any]) -> str:
    unit = f"adding or removing one unit ({report['unit']}; {report['units']} of them)"
    if report["private"]:
        guarantee = f"({format_epsilon(report['epsilon'])}, {report['delta']:g})-differentially private"
        return f"{guarantee} with respect to {unit}."
    why = (
        f"the noise comes from a known seed ({report['secret']}), so anybody can subtract it"
        if report["secret"].startswith("UNSAFE")
        else "without noise nothing is guaranteed"
    )
    return f"NOT PRIVATE: {why}."


def _json_value(value: Any) -> Any:
    """Return a value as strict JSON can hold it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    if hasattr(value, "item"):  # a number of torch or numpy
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return INFINITE if value > 0 else "NaN" if math.isnan(value) else f"-{INFINITE}"
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
