"""What the options of guiders are checked by, and how stock code that makes a guider is kept from its notice."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.guiders import guider_utils

# diffusers says of every guider that is made that "guiders are an experimental feature": of its own, and of ours too.
_NOTICE = "experimental feature"


def check_numbers(**options: Any) -> None:
    """Refuse what is no number, which would be found out by a comparison, without the name of the option.

    Args:
        options: values by name; `None` is left to whoever asks.

    Raises:
        TypeError: if one is of another type.
        ValueError: if one is a whole number beyond the range of floats.

    Example:
        >>> from hfnoise.pipelines.guider_options import check_numbers
        >>> check_numbers(threshold="0.99")
        Traceback (most recent call last):
        ...
        TypeError: threshold must be a number, got '0.99' of type str.
    """
    for name, value in options.items():
        # A tensor or a scalar of numpy compares as a number, but no configuration can hold it.
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}.")
        if isinstance(value, int) and abs(value) > sys.float_info.max:
            raise ValueError(f"{name} must be a number that a float can hold, got {value!r:.40}.")


def check_flags(**options: Any) -> None:
    """Refuse what is neither `True` nor `False`: a text such as `"no"` would be true.

    Args:
        options: values by name.

    Raises:
        TypeError: if one is of another type.

    Example:
        >>> from hfnoise.pipelines.guider_options import check_flags
        >>> check_flags(enabled="no")
        Traceback (most recent call last):
        ...
        TypeError: enabled must be True or False, got 'no' of type str.
    """
    for name, value in options.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}.")


@contextmanager
def without_notice() -> Iterator[None]:
    """Within the block the notice of diffusers about experimental guiders is not logged; all else is."""

    def is_other(record: logging.LogRecord) -> bool:
        return _NOTICE not in record.getMessage()

    logger = guider_utils.logger
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def described(value: Any) -> str:
    """Return what was given in the place of an object, with what to do where its class was.

    Example:
        >>> from hfnoise.pipelines.guider_options import described
        >>> described(dict)
        'the class dict: make one, dict()'
    """
    if isinstance(value, type):
        return f"the class {value.__name__}: make one, {value.__name__}()"
    return type(value).__name__
