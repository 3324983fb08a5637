"""Inject label noise at a known rate into a preference dataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from hfnoise.preference.pair_loss_table import check_flip_rate

FLIPPED_COLUMN = "flipped"
# The columns that identify an example; whatever else a dataset carries does not change which labels are flipped.
_IDENTITY = ("prompt", "chosen", "rejected")


def flip_labels(dataset: Any, flip_rate: float, seed: int = 0) -> Any:
    """Return the dataset with chosen and rejected swapped in a share `flip_rate` of the examples.

    Which examples are flipped depends on a hash of the example and of `seed`, compared with `flip_rate`: never on the
    order, the process or the number of rows. So every rank flips the same examples, and those flipped at a low rate
    stay flipped at a higher one. All columns that come in pairs (`chosen_ids` and `rejected_ids`, ...) are swapped.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): with columns `chosen` and `rejected`, plain text or
            messages.
        flip_rate (`float`): expected share of flipped labels, in [0, 0.5).
        seed (`int`, defaults to `0`): another seed flips other examples.

    Returns:
        A dataset of the same type with one more column, `flipped` (bool): the truth; the Trainers ignore it.

    Raises:
        ValueError: if the rate is out of range, the columns are missing, or the labels were flipped already.

    Example:
        >>> from datasets import Dataset
        >>> from hfnoise.preference import flip_labels
        >>> pairs = Dataset.from_dict({"chosen": [f"good {i}" for i in range(100)], "rejected": ["bad"] * 100})
        >>> sum(flip_labels(pairs, flip_rate=0.3, seed=0)["flipped"])
        31
    """
    if isinstance(flip_rate, bool) or not isinstance(flip_rate, (int, float)):
        raise ValueError(f"flip_rate must be a number in [0, 0.5), got {flip_rate!r}.")
    check_flip_rate(flip_rate)
    columns = dataset.column_names
    if columns is None:  # a streaming dataset may not know its columns
        columns = list(next(iter(dataset)))
    missing = [name for name in ("chosen", "rejected") if name not in columns]
    if missing:
        raise ValueError(f"flip_labels needs columns 'chosen' and 'rejected'; {missing} missing from {list(columns)}.")
    if FLIPPED_COLUMN in columns:
        raise ValueError(
            f"the dataset already has a column {FLIPPED_COLUMN!r}: its labels were flipped before. Flip the clean "
            "dataset instead, or remove that column first."
        )
    return dataset.map(_flip_example, fn_kwargs={"flip_rate": float(flip_rate), "seed": int(seed)})


def _flip_example(example: Mapping[str, Any], flip_rate: float, seed: int) -> dict[str, Any]:
    flipped = _unit_hash(example, seed) < flip_rate
    changes: dict[str, Any] = {FLIPPED_COLUMN: flipped}
    if flipped:
        for name in example:
            partner = name.replace("chosen", "rejected")
            if partner != name and partner in example:
                changes[name], changes[partner] = example[partner], example[name]
    return changes


def _unit_hash(example: Mapping[str, Any], seed: int) -> float:
    """Return a number in [0, 1) that depends on the example and the seed alone."""
    identity = [seed, *(example.get(name) for name in _IDENTITY)]
    text = json.dumps(identity, sort_keys=True, ensure_ascii=False)
    # 53 bits: every value is an exact float below 1.
    return (int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 11) / 2**53
