"""The model card of a quantised model: its bits in all, what was left out, how to load it, what stock code does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCard

from hfnoise.cards import Base, CardArguments, CardFacts, Metric
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
    "adapter": "Here are the LoRA weights alone, which are not quantised; the bits are those of the base.",
}
_DONE = dict.fromkeys(_FORM, "quantised with") | {
    "adapter": "with LoRA weights trained on it while it was quantised with"
}
_STOCK = {
    "adapter": (
        "Without `import hfnoise` the base is loaded **unquantised**, which is not the model that these LoRA weights "
        "were trained for."
    ),
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
    base: Base,
    seeds: Sequence[tuple[str, str]],
    user: CardArguments | None = None,
    difference: dict[str, float] | None = None,
    settings: Sequence[tuple[str, str]] = (),
    metrics: Sequence[Metric] = (),
    more: dict[str, Any] | None = None,
    more_noise: Sequence[tuple[str, str]] = (),
) -> ModelCard:
    """Return the card of a quantised model.

    Args:
        model (`PreTrainedModel`): for its class.
        quantization ([`LinearQuantization`]): of its quantised layers.
        report ([`QuantizationReport`]): of the model before a dense export.
        form (`str`): `"packed"`, `"master"`, `"dense"` or `"adapter"`.
        model_name (`str`): the headline.
        location (`str`): what `from_pretrained` is to be given.
        base ([`~hfnoise.cards.Base`]): the model that it began from.
        seeds (rows): of the run; that there was none, where nothing was drawn.
        user ([`~hfnoise.cards.CardArguments`], *optional*): data, tags and the like.
        difference (`dict[str, float]`, *optional*): what was measured of a dense export with quantised activations:
            `relative` (of the logits), and `rows`, `loss`, `dense_loss` where there is data.
        settings (rows, *optional*): of the training.
        metrics (sequence of [`~hfnoise.cards.Metric`], *optional*): results.
        more (`dict`, *optional*): more of the block `hfnoise:`.
        more_noise (rows, *optional*): of the noise that is not of quantisation, such as that of labels.
    """
    user, activations = user or CardArguments(), quantization.activation_bits
    kind = type(model).__name__
    is_causal = kind.endswith("ForCausalLM")
    auto = f"Auto{'Peft' if form == 'adapter' else ''}ModelForCausalLM" if is_causal else kind
    imports = [] if form == "dense" else ["import hfnoise  # before the model is loaded"]
    source = f"from {'peft' if form == 'adapter' else 'transformers'} import {auto}"
    return CardFacts(
        name=model_name,
        lead=(
            f"{base.capitalized}, {_DONE[form]} QuEST ([paper](https://huggingface.co/papers/2502.05003)) by hfnoise"
            f"{user.trained_on and ', trained'}{user.trained_on}."
        ),
        method="qat",
        base=base,
        relation="adapter" if form == "adapter" else "quantized",
        library_name="peft" if form == "adapter" else "transformers",
        tags=sorted({*_TAGS, *user.more_tags}),
        metadata={"pipeline_tag": "text-generation" if is_causal else None, **user.metadata},
        block={
            "form": form,
            "weight_bits": quantization.weight_bits,
            **({"activation_bits": activations} if activations else {}),
            "estimator": quantization.estimator,
            "bits_per_weight": round(report.bits_per_weight, 4),
            **(more or {}),
        },
        noise=[
            ("bits of a weight", f"{quantization.weight_bits}"),
            ("bits of an activation", _activations(form, activations)),
            ("bits of a quantised weight, scales included", f"{report.quantized_bits_per_weight:.3f}"),
            ("bits of a weight of the whole model, embeddings included", f"{report.bits_per_weight:.3f}"),
            ("estimator of the gradient", quantization.estimator),
            ("Hadamard group", str(quantization.hadamard_group or "no rotation")),
            *more_noise,
        ],
        noise_note=" ".join([_FORM[form], *_dense_notes(form, activations, difference)]),
        seeds=seeds,
        settings=settings,
        snippet="\n".join([*imports, source, "", f'model = {auto}.from_pretrained("{location}")']),
        use_note=_STOCK[form],
        metrics=metrics,
        citation=QUEST_BIBTEX,
    ).render("quantization.md", skipped=list(report.skipped.items()))


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
