"""Pictures side by side: CFG, Adaptive Guidance and APG at growing scales, with the evaluations they took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hfnoise.benchmarks.guidance_runs import Subject, draw
from hfnoise.pipelines import AdaptiveGuidance

SCALES = (3.0, 7.5, 15.0)
_COLUMNS = 5
_COUNT = 10


def side_by_side(subject: Subject, apg: Any, seed: int, steps: int, path: Path) -> None:
    """Write a grid: a row for each method, a column for each scale; the images of a place have one prompt and noise.

    Args:
        subject ([`~hfnoise.benchmarks.guidance_runs.Subject`]): who draws.
        apg ([`ProjectedGuidance`]): options of the last row.
        seed (`int`): of the noise.
        steps (`int`): of the scheduler.
        path (`Path`): of the picture.
    """
    from matplotlib.figure import Figure

    every = subject.world.combinations()
    # Spread over the combinations, those that were held out first, where there are some.
    held_out = every[subject.world.is_held_out(every)]
    chosen = held_out if len(held_out) else every
    labels = chosen[torch.linspace(0, len(chosen) - 1, _COUNT).round().long()]
    methods = {"CFG": None, "Adaptive Guidance, 0.99": AdaptiveGuidance(threshold=0.99), "APG": apg}
    figure = Figure(figsize=(4 * len(SCALES), 2.1 * len(methods)), layout="constrained")
    grid = figure.subplots(len(methods), len(SCALES), squeeze=False)
    for panels, (name, guider) in zip(grid, methods.items(), strict=True):
        for axes, scale in zip(panels, SCALES, strict=True):
            drawn = draw(subject, labels, seed, steps, scale, guider)
            framed = torch.nn.functional.pad(drawn.images, (1, 1, 1, 1), value=0.5)
            rows = [torch.cat(list(row), dim=2) for row in framed.split(_COLUMNS)]
            picture = torch.cat(rows, dim=1).permute(1, 2, 0).numpy()
            if picture.shape[2] == 1:
                axes.imshow(picture[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            else:
                axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
            axes.set_title(f"{name}, scale {scale:g}: {drawn.evaluations:.1f} evaluations", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
