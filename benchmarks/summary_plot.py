"""One picture of all ratios: every method beside stock and beside the best peer, on a logarithmic axis."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfnoise.benchmarks.comparison import Comparison
from hfnoise.benchmarks.table import FAMILIES, Benchmark

# Ratios beyond are drawn at the edge with their number: a few are exact against something that is broken.
LOWEST, HIGHEST = 0.02, 12.0


def draw(shown: Sequence[tuple[Benchmark, Sequence[Comparison]]], path: Path) -> None:
    """Write the picture.

    Args:
        shown (`Sequence[tuple[Benchmark, Sequence[Comparison]]]`): rows of the table, with what was found.
        path (`Path`): of the PNG.
    """
    # Here: the command's help must not wait for matplotlib.
    from matplotlib.figure import Figure

    from hfnoise.benchmarks.report import by_quantity

    lines: list[tuple[str, Comparison | None, Comparison | None] | str] = []
    for family, title in FAMILIES.items():
        of_family = [found for one, found in shown if one.family == family and found]
        lines += [title] if of_family else []
        for found in of_family:
            for stock, peer in by_quantity(found):
                either = stock or peer
                assert either is not None
                lines.append((f"{either.method}: {either.quantity}", stock, peer))
    figure = Figure(figsize=(11, 1.6 + 0.235 * len(lines)), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_xlim(LOWEST * 0.72, HIGHEST * 1.4)
    axes.set_ylim(len(lines) - 0.3, -0.9)
    axes.axvspan(LOWEST * 0.72, 1, color="tab:green", alpha=0.07, linewidth=0)
    axes.axvspan(1, HIGHEST * 1.4, color="tab:red", alpha=0.07, linewidth=0)
    axes.axvline(1, color="black", linewidth=0.8)
    labels, places = [], []
    for place, line in enumerate(lines):
        if isinstance(line, str):
            axes.axhline(place - 0.5, color="0.6", linewidth=0.5)
            labels.append(line)
        else:
            labels.append(textwrap.shorten(line[0], 92, placeholder=" ..."))
            for one, colour, marker, shift in ((line[1], "tab:blue", "o", -0.13), (line[2], "tab:orange", "D", 0.13)):
                if one:
                    _mark(axes, one, place + shift, colour, marker)
        places.append(place)
    axes.set_yticks(places, labels, fontsize=7.5)
    for tick, line in zip(axes.get_yticklabels(), lines, strict=True):
        tick.set_fontweight("bold" if isinstance(line, str) else "normal")
    axes.tick_params(axis="y", length=0)
    ticks = [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.tick_params(axis="x", top=True, labeltop=True)
    axes.grid(axis="x", color="0.85", linewidth=0.5)
    axes.set_xlabel("cost or error, ours / theirs (logarithmic): left of 1 ours is better, right of 1 the other")
    for colour, marker, words in (("tab:blue", "o", "to stock"), ("tab:orange", "D", "to the best peer")):
        axes.plot([], [], color=colour, marker=marker, linestyle="", markersize=5, label=words)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def _mark(axes: Any, one: Comparison, place: float, colour: str, marker: str) -> None:
    value, low, high = one.ratio.value, one.ratio.low, one.ratio.high
    drawn = min(max(value, LOWEST), HIGHEST)
    if drawn != value:
        axes.plot(drawn, place, color=colour, marker="<" if value < LOWEST else ">", markersize=5)
        axes.annotate(f"{value:.0e}" if value < LOWEST else f"{value:.0f}", (drawn, place), (5, 0),
                      textcoords="offset points", fontsize=6.5, va="center", color=colour)  # fmt: skip
        return
    if not math.isnan(low):
        axes.plot([max(low, LOWEST), min(high, HIGHEST)], [place, place], color=colour, linewidth=1.6, alpha=0.7)
    axes.plot(drawn, place, color=colour, marker=marker, markersize=4.2)
