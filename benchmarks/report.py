"""The report: one page from the results of all benchmarks, with the ratios of every method to stock and to peers."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from hfnoise.benchmarks.comparison import PEER, STOCK, Comparison, Ratio
from hfnoise.benchmarks.published import Found, published, read_all
from hfnoise.benchmarks.reporting import markdown
from hfnoise.benchmarks.results import REPORT, folder_of
from hfnoise.benchmarks.table import BENCHMARKS, FAMILIES, Benchmark

_LONGEST_TABLE = 45  # lines of a result that is shown in whole; a longer one is linked
_WITHOUT_SPREAD = 0.02  # by which a single measurement must differ from 1 to count

_HEAD = """# Benchmarks

<!-- Written by `hfnoise bench --report_only`; changes by hand are lost. -->

Every method beside the class that it replaces and the best other way to the same end, in one run of one machine.

**How to read it.** Everything is a cost or an error, so less is better, and a ratio is *ours / theirs*: **below 1 is
in our favour**, above 1 against us. The brackets hold the spread: plus and minus a standard error over the seeds, or
the range over the cases that were timed in turn; no brackets, no spread was taken. "Stock" is what users of Hugging
Face have today, "peer" the other way that did best; the sections below hold all of them.

**How to run it.** `hfnoise bench` takes a quarter of an hour: each benchmark with one seed or two, short
runs and small models, to see that it works and which way it points; it proves nothing. `hfnoise bench --size full` is
what is quoted here and takes many hours; `hfnoise bench NAME --size full` runs one of them. In a checkout `make bench`
and `make bench SIZE=full` write this page.
"""


def write_report(folder: Path) -> Path:
    """Write the report and its picture from the results that lie below a folder, and return its path.

    Args:
        folder (`Path`): of the report; results are in `results/` and `results/small/`.
    """
    from hfnoise.benchmarks.summary_plot import draw

    full = {**published(), **read_all(folder, "full")}
    picture = folder_of(folder, "full") / "summary.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    shown = [(one, full[one.name].comparisons) for one in BENCHMARKS if one.name in full]
    draw(shown, picture)
    path = folder / REPORT
    path.write_text(page(folder), encoding="utf-8")
    return path


def page(folder: Path) -> str:
    """Return the text of the report.

    Args:
        folder (`Path`): as for [`write_report`].
    """
    full, small = {**published(), **read_all(folder, "full")}, read_all(folder, "small")
    return "\n".join(_page(full, small, folder))


def _page(full: dict[str, Found], small: dict[str, Found], folder: Path) -> Iterator[str]:
    yield _HEAD
    yield "## Where and with what\n"
    yield _circumstances(full, small)
    yield "## Summary\n"
    yield "![Ratios of all methods to stock classes and to peers](results/summary.png)\n"
    yield _summary(full, small)
    if any(one.run and one.run.missing for one in small.values()):
        missing = sorted({name for one in small.values() if one.run for name in one.run.missing})
        yield f"Not installed where the small runs were made, and so not measured there: {', '.join(missing)}.\n"
    yield "## Against us\n"
    yield _against(full, small)
    for family, title in FAMILIES.items():
        yield f"## {title}\n"
        for one in BENCHMARKS:
            if one.family == family:
                yield from _section(one, full.get(one.name), small.get(one.name), folder)


def _circumstances(full: dict[str, Found], small: dict[str, Found]) -> str:
    rows = []
    for size, found in (("full", full), ("small", small)):
        groups: dict[tuple[str, str], list[Found]] = {}
        for one in found.values():
            if one.about["commit"]:
                groups.setdefault((one.about["machine"], _versions(one)), []).append(one)
        for (machine, versions), ones in groups.items():
            dates = sorted({one.about["date"] for one in ones if one.about["date"]})
            days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}" if dates else ""
            rows.append([size, str(len(ones)), days, machine, versions])
    note = (
        "Commit, day and seeds of each result stand in its section; results older than this page have the day of "
        "their commit. Small runs have one seed or two and few repeats, and share their machine with whatever else "
        "runs on it: their ratios are noisy.\n"
    )
    loads = [one.run.load for one in small.values() if one.run and one.run.load]
    if loads:
        note += f"\nWhen the small runs began, {statistics.median(loads):.1f} processes were running in the median.\n"
    return f"{markdown(['size', 'results', 'days', 'machine', 'versions'], rows)}\n{note}"


def _versions(found: Found) -> str:
    return f"Python {found.about['python']}, {found.about['versions']}"


def _summary(full: dict[str, Found], small: dict[str, Found]) -> str:
    rows = []
    for one in BENCHMARKS:
        if one.name not in full:
            continue
        in_small = small[one.name].comparisons if one.name in small else []
        for stock, peer in by_quantity(full[one.name].comparisons):
            shown = stock or peer
            assert shown is not None
            again = [_small(each, in_small, small.get(one.name)) for each in (stock, peer) if each]
            rows.append([
                f"`{shown.method}`" if " " not in shown.method else shown.method, shown.quantity, shown.ours,
                *_cells(stock), *_cells(peer), " / ".join(again), _link(one.name),
            ])  # fmt: skip
    header = [
        "method",
        "cost or error",
        "ours",
        "stock",
        "ratio",
        "best peer",
        "ratio",
        "small run",
        "`hfnoise bench`",
    ]
    return markdown(header, rows)


def by_quantity(comparisons: Sequence[Comparison]) -> list[tuple[Comparison | None, Comparison | None]]:
    """Return, for each method and quantity, the comparison with stock and that with the peer that does best."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for one in comparisons:
        groups.setdefault((one.method, one.quantity), []).append(one)
    return [
        (
            next((one for one in group if one.kind == STOCK), None),
            max((one for one in group if one.kind == PEER), key=lambda one: one.ratio.value, default=None),
        )
        for group in groups.values()
    ]


def _cells(one: Comparison | None) -> list[str]:
    return [f"{one.against}: {one.theirs}", show(one.ratio)] if one else ["", ""]


def _small(one: Comparison, in_small: Sequence[Comparison], run: Found | None) -> str:
    same = [
        each for each in in_small if (each.method, each.quantity, each.kind) == (one.method, one.quantity, one.kind)
    ]
    for each in same:
        if each.against == one.against:
            return number(each.ratio.value)
    if run and run.run and run.run.error:
        return "failed"
    missing = run.run.missing if run and run.run else []
    if one.package in missing:
        return f"{one.package} not installed"
    # Another peer did best there.
    return f"{number(same[0].ratio.value)} to {same[0].against}" if same else "–"


def number(value: float) -> str:
    """Return a ratio with as many digits as it is read with.

    Example:
        >>> from hfnoise.benchmarks.report import number
        >>> [number(value) for value in (3.4e-05, 0.0457, 0.68, 1.0041, 4.989, 45.3)]
        ['3.4e-05', '0.046', '0.680', '1.004', '4.99', '45.3']
    """
    if value < 0.01 or value >= 1000:
        return f"{value:.1e}"
    return f"{value:.{3 if value < 2 else 2 if value < 10 else 1}f}"


def show(ratio: Ratio) -> str:
    """Return a ratio and the ends of its spread."""
    ends = "" if math.isnan(ratio.low) else f" [{number(ratio.low)}, {number(ratio.high)}]"
    return f"**{number(ratio.value)}**{ends}"


def is_against(ratio: Ratio) -> bool:
    """Return whether ours is worse or dearer by more than the spread."""
    return ratio.value > 1 + _WITHOUT_SPREAD if math.isnan(ratio.low) else ratio.low > 1


def _against(full: dict[str, Found], small: dict[str, Found]) -> str:
    header = ["method", "cost or error", "ours", "against", "theirs", "ratio", "`hfnoise bench`"]
    rows, lines = [], []
    for one in BENCHMARKS:
        if one.name in full:
            rows += [
                [each.method, each.quantity, each.ours, each.against, each.theirs, show(each.ratio), _link(one.name)]
                for each in full[one.name].comparisons
                if is_against(each.ratio)
            ]
            lines += [f"- missed in {_link(one.name)}: {missed}" for missed in full[one.name].missed]
    for size, runs in (("full", full), ("small", small)):
        for name, found in runs.items():
            if found.run and found.run.error:
                lines.append(f"- the {size} run of {_link(name)}: {found.run.error}")
    words = "Where ours costs more, or is worse, by more than the spread; privacy and fewer bits have their price:\n"
    bounds = ["Bounds that the benchmarks set themselves and missed, and runs that failed:\n", *lines]
    return "\n".join([words, markdown(header, rows), *(bounds if lines else [])]) + "\n"


def _link(name: str) -> str:
    return f"[{name}](#{name})"


def _section(one: Benchmark, full: Found | None, small: Found | None, folder: Path) -> Iterator[str]:
    yield f"### {one.name}\n"
    yield f"{one.question}\n"
    if one.limits:
        yield f"{one.limits}\n"
    # What was run, where that is known: the table may have changed since.
    given = [found.run.arguments if found and found.run else one.arguments(size)
             for found, size in ((full, "full"), (small, "small"))]  # fmt: skip
    commands = [shlex.join(["python", "-m", one.path, *arguments]) for arguments in given]
    yield f"`hfnoise bench {one.name} --size full` is `{commands[0]}`, the small size `{commands[1]}`.\n"
    for size, found in (("Full", full), ("Small", small)):
        if found and found.about["commit"]:
            yield f"{size}: {_about(found)}\n"
        if found and found.run and found.run.error:
            yield f"**{size} run: {found.run.error}**\n"
    shown = "full" if full and full.here else "small" if small else ""
    if full and full.comparisons:
        rows = [
            [each.method, each.quantity, each.ours, each.against, each.theirs, show(each.ratio), each.ratio.spread]
            for each in full.comparisons
        ]
        header = ["method", "cost or error", "ours", "against", "theirs", "ratio", "spread"]
        yield markdown(header, rows)
    if shown:
        yield from _results(one, folder, shown)


def _about(found: Found) -> str:
    about = found.about
    seeds = about["seeds"]
    words = [f"commit {about['commit']}", about["date"]]
    if len(seeds) > 1:
        words.append(f"{len(seeds)} seeds")
    if found.run:
        words.append(f"{found.run.processor_seconds:.0f} s of the processor")
    return ", ".join(word for word in words if word) + "."


def _results(one: Benchmark, folder: Path, size: str) -> Iterator[str]:
    """Give the table of the run and its pictures; links are relative to the report."""
    results = folder_of(folder, size)
    place = results.relative_to(folder).as_posix()
    table = results / f"{one.name}.md"
    if table.is_file():
        lines = table.read_text(encoding="utf-8").strip().splitlines()
        if len(lines) <= _LONGEST_TABLE:
            # Headings of a result are none of the page.
            yield "\n".join(f"**{line.lstrip('# ')}**" if line.startswith("#") else line for line in lines) + "\n"
        else:
            yield f"[All tables]({place}/{table.name})\n"
    for stem in (one.name, *one.pictures):
        if (results / f"{stem}.png").is_file():
            yield f"![{stem.replace('_', ' ')}]({place}/{stem}.png)\n"
