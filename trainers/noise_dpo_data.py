"""The data side of NoiseDPOTrainer: checks, per-pair columns, and a reference cache with the right key."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, IterableDataset, is_caching_enabled
from torch import Tensor

from hfnoise.trainers.ches_capture import CHES_COLUMNS, REFERENCE_COLUMNS
from hfnoise.trainers.pair_collator import PairColumnCollator
from hfnoise.trainers.pair_stream import StreamedPairFilter
from hfnoise.trainers.preference_data import (
    PAIR_INDEX,
    add_pair_index,
    check_preference_dataset,
    keep_valid_pairs,
    number_vision_pairs,
    refuse_lost_traces,
    report_removed,
)
from hfnoise.trainers.quantized_base import keep_differentiable
from hfnoise.trainers.reference_cache import with_cached_columns, without_columns

# Key of a batch -> field of PairBatch.
_BATCH_KEYS = {
    "pair_flip_rate": "flip_rate",
    "pair_weight": "weight",
    "pair_annotator": "annotator",
    "pair_index": "index",
}
# Key of a batch -> option that names its column.
_BATCH_OPTIONS = {
    "pair_flip_rate": "flip_rate_column",
    "pair_weight": "sample_weight_column",
    "pair_annotator": "annotator_column",
}
# Columns with the tokens of a pair.
PAIR_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
# Counts up when the values in a reference cache change their meaning.
_REFERENCE_LAYOUT = 1
_CHES_LAYOUT = 1


class NoiseDPODataMixin:
    """Overrides of `trl.DPOTrainer` that concern datasets and batches."""

    args: Any
    accelerator: Any
    annotators: tuple[Any, ...] = ()

    def check_datasets(self, args: Any, train_dataset: Any, eval_dataset: Any) -> None:
        """Raise ValueError for datasets that cannot be trained on, before a model is loaded."""
        check_preference_dataset(train_dataset, "train_dataset", self._option_columns(args))
        check_preference_dataset(eval_dataset, "eval_dataset", self._option_columns(args))
        if args.annotator_column is None or train_dataset is None:
            return
        evaluated = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        if any(isinstance(dataset, IterableDataset) for dataset in (train_dataset, *evaluated)):
            raise ValueError(
                "annotator_column needs map-style datasets, since the annotators must be known before training; got "
                "a streaming one. Load it without streaming=True, or leave annotator_column out."
            )
        self.annotators = tuple(sorted(set(train_dataset[args.annotator_column]), key=str))

    @staticmethod
    def number_vision_pairs(args: Any, trainer_arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments with row numbers in datasets that have images, which TRL does not prepare."""
        numbered = {
            name: number_vision_pairs(trainer_arguments.get(name), name, args.drop_invalid_pairs)
            for name in ("train_dataset", "eval_dataset")
        }
        return {**trainer_arguments, **numbered}

    @staticmethod
    def _option_columns(args: Any) -> dict[str, str | None]:
        return {name: getattr(args, name) for name in _BATCH_OPTIONS.values()}

    def _batch_columns(self) -> dict[str, str]:
        columns = {key: getattr(self.args, option) for key, option in _BATCH_OPTIONS.items()}
        columns["pair_index"] = PAIR_INDEX
        return {key: column for key, column in columns.items() if column is not None}

    def wrap_collator(self) -> None:
        """Let the collator bring the per-pair columns along."""
        columns = self._batch_columns()
        # Without remove_unused_columns a collator of the user's sees, and may use, every column of the dataset.
        hidden = set(columns.values()) if self.args.remove_unused_columns else {PAIR_INDEX}
        numbers = {name: number for number, name in enumerate(self.annotators)}
        self.data_collator = PairColumnCollator(
            self.data_collator, columns, frozenset(hidden), _BATCH_OPTIONS, numbers
        )

    @staticmethod
    def split_columns(inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the inputs of the stock loss and the per-pair columns; TRL would pass unknown keys to the model."""
        columns = {field: inputs[key] for key, field in _BATCH_KEYS.items() if key in inputs}
        return {key: value for key, value in inputs.items() if key not in _BATCH_KEYS}, columns

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Compute the reference log-probabilities as `DPOTrainer` does; the per-pair columns are not for the model."""
        model = self.sharing_prefixes(model)  # type: ignore[attr-defined]
        return super().compute_ref_log_probs(model, self.split_columns(inputs)[0])  # type: ignore[misc]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        new = [column for column in self._batch_columns().values() if column not in self._signature_columns]
        self._signature_columns = [*self._signature_columns, *new]

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if isinstance(dataset, IterableDataset):
            return self._prepare_stream(dataset, processing_class, args, dataset_name)
        indexed = add_pair_index(dataset)
        prepared = super()._prepare_dataset(indexed, processing_class, args, dataset_name)  # type: ignore[misc]
        refuse_lost_traces(prepared, processing_class, f"the {dataset_name} dataset")
        name, drop = f"the {dataset_name} dataset", args.drop_invalid_pairs
        report_removed(
            indexed, prepared, name, f"have a prompt that fills max_length={args.max_length}, so no answer is left",
            "Raise max_length, shorten the prompts", drop,
        )  # fmt: skip
        with args.main_process_first(desc="checking preference pairs"):
            valid = keep_valid_pairs(prepared, args.max_length, args.truncation_mode)
        report_removed(
            prepared, valid, name, f"have identical answers (up to max_length={args.max_length})",
            "Remove them, raise max_length", drop,
        )  # fmt: skip
        return valid

    def _prepare_stream(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        unlimited = copy.copy(args)
        unlimited.max_length = None  # else TRL drops the pairs whose prompt fills it without a word
        prepared = super()._prepare_dataset(dataset, processing_class, unlimited, dataset_name)  # type: ignore[misc]
        name = f"the {dataset_name} dataset"
        return prepared.filter(
            StreamedPairFilter(name, args.max_length, args.truncation_mode, args.drop_invalid_pairs)
        )

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as `DPOTrainer` does; a new dataset is checked first."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            check_preference_dataset(eval_dataset, "eval_dataset", self._option_columns(self.args))
        return super().evaluate(eval_dataset, *args, **kwargs)  # type: ignore[misc]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Compute or load the reference log-probabilities, cached under what they depend on and nothing else.

        TRL's key re-uses stale values when `ld_alpha` changes with `max_length=None`, and recomputes when the learning
        rate changes with `max_length` set. For a dataset in memory it writes a file of another name on every process,
        and fails on all but the first: nothing is cached then.
        """
        keep_differentiable(self.model)  # type: ignore[attr-defined]  # before it is evaluated for the first time
        if isinstance(dataset, Dataset):
            with_ches = self.args.compute_ches
            # What is there comes from another model or run.
            dataset = without_columns(dataset, REFERENCE_COLUMNS + (CHES_COLUMNS if with_ches else ()))

            def compute() -> dict[str, Tensor]:
                return self.reference_columns(dataset, batch_size, with_ches)  # type: ignore[attr-defined]

            has_cache = bool(dataset.cache_files) and is_caching_enabled()
            if not has_cache and (with_ches or self.accelerator.num_processes > 1):
                return self.with_reference_columns(dataset, batch_size)  # type: ignore[attr-defined]
            key = reference_key(dataset, self.args)
            if with_ches:
                model_hash = self._precompute_model_hash  # type: ignore[attr-defined]
                return with_cached_columns(dataset, (key, model_hash), self.accelerator, compute)
            dataset = copy.copy(dataset)
            dataset._fingerprint = key
        return super()._precompute_ref_logps(dataset, name, batch_size)  # type: ignore[misc]


def reference_key(dataset: Dataset, args: Any, columns: Sequence[str] = PAIR_COLUMNS) -> str:
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
    if args.compute_ches:  # the file holds more columns
        settings["ches"] = _CHES_LAYOUT
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for batch in dataset.select_columns(list(columns)).iter(batch_size=1000):
        digest.update(json.dumps([batch[column] for column in columns]).encode())
    return digest.hexdigest()[:32]
