"""Parsing of command lines and YAML into dataclasses, with usage errors instead of tracebacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from hfnoise.errors import UsageError


class NoiseParser(TrlParser):
    """TRL's parser, except that an error is a [`UsageError`] with one line, not pages of usage and a traceback."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def parse(
    prog: str,
    dataclass_types: Sequence[type],
    arguments: Sequence[str],
    needed: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Any, ...]:
    """Return instances of the dataclasses, from `--config FILE` and the command line, which wins.

    Args:
        prog (`str`): how the command is called in messages.
        dataclass_types (`Sequence[type]`): dataclasses without common field names.
        arguments (`Sequence[str]`): the command line, without the command.
        needed (`Mapping[str, str]`): options that must be given, and what each of them takes. They are asked for
            first: whoever has not named a model yet is not helped by what another option lacks.

    Raises:
        UsageError: for an unknown option, a missing or malformed file, or a value that a dataclass refuses.
    """
    # One parser for one parse: TRL's keeps the defaults of an earlier YAML file.
    parser = NoiseParser(dataclass_types=list(dataclass_types), prog=prog)
    arguments = _split_equals(list(arguments), "--config")
    if arguments[-1:] == ["--config"]:
        raise UsageError("--config needs the name of a YAML file after it.")
    settings: dict[str, Any] = {}
    if "--config" in arguments:
        settings = _read_yaml(Path(arguments[arguments.index("--config") + 1]))
    options = [argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")]
    _ask_for(needed, [*settings, *options])
    known = [option[2:] for option in parser._option_string_actions if option.startswith("--")] + ["config"]
    # argparse takes the beginning of an option for the option; a file has to name it in full.
    _refuse_unknown(prog, [name for name in options if not any(option.startswith(name) for option in known)], known)
    _refuse_unknown(prog, [name for name in settings if name not in (*known, "env")], known, " in the --config file")
    try:
        return tuple(parser.parse_args_and_config(arguments))
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(f"{error} (see {prog} --help)") from error


def given_names(arguments: Sequence[str]) -> set[str]:
    """Return the names of the options on a command line and in its `--config` file, without their values.

    Example:
        >>> from hfnoise.trainers.command_line import given_names
        >>> sorted(given_names(["--seed", "3", "--use_cpu"]))
        ['seed', 'use_cpu']
    """
    file, rest = take_option(arguments, "--config")
    names = {argument[2:].partition("=")[0].replace("-", "_") for argument in rest if argument.startswith("--")}
    return names if file is None else names | set(_read_yaml(Path(file)))


def _ask_for(needed: Mapping[str, str], given: Sequence[str]) -> None:
    """Raise UsageError naming all needed options that are not given; argparse takes a beginning for the option."""
    names = {name.replace("-", "_") for name in given if name}
    lacking = [name for name in needed if not any(name.startswith(beginning) for beginning in names)]
    if lacking:
        raise UsageError(f"give {' and '.join(f'--{name} ({needed[name]})' for name in lacking)}.")


def _refuse_unknown(prog: str, unknown: Sequence[str], known: Sequence[str], place: str = "") -> None:
    """Raise UsageError naming the first unknown option, if there is one, and what was probably meant."""
    for name in unknown:
        close = get_close_matches(name, known, n=1)
        hint = f" Did you mean --{close[0]}?" if close else ""
        raise UsageError(f"unknown option --{name}{place}.{hint} (see {prog} --help)")


def _read_yaml(path: Path) -> dict[str, Any]:
    """Return the options in a YAML file."""
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
    return content


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
