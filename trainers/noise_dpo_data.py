"""The data side of NoiseDPOTrainer: checks, per-pair columns, and a reference cache with the right key."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

from datasets import Dataset, IterableDataset
from torch import Tensor

from hfnoise.trainers.preference_data import (
    PAIR_INDEX,
    PairColumnCollator,
    add_pair_index,
    check_preference_dataset,
    keep_valid_pairs,
    report_removed,
)

# Key of a batch -> field of PairBatch.
_BATCH_KEYS = {
    "pair_flip_rate": "flip_rate",
    "pair_weight": "weight",
    "pair_annotator": "annotator",
    "pair_index": "index",
}
# Counts up when the values in a reference cache change their meaning.
_REFERENCE_LAYOUT = 1


class NoiseDPODataMixin:
    """Overrides of `trl.DPOTrainer` that concern datasets and batches."""

    args: Any
    annotators: tuple[Any, ...] = ()

    def check_datasets(self, args: Any, train_dataset: Any, eval_dataset: Any) -> None:
        """Raise ValueError for datasets that cannot be trained on, before a model is loaded."""
        check_preference_dataset(train_dataset, "train_dataset", self._option_columns(args))
        check_preference_dataset(eval_dataset, "eval_dataset", self._option_columns(args))
        if args.annotator_column is None or train_dataset is None:
            return
        if isinstance(train_dataset, IterableDataset):
            raise ValueError(
                "annotator_column needs a map-style dataset, since the annotators must be known before training; got "
                "a streaming one. Load it without streaming=True, or leave annotator_column out."
            )
        self.annotators = tuple(sorted(set(train_dataset[args.annotator_column]), key=str))

    @staticmethod
    def _option_columns(args: Any) -> dict[str, str | None]:
        return {name: getattr(args, name) for name in ("flip_rate_column", "sample_weight_column", "annotator_column")}

    def _batch_columns(self) -> dict[str, str]:
        columns = {
            "pair_flip_rate": self.args.flip_rate_column,
            "pair_weight": self.args.sample_weight_column,
            "pair_annotator": self.args.annotator_column,
            "pair_index": PAIR_INDEX,
        }
        return {key: column for key, column in columns.items() if column is not None}

    def wrap_collator(self) -> None:
        """Let the collator bring the per-pair columns along."""
        numbers = {name: number for number, name in enumerate(self.annotators)}
        self.data_collator = PairColumnCollator(self.data_collator, self._batch_columns(), numbers)

    @staticmethod
    def split_columns(inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the inputs of the stock loss and the per-pair columns; TRL would pass unknown keys to the model."""
        columns = {field: inputs[key] for key, field in _BATCH_KEYS.items() if key in inputs}
        return {key: value for key, value in inputs.items() if key not in _BATCH_KEYS}, columns

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        new = [column for column in self._batch_columns().values() if column not in self._signature_columns]
        self._signature_columns = [*self._signature_columns, *new]

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        indexed = add_pair_index(dataset)
        prepared = super()._prepare_dataset(indexed, processing_class, args, dataset_name)  # type: ignore[misc]
        name, drop = f"the {dataset_name} dataset", args.drop_invalid_pairs
        report_removed(
            indexed, prepared, name, f"have a prompt that fills max_length={args.max_length}, so no answer is left",
            "Raise max_length, shorten the prompts", drop,
        )  # fmt: skip
        with args.main_process_first(desc="checking preference pairs"):
            valid = keep_valid_pairs(prepared, None, args.max_length, args.truncation_mode)
        report_removed(
            prepared, valid, name, f"have identical answers (up to max_length={args.max_length})",
            "Remove them, raise max_length", drop,
        )  # fmt: skip
        return valid

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as `DPOTrainer` does; a new dataset is checked first."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            check_preference_dataset(eval_dataset, "eval_dataset", self._option_columns(self.args))
        return super().evaluate(eval_dataset, *args, **kwargs)  # type: ignore[misc]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Compute or load the reference log-probabilities, cached under what they depend on and nothing else.

        TRL's key re-uses stale values when `ld_alpha` changes with `max_length=None`, and recomputes when the learning
        rate changes with `max_length` set.
        """
        if isinstance(dataset, Dataset):
            dataset = copy.copy(dataset)
            dataset._fingerprint = reference_key(dataset, self.args)
        return super()._precompute_ref_logps(dataset, name, batch_size)  # type: ignore[misc]


def reference_key(dataset: Dataset, args: Any) -> str:
    """Return the cache key of the reference log-probabilities, the weights of the reference aside (TRL adds them).

    It depends on the token ids, on how they are cut, and on the precision they are scored in.
    """
    settings = {
        "layout": _REFERENCE_LAYOUT,
        "max_length": args.max_length,
        "truncation_mode": args.truncation_mode,
        "ld_alpha": args.ld_alpha,
        "precision": [args.bf16, args.fp16],
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    for batch in dataset.select_columns(columns).iter(batch_size=1000):
        digest.update(json.dumps([batch[column] for column in columns]).encode())
    return digest.hexdigest()[:32]
