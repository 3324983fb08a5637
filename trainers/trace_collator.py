"""Batches of reasoning pairs: every row becomes a pair with traces and a pair without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trl.trainer.dpo_trainer import DataCollatorForPreference


@dataclass
class DataCollatorForTracePreference(DataCollatorForPreference):
    """Collates B rows of BVPO into a batch of 2 B ordinary preference pairs: B with traces, then the same B without.

    The rows of the batch are trace chosen, empty chosen, trace rejected, empty rejected, B each, so whatever splits a
    preference batch in its middle sees ordinary pairs. Nothing is truncated: a cut answer would be another answer.

    Args:
        pad_token_id (`int`): padding token.
        max_length (`int`, *optional*): a longer branch is an error here; the Trainer drops such rows before.
        truncation_mode (`str`): has no effect; kept for the signature of the stock collator.
        pad_to_multiple_of (`int`, *optional*): pad to a multiple of this length.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids`, `attention_mask`, `completion_mask` of shape `(4 B, length)`, and, if
        the rows hold two of each, `ref_chosen_logps` and `ref_rejected_logps` of shape `(2 B,)`.

    Raises:
        ValueError: if a branch is longer than `max_length`.

    Example:
        >>> from hfnoise import DataCollatorForTracePreference
        >>> row = {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5],
        ...        "nothink_prompt_ids": [1], "nothink_chosen_ids": [6], "nothink_rejected_ids": [7]}
        >>> DataCollatorForTracePreference(pad_token_id=0)([row])["input_ids"].tolist()
        [[1, 2, 3, 4], [1, 6, 0, 0], [1, 2, 5, 0], [1, 7, 0, 0]]
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of the rows."""
        pairs = [_pair(example, "", 0) for example in examples] + [
            _pair(example, "nothink_", 1) for example in examples
        ]
        for place, pair in enumerate(pairs):
            length = len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
            if self.max_length is not None and length > self.max_length:
                raise ValueError(
                    f"row {place % len(examples)} of the batch has a branch of {length} tokens, above max_length="
                    f"{self.max_length}: cutting it would train on half an answer. Raise max_length or drop the row."
                )
        batch: dict[str, Any] = super().torch_call(pairs)
        return batch


def _pair(example: dict[str, Any], kind: str, place: int) -> dict[str, Any]:
    pair = {name: example[kind + name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    references = ("ref_chosen_logps", "ref_rejected_logps")
    return pair | {name: example[name][place] for name in references if name in example}
