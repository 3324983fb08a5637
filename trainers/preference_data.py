"""Checks of a preference dataset before training: what is wrong is named by row, and nothing starts."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

# Position of a pair in the dataset the user gave; it lets an error name the pair.
PAIR_INDEX = "pair_index"
# How many offending rows an error message lists.
_SHOWN = 5


def check_preference_dataset(dataset: Any, name: str, per_pair: dict[str, str | None]) -> None:
    """Check columns, emptiness and the values of the per-pair columns of a dataset or a dict of datasets.

    Args:
        dataset: a `datasets.Dataset`, `datasets.IterableDataset`, a dict of them, or `None`.
        name (`str`): how errors call it, for instance `"train_dataset"`.
        per_pair (`dict[str, str | None]`): option name to column name, for the columns the configuration asks for.

    Raises:
        ValueError: what is wrong, in which rows, and what to do. A streaming dataset is checked by its first example.
    """
    if dataset is None:
        return
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_preference_dataset(part, f"{name}[{key!r}]", per_pair)
        return
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return  # TRL says what it accepts
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{name} is empty: it needs at least one preference pair.")
    tokenized = "chosen_ids" in first and "rejected_ids" in first
    missing = [column for column in ("chosen", "rejected") if column not in first]
    if missing and not tokenized:
        raise ValueError(
            f"{name} lacks the columns {missing}; it has {sorted(first)}. A preference dataset has 'chosen' and "
            "'rejected' (text or messages) and usually 'prompt'; rename yours with dataset.rename_column."
        )
    for option, column in per_pair.items():
        if column is not None and column not in first:
            raise ValueError(f"{name} lacks the column {column!r} that {option} names; it has {sorted(first)}.")
    if isinstance(dataset, Dataset):
        for option, column in per_pair.items():
            if column is not None:
                _check_column(dataset[column], name, column, option)


def _check_column(values: Iterable[Any], name: str, column: str, option: str) -> None:
    accepted, wanted = _PER_PAIR_VALUES[option]
    bad = [(row, value) for row, value in enumerate(values) if not accepted(value)]
    if bad:
        shown = ", ".join(f"row {row}: {value!r}" for row, value in bad[:_SHOWN])
        raise ValueError(
            f"column {column!r} of {name} ({option}) must hold {wanted} in every row; {len(bad)} do not: {shown}."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_PER_PAIR_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "flip_rate_column": (lambda value: _is_number(value) and 0 <= value < 0.5, "a flip rate in [0, 0.5)"),
    "sample_weight_column": (lambda value: _is_number(value) and value >= 0, "a finite weight >= 0"),
    "annotator_column": (lambda value: isinstance(value, (str, int)), "a string or an integer"),
}


def add_pair_index(dataset: Any) -> Any:
    """Return the dataset with the column `pair_index`, its row numbers, unless it has one."""
    first = next(iter(dataset))
    if PAIR_INDEX in first:
        return dataset
    if isinstance(dataset, Dataset):
        return dataset.add_column(PAIR_INDEX, list(range(len(dataset))))
    return dataset.map(_with_index, with_indices=True)


def _with_index(example: dict[str, Any], index: int) -> dict[str, Any]:
    return {PAIR_INDEX: index}


def keep_valid_pairs(prepared: Any, count: int | None, max_length: int | None, truncation_mode: str) -> Any:
    """Return the tokenized dataset without the pairs whose two answers are equal once truncated."""
    return prepared.filter(
        has_distinct_answers, fn_kwargs={"max_length": max_length, "truncation_mode": truncation_mode}
    )


def has_distinct_answers(example: dict[str, Any], max_length: int | None, truncation_mode: str) -> bool:
    """Return whether the model sees a difference between the two answers of a tokenized pair."""
    rows = [example["prompt_ids"] + example[key] for key in ("chosen_ids", "rejected_ids")]
    if max_length is not None:
        window = slice(-max_length, None) if truncation_mode == "keep_end" else slice(None, max_length)
        rows = [row[window] for row in rows]
    return rows[0] != rows[1]


def report_removed(before: Any, after: Any, name: str, reason: str, remedy: str, drop: bool) -> None:
    """Raise, or log where `drop` is set, if rows of `before` are gone from `after`.

    Raises:
        ValueError: the number of rows, the first of them, why they cannot be trained on, and what to do.
    """
    if not isinstance(before, Dataset) or len(before) == len(after):
        return
    kept = set(after[PAIR_INDEX])
    removed = [index for index in before[PAIR_INDEX] if index not in kept]
    shown = ", ".join(map(str, removed[:_SHOWN])) + (", ..." if len(removed) > _SHOWN else "")
    message = f"{len(removed)} of {len(before)} pairs of {name} {reason} (rows {shown})"
    if not drop:
        raise ValueError(f"{message}. {remedy} or set drop_invalid_pairs=True to train without them.")
    if len(after) == 0:
        raise ValueError(f"{message}: no pair is left to train on. {remedy}.")
    logger.warning("%s: dropped.", message)


@dataclass
class PairColumnCollator:
    """Collates the columns that TRL's collator drops and leaves the rest to it.

    Args:
        base (`Callable`): the collator of the stock Trainer.
        columns (`dict[str, str]`): batch key to dataset column.
        annotators (`dict`, *optional*): number of each annotator, for the key `pair_annotator`.
    """

    base: Callable[[list[dict[str, Any]]], dict[str, Any]]
    columns: dict[str, str]
    annotators: dict[Any, int] | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        extra = {
            key: self._tensor(key, [example[column] for example in examples])
            for key, column in self.columns.items()
            if column in examples[0]
        }
        return {**self.base(examples), **extra}

    def _tensor(self, key: str, values: list[Any]) -> torch.Tensor:
        if key == "pair_annotator":
            # An annotator first met in evaluation has no number; -1 keeps it out of the per-annotator figures.
            return torch.tensor([(self.annotators or {}).get(value, -1) for value in values], dtype=torch.long)
        return torch.tensor(values, dtype=torch.long if key == "pair_index" else torch.float32)
