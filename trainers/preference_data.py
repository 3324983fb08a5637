"""Checks of a preference dataset before training: what is wrong is named by row, and nothing starts."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

from datasets import Dataset, IterableDataset

from hfnoise.preference.traces import TRACE_END

logger = logging.getLogger(__name__)

# Position of a pair in the dataset the user gave; it lets an error name the pair. No user's column is called so.
PAIR_INDEX = "hfnoise_pair_index"
# How many offending rows an error message lists.
_SHOWN = 5
# Rows that are looked at for what a chat template does to all of them alike.
_LOOKED_AT = 20


def check_preference_dataset(dataset: Any, name: str, per_pair: dict[str, str | None]) -> None:
    """Check columns, emptiness and the values of the per-pair columns of a dataset or a dict of datasets.

    Args:
        dataset: a `datasets.Dataset`, `datasets.IterableDataset`, a dict of them, or `None`.
        name (`str`): how errors call it, for instance `"train_dataset"`.
        per_pair (`dict[str, str | None]`): option name to column name, for the columns the configuration asks for.

    Raises:
        ValueError: what is wrong, in which rows, and what to do. Of a streaming dataset only the first example is
            looked at; the others are checked as they come.
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
                check_values(dataset[column], name, column, option)


def check_values(values: Iterable[Any], name: str, column: str, option: str) -> None:
    """Raise ValueError naming the values of a per-pair column that its option does not accept."""
    accepted, wanted = PER_PAIR_VALUES[option]
    bad = [(row, value) for row, value in enumerate(values) if not accepted(value)]
    if bad:
        shown = ", ".join(f"row {row}: {value!r}" for row, value in bad[:_SHOWN])
        raise ValueError(
            f"column {column!r} of {name} ({option}) must hold {wanted} in every row; {len(bad)} do not: {shown}."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


PER_PAIR_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "flip_rate_column": (lambda value: _is_number(value) and 0 <= value < 0.5, "a flip rate in [0, 0.5)"),
    "sample_weight_column": (lambda value: _is_number(value) and value >= 0, "a finite weight >= 0"),
    "annotator_column": (lambda value: isinstance(value, (str, int)), "a string or an integer"),
}


def add_pair_index(dataset: Dataset) -> Dataset:
    """Return the dataset with its row numbers in a column; those of an earlier run are replaced."""
    if PAIR_INDEX in dataset.column_names:
        dataset = dataset.remove_columns(PAIR_INDEX)
    return dataset.add_column(PAIR_INDEX, list(range(len(dataset))))


def keep_valid_pairs(prepared: Dataset, max_length: int | None, truncation_mode: str) -> Dataset:
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


def report_removed(before: Dataset, after: Dataset, name: str, reason: str, remedy: str, drop: bool) -> None:
    """Raise, or log where `drop` is set, if rows of `before` are gone from `after`.

    Raises:
        ValueError: the number of rows, the first of them, why they cannot be trained on, and what to do.
    """
    if len(before) == len(after):
        return
    kept = set(after[PAIR_INDEX])
    removed = [index for index in before[PAIR_INDEX] if index not in kept]
    message = removed_message(removed, len(before), name, reason)
    if not drop:
        raise ValueError(f"{message}. {remedy} or set drop_invalid_pairs=True to train without them.")
    if len(after) == 0:
        raise ValueError(f"{message}: no pair is left to train on. {remedy}.")
    logger.warning("%s: dropped.", message)


def removed_message(removed: list[int], count: int, name: str, reason: str) -> str:
    """Return the sentence on the rows that cannot be trained on, without its end."""
    shown = ", ".join(map(str, removed[:_SHOWN])) + (", ..." if len(removed) > _SHOWN else "")
    return f"{len(removed)} of {count} pairs of {name} {reason} (rows {shown})"


def refuse_lost_traces(prepared: Dataset, processing_class: Any, name: str) -> None:
    """Raise if a chat template has deleted the reasoning traces of the answers, as those of reasoning models do.

    Raises:
        ValueError: with the row; training on answers without their traces would go unnoticed.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    for row in prepared.select(range(min(_LOOKED_AT, len(prepared)))):
        answer = row.get("chosen")
        if not isinstance(answer, list) or not answer:
            return  # text, tokenized as it is
        given = str(answer[-1].get("content")) + str(answer[-1].get("reasoning_content") or "")
        has_trace = TRACE_END in given or bool(answer[-1].get("reasoning_content"))
        if has_trace and TRACE_END not in tokenizer.decode(row["chosen_ids"]):
            raise ValueError(
                f"the chat template deletes the reasoning traces of {name} (row {row[PAIR_INDEX]}): the model would "
                "be trained on answers without them. Set tokenizer.chat_template to a template for training that "
                "keeps them (TRL ships deepseek_r1_distill_training.jinja), or use BVPOTrainer, which needs none."
            )


def number_vision_pairs(dataset: Any, name: str, drop: bool) -> Any:
    """Return a dataset with images, which TRL tokenizes batch by batch, with row numbers and without equal answers.

    Raises:
        ValueError: naming the rows with identical answers, unless `drop` is set.
    """
    if isinstance(dataset, dict):
        return {key: number_vision_pairs(part, f"{name}[{key!r}]", drop) for key, part in dataset.items()}
    if not isinstance(dataset, Dataset) or not {"image", "images"} & set(dataset.column_names):
        return dataset
    # A new column makes a copy of a dataset that was shuffled or selected from, with all its images: too dear for a
    # row number. An error then names the pair by its prompt alone.
    numbered = dataset if dataset._indices is not None else add_pair_index(dataset)
    answers = zip(dataset["chosen"], dataset["rejected"], strict=True)
    equal = [row for row, (chosen, rejected) in enumerate(answers) if chosen == rejected]
    if not equal:
        return numbered
    message = removed_message(equal, len(dataset), name, "have identical answers")
    if not drop or len(equal) == len(dataset):
        raise ValueError(f"{message}. Remove them or set drop_invalid_pairs=True to train without them.")
    logger.warning("%s: dropped.", message)
    left_out = set(equal)
    return numbered.select([row for row in range(len(dataset)) if row not in left_out])
