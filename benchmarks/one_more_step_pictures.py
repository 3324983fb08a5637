"""The picture of benchmarks/one_more_step.py: how bright the images of each prompt are, by where they start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfnoise.benchmarks.one_more_step_starts import MATCHED, OMS, WHITE
from hfnoise.worlds.brightness import PROMPTS, brightness_error

_TITLES = {"white noise": WHITE, "One More Step": OMS, "One More Step with terminal prior": MATCHED}
_COLOURS = ("#264653", "#e9a03b", "#c8553d")
# What is drawn as black and as white: three standard deviations beyond the dark and the bright prompt.
_RANGE = 1.3
_BINS = [0.065 * number - _RANGE for number in range(41)]
_PICTURES, _GAP = 6, 4


def plot(seen: dict[str, Any], path: Path) -> None:
    """Write histograms of the brightness by prompt, over those of real images, and some of the images.

    The number beside a start is its Wasserstein-1 distance from the real images.

    Args:
        seen (`dict[str, Any]`): of [`~hfnoise.benchmarks.one_more_step.run`].
        path (`Path`): of the PNG.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows = {"real images": seen["real"]}
    rows |= {name: seen["drawn"][start] for name, start in _TITLES.items()}
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    axes = figure.subplots(len(rows), 2, width_ratios=(3, 2), sharex="col", sharey="col")
    for (histogram, pictures), (name, latents) in zip(axes, rows.items(), strict=True):
        for number, colour in enumerate(_COLOURS):
            chosen = seen["prompts"] == number
            real, drawn = (images[chosen].mean((1, 2, 3)).tolist() for images in (seen["real"], latents))
            histogram.hist(real, _BINS, color=colour, alpha=0.3)
            if latents is not seen["real"]:
                histogram.hist(drawn, _BINS, histtype="step", linewidth=1.8, color=colour)
        error = brightness_error(latents, seen["real"], seen["prompts"])
        title = name if latents is seen["real"] else f"{name}: {error:.3f} from them"
        histogram.set_title(title, loc="left", fontweight="bold")
        histogram.set_ylabel("images")
        pictures.imshow(_tiles(latents, seen["prompts"]), cmap="gray", vmin=-_RANGE, vmax=_RANGE, aspect="auto")
        height = latents.shape[2] + _GAP
        pictures.set_yticks([height * (number + 0.5) for number in range(len(PROMPTS))], PROMPTS)
        pictures.set_xticks([])
        pictures.tick_params(length=0)
        for label, colour in zip(pictures.get_yticklabels(), _COLOURS, strict=True):
            label.set_color(colour)
        pictures.spines[:].set_visible(False)
    axes[-1, 0].set_xlabel("brightness: mean of the latents")
    axes[0, 1].set_title(f"some of them: -{_RANGE} is black, {_RANGE} white", loc="left")
    named = zip(PROMPTS, _COLOURS, strict=True)
    handles: list[Any] = [Patch(color=colour, label=f'"{name}"') for name, colour in named]
    handles += [Patch(color="0.8", label="real images"), Line2D([], [], color="0.3", label="samples of DDIM")]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _tiles(latents: Tensor, prompts: Tensor) -> Tensor:
    """Return the first images of each prompt in rows, as means over the channels, with white gaps."""
    size = latents.shape[-1]
    sheet = torch.full((len(PROMPTS) * (size + _GAP), _PICTURES * (size + _GAP)), float("nan"))
    for row in range(len(PROMPTS)):
        for column, image in enumerate(latents[prompts == row][:_PICTURES].mean(1)):
            top, left = row * (size + _GAP), column * (size + _GAP)
            sheet[top : top + size, left : left + size] = image
    return sheet
