"""The first page: one prompt, one seed, and what each way of guiding and starting makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from noise_space.columns import (
    CFG,
    COLUMNS,
    EMBEDDED_NETWORKS,
    MOST_PICTURES,
    MOST_STEPS,
    RE_DENOISE,
    Drawing,
    chosen_columns,
)
from noise_space.drawing import Column, draw_columns
from noise_space.models import EMBEDDED_PIPELINES
from noise_space.pictures import caption, grid_picture

# One job at a time on the whole machine: Trainers seed the process, and pipelines keep their state in themselves.
QUEUE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "compute"}
INTRODUCTION = """# Noise to pictures, guided
The same prompt from the same noise, drawn by stock classifier-free guidance (CFG) and by what `hfnoise` adds to it.
Every column says how often the model was evaluated. The digits are models of 3 MB that come with the library."""
# What suits each embedded world: a prompt that shows its point.
PROMPTS = {
    "digits-sd": "a photo of the digit seven",
    "digits-sd-weak": "a photo of the digit seven",
    "coloured-digits-sd": "a photo of a thick red seven",
    "shaded-digits-sd": "a photo of the digit seven on a dark background",
}
# Here every column makes a difference that can be seen.
FIRST_MODEL = "shaded-digits-sd"
# On the digits, as in docs/guidance.md; the library's own default for larger models.
DIGITS_THRESHOLD, USUAL_THRESHOLD = 0.99, 0.999
# Of `Drawing`, in the order of the inputs of the page; what is ticked comes first.
FIELDS = (
    "model", "prompt", "negative_prompt", "seed", "pictures", "steps", "guidance_scale", "threshold", "eta",
    "norm_threshold", "momentum", "golden", "one_more_step",
)  # fmt: skip


def build_pictures_page() -> None:
    """Add the page to the Blocks that are being built."""
    gr.Markdown(INTRODUCTION)
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=300):
            inputs, draw = _controls()
        with gr.Column(scale=8, min_width=300):
            message = gr.Markdown("Press **Draw**: some ten seconds for the digits on one core.", elem_id="status")
            with gr.Row(elem_classes="columns", equal_height=False):
                slots = [_slot(name) for name in COLUMNS]
            with gr.Accordion("Python that draws the same", open=False):
                codes = [
                    gr.Code(label=name, language="python", visible=False, interactive=False, wrap_lines=True)
                    for name in COLUMNS
                ]
    outputs = [message, *(part for slot, code in zip(slots, codes, strict=True) for part in (*slot, code))]
    gr.on(
        [draw.click, inputs[2].submit], draw_page, inputs, outputs, api_visibility="private", show_progress="minimal",
        show_progress_on=message, **QUEUE,
    )  # fmt: skip
    gr.api(draw_api, api_name="draw", **QUEUE)


def _controls() -> tuple[list[Any], gr.Button]:
    """Return the inputs, in the order of `FIELDS` after what is ticked, and the button."""
    model = gr.Dropdown(
        list(EMBEDDED_PIPELINES), value=FIRST_MODEL, label="Model", allow_custom_value=True,
        info="Embedded, or type a Hub id such as owner/name", elem_id="model",
    )  # fmt: skip
    prompt = gr.Textbox(PROMPTS[FIRST_MODEL], label="Prompt", elem_id="prompt")
    ticked = gr.CheckboxGroup(list(COLUMNS), value=list(COLUMNS), label="Columns to draw", elem_id="columns")
    draw = gr.Button("Draw", variant="primary", elem_id="draw")
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120, elem_id="seed")
        pictures = gr.Number(4, label="Pictures", precision=0, minimum=1, maximum=MOST_PICTURES, min_width=120)
    steps = gr.Slider(1, MOST_STEPS, value=20, step=1, label="Steps")
    scale = gr.Slider(0, 30, value=4, step=0.5, label="Guidance scale (1 is none)")
    negative = gr.Textbox("", label="Negative prompt", placeholder="none")
    with gr.Accordion("Adaptive Guidance and APG", open=False):
        threshold = gr.Slider(
            0.9, 1, value=DIGITS_THRESHOLD, step=0.0005, label="Threshold of Adaptive Guidance",
            info="Cosine of the two predictions from which a picture needs no second one",
        )  # fmt: skip
        eta = gr.Slider(0, 1, value=0, step=0.05, label="eta of APG", info="What is kept of the parallel part")
        norm = gr.Number(
            None,
            label="Rescaling norm r of APG",
            placeholder="auto",
            info="Empty: as for SDXL, by the size",
            minimum=0,
        )
        momentum = gr.Slider(-0.95, 0.95, value=-0.5, step=0.05, label="Momentum of APG", info="0 is none")
    with gr.Accordion("Golden noise and One More Step", open=False):
        golden = gr.Dropdown(
            [RE_DENOISE, EMBEDDED_NETWORKS[0]], value=RE_DENOISE, label="Golden noise", allow_custom_value=True,
            info="ReDenoise, or a network: the embedded one, or a Hub id",
        )  # fmt: skip
        module = gr.Dropdown(
            [EMBEDDED_NETWORKS[1]], value=EMBEDDED_NETWORKS[1], label="Module of One More Step",
            allow_custom_value=True, info="The embedded one is for shaded-digits-sd; or a Hub id",
        )  # fmt: skip
    model.change(suit_model, [model, prompt], [prompt, threshold], api_visibility="private", queue=False)
    return [
        ticked, model, prompt, negative, seed, pictures, steps, scale, threshold, eta, norm, momentum, golden, module,
    ], draw  # fmt: skip


def _slot(name: str) -> tuple[gr.Column, gr.Image, gr.HTML]:
    with gr.Column(min_width=190, visible=False, elem_classes="drawn") as column:
        gr.HTML(f"<h3>{name}</h3>")
        image = gr.Image(
            show_label=False, interactive=False, format="png", buttons=[], container=False, elem_classes="pixels",
            alt_text=f"Pictures of {name}",
        )  # fmt: skip
        cost = gr.HTML()
    return column, image, cost


def suit_model(model: str, prompt: str) -> tuple[Any, Any]:
    """Return a prompt that a chosen world understands, unless one was typed, and a threshold that suits it."""
    threshold = DIGITS_THRESHOLD if model in PROMPTS else USUAL_THRESHOLD
    keeps = model not in PROMPTS or prompt not in PROMPTS.values()
    return gr.skip() if keeps else PROMPTS[model], threshold


def draw_page(ticked: list[str], *values: Any) -> Iterator[list[Any]]:
    """Yield the outputs of the page, after every column anew.

    Raises:
        gr.Error: for what cannot be drawn at all.
    """
    try:
        drawing = Drawing(**dict(zip(FIELDS, values, strict=True)))
        names = list(chosen_columns(ticked))
        drawn: dict[str, Column] = {}
        yield _page(f"{names[0]}: 1 of {len(names)} ...", names, drawn)
        for column in draw_columns(drawing, ticked):
            drawn[column.name] = column
            left = names[len(drawn) :]
            status = f"{left[0]}: {len(drawn) + 1} of {len(names)} ..." if left else _done(drawing)
            yield _page(status, names, drawn)
    except ValueError as error:
        raise gr.Error(str(error), duration=None, title="Nothing drawn", print_exception=False) from error


def _done(drawing: Drawing) -> str:
    seeds = drawing.seeds()
    several = f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"
    return f"Drawn by `{drawing.model}`, {several}, {drawing.steps} steps, guidance scale {drawing.guidance_scale:g}."


def _page(status: str, names: list[str], drawn: dict[str, Column]) -> list[Any]:
    outputs: list[Any] = [status]
    for name in COLUMNS:
        column = drawn.get(name)
        picture = grid_picture(column.images) if column and column.images else None
        below = "" if column is None else caption(column, drawn.get(CFG))
        python = column.python if column else ""
        outputs += [
            gr.update(visible=name in names),
            gr.update(value=picture, visible=column is None or bool(picture)),
        ]
        outputs += [below, gr.update(value=python, visible=bool(python))]
    return outputs


def draw_api(
    model: str = FIRST_MODEL,
    prompt: str = PROMPTS[FIRST_MODEL],
    columns: list[str] = list(COLUMNS),  # noqa: B006
    negative_prompt: str = "",
    seed: float = 0,
    pictures: float = 4,
    steps: float = 20,
    guidance_scale: float = 4.0,
) -> list[dict[str, Any]]:
    """Draw columns, and return of each its name, evaluations per picture, seconds, Python, notes and refusal."""
    try:
        drawing = Drawing(model, prompt, negative_prompt, seed, pictures, steps, guidance_scale)  # type: ignore[arg-type]
        found = list(draw_columns(drawing, columns))
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error
    shown = ("name", "evaluations", "start_evaluations", "seconds", "notes", "python", "refusal")
    return [{name: getattr(column, name) for name in shown} for column in found]
