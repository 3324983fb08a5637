"""Reading JSON that somebody else may have written: what Python takes beyond the standard is refused."""

from __future__ import annotations

import json
from typing import Any

# Four times as deep as the deepest file of ours.
_MOST_DEPTH = 32


def parse_json(text: str | bytes, finite: bool = True) -> Any:
    """Return what a text of JSON holds.

    Python's own reader takes NaN and infinities, which compare as nothing and poison every sum, keeps the last of two
    entries of one name, and ends in a RecursionError in the depth.

    Args:
        text (`str` or `bytes`): of a file.
        finite (`bool`, defaults to `True`): whether NaN and infinities are refused.

    Raises:
        ValueError: if it is no JSON, holds NaN or infinities or an entry twice, or is nested too deeply.

    Example:
        >>> from hfnoise.strict_json import parse_json
        >>> parse_json('{"rate": NaN}')
        Traceback (most recent call last):
        ...
        ValueError: it holds NaN, which is no number of JSON
    """
    try:
        content = json.loads(
            text, parse_constant=_refuse if finite else None, parse_float=_finite if finite else None,
            object_pairs_hook=_once,
        )  # fmt: skip
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(content, 0)
    return content


def _refuse(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"it holds {text}, which is beyond the numbers of a float")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the entry {next(n for n in names if names.count(n) > 1)!r} twice")
    return content


def _check_depth(content: Any, depth: int) -> None:
    if depth > _MOST_DEPTH:
        raise ValueError(f"it is nested more than {_MOST_DEPTH} deep")
    for value in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        if isinstance(value, (dict, list)):
            _check_depth(value, depth + 1)
