"""Model cards: built from what a run knows, rendered strictly, never with a "None" in them."""

from __future__ import annotations

import math
import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined
from safetensors import safe_open

import hfnoise
from hfnoise.worlds import docstrings

# Of transformers, TRL and trackers; the value is a secret.
_TOKEN_OPTION = re.compile(r"--\w*[-_]?(token|api[-_]key|password)")
_LIBRARIES = ("torch", "transformers", "trl", "diffusers", "accelerate", "peft", "datasets")


def render_card(template: str, card_data: ModelCardData, **values: Any) -> ModelCard:
    """Return a card rendered from a template of `hfnoise.model_cards`; a missing value is an error, not a blank.

    Args:
        template (`str`): file name below `model_cards/templates`.
        card_data (`huggingface_hub.ModelCardData`): the YAML block.
        **values: every variable of the template.

    Raises:
        jinja2.UndefinedError: if a variable is missing.
    """
    text = (files("hfnoise.model_cards") / "templates" / template).read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    return ModelCard(environment.from_string(text).render(card_data=card_data.to_yaml(), **values))


def versions_by_library() -> dict[str, str]:
    """Return the versions of hfnoise and of those of the libraries it stands on that are installed."""
    found = {"hfnoise": hfnoise.__version__}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def library_versions() -> str:
    """Return the versions of hfnoise and of the libraries it stands on, one line."""
    return ", ".join(f"{name} {number}" for name, number in versions_by_library().items())


def preference_card(
    trainer: Any, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
) -> ModelCard:
    """Return the card of a preference run: the noise, what was done about it, the settings and the last evaluation.

    Args:
        trainer ([`NoiseDPOTrainer`]): the trainer; its `report()`, where it has one, says what is known of the noise.
        model_name (`str`, *optional*): the name of the output folder by default.
        dataset_name (`str`, *optional*): identifier of the dataset.
        tags (`str` or `list[str]`, *optional*): more tags.
    """
    args = trainer.args
    is_adapter = hasattr(trainer.model, "peft_config")
    base_path = trainer.model.config._name_or_path
    base = hub_name(base_path)
    injected = trainer.injected_flip_rate
    report = trainer.report()
    name = model_name or Path(args.output_dir).name
    data = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        tags=sorted({*trainer._tag_names, *([tags] if isinstance(tags, str) else tags or [])}),
        pipeline_tag="text-generation",
        **({"base_model": base} if base else {}),
        **({"base_model_relation": "adapter" if is_adapter else "finetune"} if base else {}),
        **({"datasets": [dataset_name]} if dataset_name else {}),
        hfnoise={"method": trainer._method.name, "loss_type": list(args.loss_type), **_flat(report, injected)},
    )
    return render_card(
        "preference.md",
        data,
        model_name=name,
        lead=_lead(trainer, base, base_path, dataset_name),
        noise_rows=_injected_rows(injected) + _noise_rows(args, report),
        noise_note=_noise_note(report),
        snippet=_snippet(is_adapter, trainer.hub_model_id or args.output_dir),
        training_rows=_training_rows(args, trainer.state.global_step, trainer.accelerator.num_processes),
        command=command_line(),
        metric_rows=_metric_rows(trainer.state.log_history),
        versions=library_versions(),
        citation=trainer._paper["citation"],
    )


def hub_name(path: str) -> str | None:
    """Return the identifier of the base model; a local folder, or a model built in memory, has none."""
    return path if path and not Path(path).is_dir() else None


def embedded_name(path: str) -> str | None:
    """Return how a base model that is part of hfnoise is called, with its size; `None` for any other."""
    if Path(path).name != docstrings.MODEL_FOLDER or Path(path) != Path(docstrings.model_path()):
        return None
    with safe_open(Path(path) / "model.safetensors", framework="pt") as weights:
        parameters = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return f"`{docstrings.NAME}` ({parameters / 1e6:.2f} M parameters, part of hfnoise)"


def command_line() -> str:
    """Return the command line of this process as it can be typed again, without access tokens."""
    program, given = Path(sys.argv[0]).name or "python", _without_tokens(sys.argv[1:])
    if program == "__main__.py":  # `python -m package` shows itself by the file that it runs
        package = getattr(sys.modules["__main__"].__spec__, "parent", "")
        return shlex.join(["python", "-m", package or sys.argv[0], *given])
    return shlex.join([program, *given])


def _without_tokens(arguments: list[str]) -> list[str]:
    """Return the arguments with the values of options like `--hub_token` left out: a card is public."""
    shown: list[str] = []
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if shown and _TOKEN_OPTION.fullmatch(shown[-1]):
            argument = "HIDDEN"
        elif equals and _TOKEN_OPTION.fullmatch(name):
            argument = f"{name}=HIDDEN"
        shown.append(argument)
    return shown


def _lead(trainer: Any, base: str | None, base_path: str, dataset_name: str | None) -> str:
    data = f" on `{dataset_name}`" if dataset_name else ""
    local = (base_path and embedded_name(base_path)) or "A local model"
    start = f"[{base}](https://huggingface.co/{base})" if base else local
    return (
        f"{start} trained{data} with {trainer._name} ([paper](https://huggingface.co/papers/{trainer._method.paper})) "
        f"by hfnoise, {trainer._purpose}."
    )


def _flat(report: dict[str, Any], injected: float | None) -> dict[str, Any]:
    """Return the part of the report that goes into the YAML block."""
    flat: dict[str, Any] = {"flip_rate": report["flip_rate"]} if report["flip_rate"] is not None else {}
    flat |= {} if injected is None else {"inject_flip_rate": injected}
    estimate = report.get("estimate")
    if estimate is not None:
        flat["flip_rate_estimate"] = round(estimate["flip_rate"], 4)
        flat["flip_rate_interval"] = [round(bound, 4) for bound in estimate["interval"]]
        flat["flip_rate_refused"] = estimate["refused"]
    return {**flat, **report.get("settings", {})}


def _injected_rows(injected: float | None) -> list[tuple[str, str]]:
    return [] if injected is None else [("labels flipped on purpose (`inject_flip_rate`)", f"{injected:.1%}")]


def _noise_rows(args: Any, report: dict[str, Any]) -> list[tuple[str, str]]:
    per_pair = f"per pair, column `{args.flip_rate_column}`"
    rate = per_pair if args.flip_rate_column else "not given" if args.flip_rate is None else str(args.flip_rate)
    rows = [("flip rate used in training", "none needed (auto)" if rate == "auto" else rate)]
    rows.append(("loss", " + ".join(f"`{name}`" for name in args.loss_type)))
    if args.sample_weight_column:
        rows.append(("weight per pair", f"column `{args.sample_weight_column}`"))
    rows += [
        (f"`{name}`", f"{value:g}" if isinstance(value, float) else str(value))
        for name, value in report.get("settings", {}).items()
    ]
    estimate = report.get("estimate")
    if estimate is not None:
        rows.append(("flip rate estimated afterwards", _estimate_text(estimate)))
    for name, part in report.get("by_annotator", {}).items():
        rows.append((f"flip rate of annotator {name}", _estimate_text(part)))
    return rows


def _estimate_text(estimate: dict[str, Any]) -> str:
    low, high = estimate["interval"]
    text = f"{estimate['flip_rate']:.3f} (95 % interval {low:.3f} to {high:.3f}, {estimate['count']} pairs)"
    return f"refused: {estimate['reason']}" if estimate["refused"] else text


def _noise_note(report: dict[str, Any]) -> str:
    if report.get("estimate") is None:
        return "The flip rate of the labels was not estimated: that needs held-out pairs labelled by the same source."
    return (
        "The estimate is the maximum-likelihood flip rate of held-out margins: it assumes flips that do not depend on "
        "the pair."
    )


def _snippet(is_adapter: bool, name: str) -> str:
    module, kind = ("peft", "AutoPeftModelForCausalLM") if is_adapter else ("transformers", "AutoModelForCausalLM")
    return (
        f"from {module} import {kind}\nfrom transformers import AutoTokenizer\n\n"
        f'model = {kind}.from_pretrained("{name}")\ntokenizer = AutoTokenizer.from_pretrained("{name}")'
    )


def _training_rows(args: Any, steps: int, processes: int) -> list[tuple[str, str]]:
    global_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    names = ("beta", "learning_rate", "lr_scheduler_type", "optim", "max_length", "seed")
    rows = [(name, str(getattr(getattr(args, name), "value", getattr(args, name)))) for name in names]
    rows = [(name, "no limit" if value == "None" else value) for name, value in rows]
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    return [*rows, ("steps", str(steps)), ("pairs per step", str(global_batch)), ("precision", precision)]


def _metric_rows(log_history: list[dict[str, Any]]) -> list[tuple[str, str]]:
    last: dict[str, Any] = next((entry for entry in reversed(log_history) if "eval_loss" in entry), {})
    shown = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
    return [(name.removeprefix("eval_"), f"{last[name]:.4f}") for name in shown if name in last]
