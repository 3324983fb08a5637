"""The figures of the full runs, shipped with the package: a copy without docs/ shows them beside its own."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from hfnoise.benchmarks.comparison import Comparison, Ratio
from hfnoise.benchmarks.reporting import write_json
from hfnoise.benchmarks.results import Run, folder_of, read_result, read_runs
from hfnoise.benchmarks.table import BENCHMARKS, Benchmark

FILE = "published.json"


@dataclass(frozen=True)
class Found:
    """What a run of a benchmark found.

    Args:
        comparisons (`Sequence[Comparison]`): ratios to stock classes and peers.
        about (`dict[str, Any]`): commit, date, machine, versions, python, seeds.
        missed (`Sequence[str]`): acceptance bounds that were not met.
        run (`Run`, *optional*): how it went, if `hfnoise bench` ran it.
        here (`bool`): whether its files lie beside the report.
    """

    comparisons: Sequence[Comparison]
    about: dict[str, Any]
    missed: Sequence[str] = ()
    run: Run | None = None
    here: bool = True


def read_all(folder: Path, size: str) -> dict[str, Found]:
    """Return what the runs of a size found, by benchmark; a run that failed is there without comparisons.

    Args:
        folder (`Path`): of the report.
        size (`str`): "small" or "full".
    """
    runs = read_runs(folder, size)
    found = {}
    for one in BENCHMARKS:
        content = read_result(folder_of(folder, size) / f"{one.name}.json")
        if content is not None or one.name in runs:
            found[one.name] = _found(one, content or {}, runs.get(one.name))
    return found


def _found(one: Benchmark, content: dict[str, Any], run: Run | None) -> Found:
    about = {key: content.get(key, "") for key in ("commit", "date", "machine", "versions", "python", "seeds")}
    missed = [statement for statement, passed in content.get("acceptance", []) if not passed]
    comparisons = one.compare(content) if one.compare and content else []
    return Found([each for each in comparisons if not math.isnan(each.ratio.value)], about, missed, run)


def publish(found: dict[str, Found]) -> None:
    """Write the figures of full runs into the package of this checkout."""
    content = {
        name: {"about": one.about, "comparisons": [asdict(each) for each in one.comparisons], "missed": one.missed}
        for name, one in found.items()
    }
    write_json(Path(__file__).parent / FILE, content)


def published() -> dict[str, Found]:
    """Return the shipped figures of the full runs."""
    content = json.loads((files("hfnoise.benchmarks") / FILE).read_text(encoding="utf-8"))
    return {
        name: Found(
            [Comparison(**{**each, "ratio": Ratio(**each["ratio"])}) for each in one["comparisons"]],
            one["about"], one["missed"], here=False,
        )
        for name, one in content.items()
    }  # fmt: skip
