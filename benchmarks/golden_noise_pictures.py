"""The pictures of the golden noise benchmark: scores against evaluations, and images of fixed seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfnoise.benchmarks.golden_noise_nets import OFFICIAL, OURS
from hfnoise.benchmarks.golden_noise_starts import BEST_OF, GOLDEN, NLG, Plain
from hfnoise.benchmarks.guidance_runs import Subject
from hfnoise.worlds.digits_checkpoints import load_digit_classifier

_STYLES = {
    GOLDEN: ("*", "C3"), OURS: ("D", "C1"), OFFICIAL: ("v", "C5"), NLG.format(5): ("P", "C4"),
    NLG.format(20): ("X", "C4"), BEST_OF[2]: ("o", "C0"), BEST_OF[4]: ("s", "C0"), "zero-order search": ("^", "C2"),
    "search over paths": ("h", "C2"),
}  # fmt: skip
_SHOWN = {
    "random": "plain",
    "golden: ReDenoise": GOLDEN,
    "golden: NoisePromptNet": OURS,
    "searched: best of 4": BEST_OF[4],
}
# Of the images of a start; and pixels of the picture for one of the image.
_COLUMNS, _ROWS, _SCALE = 10, 2, 4
_DISTANCES = (1, 2, 3, 4, 6, 8, 10, 15, 20, 30, 50)
_RIGHT, _WRONG = (0.75, 0.75, 0.75), (0.85, 0.15, 0.1)


def plot(found: dict[str, Any], steps: int, path: Path) -> None:
    """Write errors by the judge, and Fréchet distances, against evaluations: a column for each scale.

    Args:
        found (`dict`): of [`~hfnoise.benchmarks.golden_noise.run`].
        steps (`int`): of the sampler.
        path (`Path`): of the PNG.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure = Figure(figsize=(4.3 * len(found["refined"]) + 0.6, 8.2), layout="constrained")
    panels = figure.subplots(2, len(found["refined"]), sharex="col", sharey="row", squeeze=False)
    metrics = {
        "wrong by the judge, %": lambda one: 100 * (1 - one["judge_accuracy"]["mean"]),
        "Fréchet distance": lambda one: one["frechet_distance"]["mean"],
    }
    for row, (label, value) in zip(panels, metrics.items(), strict=True):
        row[0].set_ylabel(f"{label} (lower is better)")
        for axes, (scale, refined) in zip(row, found["refined"].items(), strict=True):
            _plain(axes, found["plain"], value, scale)
            for name, (marker, colour) in _STYLES.items():
                if name in refined:
                    size = 170 if marker == "*" else 70
                    axes.scatter(
                        refined[name]["evaluations"], value(refined[name]), s=size, c=colour, marker=marker,
                        label=name, edgecolors="white", linewidths=0.6, zorder=3,
                    )  # fmt: skip
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xticks([10, 20, 40, 80], ["10", "20", "40", "80"])
            if axes in panels[0]:
                axes.set_title(f"refined at CFG {scale:g}, {steps} steps", loc="left", fontweight="bold")
            else:
                axes.set_xlabel("evaluations an image")
            axes.grid(alpha=0.25)
    panels[0, 0].set_yscale("symlog", linthresh=1, linscale=0.5)
    panels[0, 0].set_ylim(-0.3, 100)
    panels[1, 0].set_yscale("log")
    for axes in panels[:, 0]:
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    _name_scales(panels[1], found["plain"])
    low, high = panels[1, 0].get_ylim()
    ticks = [one for one in _DISTANCES if low <= one <= high]
    panels[1, 0].set_yticks(ticks, map(str, ticks))
    handles = dict(zip(*reversed(panels[0, 0].get_legend_handles_labels()), strict=True))
    columns = 2 if len(panels[0]) == 1 else 4
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=110)


def _plain(axes: Any, plain: dict[Plain, Any], value: Any, scale: float) -> None:
    runs = sorted(plain, key=lambda run: run.evaluations)
    points = [(run.evaluations, value(plain[run])) for run in runs]
    axes.scatter(*zip(*points, strict=True), s=16, c="0.6", label="plain of another CFG (number)", zorder=2)
    own = [(run.evaluations, value(plain[run])) for run in runs if run.scale == scale]
    axes.plot(
        *zip(*own, strict=True), "o-", color="0.15", markersize=4, linewidth=1, label="plain of this CFG", zorder=2
    )
    least, front = float("inf"), []
    for evaluations, height in points:
        least = min(least, height)
        front.append((evaluations, least))
    axes.step(*zip(*front, strict=True), where="post", color="0.6", linewidth=1, linestyle="--", zorder=1,
              label="best plain for as much")  # fmt: skip


def _name_scales(row: Any, plain: dict[Plain, Any]) -> None:
    """Write beside the cheapest plain run of each scale which one it is."""
    for scale in sorted({run.scale for run in plain}):
        run = min((run for run in plain if run.scale == scale), key=lambda run: run.evaluations)
        for axes in row:
            axes.annotate(
                f"{scale:g}", (run.evaluations, plain[run]["frechet_distance"]["mean"]), (-5, 0), fontsize=8,
                textcoords="offset points", ha="right", va="center", color="0.4",
            )  # fmt: skip


def grid(shown: dict[float, dict[str, Tensor]], subject: Subject, checkpoint: str, path: Path) -> None:
    """Write images of the same noises by start, a column for each scale; framed red where the judge reads another one.

    Args:
        shown (`dict`): images in [0, 1] by scale and start.
        subject ([`~hfnoise.benchmarks.guidance_runs.Subject`]): who drew.
        checkpoint (`str`): whose judge is asked.
        path (`Path`): of the PNG.
    """
    from matplotlib.figure import Figure

    judge, labels = load_digit_classifier("judge", checkpoint), subject.labels(_COLUMNS * _ROWS)
    figure = Figure(figsize=(5.2 * len(shown), 1.3 * len(_SHOWN) + 0.4), layout="constrained")
    panels = figure.subplots(len(_SHOWN), len(shown), squeeze=False)
    for column, (scale, starts) in zip(panels.T, shown.items(), strict=True):
        for axes, (title, name) in zip(column, _SHOWN.items(), strict=True):
            images = starts[name][: _COLUMNS * _ROWS]
            right = (judge.predict(2 * images - 1) == labels[: len(images)]).all(1)
            axes.imshow(_sheet(images, right), interpolation="nearest")
            axes.set_title(f"{title}, CFG {scale:g}", loc="left", fontsize=10)
            axes.set_axis_off()
    figure.suptitle(
        "A place has one prompt in all, and the noise of the first row or, where it is searched, of a better one; "
        "red: the judge reads another one",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


def _sheet(images: Tensor, right: Tensor) -> Any:
    """Return images in rows, each in a frame that says whether it is right."""
    tiles = []
    for image, good in zip(images.expand(-1, 3, -1, -1), right.tolist(), strict=True):
        large = image.repeat_interleave(_SCALE, 1).repeat_interleave(_SCALE, 2)
        frame = torch.tensor(_RIGHT if good else _WRONG)[:, None, None]
        tile = frame.expand(3, *[side + 2 * _SCALE for side in large.shape[1:]]).clone()
        tile[:, _SCALE:-_SCALE, _SCALE:-_SCALE] = large
        tiles.append(torch.nn.functional.pad(tile, (2, 2, 2, 2), value=1.0))
    rows = [torch.cat(tiles[start : start + _COLUMNS], 2) for start in range(0, len(tiles), _COLUMNS)]
    return torch.cat(rows, 1).permute(1, 2, 0).numpy()
