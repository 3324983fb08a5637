"""The pictures of a column as one, and what stands below it."""

from __future__ import annotations

from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from hfnoise.pipelines.picture_files import save_grid
from noise_space.drawing import Column


def grid_picture(images: tuple[Image.Image, ...]) -> Image.Image:
    """Return all pictures in one, small ones enlarged pixel by pixel."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "grid.png"
        save_grid(list(images), path)
        with Image.open(path) as grid:
            return grid.copy()


def caption(column: Column, stock: Column | None) -> str:
    """Return what a column cost, as HTML.

    Args:
        column ([`Column`]): that was drawn, or refused.
        stock ([`Column`], *optional*): to compare with.
    """
    if column.refusal:
        return f'<div class="refused" role="alert"><b>Not drawn.</b> {escape(column.refusal)}</div>'
    if column.evaluations is None:
        cost = "<b>?</b> evaluations: hfnoise does not know this pipeline"
    else:
        cost = f"<b>{column.evaluations:g}</b> evaluations per picture{_share(column, stock)}"
    lines = [cost]
    if column.start_evaluations:
        lines.append(f"and {column.start_evaluations:g} of a small network before the first step")
    lines.append(f"{column.seconds:.2f} s for {len(column.images)} picture{'s' if len(column.images) > 1 else ''}")
    shown = "".join(f"<div>{line}</div>" for line in lines)
    notes = "".join(f"<li>{escape(note)}</li>" for note in column.notes)
    return f'<div class="cost">{shown}</div>' + (f'<ul class="notes">{notes}</ul>' if notes else "")


def _share(column: Column, stock: Column | None) -> str:
    if stock is None or stock.name == column.name or not stock.evaluations or column.evaluations is None:
        return ""
    change = round(100 * (column.evaluations / stock.evaluations - 1))
    return f' <span class="share">{change:+d} %</span>' if change else ' <span class="share">as CFG</span>'
