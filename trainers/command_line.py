"""Parsing of command lines and YAML into dataclasses, with usage errors instead of tracebacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from hfnoise.errors import UsageError


class NoiseParser(TrlParser):
    """TRL's parser, except that an error is a [`UsageError`] with one line, not pages of usage and a traceback."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def parse(prog: str, dataclass_types: Sequence[type], arguments: Sequence[str]) -> tuple[Any, ...]:
    """Return instances of the dataclasses, from `--config FILE` and the command line, which wins.

    Args:
        prog (`str`): how the command is called in messages.
        dataclass_types (`Sequence[type]`): dataclasses without common field names.
        arguments (`Sequence[str]`): the command line, without the command.

    Raises:
        UsageError: for an unknown option, a missing or malformed file, or a value that a dataclass refuses.
    """
    # One parser for one parse: TRL's keeps the defaults of an earlier YAML file.
    parser = NoiseParser(dataclass_types=list(dataclass_types), prog=prog)
    arguments = _split_equals(list(arguments), "--config")
    if arguments[-1:] == ["--config"]:
        raise UsageError("--config needs the name of a YAML file after it.")
    try:
        if "--config" in arguments:
            _check_yaml(Path(arguments[arguments.index("--config") + 1]))
        return tuple(parser.parse_args_and_config(arguments))
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(f"{error} (see {prog} --help)") from error


def _check_yaml(path: Path) -> None:
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise UsageError(f"the configuration file {str(path)!r} cannot be read: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise UsageError(
            f"the configuration file {str(path)!r} is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(content, dict):
        raise UsageError(f"the configuration file {str(path)!r} must hold lines of the form `option: value`.")


def _split_equals(arguments: list[str], flag: str) -> list[str]:
    """Return the arguments with `flag=value` as two of them, the only form TRL's parser knows."""
    split: list[str] = []
    for argument in arguments:
        split += [flag, argument[len(flag) + 1 :]] if argument.startswith(f"{flag}=") else [argument]
    return split


def take_option(arguments: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """Return the value of `flag`, if given, and the arguments without it.

    Raises:
        UsageError: if no value follows.
    """
    rest = _split_equals(list(arguments), flag)
    if flag not in rest:
        return None, rest
    at = rest.index(flag)
    if at + 1 == len(rest):
        raise UsageError(f"{flag} needs a value after it.")
    return rest[at + 1], [*rest[:at], *rest[at + 2 :]]
