"""The second page: how many preference labels are flipped, and which."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from PIL import Image

from hfnoise.trainers.audit_labels import plot_margins
from noise_space.labels import DOCSTRINGS, FEWEST_PAIRS, LARGEST_SHARE, MOST_PAIRS, SUSPECTS, Audit, Found, find_flips
from noise_space.pictures_page import QUEUE

INTRODUCTION = """# Which preference labels are wrong?
A share of the labels is flipped, and a small model is trained on the noisy pairs by `RobustDPOTrainer`, which is
**not** told how many. Other pairs with labels from the same source are then scored: where the model contradicts one,
the label is suspect."""
FIELDS = (
    "dataset", "model", "split", "flip_share", "seed", "pairs", "beta", "learning_rate", "batch_size", "max_length",
)  # fmt: skip
HEADERS = ["rank", "p_flip", "margin", "flipped", "prompt", "recorded as chosen", "recorded as rejected"]
# Defaults of `hfnoise audit-labels`, for models of a few hundred million parameters.
_LARGER = {"beta": 0.1, "learning_rate": 5e-6, "batch_size": 8, "max_length": 1024}


def build_labels_page() -> None:
    """Add the page to the Blocks that are being built."""
    world = Audit()
    gr.Markdown(INTRODUCTION)
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=300):
            share = gr.Slider(
                0, LARGEST_SHARE, value=world.flip_share, step=0.05, label="Share of labels to flip", elem_id="share"
            )
            pairs = gr.Slider(
                FEWEST_PAIRS, MOST_PAIRS, value=world.pairs, step=50, label="Pairs to look at", elem_id="pairs",
                info="As many others are trained on",
            )  # fmt: skip
            seed = gr.Number(world.seed, label="Seed", precision=0, minimum=0)
            find = gr.Button("Find flipped labels", variant="primary", elem_id="find")
            with gr.Accordion("Dataset and model", open=False):
                dataset = gr.Dropdown(
                    [DOCSTRINGS], value=DOCSTRINGS, label="Preference pairs", allow_custom_value=True,
                    info="Embedded, or a Hub id: columns prompt, chosen, rejected",
                )  # fmt: skip
                split = gr.Textbox(world.split, label="Split", info="Of a dataset that you name")
                model = gr.Dropdown(
                    [DOCSTRINGS], value=DOCSTRINGS, label="Model", allow_custom_value=True,
                    info="Embedded, or a Hub id: small ones, all weights are trained",
                )  # fmt: skip
            with gr.Accordion("Training", open=False):
                beta = gr.Number(world.beta, label="beta of DPO")
                rate = gr.Number(world.learning_rate, label="Learning rate", step=1e-6)
                batch = gr.Number(world.batch_size, label="Pairs per step", precision=0)
                longest = gr.Number(world.max_length, label="Longest pair, in tokens", precision=0)
        with gr.Column(scale=8, min_width=300):
            verdict = gr.Markdown(
                "Press **Find flipped labels**: about a minute for the docstrings on one core.", elem_id="verdict"
            )
            plot = gr.Image(
                show_label=False, interactive=False, format="png", buttons=["download"], elem_id="margins",
                visible=False, alt_text="Histogram of the margins",
            )  # fmt: skip
            table = gr.Dataframe(
                headers=HEADERS, datatype="str", label=f"The {SUSPECTS} most suspect labels", interactive=False,
                wrap=True, visible=False, elem_id="suspects",
                column_widths=["60px", "90px", "80px", "80px", "220px", "220px", "220px"],
            )  # fmt: skip
            with gr.Accordion("Python that does the same", open=False):
                python = gr.Code(language="python", interactive=False, show_label=False)
    training = [beta, rate, batch, longest]
    model.change(suit_model, model, training, api_visibility="private", queue=False)
    inputs = [dataset, model, split, share, seed, pairs, *training]
    find.click(
        find_page, inputs, [verdict, plot, table, python], api_visibility="private", show_progress_on=verdict, **QUEUE
    )
    gr.api(find_api, api_name="find_flips", **QUEUE)


def suit_model(model: str) -> list[Any]:
    """Return settings of the training that suit a model."""
    world = Audit()
    if model == DOCSTRINGS:
        return [world.beta, world.learning_rate, world.batch_size, world.max_length]
    return list(_LARGER.values())


def find_page(*values: Any, progress: gr.Progress = gr.Progress()) -> tuple[Any, ...]:  # noqa: B008
    """Return verdict, histogram, suspects and Python.

    Raises:
        gr.Error: for what cannot be run.
    """
    audit, found = _found(dict(zip(FIELDS, values, strict=True)), progress)
    notes = "".join(f"\n\n*{note}*" for note in found.notes if found.estimate.reason not in note)
    return (
        found.verdict() + notes, gr.update(value=histogram(found), visible=True),
        gr.update(value=found.suspects(), visible=True), audit.python(),
    )  # fmt: skip


def find_api(
    dataset: str = DOCSTRINGS,
    model: str = DOCSTRINGS,
    split: str = "train",
    flip_share: float = 0.2,
    seed: float = 0,
    pairs: float = 1000,
) -> dict[str, Any]:
    """Return the estimated flip rate, its interval, why it was refused, and the suspects."""
    training = dict(zip(FIELDS[6:], suit_model(model), strict=True))
    given = {"dataset": dataset, "model": model, "split": split, "flip_share": flip_share, "seed": seed}
    _, found = _found({**given, "pairs": pairs, **training}, gr.Progress())
    estimate = found.estimate
    return {
        "flip_rate": estimate.flip_rate, "interval": list(estimate.interval), "refused": estimate.refused,
        "reason": estimate.reason, "headers": HEADERS, "suspects": found.suspects(),
    }  # fmt: skip


def _found(values: dict[str, Any], progress: gr.Progress) -> tuple[Audit, Found]:
    try:
        audit = Audit(**values)
        return audit, find_flips(audit, lambda share, what: progress(share, desc=what))
    except ValueError as error:
        raise gr.Error(str(error), duration=None, title="Nothing found", print_exception=False) from error


def histogram(found: Found) -> Image.Image:
    """Return the margins as a picture: by truth where labels were flipped here."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "margins.png"
        plot_margins(found.margins, found.estimate, path, found.flipped)
        with Image.open(path) as picture:
            return picture.copy()
