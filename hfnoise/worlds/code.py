"""Code of the Python standard library, as private data of a kind that the docstrings model has not read.

The model of [`hfnoise.worlds.docstrings`] was trained on docstrings, in the clear. A run on other docstrings would
have next to nothing to learn, and a guarantee for documents that the model has read would mean nothing. Functions
without their docstrings are another kind of text: the model is public, the code is the private data.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

from hfnoise.worlds.standard_library import Document, standard_library_functions
from hfnoise.worlds.text_windows import corrupted_pairs, cut_into_rows, seeded_digest, text_windows

if TYPE_CHECKING:
    from datasets import Dataset

NAME = "hfnoise:code"  # on command lines and in cards
# 99 % of the rows take fewer than 96 tokens of the docstrings model, the rest is cut by max_length.
ROW_BYTES = 128
_FEWEST_BYTES = 32
_SPLITS = ("train", "validation")


def code_texts(split: str = "train", size: int | None = None) -> Dataset:
    """Return rows of code for language modelling; a module is in one split only.

    Args:
        split (`str`, defaults to `"train"`): `"train"` (7 of 8 modules) or `"validation"`.
        size (`int`, *optional*): number of rows; all of them by default, about 30000 and 7000.

    Returns:
        `datasets.Dataset` with the string columns `text` (at most 128 bytes), `function` and `module`; the last two
        can be units of privacy (`unit_column`). A smaller `size` gives the first rows of a larger one, which are of
        functions in random order.

    Raises:
        ValueError: if the split is unknown or the size out of range.

    Example:
        >>> from hfnoise.worlds.code import code_texts
        >>> code_texts("validation", size=3).column_names
        ['text', 'function', 'module']
    """
    rows = _rows(_checked(split))
    return _dataset([*rows[: _checked_size(size, len(rows), split)]])


def code_pairs(split: str = "train", size: int = 1000, seed: int = 0) -> Dataset:
    """Return preference pairs: the true continuation of a piece of code against a subtly corrupted one.

    Args:
        split (`str`, defaults to `"train"`): `"train"` or `"validation"`, of the modules as in [`code_texts`].
        size (`int`, defaults to `1000`): number of pairs.
        seed (`int`, defaults to `0`): another seed draws other pieces and other errors.

    Returns:
        `datasets.Dataset` with the string columns `prompt`, `chosen`, `rejected`, at most 96 tokens together.

    Raises:
        ValueError: if the split is unknown or the size out of range.

    Example:
        >>> from hfnoise.worlds.code import code_pairs
        >>> code_pairs("validation", size=3).column_names
        ['prompt', 'chosen', 'rejected']
    """
    windows = text_windows(_functions(_checked(split)))
    pairs = list(islice(corrupted_pairs(windows, seed), size))
    _checked_size(size, len(pairs), split)
    return _dataset(pairs)


@lru_cache(maxsize=2)
def _rows(split: str) -> tuple[dict[str, str], ...]:
    return tuple(
        {"text": text, "function": document.name, "module": document.module}
        for document in sorted(_functions(split), key=lambda document: seeded_digest(0, document.name))
        for text in cut_into_rows(document.text, ROW_BYTES)
        if len(text.encode()) >= _FEWEST_BYTES
    )


def _functions(split: str) -> list[Document]:
    return [document for document in standard_library_functions() if _split_of(document.module) == split]


def _split_of(module: str) -> str:
    return "validation" if hashlib.sha256(module.encode()).digest()[0] < 32 else "train"


def _checked(split: str) -> str:
    if split not in _SPLITS:
        raise ValueError(f"split must be one of {', '.join(_SPLITS)}, got {split!r}.")
    return split


def _checked_size(size: int | None, available: int, split: str) -> int:
    if size is None:
        return available
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= available:
        raise ValueError(f"size must be from 1 to {available}, the {split} rows of this Python, got {size!r}.")
    return size


def _dataset(rows: list[dict[str, str]]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_list(rows)
