"""What every sub-command asks of its options, whatever parses them: YAML files, unknown names, what is missing."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from hfnoise.errors import UsageError


class UsageParser(argparse.ArgumentParser):
    """A parser whose faults are a [`UsageError`] of one line, not pages of usage.

    Example:
        >>> from hfnoise.command_options import UsageParser
        >>> UsageParser(prog="hfnoise demo").parse_args(["--sed", "3"])
        Traceback (most recent call last):
        ...
        hfnoise.errors.UsageError: unrecognized arguments: --sed 3 (see hfnoise demo --help)
    """

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def take_option(arguments: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """Return the value of `flag`, if given, and the arguments without it.

    Raises:
        UsageError: if no value follows.

    Example:
        >>> from hfnoise.command_options import take_option
        >>> take_option(["--seed", "3", "--config=run.yaml"], "--config")
        ('run.yaml', ['--seed', '3'])
    """
    rest = split_equals(arguments, flag)
    if flag not in rest:
        return None, rest
    at = rest.index(flag)
    if at + 1 == len(rest):
        raise UsageError(f"{flag} needs a value after it.")
    return rest[at + 1], [*rest[:at], *rest[at + 2 :]]


def split_equals(arguments: Sequence[str], flag: str) -> list[str]:
    """Return the arguments with `flag=value` as two of them, the only form TRL's parser knows.

    Example:
        >>> from hfnoise.command_options import split_equals
        >>> split_equals(["--config=run.yaml"], "--config")
        ['--config', 'run.yaml']
    """
    split: list[str] = []
    for argument in arguments:
        split += [flag, argument[len(flag) + 1 :]] if argument.startswith(f"{flag}=") else [argument]
    return split


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the options in a YAML file.

    Raises:
        UsageError: if it cannot be read, is not YAML, or holds something else than options.
    """
    import yaml

    try:
        with Path(path).open(encoding="utf-8") as file:
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


def option_names(arguments: Sequence[str]) -> list[str]:
    """Return the names of the options on a command line, as they were typed.

    Example:
        >>> from hfnoise.command_options import option_names
        >>> option_names(["--seed", "3", "--dtype=float16"])
        ['seed', 'dtype']
    """
    return [argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")]


def ask_for(needed: Mapping[str, str], given: Sequence[str]) -> None:
    """Raise unless all needed options are given; a beginning stands for the option, as argparse has it.

    Args:
        needed (`Mapping[str, str]`): names, and what each of them takes.
        given (`Sequence[str]`): names.

    Raises:
        UsageError: naming all that are missing.
    """
    names = {name.replace("-", "_") for name in given if name}
    lacking = [name for name in needed if not any(name.startswith(beginning) for beginning in names)]
    if lacking:
        raise UsageError(f"give {' and '.join(f'--{name} ({needed[name]})' for name in lacking)}.")


def refuse_unknown(prog: str, unknown: Sequence[str], known: Sequence[str], place: str = "") -> None:
    """Raise if there is an unknown option.

    Args:
        prog (`str`): how the command is called.
        unknown (`Sequence[str]`): names.
        known (`Sequence[str]`): names that might have been meant.
        place (`str`): where they stand, with a space before it.

    Raises:
        UsageError: naming the first, and what was probably meant.
    """
    for name in unknown:
        close = get_close_matches(name, known, n=1)
        hint = f" Did you mean --{close[0]}?" if close else ""
        raise UsageError(f"unknown option --{name}{place}.{hint} (see {prog} --help)")
