"""What every benchmark writes: a table on the terminal, JSON with its circumstances, and a PNG beside it."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hfnoise.cards import library_versions


def circumstances(seeds: Sequence[int]) -> dict[str, Any]:
    """Return commit, versions, machine and seeds of a run."""
    return {
        "commit": _commit(),
        "versions": library_versions(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seeds": list(seeds),
    }


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "not a git checkout"


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error; the error of a single value is not known, so NaN."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def show(value: tuple[float, float]) -> str:
    """Return mean and standard error as text, in per cent."""
    mean, error = value
    return f"{100 * mean:.1f}" if math.isnan(error) else f"{100 * mean:.1f} ± {100 * error:.1f}"


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to the terminal."""
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=max(100, Console().width)).print(table)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the table as Markdown, to be pasted into the docs."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def judge(checks: Sequence[tuple[str, bool]]) -> str:
    """Print which acceptance bounds are met and return the same as a list in Markdown.

    Args:
        checks (`Sequence[tuple[str, bool]]`): statements, and whether they hold.
    """
    for statement, passed in checks:
        print(f"{'ok  ' if passed else 'MISS'} {statement}")
    return "".join(f"- {'met' if passed else '**missed**'}: {statement}\n" for statement, passed in checks)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write the results with sorted keys, so that two runs can be compared line by line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
