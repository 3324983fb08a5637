"""A folder that is written to as a whole or not at all, over what an earlier save has left there."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def staged_folder(directory: str, last: str, variant: str | None = None) -> Iterator[str]:
    """Yield a folder whose content is in `directory` at the end of the block, unless it fails: a full disk changes
    nothing there.

    Args:
        directory (`str`): made if need be; gone again if it was made for nothing.
        last (`str`): the file that says that all is there, moved after the others.
        variant (`str`, *optional*): of the weights; those of others stay.

    Example:
        >>> from pathlib import Path
        >>> from hfnoise.pipelines.staged_folder import staged_folder
        >>> with staged_folder("saved", last="config.json") as folder:
        ...     _ = Path(folder, "config.json").write_text("{}")
        >>> [path.name for path in Path("saved").iterdir()]
        ['config.json']
    """
    existed = os.path.isdir(directory)
    os.makedirs(directory, exist_ok=True)
    # Inside, so that it is on the same disk and moving costs nothing.
    staging = tempfile.mkdtemp(prefix=".saving-", dir=directory)
    try:
        yield staging
        names = sorted(os.listdir(staging), key=lambda name: name == last)
        _remove_old_weights(directory, names, variant)
        for name in names:
            _replace(os.path.join(staging, name), os.path.join(directory, name), variant)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not existed and not os.listdir(directory):
            os.rmdir(directory)


def _replace(source: str, target: str, variant: str | None) -> None:
    """Move a file, or the files of a folder, to where others of an earlier save may be."""
    if os.path.isdir(source) and os.path.isdir(target):
        _remove_old_weights(target, os.listdir(source), variant)
        for name in os.listdir(source):
            _replace(os.path.join(source, name), os.path.join(target, name), variant)
        return
    if os.path.isdir(target):
        shutil.rmtree(target)
    os.replace(source, target)


def _remove_old_weights(folder: str, written: list[str], variant: str | None) -> None:
    """Remove weights that the written ones replace in other files: another number of shards would be read first."""
    marked = re.escape(f".{variant}") if variant else ""
    weights = re.compile(rf"(?P<stem>[^.]+?){marked}(-\d{{5}}-of-\d{{5}})?\.(safetensors|bin)")
    stems = {match["stem"] for match in map(weights.fullmatch, written) if match}
    for stem in stems:
        shards = re.compile(
            rf"{re.escape(stem)}({marked}(-\d{{5}}-of-\d{{5}})?\.(safetensors|bin)|\.(safetensors|bin)\.index{marked}\.json)"
        )
        for name in os.listdir(folder):
            if shards.fullmatch(name) and name not in written:
                os.remove(os.path.join(folder, name))
