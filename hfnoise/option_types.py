"""Configuration fields, held to the types of their annotations: YAML, JSON and callers give what they like."""

from __future__ import annotations

import math
import os
import types
import typing
from enum import Enum
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

# What a seed or a count may be at most; torch and pyarrow take 64 bits.
_MOST_INT = 2**63
_WORDS: dict[Any, str] = {
    bool: "True or False", int: "a whole number", float: "a finite number", str: "a text", dict: "a mapping",
    type(None): "None",
}  # fmt: skip


class _Mismatch(Exception):
    """The value is not of the type."""


def check_option_types(config: Any, owner: type, *inherited: str) -> None:
    """Give the fields that a dataclass declares the types of their annotations, or raise for one that has another.

    Numbers may come as text (YAML 1.1 reads `1e-4` as one), whole numbers as floats, texts as paths, lists as
    tuples. A `bool` is no number, and no text is a `bool`: `"no"` would be true.

    Args:
        config: an instance of `owner`, of which a value is replaced where it is given in another form.
        owner (`type`): the dataclass whose own fields are looked at, not those that it inherits.
        *inherited (`str`): names of inherited fields to look at as well.

    Raises:
        ValueError: naming the field, what it was given, and what it takes.

    Example:
        >>> from dataclasses import dataclass
        >>> from hfnoise.option_types import check_option_types
        >>> @dataclass
        ... class Options:
        ...     rate: float = 0.1
        >>> options = Options(rate="1e-4")
        >>> check_option_types(options, Options)
        >>> options.rate
        0.0001
    """
    hints = _hints(owner)
    for name in (*owner.__dict__.get("__annotations__", ()), *inherited):
        value = getattr(config, name)
        try:
            made = _as(value, hints[name])
        except _Mismatch:
            raise ValueError(_refusal(name, value, hints[name]) + _help(owner, name)) from None
        if made is not value:
            setattr(config, name, made)


def wrong_type(owner: type, name: str, value: Any, texts: bool = True) -> str:
    """Return why a value is not of the type of a field, inherited or not; nothing if it is.

    Args:
        owner (`type`): a dataclass.
        name (`str`): of the field; one that there is not takes anything.
        value: what was given.
        texts (`bool`, defaults to `True`): leave texts to the parser of the command line, which reads all options
            from texts; of what a program has stored they are wrong where no text is wanted.

    Example:
        >>> from dataclasses import dataclass
        >>> from hfnoise.option_types import wrong_type
        >>> @dataclass
        ... class Options:
        ...     rate: float = 0.1
        >>> wrong_type(Options, "rate", [0.1])
        'rate must be a finite number, got [0.1] of type list.'
    """
    wanted = _hints(owner).get(name, Any)
    if texts and isinstance(value, float) and math.isinf(value):
        return ""  # stock fields take it, such as max_grad_norm; ours are looked at again
    try:
        made = _as(value, wanted)
    except _Mismatch:
        return "" if texts and isinstance(value, str) else _refusal(name, value, wanted)
    is_read = isinstance(value, str) and not isinstance(made, str)
    return _refusal(name, value, wanted) if is_read and not texts else ""


@lru_cache(maxsize=64)
def _hints(owner: type) -> dict[str, Any]:
    return typing.get_type_hints(owner)


def _as(value: Any, wanted: Any) -> Any:
    """Return the value in a type that it is given for."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return _as_one_of(value, arguments)
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise _Mismatch
        made = [_as(entry, arguments[0]) for entry in value]
        return value if isinstance(value, list) and made == value else made
    if wanted is Any or (origin is typing.Literal and value in arguments):
        return value
    if wanted is float:
        return _number(value)
    if wanted is int:
        return _whole(value)
    if wanted is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if wanted is bool and getattr(getattr(value, "dtype", None), "kind", "") == "b":  # of numpy
        return bool(value)
    if isinstance(wanted, type) and issubclass(wanted, Enum) and value in [one.value for one in wanted]:
        return value  # stock enums are texts, and compare as such
    if origin is typing.Literal or not isinstance(value, origin or wanted):
        raise _Mismatch
    return value


def _as_one_of(value: Any, wanted: tuple[Any, ...]) -> Any:
    # As it is, if that will do: of `float | str` a text is the class's own to read.
    for one in wanted:
        plain = typing.get_origin(one) or one
        if plain is not float and plain is not int and plain is not list and isinstance(value, plain):
            return value
    for one in wanted:
        try:
            return _as(value, one)
        except _Mismatch:
            continue
    raise _Mismatch


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (Real, str)):
        raise _Mismatch
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise _Mismatch from None
    if not math.isfinite(number):
        raise _Mismatch
    return value if isinstance(value, (int, float)) else number


def _whole(value: Any) -> int:
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else _number(value)
    if isinstance(number, str) or number != int(number) or not -_MOST_INT < number < _MOST_INT:
        raise _Mismatch
    return int(number)


def _refusal(name: str, value: Any, wanted: Any) -> str:
    return f"{name} must be {_described(wanted)}, got {value!r:.80} of type {type(value).__name__}."


def _help(owner: Any, name: str) -> str:
    """Return what the option is, which says its range too."""
    text = owner.__dataclass_fields__[name].metadata.get("help", "")
    return f" {name}: {text}" if text else ""


def _described(wanted: Any) -> str:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_described(one) for one in arguments)
    if origin is list:
        return f"a list of {_described(arguments[0]).removeprefix('a ')}s"
    plain = origin or wanted
    return _WORDS.get(plain, getattr(plain, "__name__", str(plain)))


def check_least(config: Any, least: int, *names: str) -> None:
    """Raise unless the fields of these names, where they are given, are at least so large.

    Args:
        config: with fields that are numbers or `None`.
        least (`int`): smallest number allowed.
        *names (`str`): of the fields.

    Raises:
        ValueError: naming the first that is smaller.

    Example:
        >>> from types import SimpleNamespace
        >>> from hfnoise.option_types import check_least
        >>> check_least(SimpleNamespace(rows=3, top=None), 1, "rows", "top")
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
