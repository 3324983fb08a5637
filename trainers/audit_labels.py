"""`hfnoise audit-labels`: how many labels of a preference dataset are flipped, and which.

Every pair is scored by a model that was not trained on it (cross-fitting), because a model agrees with labels it has
seen. The loss is `sym`, which needs no flip rate.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hfnoise.cards import library_versions
from hfnoise.errors import UsageError
from hfnoise.folders import check_writable
from hfnoise.preference.corruption import flip_labels
from hfnoise.preference.flip_rate import FlipRateEstimate, estimate_flip_rate, posterior_flip
from hfnoise.trainers.audit_arguments import AuditArguments
from hfnoise.trainers.command_line import parse
from hfnoise.trainers.dataset_loading import load_any, resolve_model
from hfnoise.trainers.noise_dpo import NoiseDPOConfig, NoiseDPOTrainer
from hfnoise.trainers.preference_data import check_preference_dataset
from hfnoise.trainers.reference_cache import with_columns
from hfnoise.trainers.robust_dpo import RobustDPOConfig, refused_estimate_note

logger = logging.getLogger(__name__)

_SHOWN_CHARACTERS = 60


def main(arguments: Sequence[str]) -> int:
    """Audit a dataset from a command line; writes report.json, margins.png, suspects.md and dataset/."""
    (audit,) = parse("hfnoise audit-labels", [AuditArguments], arguments)
    try:
        check_writable(audit.output_dir)
        dataset = _load(audit)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    margins = held_out_margins(audit, dataset)
    estimate = estimate_flip_rate(margins)
    rate = estimate.rate_for_posterior() if audit.flip_rate is None else audit.flip_rate
    p_flip = posterior_flip(margins.double(), rate, scale=estimate.scale)
    _write(audit, with_columns(dataset, {"margin": margins, "p_flip": p_flip}), margins, estimate, rate)
    return 0


def _load(audit: AuditArguments) -> Dataset:
    splits = load_any(audit.dataset_name, audit.dataset_config)
    if audit.dataset_split not in splits:
        raise ValueError(
            f"dataset {audit.dataset_name!r} has no split {audit.dataset_split!r}; it has {sorted(splits)}."
        )
    dataset = splits[audit.dataset_split]
    check_preference_dataset(dataset, f"split {audit.dataset_split!r}", {})
    return flip_labels(dataset, audit.inject_flip_rate, audit.seed) if audit.inject_flip_rate else dataset


def held_out_margins(audit: AuditArguments, dataset: Dataset) -> Tensor:
    """Return the margin of every pair, shape `(len(dataset),)`, from a model that was not trained on it."""
    if audit.ref_model_name_or_path is not None:
        return _trainer(audit, dataset.select(range(1))).pair_margins(dataset)
    generator = torch.Generator().manual_seed(audit.seed)
    fold_of = torch.randperm(len(dataset), generator=generator) % audit.folds
    margins = torch.zeros(len(dataset))
    for fold in range(audit.folds):
        inside, outside = ((fold_of == fold).nonzero().flatten(), (fold_of != fold).nonzero().flatten())
        if not len(inside) or not len(outside):
            raise UsageError(f"{len(dataset)} pairs cannot be divided into {audit.folds} folds; use fewer.")
        logger.info("fold %d of %d: training on %d pairs", fold + 1, audit.folds, len(outside))
        trainer = _trainer(audit, dataset.select(outside.tolist()))
        trainer.train()
        margins[inside] = trainer.pair_margins(dataset.select(inside.tolist()))
    return margins


def _trainer(audit: AuditArguments, pairs: Dataset) -> NoiseDPOTrainer:
    from transformers import AutoModelForCausalLM

    reference = audit.ref_model_name_or_path
    # Nothing is saved by these runs; the folder only satisfies the Trainer.
    config = NoiseDPOConfig(
        tempfile.gettempdir(), loss_type=["sym"], sym_temperature=RobustDPOConfig.sym_temperature, beta=audit.beta,
        num_train_epochs=audit.num_train_epochs, learning_rate=audit.learning_rate, max_length=audit.max_length,
        per_device_train_batch_size=audit.per_device_train_batch_size, seed=audit.seed,
        per_device_eval_batch_size=audit.per_device_train_batch_size, use_cpu=audit.use_cpu, bf16=audit.bf16,
        save_strategy="no", report_to="none",
    )  # fmt: skip
    try:
        return NoiseDPOTrainer(
            resolve_model(audit.model_name_or_path),
            ref_model=None if reference is None else AutoModelForCausalLM.from_pretrained(resolve_model(reference)),
            args=config,
            train_dataset=pairs,
        )
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


def _write(audit: AuditArguments, scored: Dataset, margins: Tensor, estimate: FlipRateEstimate, rate: float) -> None:
    folder = Path(audit.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    given = audit.flip_rate is not None
    note = refused_estimate_note(estimate) if estimate.refused and not given else ""
    source = "given" if given else "refused estimate: only the order counts" if estimate.refused else "estimate"
    report = {
        "arguments": asdict(audit), "estimate": asdict(estimate), "versions": library_versions(),
        "p_flip": {"flip_rate": rate, "scale": estimate.scale, "source": source, "note": note},
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    scored.save_to_disk(folder / "dataset")
    plot_margins(margins, estimate, folder / "margins.png")
    rows = suspect_rows(scored, audit.top)
    (folder / "suspects.md").write_text(_markdown(rows), encoding="utf-8")
    _print(rows, note or describe(estimate), folder)


def suspect_rows(scored: Dataset, top: int) -> list[tuple[str, ...]]:
    """Return the pairs whose labels look flipped, worst first: row, p_flip, margin, prompt, chosen, rejected."""
    p_flip, margin = scored["p_flip"][:], scored["margin"][:]
    # Rounded to 0 or 1, or at a rate of 0, the probabilities tie; the margins do not.
    order = sorted(range(len(scored)), key=lambda row: (-p_flip[row], margin[row]))
    rows = []
    for number in order[:top]:
        texts = (_text(scored[number].get(name, "")) for name in ("prompt", "chosen", "rejected"))
        rows.append((str(number), f"{p_flip[number]:.3f}", f"{margin[number]:.3f}", *texts))
    return rows


def _text(value: Any) -> str:
    """Return the start of a text, or of the last message, on one line."""
    content = value[-1]["content"] if isinstance(value, list) and value else value
    line = " ".join(str(content).split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 1] + "…"


_HEADER = ("row", "p_flip", "margin", "prompt", "chosen", "rejected")


def _markdown(rows: list[tuple[str, ...]]) -> str:
    lines = [_HEADER, tuple("---" for _ in _HEADER), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _print(rows: list[tuple[str, ...]], verdict: str, folder: Path) -> None:
    table = Table(*_HEADER, title="labels that look flipped")
    for row in rows:
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    console = Console()
    console.print(table)
    console.print(verdict, markup=False)
    console.print(f"report.json, margins.png, suspects.md and dataset/ are in {folder}", markup=False)


def describe(estimate: FlipRateEstimate) -> str:
    """Return the estimate in one sentence."""
    low, high = estimate.interval
    if estimate.refused:
        return f"flip rate: refused. {estimate.reason}"
    return f"flip rate {estimate.flip_rate:.3f}, 95 % interval {low:.3f} to {high:.3f}, from {estimate.count} pairs"


def _title(estimate: FlipRateEstimate) -> str:
    return "flip rate: not estimated" if estimate.refused else describe(estimate)


def plot_margins(margins: Tensor, estimate: FlipRateEstimate, path: Path, flipped: Tensor | None = None) -> None:
    """Write a histogram of the margins; pairs left of zero are those whose label the model contradicts.

    Args:
        margins (`torch.Tensor` of shape `(pairs,)`): signed by the recorded label.
        estimate ([`FlipRateEstimate`]): for the title.
        path (`Path`): of the picture.
        flipped (`torch.Tensor` of `bool` and shape `(pairs,)`, *optional*): which labels are known to be flipped; the
            colours then say so.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    low, high = torch.quantile(margins, torch.tensor([0.005, 0.995])).tolist()
    low, high = min(low, 0.0), max(high, 0.0)
    width = max(high - low, 1e-6) / 60
    # Zero is an edge, so that no bin holds both kinds of pairs.
    edges = [width * number for number in range(math.floor(low / width), math.ceil(high / width) + 1)]
    clamped = margins.double().clamp(edges[0], edges[-1])
    names = ("model agrees with the label", "model contradicts the label")
    wrong = clamped < 0
    if flipped is not None:
        names, wrong = ("label as it was", "flipped label"), flipped
    parts = [clamped[~wrong].tolist(), clamped[wrong].tolist()]
    axes.hist(parts, bins=edges, color=["#4477aa", "#cc6677"], label=names, stacked=True)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel="held-out margin h, signed by the recorded label", ylabel="pairs", title=_title(estimate))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
