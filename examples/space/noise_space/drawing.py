"""Draws the columns of the first page, one after the other, from the same seeds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

import hfnoise
from noise_space.columns import ONE_MORE_STEP, Drawing, chosen_columns, start_network
from noise_space.counting import counted, denoisers_of
from noise_space.models import use_pipeline
from noise_space.notes import collected_notes
from noise_space.refusals import REFUSALS, in_words


@dataclass(frozen=True)
class Column:
    """A column of the page.

    Args:
        name (`str`): of `COLUMNS`.
        python (`str`): a script that draws the same; empty if it could not be drawn.
        images (`tuple` of PIL images): one for each seed.
        evaluations (`float`, *optional*): of the denoiser, per picture; `None` where they cannot be counted.
        start_evaluations (`float`): of small networks before the first step, per picture.
        seconds (`float`): of the call.
        notes (`tuple[str, ...]`): what else there is to know.
        refusal (`str`): why there are no pictures; empty if there are.
    """

    name: str
    python: str = ""
    images: tuple[Image.Image, ...] = ()
    evaluations: float | None = None
    start_evaluations: float = 0.0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    refusal: str = ""


def draw_columns(drawing: Drawing, ticked: Sequence[str]) -> Iterator[Column]:
    """Yield what is drawn, column by column; what the library refuses is a column with its message.

    Raises:
        ValueError: if nothing can be drawn: nothing is ticked, or the model cannot be loaded.
    """
    for name, parts in chosen_columns(ticked).items():
        # Let go between columns: the page shows one while nobody draws.
        with _pipeline(drawing.model) as pipe, collected_notes() as notes:
            try:
                column = _drawn(pipe, drawing, name, parts, notes)
            except REFUSALS as error:
                column = Column(name, refusal=in_words(error))
        yield column


@contextmanager
def _pipeline(name: str) -> Iterator[Any]:
    with ExitStack() as stack:
        try:
            pipe = stack.enter_context(use_pipeline(name))
        except REFUSALS as error:
            raise ValueError(f"{name!r} cannot be loaded: {in_words(error)}") from error
        yield pipe


def _drawn(pipe: Any, drawing: Drawing, name: str, parts: Sequence[str], notes: list[str]) -> Column:
    guider = drawing.guider(parts)
    guider = None if guider is None else guider.make()
    members = [start_network(call) for call in drawing.start(parts)]
    networks = [getattr(member, "module", member) for member in members]
    networks = [network for network in networks if isinstance(network, torch.nn.Module)]
    noise = [torch.Generator().manual_seed(seed) for seed in drawing.seeds()]
    denoisers = denoisers_of(pipe)
    began = time.perf_counter()
    with counted(denoisers, networks) as count, hfnoise.guide(pipe, guider, initial_noise=members or None):
        output = pipe([drawing.prompt] * drawing.pictures, generator=noise, **drawing.call())
        seconds = time.perf_counter() - began
        said = _said(pipe, guider, members, drawing, parts)
    images = getattr(output, "images", None)
    if images is None or not all(isinstance(image, Image.Image) for image in images):
        raise ValueError(f"{type(pipe).__name__} puts out no pictures: this page shows nothing else.")
    return Column(
        name, drawing.python(parts), tuple(images), count.denoiser / len(images) if denoisers else None,
        count.start / len(images), seconds, (*said, *notes),
    )  # fmt: skip


def _said(pipe: Any, guider: Any, members: list[Any], drawing: Drawing, parts: Sequence[str]) -> list[str]:
    """Return what the reports of hfnoise say."""
    said = [str(pipe.guidance_report)] if guider is not None and drawing.guidance_scale > 1 else []
    for member in members:
        report = getattr(member, "report", None)
        if report is not None:
            similarity = sum(report.similarity) / len(report.similarity)
            said.append(f"start: cosine of {similarity:.3f} to the noise that it was made of")
    if ONE_MORE_STEP in parts:
        said.append(f"start: {hfnoise.start_gap(pipe, drawing.steps)}")
    return said
