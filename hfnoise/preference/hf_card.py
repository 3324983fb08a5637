"""The card of a preference run: the noise of the labels, what was done about it, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from hfnoise.cards import (
    CardArguments,
    CardFacts,
    Metric,
    last_metrics,
    number,
    rate,
    rows_of,
    run_seeds,
    setting_rows,
    trained_base,
)

_SETTINGS = ("beta", "learning_rate", "lr_scheduler_type", "optim", "max_length")
# Of the metrics of TRL, those that say whether the noise did harm; by dataset, where there are several.
_SHOWN = ("loss", "rewards/accuracies", "rewards/margins")
_RATE = "rewards/accuracies"


def preference_card(trainer: Any, **given: Any) -> ModelCard:
    """Return the card of a preference run: the noise, what was done about it, the settings and the last evaluation.

    Args:
        trainer ([`NoiseDPOTrainer`]): the trainer; its `report()`, where it has one, says what is known of the noise.
        **given: fields of [`~hfnoise.cards.CardArguments`].
    """
    user = CardArguments(**given)
    args = trainer.args
    is_adapter = hasattr(trainer.model, "peft_config")
    base = trained_base(trainer.model, user.finetuned_from)
    return CardFacts(
        name=user.model_name or Path(args.output_dir).name,
        lead=(
            f"{base.capitalized} trained{user.trained_on} with {trainer._name} "
            f"([paper](https://huggingface.co/papers/{trainer._method.paper})) by hfnoise, {trainer._purpose}."
        ),
        method=trainer._method.name,
        base=base,
        relation="adapter" if is_adapter else "finetune",
        library_name="peft" if is_adapter else "transformers",
        tags=sorted({*trainer._tag_names, *user.more_tags}),
        metadata={"pipeline_tag": "text-generation", **user.metadata},
        block={**label_noise_block(trainer), "seed": args.seed},
        noise=label_noise_rows(trainer),
        noise_note=_noise_note(trainer.report()),
        seeds=run_seeds(args),
        settings=_training_rows(args, trainer.steps_text(), trainer.accelerator.num_processes),
        snippet=_snippet(is_adapter, trainer.hub_model_id or args.output_dir),
        results_note=(
            "Measured on the evaluation pairs with their recorded labels: `rewards/accuracies` is agreement with "
            "labels that may be flipped."
        ),
        metrics=_metrics(last_metrics(trainer.evaluation_log()), trainer.eval_dataset),
        citation=trainer._paper["citation"],
    ).render()


def label_noise_block(trainer: Any) -> dict[str, Any]:
    """Return what is known of the noise of the labels, for the YAML block.

    Args:
        trainer ([`NoiseDPOTrainer`]): the trainer.
    """
    report, injected = trainer.report(), trainer.injected_flip_rate
    block: dict[str, Any] = {"loss_type": list(trainer.args.loss_type)}
    block |= {"flip_rate": report["flip_rate"]} if report["flip_rate"] is not None else {}
    block |= {} if injected is None else {"inject_flip_rate": injected}
    estimate = report.get("estimate")
    if estimate is not None:
        block["flip_rate_estimate"] = round(estimate["flip_rate"], 4)
        block["flip_rate_interval"] = [round(bound, 4) for bound in estimate["interval"]]
        block["flip_rate_refused"] = estimate["refused"]
    return {**block, **report.get("settings", {})}


def label_noise_rows(trainer: Any) -> list[tuple[str, str]]:
    """Return what is known of the noise of the labels, and of what is done about it, as rows of a table.

    Args:
        trainer ([`NoiseDPOTrainer`]): the trainer.
    """
    args, report, injected = trainer.args, trainer.report(), trainer.injected_flip_rate
    rows = [] if injected is None else [("labels flipped on purpose (`inject_flip_rate`)", f"{injected:.1%}")]
    per_pair = f"per pair, column `{args.flip_rate_column}`"
    used = per_pair if args.flip_rate_column else "not given" if args.flip_rate is None else str(args.flip_rate)
    rows.append(("flip rate used in training", "none needed (auto)" if used == "auto" else used))
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
        rows.append((f'flip rate of annotator "{name}"', _estimate_text(part)))
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


def _training_rows(args: Any, steps: str, processes: int) -> list[tuple[str, str]]:
    global_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    rows = setting_rows(args, _SETTINGS) + ([] if args.max_length else [("max_length", "no limit")])
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    batch = ("pairs per step", str(global_batch))
    return [*rows, ("steps", steps), batch, ("processes", str(processes)), ("precision", precision)]


def _metrics(last: dict[str, float], dataset: Any) -> list[Metric]:
    found = []
    for name, value in last.items():
        known = next((one for one in _SHOWN if name == one or name.endswith(f"_{one}")), None)
        if known == _RATE:
            found.append(rate(name, value, rows_of(dataset, name.removesuffix(f"_{_RATE}")), "pairs"))
        elif known is not None:
            found.append(Metric(name, number(value)))
    return found
