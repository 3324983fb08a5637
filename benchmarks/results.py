"""Where results lie below the folder of a report, and what is known of the runs that made them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

REPORT = "benchmarks.md"


@dataclass(frozen=True)
class Run:
    """How a benchmark was run.

    Args:
        arguments (`list[str]`): its command line.
        code (`str`): name of the code.
        seconds (`float`): it took.
        processor_seconds (`float`): of all its processes, which other work on the machine changes less.
        load (`float`): average of the machine's running processes in the minute before; 0 where it is not known.
        missing (`list[str]`): packages of peers that were not installed.
        error (`str`): why it failed, or "".
    """

    arguments: list[str]
    code: str
    seconds: float
    processor_seconds: float
    load: float
    missing: list[str]
    error: str

    def failed(self, error: str) -> Run:
        """Return the same run with an error."""
        return replace(self, error=error)


def folder_of(folder: Path, size: str) -> Path:
    """Return where the results of a size lie."""
    return folder / "results" if size == "full" else folder / "results" / size


def runs_file(folder: Path, size: str) -> Path:
    """Return the file that says how the benchmarks were run."""
    return folder_of(folder, size) / "runs.json"


def read_runs(folder: Path, size: str) -> dict[str, Run]:
    """Return what is known of the runs of a size; nothing, where none was made by `hfnoise bench`."""
    path = runs_file(folder, size)
    if not path.is_file():
        return {}
    try:
        return {name: Run(**run) for name, run in json.loads(path.read_text(encoding="utf-8")).items()}
    except (TypeError, ValueError):  # of another version, or cut off: what it tells of is run again
        return {}


def read_result(path: Path) -> dict[str, Any] | None:
    """Return a result, or `None` where there is none."""
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
