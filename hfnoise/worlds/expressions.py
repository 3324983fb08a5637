"""A classification task on code: which kind of statement does an expression stand in?

An expression of the Python standard library is given without its statement (`len(value) == 1`, `memo.append(item)`),
and the label says whether it was tested, assigned, returned, raised or executed for its effect. A tiny model learns it
in seconds, from 20 % right by chance to about 60 %, and nobody gets all of it right: what is returned may look like
what is assigned. The docstrings model has read no code of functions, see [`hfnoise.worlds.code`].
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from hfnoise.worlds.standard_library import Document, standard_library_functions
from hfnoise.worlds.text_windows import cut_into_rows, seeded_digest

if TYPE_CHECKING:
    from datasets import Dataset

NAME = "hfnoise:expressions"  # in cards
KINDS = ("tested", "assigned", "returned", "raised", "executed")
# 95 % of the texts take at most 32 tokens of the docstrings model, half of them at most 17; the rest is cut.
TEXT_BYTES = 64
_FEWEST_BYTES = 12  # shorter ones (`x + 1`) say nothing
_PLACES: dict[type[ast.AST], tuple[str, int]] = {
    ast.If: ("test", 0),
    ast.While: ("test", 0),
    ast.Assign: ("value", 1),
    ast.Return: ("value", 2),
    ast.Raise: ("exc", 3),
    ast.Expr: ("value", 4),
}
_SPLITS = ("train", "validation")
_MOST_VALIDATION = 64  # of 256: a quarter of the functions


def expression_texts(split: str = "train", size: int | None = None) -> Dataset:
    """Return expressions with the kind of statement that they stand in, equally many of each kind.

    Single names and constants, which say nothing, and texts below 12 bytes are left out.

    Args:
        split (`str`, defaults to `"train"`): `"train"` (3 of 4 functions) or `"validation"`; a function is in one
            split only, and so is a text that stands in several.
        size (`int`, *optional*): number of rows, a multiple of 5; by default all that keep the kinds equal, about
            10000 and 3000.

    Returns:
        `datasets.Dataset` with the string columns `text` (at most 64 bytes; the beginning of longer ones) and
        `module`, and `label`, a `ClassLabel` of tested, assigned, returned, raised, executed. A smaller `size` gives
        the first rows of a larger one.

    Raises:
        ValueError: if the split is unknown or the size out of range.

    Example:
        >>> from hfnoise.worlds.expressions import expression_texts
        >>> expressions = expression_texts("validation", size=50)
        >>> expressions.features["label"].names
        ['tested', 'assigned', 'returned', 'raised', 'executed']
    """
    if split not in _SPLITS:
        raise ValueError(f"split must be one of {', '.join(_SPLITS)}, got {split!r}.")
    whole = size is None or (isinstance(size, int) and not isinstance(size, bool) and size > 0)
    if not whole or (size or 0) % len(KINDS):
        raise ValueError(f"size must be a multiple of {len(KINDS)} (the kinds have equal shares), got {size!r}.")
    by_kind = _reader().read(split, None if size is None else size // len(KINDS))
    most = len(KINDS) * min(map(len, by_kind))
    if size is not None and size > most:
        raise ValueError(f"size={size} is more than the {most} {split} rows that this Python gives. Ask for {most}.")
    from datasets import ClassLabel, Dataset, Features, Value

    # One of each kind, again and again: so the first rows of a larger set are a set of their own.
    groups = list(zip(*by_kind, strict=False))[: None if size is None else size // len(KINDS)]
    return Dataset.from_list(
        [{"text": text, "module": module, "label": kind} for row in groups for kind, (text, module) in enumerate(row)],
        features=Features({"text": Value("string"), "module": Value("string"), "label": ClassLabel(names=[*KINDS])}),
    )


class _Reader:
    """Reads functions in an order that looks random, and no more of them than are asked for."""

    def __init__(self) -> None:
        functions = sorted(standard_library_functions(), key=lambda document: seeded_digest(0, document.name))
        self._functions = iter(functions)
        self._seen: set[str] = set()
        self._rows: dict[str, list[list[tuple[str, str]]]] = {split: [[] for _ in KINDS] for split in _SPLITS}

    def read(self, split: str, count: int | None) -> list[list[tuple[str, str]]]:
        """Return text and module of at least `count` rows of every kind, or all there are."""
        rows = self._rows[split]
        while count is None or min(map(len, rows)) < count:
            document = next(self._functions, None)
            if document is None:
                break
            for text, kind in _expressions(document):
                if text not in self._seen:  # the first function keeps it, whatever its kind elsewhere
                    self._seen.add(text)
                    self._rows[_split_of(document.name)][kind].append((text, document.module))
        return rows


_reader = lru_cache(maxsize=1)(_Reader)


def _split_of(function: str) -> str:
    return "validation" if hashlib.sha256(function.encode()).digest()[0] < _MOST_VALIDATION else "train"


def _expressions(document: Document) -> Iterator[tuple[str, int]]:
    """Yield the beginning of every expression that is long enough, and its kind."""
    try:
        tree = ast.parse(document.text)
    except SyntaxError:  # dedenting has cut into a string of several lines
        return
    lines = [line.encode() for line in document.text.splitlines(keepends=True)]
    for node in ast.walk(tree):
        attribute, kind = _PLACES.get(type(node), ("", 0))
        value = getattr(node, attribute, None)
        # Single names and constants are the same in all places.
        if value is None or isinstance(value, (ast.Name, ast.Constant)):
            continue
        text = next(cut_into_rows(_source(lines, value), TEXT_BYTES), "")
        if len(text.encode()) >= _FEWEST_BYTES:
            yield text, kind


def _source(lines: list[bytes], node: ast.expr) -> str:
    """Return what `ast.get_source_segment` returns, without splitting the source anew for every node."""
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    if first == last:
        return lines[first][node.col_offset : node.end_col_offset].decode()
    parts = [lines[first][node.col_offset :], *lines[first + 1 : last], lines[last][: node.end_col_offset]]
    return b"".join(parts).decode()
