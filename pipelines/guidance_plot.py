"""The picture of a guidance report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfnoise.pipelines.guidance_report import GuidanceReport

# Of 1 - similarity, which is what the axis is logarithmic in: between 0.99 and 0.999 lies what matters.
_TICKS = {1.0: "0", 0.1: "0.9", 0.01: "0.99", 1e-3: "0.999", 1e-4: "0.9999", 1e-5: "0.99999"}
# float32 has no cosines between 1 - 1e-7 and 1.
_LEAST_DISTANCE = 1e-6
# So many lines can be told apart by their colour.
_MOST_LABELS = 10


def plot_report(report: GuidanceReport, path: str | Path, threshold: float | None = None) -> None:
    """Write the picture of [`GuidanceReport.plot`].

    Args:
        report ([`GuidanceReport`]): of a run.
        path (`str` or `Path`): a PNG, SVG or PDF file; its folder is made if it is missing.
        threshold (`float`, *optional*): draws a line at it.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.guidance_plot import plot_report
        >>> from hfnoise.pipelines.guidance_report import GuidanceReport
        >>> plot_report(GuidanceReport(torch.tensor([[0.9], [0.99], [torch.nan]]), (2,), (2, 2, 1), 1), "report.png")
    """
    from matplotlib.figure import Figure

    is_measured = not bool(report.similarity.isnan().all())
    figure = Figure(figsize=(6.4, 5.4 if is_measured else 3.2), layout="constrained")
    if is_measured:
        trace, bars = figure.subplots(2, sharex=True, height_ratios=(3, 2))
        _plot_similarity(trace, report, threshold)
    else:
        bars = figure.subplots()
    _plot_rows(bars, report)
    figure.suptitle(str(report), fontsize=9)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _plot_similarity(axes: Any, report: GuidanceReport, threshold: float | None) -> None:
    distance = (1 - report.similarity).clamp(min=_LEAST_DISTANCE)
    few = report.batch <= _MOST_LABELS
    for sample, stop in enumerate(report.stop_steps):
        values = distance[:, sample]
        (line,) = axes.plot(
            values.tolist(), marker=".", markersize=4, linewidth=1.2, alpha=1.0 if few else 0.5,
            label=f"sample {sample}" if few else None,
        )  # fmt: skip
        measured = [step for step, value in enumerate(values.tolist()) if value == value and (stop or 0) >= step]
        if stop is not None and measured:
            # Where the last cosine was measured: guidance ends at the step after it, or at it.
            axes.plot(measured[-1], values[measured[-1]], marker="o", markersize=8, color=line.get_color())
    if threshold is not None:
        axes.axhline(
            max(1 - threshold, _LEAST_DISTANCE), color="black", linewidth=0.8, linestyle=":",
            label=f"threshold {threshold:g}",
        )  # fmt: skip
    axes.plot([], [], marker="o", markersize=8, color="black", linestyle="none", label="stopped after it")
    axes.set_yscale("log")
    axes.invert_yaxis()
    low = float(distance.nan_to_num(nan=1.0).min()) / 3
    ticks = [tick for tick in _TICKS if tick >= low]
    axes.set_yticks(ticks, labels=[_TICKS[tick] for tick in ticks])
    axes.minorticks_off()
    axes.set_ylabel("similarity of the predictions")
    axes.grid(axis="y", linewidth=0.4)
    axes.legend(frameon=False, fontsize=8, loc="lower right", ncols=2)


def _plot_rows(axes: Any, report: GuidanceReport) -> None:
    steps = range(len(report.rows))
    with_condition = [min(rows, report.batch) for rows in report.rows]
    without = [rows - report.batch for rows in report.rows]
    axes.bar(steps, with_condition, color="#4477aa", label="conditional")
    axes.bar(steps, without, bottom=with_condition, color="#ee8866", label="unconditional")
    full = report.predictions * report.batch
    axes.axhline(full, color="black", linewidth=0.8, linestyle="--", label="full guidance")
    axes.set(xlabel="step", ylabel="rows evaluated", ylim=(0, 1.35 * full))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center")
