"""Options of guidance that must be numbers: what else a file or a caller gives is named before it is compared."""

from __future__ import annotations

from numbers import Real
from typing import Any


def check_number(name: str, value: Any) -> None:
    """Raise unless an option is a real number, of Python or NumPy.

    Args:
        name (`str`): of the option.
        value: what was given.

    Raises:
        TypeError: if it is something else, a `bool` or a text with digits included.

    Example:
        >>> from hfnoise.guidance.number_check import check_number
        >>> check_number("eta", "0.5")
        Traceback (most recent call last):
        ...
        TypeError: eta must be a number, got '0.5' of type str.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}.")
