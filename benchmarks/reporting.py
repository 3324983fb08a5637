"""What every benchmark writes: a table on the terminal, JSON with its circumstances, and a PNG beside it."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hfnoise

_FOLDER = Path(__file__).parent
# Results are written into the checkout; only code that was changed makes a commit another one.
_CODE = ("hfnoise", "trainers", "pipelines", "model_cards", "benchmarks")


def circumstances(seeds: Sequence[int]) -> dict[str, Any]:
    """Return commit, date, versions, machine and seeds of a run."""
    # Here: `hfnoise bench --help` need not import the libraries.
    from hfnoise.cards import library_versions

    return {
        "commit": commit(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "versions": library_versions(),
        "python": platform.python_version(),
        "machine": machine(),
        "seeds": list(seeds),
    }


def commit() -> str:
    """Return the commit of the checkout, with "-dirty" if its code was changed since, or the installed version."""
    # A virtual environment may lie in somebody else's checkout, whose commit says nothing of hfnoise.
    if not _git("ls-files", Path(__file__).name):
        return f"hfnoise {hfnoise.__version__}, installed"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *(f":/{part}" for part in _CODE))
    return _git("describe", "--always") + ("-dirty" if changed else "")


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(_FOLDER), *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def machine() -> str:
    """Return architecture, number of cores and, where Linux tells it, the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return ", ".join([platform.machine(), f"{os.cpu_count()} cores", *names[:1]])


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
    from rich.console import Console
    from rich.table import Table

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
