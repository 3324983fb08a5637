"""The model card of a quantised model: its bits in all, what was left out, how to load it, what stock code does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hfnoise.cards import command_line, embedded_name, hub_name, library_versions, render_card
from hfnoise.citations import QUEST_BIBTEX
from hfnoise.quantization.linear import LinearQuantization
from hfnoise.quantization.report import QuantizationReport

_TAGS = ("hfnoise", "quest", "quantization-aware-training")
_FORM = {
    "packed": (
        "Weights are stored at their bits, as codes of a grid, with one float32 scale a row. It computes what the "
        "float weights compute when they are quantised in every forward pass, as in training, to the last bit."
    ),
    "master": "Weights are float master weights, which are quantised in every forward pass: they can be trained on.",
    "dense": "Weights are floats that lie on the grid of the quantised ones, under their stock names.",
}
_STOCK = {
    "packed": (
        "Without `import hfnoise` transformers does not know the format and refuses the file: the shapes of packed "
        "weights are no float weight's."
    ),
    "master": (
        "Without `import hfnoise` transformers loads the master weights **unquantised**, with a line in its log only: "
        "another model than the one that was trained."
    ),
    "dense": "Stock transformers loads it; hfnoise is not needed.",
}


def quantization_card(
    model: Any,
    quantization: LinearQuantization,
    report: QuantizationReport,
    form: str,
    model_name: str,
    location: str,
    base_path: str = "",
    dataset_names: Sequence[str] = (),
    tags: Sequence[str] = (),
    difference: dict[str, float] | None = None,
    training_rows: Sequence[tuple[str, str]] = (),
    metric_rows: Sequence[tuple[str, str]] = (),
) -> ModelCard:
    """Return the card of a quantised model.

    Args:
        model (`PreTrainedModel`): for its class.
        quantization ([`LinearQuantization`]): of its quantised layers.
        report ([`QuantizationReport`]): of the model before a dense export.
        form (`str`): `"packed"`, `"master"` or `"dense"`.
        model_name (`str`): the headline.
        location (`str`): what `from_pretrained` is to be given.
        base_path (`str`, *optional*): name or path of the model that it began from.
        dataset_names (`Sequence[str]`, *optional*), tags (`Sequence[str]`, *optional*): for the YAML block.
        difference (`dict[str, float]`, *optional*): what was measured of a dense export with quantised activations:
            `relative` (of the logits), and `rows`, `loss`, `dense_loss` where there is data.
        training_rows, metric_rows (`Sequence[tuple[str, str]]`, *optional*): tables.
    """
    base = hub_name(base_path)
    kind = type(model).__name__
    auto = "AutoModelForCausalLM" if kind.endswith("ForCausalLM") else kind
    data = ModelCardData(
        library_name="transformers",
        tags=sorted({*_TAGS, *tags}),
        **({"pipeline_tag": "text-generation"} if kind.endswith("ForCausalLM") else {}),
        **({"base_model": base, "base_model_relation": "quantized"} if base else {}),
        **({"datasets": list(dataset_names)} if dataset_names else {}),
        hfnoise={
            "method": "qat",
            "form": form,
            "weight_bits": quantization.weight_bits,
            **({"activation_bits": quantization.activation_bits} if quantization.activation_bits else {}),
            "estimator": quantization.estimator,
            "bits_per_weight": round(report.bits_per_weight, 4),
        },
    )
    start = (
        f"[{base}](https://huggingface.co/{base})" if base else (base_path and embedded_name(base_path)) or "A model"
    )
    activations = quantization.activation_bits
    return render_card(
        "quantization.md",
        data,
        model_name=model_name,
        lead=f"{start}, quantised with QuEST ([paper](https://huggingface.co/papers/2502.05003)) by hfnoise.",
        quantization_rows=[
            ("bits of a weight", f"{quantization.weight_bits}"),
            ("bits of an activation", _activations(form, activations)),
            ("bits of a quantised weight, scales included", f"{report.quantized_bits_per_weight:.3f}"),
            ("bits of a weight of the whole model, embeddings included", f"{report.bits_per_weight:.3f}"),
            ("estimator of the gradient", quantization.estimator),
            ("Hadamard group", str(quantization.hadamard_group or "no rotation")),
        ],
        form_note=" ".join([_FORM[form], *_dense_notes(form, activations, difference)]),
        skipped_rows=list(report.skipped.items()),
        snippet="\n".join(
            [
                *([] if form == "dense" else ["import hfnoise  # before the model is loaded"]),
                f"from transformers import {auto}",
                "",
                f'model = {auto}.from_pretrained("{location}")',
            ]
        ),
        stock_note=_STOCK[form],
        training_rows=list(training_rows),
        command=command_line(),
        metric_rows=list(metric_rows),
        versions=library_versions(),
        citation=QUEST_BIBTEX,
    )


def _activations(form: str, activations: float | None) -> str:
    if activations is None:
        return "not quantised"
    return f"not quantised here; {activations} before" if form == "dense" else f"{activations}"


def _dense_notes(form: str, activations: float | None, difference: dict[str, float] | None) -> list[str]:
    if form != "dense":
        return []
    if activations is None:
        return ["It computes what the quantised model computes, to the last bit."]
    note = (
        f"**It does not compute what was trained**: there an activation had {activations} bit, and stock layers do "
        "not quantise them."
    )
    if difference is None:
        return [note, "The difference was not measured: no data was at hand."]
    measured = f"Measured: the logits differ by {difference['relative']:.1%} of their norm"
    if "loss" in difference:
        measured += (
            f", the loss is {difference['dense_loss']:.4f} instead of {difference['loss']:.4f}, "
            f"on {difference['rows']:.0f} rows of data"
        )
    return [note, f"{measured}."]
