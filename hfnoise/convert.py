"""`hfnoise convert KIND SRC DST`: checkpoints of other projects in the form that is used here, and back."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from hfnoise.commands import CONVERSIONS
from hfnoise.errors import UsageError


def main(arguments: Sequence[str]) -> int:
    """Run `hfnoise convert` from a command line and return the exit code.

    Args:
        arguments (`Sequence[str]`): the kind of checkpoint, one of [`~hfnoise.commands.CONVERSIONS`], then its own.

    Raises:
        UsageError: for an unknown kind, or what it refuses.

    Example:
        >>> from hfnoise.convert import main
        >>> main(["unet", "there", "here"])
        Traceback (most recent call last):
        ...
        hfnoise.errors.UsageError: say what to convert: npnet, oms (see hfnoise convert --help); got 'unet'.
    """
    kind, *rest = arguments or [""]
    if kind in ("-h", "--help"):
        width = max(len(one.name) for one in CONVERSIONS)
        rows = [f"  {one.name:<{width}}  {one.help}" for one in CONVERSIONS]
        print("\n".join(["usage: hfnoise convert KIND SRC DST  (hfnoise convert KIND --help says more)", "", *rows]))
        return 0
    for one in CONVERSIONS:
        if one.name == kind:
            module, _, function = one.launch.partition(":")
            return int(getattr(import_module(module), function)(rest) or 0)
    known = ", ".join(one.name for one in CONVERSIONS)
    got = f"; got {kind!r}" if kind else ""
    raise UsageError(f"say what to convert: {known} (see hfnoise convert --help){got}.")
