"""What people type, checked: a message that says what was given, what is allowed and what to do."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

# numpy and the Trainers take no larger seed.
LARGEST_SEED = 2**32 - 1
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def whole_number(value: Any, name: str, least: int, most: int) -> int:
    """Return a whole number within bounds.

    Raises:
        ValueError: for anything else.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not number.is_integer() or not least <= number <= most:
        given = "nothing" if value in (None, "") else repr(value)
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {given}.")
    return int(number)


def number(value: Any, name: str, least: float, most: float) -> float:
    """Return a number within bounds.

    Raises:
        ValueError: for anything else.
    """
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if isinstance(value, bool) or not least <= found <= most:
        given = "nothing" if value in (None, "") else repr(value)
        raise ValueError(f"{name} must be a number from {least:g} to {most:g}, got {given}.")
    return found


def text(value: Any, name: str, most: int = 1000) -> str:
    """Return a text that says something.

    Raises:
        ValueError: if there is none, or it is longer than `most` characters.
    """
    found = value.strip() if isinstance(value, str) else ""
    if not found:
        raise ValueError(f"{name} is empty: type one.")
    if len(found) > most:
        raise ValueError(f"{name} has {len(found)} characters; at most {most} are taken.")
    return found


def repository(value: Any, name: str) -> str:
    """Return a Hub id, or a folder or file of this machine.

    On Hugging Face, where the variable SPACE_ID is set, only Hub ids are taken: whoever visits a public Space has no
    business among the files of its machine.

    Raises:
        ValueError: if it is neither.
    """
    found = text(value, name, most=300)
    if _HUB_ID.fullmatch(found) and not Path(found).exists():
        return found
    if os.environ.get("SPACE_ID"):
        raise ValueError(f"{name} must be a Hub id such as owner/name, got {found!r}: a Space reads no local files.")
    if not Path(found).expanduser().exists():
        raise ValueError(f"{name} {found!r} is neither a Hub id such as owner/name nor a folder that exists here.")
    return str(Path(found).expanduser())
