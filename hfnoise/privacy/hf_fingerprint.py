"""A fingerprint of what a dataset holds, so that the privacy ledger knows it again in another session."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import Any

import datasets
import torch
import torch.utils.data

# Part of the fingerprint, like everything below: another number gives other fingerprints, and lost ledgers.
_ROWS_PER_BATCH = 1000


def dataset_fingerprint(dataset: Any) -> str:
    """Return a hash of the rows of a dataset in their order; the same content gives the same string in every session.

    For a `datasets.Dataset` it depends on names, types and values of the columns, and not on their order, on how
    the Arrow table is chunked or sliced, on indices (`select`), on the cache, nor on `_fingerprint`, which is random
    after a lambda. Other map-style datasets are read row by row. What the ledger cannot see: the same people in other
    rows, a shuffled copy, or one with another column. Those get fingerprints and budgets of their own, and the true
    epsilon of the people in them is larger than either ledger says.

    Args:
        dataset: `datasets.Dataset`, or anything with `len` and indices whose rows consist of dictionaries, lists,
            tuples, strings, bytes, numbers, None, tensors and numpy arrays.

    Returns:
        `str`: "sha256:" and 64 hexadecimal digits.

    Raises:
        ValueError: for a dataset without a length, which cannot be Poisson-sampled.
        TypeError: for a dictionary of splits, or rows of another type.

    Example:
        >>> from datasets import Dataset
        >>> from hfnoise.privacy.hf_fingerprint import dataset_fingerprint
        >>> rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
        >>> dataset_fingerprint(rows) == dataset_fingerprint(rows.select_columns(["label", "text"]))
        True
    """
    iterable = (datasets.IterableDataset, datasets.IterableDatasetDict, torch.utils.data.IterableDataset)
    if isinstance(dataset, iterable) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"{type(dataset).__name__} has no length or no indices, so no step can draw each unit with the same "
            "known probability, and the guarantee of Poisson sampling would be lost; use a map-style dataset."
        )
    if isinstance(dataset, Mapping):
        raise TypeError(f"{type(dataset).__name__} is a dictionary; give one split, dataset['train'] for instance.")
    digest = hashlib.sha256()
    if isinstance(dataset, datasets.Dataset):
        _hash_arrow(digest, dataset)
    else:
        digest.update(b"rows")
        for index in range(len(dataset)):
            _hash_value(digest, dataset[index])
    return f"sha256:{digest.hexdigest()}"


class _Sink:
    """A file that hashes what is written to it."""

    closed = False

    def __init__(self, digest: Any) -> None:
        self.digest = digest

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def _hash_arrow(digest: Any, dataset: datasets.Dataset) -> None:
    import pyarrow

    digest.update(f"arrow {len(dataset)}".encode())
    writer = None
    for table in dataset.with_format("arrow").iter(batch_size=_ROWS_PER_BATCH):
        table = table.select(sorted(table.column_names)).replace_schema_metadata(None)
        # Taking all rows copies them into buffers that start at 0 and hold nothing but these rows.
        table = table.combine_chunks().take(pyarrow.array(range(len(table)), pyarrow.int64())).combine_chunks()
        writer = writer or pyarrow.ipc.new_stream(pyarrow.PythonFile(_Sink(digest), mode="w"), table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _hash_value(digest: Any, value: Any) -> None:
    """Hash type, length and content, so that no two values run into one another."""
    if isinstance(value, Mapping):
        digest.update(f"mapping {len(value)};".encode())
        for key in sorted(value):
            _hash_value(digest, key)
            _hash_value(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"sequence {len(value)};".encode())
        for item in value:
            _hash_value(digest, item)
    elif isinstance(value, (str, bytes)):
        encoded = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        digest.update(f"{type(value).__name__} {len(encoded)};".encode() + encoded)
    elif value is None or isinstance(value, (bool, int)):
        digest.update(f"{type(value).__name__} {value};".encode())
    elif isinstance(value, float):
        digest.update(b"float " + struct.pack("<d", value))
    elif isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{value.dtype} {tuple(value.shape)};".encode())
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")  # numpy has no bfloat16
    elif type(value).__module__ == "numpy" and hasattr(value, "tobytes") and value.dtype.hasobject is False:
        digest.update(f"{value.dtype} {tuple(value.shape)};".encode() + value.tobytes())
    else:
        raise TypeError(
            f"a row of the dataset holds a {type(value).__name__}, of which no fingerprint can be made; the ledger "
            "could not tell what was spent on it; use datasets.Dataset, or rows of plain values, tensors and arrays."
        )
