"""Rows for language modelling on the command line: texts, tokenised and cut into blocks."""

from __future__ import annotations

from itertools import chain
from typing import Any

from datasets import Dataset

from hfnoise.trainers.dataset_loading import EMBEDDED, load_splits
from hfnoise.worlds import docstrings

# Held-out texts of the docstrings world that are read: 60 000 bytes give the loss to within 0.01.
_HELD_OUT_BYTES = 60_000


def load_texts(script: Any) -> tuple[Any, Any]:
    """Return training and evaluation split with a column of text; of `hfnoise:docstrings`, the docstrings themselves.

    Args:
        script (`trl.ScriptArguments`): of the command line.

    Raises:
        ValueError: if there is no such dataset, split or column.
    """
    if script.dataset_name != EMBEDDED:
        return load_splits(script, "text")
    train = [document.text for document in docstrings.corpus("train")]
    held_out, size = [], 0
    for document in docstrings.corpus("validation"):
        held_out.append(document.text)
        size += len(document.text.encode())
        if size >= _HELD_OUT_BYTES:
            break
    return Dataset.from_dict({script.text_column: train}), Dataset.from_dict({script.text_column: held_out})


def text_blocks(texts: Any, tokenizer: Any, column: str, size: int) -> Dataset:
    """Return all texts, one after another with an end-of-text token between, cut into blocks of `size` tokens.

    What is left at the end is dropped. Every token but the first of a block is predicted.

    Args:
        texts (`datasets.Dataset`): with the column.
        tokenizer (`PreTrainedTokenizerBase`): with an end-of-text token.
        column (`str`): of the texts.
        size (`int`): tokens of a block, at least 2.

    Returns:
        `datasets.Dataset` with `input_ids` and `labels`.

    Raises:
        ValueError: if there is no such column, or not one whole block.
    """
    if column not in texts.column_names:
        raise ValueError(
            f"the dataset has no column {column!r}; it has {texts.column_names}. Name it by --text_column."
        )
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no end-of-text token (eos_token), which is put between texts.")
    encoded = tokenizer(list(texts[column]), add_special_tokens=False, verbose=False)["input_ids"]
    ids = list(chain.from_iterable((end, *row) for row in encoded))
    blocks = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
    if not blocks:
        raise ValueError(
            f"the texts have {len(ids)} tokens, fewer than one block of {size}. Set a smaller --block_size."
        )
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})
