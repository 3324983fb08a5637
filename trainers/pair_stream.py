"""Checks of a streaming preference dataset, pair by pair as it comes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from hfnoise.trainers.preference_data import has_distinct_answers

logger = logging.getLogger(__name__)

_SHOWN_CHARACTERS = 80


@dataclass
class StreamedPairFilter:
    """Lets the pairs through that can be trained on; the others raise, or are dropped with one warning.

    Args:
        name (`str`): how messages call the dataset.
        max_length (`int`, *optional*): tokens of prompt and answer together.
        truncation_mode (`str`): `"keep_start"` or `"keep_end"`.
        drop (`bool`): whether to drop instead of to raise.
    """

    name: str
    max_length: int | None
    truncation_mode: str
    drop: bool
    warned: bool = False

    def __call__(self, example: dict[str, Any]) -> bool:
        reason = self._fault(example)
        if reason is None:
            return True
        prompt = str(example.get("prompt", ""))[:_SHOWN_CHARACTERS]
        message = f"a pair of {self.name} {reason} (prompt {prompt!r})"
        if not self.drop:
            raise ValueError(f"{message}. Remove such pairs or set drop_invalid_pairs=True to train without them.")
        if not self.warned:
            logger.warning("%s: dropped, as all such pairs will be.", message)
            self.warned = True
        return False

    def _fault(self, example: dict[str, Any]) -> str | None:
        limit = self.max_length
        if limit is not None and self.truncation_mode == "keep_start" and len(example["prompt_ids"]) >= limit:
            return f"has a prompt that fills max_length={limit}, so no answer is left"
        if not has_distinct_answers(example, limit, self.truncation_mode):
            return f"has identical answers (up to max_length={limit})"
        return None
