"""The model card of a private run: the guarantee in words, in numbers and in the YAML block, and how to check it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import peft
import transformers
from huggingface_hub import ModelCard, ModelCardData

from hfnoise import citations
from hfnoise.cards import command_line, embedded_name, hub_name, library_versions, render_card

_TAGS = ("dp-sgd", "hfnoise")
_PIPELINES = {
    "CausalLM": "text-generation",
    "QuestionAnswering": "question-answering",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "ImageClassification": "image-classification",
}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What goes into the YAML block, for programs that compare models.
_BLOCK = (
    "private", "epsilon", "delta", "total_epsilon", "adjacency", "unit", "units", "rows_per_unit_and_step",
    "expected_batch_size", "sample_rate", "steps", "noise_multiplier", "clip_norm", "clipping", "noise", "bands",
    "accountant", "secret", "private_metrics_logged",
)  # fmt: skip
_SETTINGS = (
    "learning_rate", "lr_scheduler_type", "optim", "weight_decay", "loss_type", "beta", "max_length", "seed",
)  # fmt: skip


def privacy_card(
    trainer: Any,
    model_name: str | None = None,
    dataset_name: str | list[str] | None = None,
    tags: str | list[str] | None = None,
    language: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """Return the card of a private run, from `trainer.privacy_report()`, its settings and its last evaluation.

    Args:
        trainer ([`~hfnoise.DPTrainerMixin`]): a private Trainer.
        model_name (`str`, *optional*): the name of the output folder by default.
        dataset_name (`str` or `list[str]`, *optional*): identifier of the dataset, if it may be named.
        tags (`str` or `list[str]`, *optional*): more tags.
        language (`str`, *optional*), license (`str`, *optional*): identifiers of the Hub.
    """
    report = trainer.privacy_report()
    base_path = getattr(getattr(trainer.model, "config", None), "_name_or_path", "")
    base, is_adapter, task = hub_name(base_path), hasattr(trainer.model, "peft_config"), _task(trainer.model)
    datasets = [dataset_name] if isinstance(dataset_name, str) else dataset_name
    optional = {
        "base_model": base,
        "base_model_relation": ("adapter" if is_adapter else "finetune") if base else None,
        "pipeline_tag": _PIPELINES.get(task),
        "datasets": [name for name in datasets or [] if _HUB_NAME.fullmatch(name)],
        "language": language,
        "license": license,
    }
    given = [tags] if isinstance(tags, str) else tags or []
    data = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        tags=sorted(
            {
                *_TAGS,
                "differential-privacy" if report["private"] else "not-private",
                *(getattr(trainer, "_tag_names", None) or ()),
                *given,
            }
        ),
        **{name: value for name, value in optional.items() if value},
        hfnoise=_block(trainer, report),
    )
    return render_card(
        "privacy.md",
        data,
        model_name=model_name or Path(trainer.args.output_dir).name,
        lead=_lead(trainer, base, base_path, datasets),
        statement=report["statement"],
        meaning=_meaning(report),
        privacy_rows=_privacy_rows(report),
        not_covered=report["not_covered"],
        check_note=_check_note(report),
        check_command=check_command(report),
        snippet=_snippet(trainer, is_adapter, task),
        training_rows=_training_rows(trainer),
        command=command_line(),
        metric_rows=_metric_rows(trainer.state.log_history),
        versions=library_versions(),
        citation="\n\n".join(_citations(trainer, report)),
    )


def check_command(report: dict[str, Any]) -> str:
    """Return a command line that computes epsilon again, from the numbers of the report and nothing else.

    Args:
        report (`dict`): from `privacy_report`, or read from `dp_report.json`.
    """
    rate = f"{report['expected_batch_size']} / {report['units']}"
    mechanism = f"Mechanism({rate}, {report['noise_multiplier']!r}, {report['steps']}, {report['bands']})"
    return (
        'python -c "from hfnoise.privacy import Mechanism, composed_epsilon; '
        f"print(composed_epsilon([{mechanism}], {report['delta']!r}, '{report['accountant']}'))\""
    )


def format_epsilon(epsilon: float | str) -> str:
    """Return epsilon with four digits, rounded up: a smaller number would claim more than was proved.

    Example:
        >>> from hfnoise.privacy.hf_card import format_epsilon
        >>> format_epsilon(2.00001), format_epsilon("Infinity")
        ('2.001', 'infinity')
    """
    epsilon = float(epsilon)
    if not math.isfinite(epsilon):
        return "infinity"
    if epsilon <= 0.0:
        return "0"
    digits = max(0, 3 - math.floor(math.log10(epsilon)))
    return f"{math.ceil(epsilon * 10**digits - 1e-9) / 10**digits:.{digits}f}".rstrip("0").rstrip(".")


def _task(model: Any) -> str:
    """Return the task in the class name of the model, such as `CausalLM`."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = re.search(r"For([A-Z]\w+)$", type(base).__name__)
    return found[1] if found else ""


def _block(trainer: Any, report: dict[str, Any]) -> dict[str, Any]:
    block = {"method": type(trainer).__name__, **{name: report[name] for name in _BLOCK}}
    if report["audit"] is not None:
        audit = report["audit"]
        block["audit_epsilon_lower_bound"] = audit.get("epsilon_lower_bound") if isinstance(audit, dict) else audit
    return block


def _lead(trainer: Any, base: str | None, base_path: str, datasets: list[str] | None) -> str:
    data = f" on {' and '.join(f'`{name}`' for name in datasets)}" if datasets else ""
    local = (base_path and embedded_name(base_path)) or "A local model"
    start = f"[{base}](https://huggingface.co/{base})" if base else local
    return (
        f"{start}, fine-tuned{data} with `{type(trainer).__name__}` of hfnoise: gradients clipped per unit, noise "
        "added to their sum ([DP-SGD](https://huggingface.co/papers/1607.00133))."
    )


def _meaning(report: dict[str, Any]) -> str:
    if not report["private"]:
        return "These weights must be handled like the data that they were trained on."
    epsilon, delta = format_epsilon(report["epsilon"]), report["delta"]
    return (
        "Whoever sees these weights, and knows everything else about the data, learns little about whether any one "
        f"unit was in it: every event is at most exp({epsilon}) times as probable with the unit as without it, and "
        f"the other way round, up to a probability of {delta:g}."
    )


def _privacy_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    delta = f"{report['delta']:g}"
    condition = ", if the noise were secret" if report["secret"].startswith("UNSAFE") else ""
    rows = [
        (f"epsilon of these weights{condition}", f"{format_epsilon(report['epsilon'])} at delta {delta}"),
        (
            "epsilon of everything released of this dataset",
            f"{format_epsilon(report['total_epsilon'])} at delta {delta}",
        ),
        ("neighbouring datasets", report["adjacency"]),
        ("unit", f"{report['unit']}; {report['units']} units"),
        ("rows of a unit in a step", f"at most {report['rows_per_unit_and_step']}"),
        ("sampler", report["sampler"]),
        ("expected batch", f"{report['expected_batch_size']} units"),
        ("steps", str(report["steps"])),
    ]
    if report["steps_of_an_earlier_run"]:
        rows.append(("steps before, of another run on the ledger", str(report["steps_of_an_earlier_run"])))
    kinds = ", ".join(f"{count} in {kind}" for kind, count in report["trained_parameters"]["kinds"].items())
    noise = report["noise"] if report["bands"] == 1 else f"{report['noise']}, {report['bands']} bands"
    chosen = "; ".join(report["chosen_by_evaluation"])
    rows += [
        ("clipping", f"{report['clipping']}, norm at most {report['clip_norm']:g}"),
        ("noise", f"{noise}; multiplier {report['noise_multiplier']:.6g}"),
        ("secret of the noise", report["secret"]),
        ("accountant", report["accountant_description"]),
        ("trained numbers, all clipped per unit", f"{report['trained_parameters']['count']} ({kinds})"),
        ("training losses logged without noise", "yes" if report["private_metrics_logged"] else "no"),
        ("weights chosen by evaluation", chosen or "no"),
        ("audit", _audit(report["audit"])),
    ]
    return rows


def _audit(audit: Any) -> str:
    if audit is None:
        return "not audited"
    if not isinstance(audit, dict) or "epsilon_lower_bound" not in audit:
        return str(audit)
    canaries = f" from {audit['canaries']} canaries" if "canaries" in audit else ""
    return f"epsilon is at least {float(audit['epsilon_lower_bound']):.3f}{canaries}: a test for errors, no proof"


def _check_note(report: dict[str, Any]) -> str:
    if report["steps_of_an_earlier_run"]:
        return (
            "The command prints the epsilon of the steps of this run. The weights hold earlier steps as well: their "
            "epsilon is that of the whole ledger, stated above."
        )
    return "The command prints the epsilon of these weights again, from the numbers above."


def _snippet(trainer: Any, is_adapter: bool, task: str) -> str:
    library, start = (peft, "AutoPeftModel") if is_adapter else (transformers, "AutoModel")
    model = f"{start}For{task}" if task and hasattr(library, f"{start}For{task}") else start
    name = trainer.hub_model_id or trainer.args.output_dir
    lines = [f"from {library.__name__} import {model}", "", f'model = {model}.from_pretrained("{name}")']
    tokens = trainer.processing_class
    if tokens is not None:
        is_tokenizer = isinstance(tokens, transformers.PreTrainedTokenizerBase)
        auto = "AutoTokenizer" if is_tokenizer else "AutoProcessor"
        lines.insert(1, f"from transformers import {auto}")
        lines.append(f'{"tokenizer" if is_tokenizer else "processor"} = {auto}.from_pretrained("{name}")')
    return "\n".join(lines)


def _training_rows(trainer: Any) -> list[tuple[str, str]]:
    args = trainer.args
    values = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name, None) is not None}
    rows = [(name, _text(getattr(value, "value", value))) for name, value in values.items()]
    return [
        *rows,
        ("optimizer steps", str(trainer.state.global_step)),
        ("processes", str(trainer.accelerator.num_processes)),
        ("precision", "bf16" if args.bf16 else "fp32"),
    ]


def _text(value: Any) -> str:
    return " + ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _metric_rows(log_history: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the last value of each metric of evaluation, without those that say how long it took."""
    found: dict[str, float] = {}
    for entry in log_history:
        found |= {name: value for name, value in entry.items() if name.startswith("eval_")}
    timings = ("runtime", "per_second", "num_tokens")
    return [
        (name.removeprefix("eval_"), f"{value:.4f}")
        for name, value in found.items()
        if isinstance(value, (int, float)) and not name.endswith(timings)
    ]


def _citations(trainer: Any, report: dict[str, Any]) -> list[str]:
    used = {
        citations.DP_SGD_BIBTEX: True,
        citations.AUTOMATIC_CLIPPING_BIBTEX: report["clipping"] == "auto",
        citations.BANDED_NOISE_BIBTEX: report["bands"] > 1,
        citations.DP_ADAM_BC_BIBTEX: trainer.dp_config.adam_bias_correction,
        citations.PLD_BIBTEX: report["accountant"] == "pld",
        citations.RDP_BIBTEX: report["accountant"] == "rdp",
        citations.AUDIT_BIBTEX: report["audit"] is not None,
    }
    method = (getattr(trainer, "_paper", None) or {}).get("citation")
    return [text for text, is_used in used.items() if is_used] + ([method.strip()] if method else [])
