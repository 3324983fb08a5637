"""`hfnoise.score_dataset` and `hfnoise score-pairs`: CHES and reference log-probabilities of a preference dataset."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset

from hfnoise.cards import library_versions
from hfnoise.errors import UsageError
from hfnoise.folders import check_writable
from hfnoise.option_types import check_least, check_option_types
from hfnoise.preference.ches import DEFAULT_KEEP, filter_by_ches
from hfnoise.trainers.ches_capture import CHES_COLUMNS, REFERENCE_COLUMNS
from hfnoise.trainers.command_line import parse
from hfnoise.trainers.dataset_loading import load_any, resolve_model
from hfnoise.trainers.noise_dpo import NoiseDPOConfig, NoiseDPOTrainer
from hfnoise.trainers.reference_cache import with_columns

__all__ = ["score_dataset"]

logger = logging.getLogger(__name__)


def score_dataset(
    model: Any,
    dataset: Dataset,
    processing_class: Any = None,
    batch_size: int = 8,
    max_length: int | None = 1024,
    **settings: Any,
) -> Dataset:
    """Return the dataset with `ches`, `ln_ches`, `ref_chosen_logps` and `ref_rejected_logps`, in one forward pass.

    Higher CHES (arXiv 2410.08847) means that DPO from this model will lower the likelihood of the chosen answer more;
    see `hfnoise.preference.ches_scores`. Departure: one batched pass over pairs, where the official script runs two
    forwards per pair; equal to it up to rounding.

    Args:
        model (`str` or `transformers.PreTrainedModel`): name, path, `"hfnoise:docstrings"`, or a loaded model, with or
            without PEFT (its adapter counts). A loaded model is moved to the device; nothing else of it changes.
        dataset (`datasets.Dataset`): preference pairs, as for training.
        processing_class (*optional*): its tokenizer; loaded from the place the model came from by default.
        batch_size (`int`, defaults to `8`): pairs per forward pass and process, at least 1. It does not change scores.
        max_length (`int`, *optional*, defaults to `1024`): longest prompt and answer in tokens.
        **settings: further fields of `NoiseDPOConfig`, for instance `use_cpu=True`, `drop_invalid_pairs=True` or
            `model_init_kwargs={"dtype": "bfloat16"}`.

    Returns:
        `datasets.Dataset`: your rows in their order with the four columns, float; the same on every process.

    Raises:
        ValueError: for a dataset that cannot be scored, a batch size below 1, or a loaded model of unknown origin
            without `processing_class`.

    Example:
        >>> from hfnoise import filter_by_ches, score_dataset
        >>> from hfnoise.worlds.docstrings import preference_pairs
        >>> scored = score_dataset("hfnoise:docstrings", preference_pairs(size=4), use_cpu=True, disable_tqdm=True)
        >>> scored.column_names[3:], len(filter_by_ches(scored, keep=0.5))
        (['ref_chosen_logps', 'ref_rejected_logps', 'ches', 'ln_ches'], 2)
    """
    if not isinstance(dataset, Dataset) or {"image", "images"} & set(dataset.column_names):
        what = f"{type(dataset).__name__} with images" if isinstance(dataset, Dataset) else type(dataset).__name__
        raise ValueError(
            f"score_dataset reads a map-style datasets.Dataset of text, got {what}. Pass one split, loaded without "
            "streaming=True; pairs with images are scored by the score_dataset of a NoiseDPOTrainer."
        )
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}.")
    if not isinstance(model, str) and processing_class is None and not model.config._name_or_path:
        raise ValueError(
            "the model was not loaded from anywhere, so its tokenizer is not known: pass processing_class."
        )
    # Nothing is saved; the folder only satisfies the Trainer. Dropout does nothing in a pass that does not train.
    defaults: dict[str, Any] = {
        "output_dir": tempfile.gettempdir(), "bf16": False, "report_to": "none", "activation_checkpointing": False,
        "disable_dropout": False,
    }  # fmt: skip
    args = NoiseDPOConfig(
        **(defaults | settings), precompute_ref_log_probs=True, compute_ches=True, max_length=max_length,
        per_device_train_batch_size=batch_size,
    )  # fmt: skip
    with _left_as_it_was(model):
        trainer = NoiseDPOTrainer(
            resolve_model(model) if isinstance(model, str) else model,
            args=args,
            train_dataset=dataset,
            processing_class=processing_class,
        )
        scored = trainer.train_dataset
        values = {name: torch.tensor(scored[name][:]) for name in (*REFERENCE_COLUMNS, *CHES_COLUMNS)}
        return with_columns(trainer.given_rows(dataset, scored), values)


@contextmanager
def _left_as_it_was(model: Any) -> Iterator[None]:
    """Undo what TRL does to a loaded model that it is going to train: another `forward`, a copy of its adapter."""
    if isinstance(model, str):
        yield
        return
    adapters = set(model.peft_config) if is_peft_model(model) else set()
    causal_model = model.get_base_model() if adapters else model
    forward = causal_model.__dict__.get("forward")
    try:
        yield
    finally:
        causal_model.__dict__.pop("forward", None)
        if forward is not None:
            causal_model.forward = forward
        if "ref" in getattr(model, "peft_config", {}) and "ref" not in adapters:
            model.delete_adapter("ref")


@dataclass
class ScoreArguments:
    """What to score, and what to keep.

    Args:
        model_name_or_path (`str`): Hub id, folder, or `hfnoise:docstrings`.
        dataset_name (`str`): Hub id, local file or folder, or `hfnoise:docstrings`.
        keep (`float`, *optional*): share of the pairs with the lowest scores to write, in (0, 1]; all by default.
        column (`str`, defaults to `"ln_ches"`): the score to keep by, `"ln_ches"` or `"ches"`.

    Raises:
        ValueError: for values out of range.
    """

    model_name_or_path: str = field(metadata={"help": "Hub id, folder, or hfnoise:docstrings."})
    dataset_name: str = field(metadata={"help": "Preference dataset: Hub id, file, folder, or hfnoise:docstrings."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split to score."})
    output_dir: str = field(default="scored_pairs", metadata={"help": "Folder for report.json and dataset/."})
    keep: float | None = field(
        default=None,
        metadata={"help": f"Write only this share of the pairs, the lowest scores; the paper keeps {DEFAULT_KEEP:g}."},
    )
    column: str = field(default="ln_ches", metadata={"help": "The score to keep by: ln_ches or ches."})
    batch_size: int = field(default=8, metadata={"help": "Pairs per forward pass."})
    max_length: int = field(default=1024, metadata={"help": "Longest prompt and answer, in tokens."})
    drop_invalid_pairs: bool = field(default=False, metadata={"help": "Drop pairs that cannot be scored."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU."})
    bf16: bool = field(default=False, metadata={"help": "Score in bfloat16."})

    def __post_init__(self) -> None:
        check_option_types(self, ScoreArguments)
        check_least(self, 1, "batch_size", "max_length")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"keep is the share of pairs with the lowest scores, in (0, 1], got {self.keep!r}.")
        if self.column not in CHES_COLUMNS:
            raise ValueError(f"column must be 'ln_ches' or 'ches', got {self.column!r}.")


def main(arguments: Sequence[str]) -> int:
    """Score a dataset from a command line; writes report.json and dataset/."""
    (given,) = parse("hfnoise score-pairs", [ScoreArguments], arguments)
    folder = Path(given.output_dir)
    try:
        check_writable(given.output_dir)
        splits = load_any(given.dataset_name, given.dataset_config)
        if given.dataset_split not in splits:
            raise ValueError(
                f"dataset {given.dataset_name!r} has no split {given.dataset_split!r}; it has {sorted(splits)}."
            )
        scored = score_dataset(
            given.model_name_or_path, splits[given.dataset_split], batch_size=given.batch_size,
            max_length=given.max_length, drop_invalid_pairs=given.drop_invalid_pairs, use_cpu=given.use_cpu,
            bf16=given.bf16,
        )  # fmt: skip
        kept = scored if given.keep is None else filter_by_ches(scored, given.keep, given.column)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    kept.save_to_disk(folder / "dataset")
    scores = sorted(scored[given.column][:])
    report = {
        "arguments": asdict(given), "pairs": len(scored), "kept": len(kept), "versions": library_versions(),
        given.column: {"lowest": scores[0], "median": scores[len(scores) // 2], "highest": scores[-1]},
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(
        f"{given.column} from {scores[0]:.4g} to {scores[-1]:.4g}, higher means more displacement; {len(kept)} of "
        f"{len(scored)} pairs are in {folder / 'dataset'}"
    )
    return 0
