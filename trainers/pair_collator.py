"""A collator that brings the per-pair columns along and leaves the rest to the one it wraps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from hfnoise.trainers.preference_data import check_values


@dataclass
class PairColumnCollator:
    """Collates the columns that TRL's collator drops; the collator it wraps sees the examples it would see in TRL.

    Args:
        base (`Callable`): the collator of the stock Trainer, or the user's own.
        columns (`dict[str, str]`): batch key to dataset column.
        hidden (`frozenset[str]`, *optional*): columns that the stock Trainer would have removed before collating.
        options (`dict[str, str]`, *optional*): batch key to the option that names the column, for its check.
        annotators (`dict`, *optional*): number of each annotator, for the key `pair_annotator`.
    """

    base: Callable[[list[dict[str, Any]]], dict[str, Any]]
    columns: dict[str, str]
    hidden: frozenset[str] = frozenset()
    options: dict[str, str] = field(default_factory=dict)
    annotators: dict[Any, int] = field(default_factory=dict)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        extra = {
            key: self._tensor(key, [example[column] for example in examples])
            for key, column in self.columns.items()
            if column in examples[0]
        }
        visible = [{name: value for name, value in example.items() if name not in self.hidden} for example in examples]
        batch = {**self.base(visible), **extra}
        refuse_empty_answers(batch)
        return batch

    def _tensor(self, key: str, values: list[Any]) -> torch.Tensor:
        if key in self.options:  # the rows of a stream could not be checked before training
            check_values(values, "a batch", self.columns[key], self.options[key])
        if key == "pair_annotator":
            # An annotator first met in evaluation has no number; -1 keeps it out of the per-annotator figures.
            return torch.tensor([self.annotators.get(value, -1) for value in values], dtype=torch.long)
        return torch.tensor(values, dtype=torch.long if key == "pair_index" else torch.float32)


def refuse_empty_answers(batch: dict[str, Any]) -> None:
    """Raise ValueError if an answer has no token left: a prompt that fills `max_length` hides it from the loss.

    Text datasets are checked before training; with images the tokens are known here for the first time.
    """
    if "completion_mask" in batch and not bool(batch["completion_mask"].any(dim=1).all()):
        raise ValueError(
            f"a pair has a prompt that fills max_length, so no answer is left ({batch['completion_mask'].size(1)} "
            "tokens with its images). Raise max_length, set it to None, or shorten the prompts."
        )
