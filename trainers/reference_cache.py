"""Columns computed once from a dataset, kept in an Arrow file that later runs find again."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from accelerate.utils import broadcast_object_list
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher
from torch import Tensor


def with_cached_columns(
    dataset: Dataset, key: Any, accelerator: Any, compute: Callable[[], dict[str, Tensor]]
) -> Dataset:
    """Return the dataset with more columns: those of an earlier run with the same key, or computed now.

    `trl.DPOTrainer` caches its two columns in the same way and in the same place; it cannot hold others.

    Args:
        dataset (`datasets.Dataset`): where its rows are cached, the columns are as well.
        key: what the values depend on; hashed.
        accelerator (`accelerate.Accelerator`): of the trainer.
        compute (`Callable`): returns the columns, one value per row, the same on every process; called on all.
    """
    fingerprint = Hasher.hash(key)
    file = dataset._get_cache_file_path(fingerprint)
    known = [os.path.exists(file)]
    broadcast_object_list(known, from_process=0)  # all compute or none does
    if not known[0]:
        columns = compute()
        if accelerator.is_main_process:
            dataset.map(
                lambda _, rows: {name: values[rows].numpy() for name, values in columns.items()},
                with_indices=True,
                batched=True,
                remove_columns=dataset.column_names,
                new_fingerprint=fingerprint,
                cache_file_name=file,
                desc="Caching scores of the reference",
            )
        accelerator.wait_for_everyone()
    return concatenate_datasets([dataset, Dataset.from_file(file)], axis=1)


def with_columns(dataset: Dataset, columns: dict[str, Tensor]) -> Dataset:
    """Return the dataset with the columns, one value per row; columns of the same names are replaced."""
    dataset = without_columns(dataset, tuple(columns))
    for name, values in columns.items():
        dataset = dataset.add_column(name, values.tolist())
    return dataset


def without_columns(dataset: Dataset, names: tuple[str, ...]) -> Dataset:
    """Return the dataset without those of the named columns that it has: values of another model or run."""
    return dataset.remove_columns([name for name in names if name in dataset.column_names])
