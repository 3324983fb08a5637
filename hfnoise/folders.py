"""Whether a folder can be written to, found out before anything is trained; and folders that are whole or not."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hfnoise.errors import UsageError


def check_writable(output_dir: str) -> None:
    """Raise ValueError if nothing can be written to `output_dir`, without creating it.

    Args:
        output_dir (`str`): a folder, which need not exist yet.

    Raises:
        ValueError: which folder cannot be written and why.

    Example:
        >>> from hfnoise.folders import check_writable
        >>> check_writable("a/folder/to/be")
    """
    path = Path(output_dir).absolute()
    try:
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        if not existing.is_dir():
            raise NotADirectoryError(f"{str(existing)!r} is a file")
        with tempfile.NamedTemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"output_dir {output_dir!r} cannot be written ({error}); choose another folder.") from None


def output_folder(output_dir: str | Path) -> Path:
    """Return the folder that a command will write to; it need not exist yet.

    Args:
        output_dir (`str` or `Path`): as given on the command line.

    Raises:
        UsageError: if nothing can be written there.

    Example:
        >>> from hfnoise.folders import output_folder
        >>> output_folder("a/folder/to/be").name
        'be'
    """
    try:
        check_writable(str(output_dir))
    except ValueError as error:
        raise UsageError(str(error)) from error
    return Path(output_dir)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give an empty folder beside `out`, which becomes `out` if the block ends well and vanishes if not.

    Args:
        out (`Path`): must not exist, or be an empty folder.

    Raises:
        OSError: if `out` holds something by then.

    Example:
        >>> from pathlib import Path
        >>> from hfnoise.folders import new_folder
        >>> with new_folder(Path("made")) as folder:
        ...     _ = (folder / "file").write_text("whole")
        >>> Path("made/file").read_text()
        'whole'
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        yield made
        made.chmod(0o755)  # a temporary folder is its owner's only
        os.replace(made, out)  # onto an empty folder, or none
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
