"""What every sub-command asks of its options, whatever parses them: YAML files, unknown names, what is missing."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from hfnoise.errors import UsageError

# The longest of our examples has 4 kB. YAML of megabytes takes minutes to be read.
_MOST_BYTES = 2**18
# Options are lists or mappings at most. Its scanner takes time by the square of the depth.
_MOST_DEPTH = 32


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
    """Return the options in a YAML file, of which nothing but plain values is made.

    Raises:
        UsageError: if it cannot be read, is not YAML, or holds something else than options: twice the same, tags of
            Python, anchors (of which a file of a few lines can make gigabytes).
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"the configuration file {str(path)!r} cannot be read: {error.strerror}.") from None
    if len(content) > _MOST_BYTES:
        raise UsageError(
            f"the configuration file {str(path)!r} has more than {_MOST_BYTES} bytes: it holds no options."
        )
    try:
        found = _plain(content.decode("utf-8"))
    # What YAML takes for a date, a number or a boolean and is none ends in many ways.
    except Exception as error:
        raise UsageError(
            f"the configuration file {str(path)!r} is not valid YAML: {' '.join(str(error).split()):.500}"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise UsageError(f"the configuration file {str(path)!r} must hold lines of the form `option: value`.")
    return found


def _plain(text: str) -> Any:
    import yaml

    depth, names = 0, set()
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        depth += type(token).__name__.endswith("StartToken") - type(token).__name__.endswith("EndToken")
        line = token.start_mark.line + 1
        if isinstance(token, (yaml.AnchorToken, yaml.AliasToken)):
            raise ValueError(f"line {line} has an anchor or alias ({token.value}), which options do not take")
        if depth > _MOST_DEPTH:
            raise ValueError(f"line {line} is nested more than {_MOST_DEPTH} deep")
    loader = yaml.SafeLoader(text)
    node = loader.get_single_node()
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        if str(key.value) in names:
            raise ValueError(f"line {key.start_mark.line + 1} gives {key.value} a second time")
        names.add(str(key.value))
    return None if node is None else loader.construct_document(node)


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
