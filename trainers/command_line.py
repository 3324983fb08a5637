"""Parsing of command lines and YAML into dataclasses, with usage errors instead of tracebacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

from trl import TrlParser

from hfnoise.command_options import ask_for, option_names, read_yaml, refuse_unknown, split_equals, take_option
from hfnoise.errors import UsageError
from hfnoise.option_types import wrong_type

__all__ = ["NoiseParser", "given_names", "parse", "take_option"]

RESUME = "resume_from_checkpoint"


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
    arguments = split_equals(arguments, "--config")
    if arguments[-1:] == ["--config"]:
        raise UsageError("--config needs the name of a YAML file after it.")
    settings: dict[str, Any] = {}
    if "--config" in arguments:
        settings = read_yaml(arguments[arguments.index("--config") + 1])
    options = option_names(arguments)
    ask_for(needed, [*settings, *options])
    known = [option[2:] for option in parser._option_string_actions if option.startswith("--")] + ["config"]
    # argparse takes the beginning of an option for the option; a file has to name it in full.
    refuse_unknown(prog, [name for name in options if not any(option.startswith(name) for option in known)], known)
    refuse_unknown(prog, [name for name in settings if name not in (*known, "env")], known, " in the --config file")
    # argparse reads texts; what YAML made numbers, lists and mappings of goes past it.
    for name, value in settings.items():
        if name == RESUME and isinstance(value, bool):
            continue
        for owner in dataclass_types:
            if reason := wrong_type(owner, name, value):
                raise UsageError(f"{reason} (see {prog} --help)")
    try:
        return tuple(map(_with_resume_words, parser.parse_args_and_config(arguments)))
    except UsageError:
        raise
    # A stock configuration fails as it happens to with a value that it does not expect.
    except Exception as error:
        kind = "" if isinstance(error, (ValueError, TypeError, ImportError)) else f"{type(error).__name__}: "
        raise UsageError(f"{kind}{error} (see {prog} --help)") from error


def _with_resume_words(parsed: Any) -> Any:
    # Declared as a text, which the Trainers take for the name of a folder; their `train` knows True and False.
    word = str(getattr(parsed, RESUME, None)).lower()
    if word in ("true", "false"):
        setattr(parsed, RESUME, word == "true")
    return parsed


def given_names(arguments: Sequence[str]) -> set[str]:
    """Return the names of the options on a command line and in its `--config` file, without their values.

    Example:
        >>> from hfnoise.trainers.command_line import given_names
        >>> sorted(given_names(["--seed", "3", "--use_cpu"]))
        ['seed', 'use_cpu']
    """
    file, rest = take_option(arguments, "--config")
    names = {name.replace("-", "_") for name in option_names(rest)}
    return names if file is None else names | set(read_yaml(file))
