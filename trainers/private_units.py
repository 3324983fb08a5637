"""What is protected: rows, pairs, or all rows of a user; and which rows of a unit a step uses."""

from __future__ import annotations

import datetime
import math
from typing import Any

import torch
from torch import Tensor

from hfnoise.privacy.keyed_random import KeyedRandom


class Units:
    """The units of a dataset: each of its rows, or the rows that share a value of `unit_column`.

    Args:
        rows (`int`): rows of the dataset.
        names (`list`, *optional*): the value of the unit column for each row, see `unit_names`.
        max_rows (`int`, defaults to `1`): rows of a unit that a step may use.

    Example:
        >>> from hfnoise.trainers.private_units import Units
        >>> Units(rows=4, names=["ann", "bob", "ann", "ann"], max_rows=2).count
        2
    """

    def __init__(self, rows: int, names: list[Any] | None = None, max_rows: int = 1) -> None:
        self.max_rows = max_rows
        self._members: list[Tensor] | None = None
        self.count = rows
        if names is not None:
            places: dict[Any, list[int]] = {}
            for row, name in enumerate(names):
                places.setdefault(name, []).append(row)
            # In order of first appearance: the same on every process.
            self._members = [torch.tensor(members) for members in places.values()]
            self.count = len(self._members)

    def rows(self, units: Tensor, random: KeyedRandom, step: int) -> tuple[Tensor, Tensor]:
        """Return the rows that a micro-batch uses, always `max_rows` for each place.

        A unit with more rows than `max_rows` brings a choice of them, drawn anew at each step; one with fewer, and an
        empty place, are filled up with rows that do not count.

        Args:
            units (`Tensor[size]`): units of the micro-batch, -1 for an empty place.
            random ([`KeyedRandom`]): of the run.
            step (`int`): of the run.

        Returns:
            rows `Tensor[size * max_rows]` of int64 and whether each counts, a bool tensor of that shape.
        """
        if self._members is None:
            return units.clamp(min=0), units >= 0
        rows, counts = [], []
        for unit in units.tolist():
            members = self._members[max(unit, 0)]
            chosen = self._choice(members, max(unit, 0), random, step)
            filled = torch.full((self.max_rows,), int(members[0]))
            filled[: chosen.numel()] = chosen
            rows.append(filled)
            counts.append(torch.arange(self.max_rows) < (chosen.numel() if unit >= 0 else 0))
        return torch.cat(rows), torch.cat(counts)

    def _choice(self, members: Tensor, unit: int, random: KeyedRandom, step: int) -> Tensor:
        """Return at most `max_rows` of the rows of a unit, each choice equally likely."""
        if members.numel() <= self.max_rows:
            return members
        order = random.uniforms(f"rows of {unit}", step, members.numel()).argsort()
        return members[order[: self.max_rows].sort().values]


def unit_names(dataset: Any, column: str) -> list[Any]:
    """Return the unit of each row, as values that are equal where they say the same.

    Tensors, which a dataset with a format returns, are equal only to themselves: every row would be a unit of its own,
    and all rows of a user would have many times the stated epsilon. Rows without a name (None, NaN) are one unit.

    Args:
        dataset (`datasets.Dataset`): with the column.
        column (`str`): of strings, whole numbers, dates, or lists of them.

    Raises:
        ValueError: for values of which it is not known whether two are the same.
    """
    return [_plain_name(name) for name in dataset[column]]


def _plain_name(name: Any) -> Any:
    if hasattr(name, "tolist"):  # of torch, numpy or jax
        name = name.tolist()
    if isinstance(name, float) and math.isnan(name):
        return None
    if isinstance(name, (list, tuple)):
        return tuple(_plain_name(part) for part in name)
    if not isinstance(name, (str, bytes, bool, int, float, datetime.date, type(None))):
        raise ValueError(
            f"the unit column holds a {type(name).__name__}, of which it is not known whether two are the same: rows "
            "of one unit could be taken for several, and epsilon would not be that of the unit. Use strings or whole "
            "numbers."
        )
    return name
