"""The model card of a private run: the guarantee in words, in numbers and in the YAML block, and how to check it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import peft
import transformers
from huggingface_hub import ModelCard

from hfnoise import citations
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
from hfnoise.preference.hf_card import label_noise_block, label_noise_rows

_TAGS = ("dp-sgd", "hfnoise")
_PIPELINES = {
    "CausalLM": "text-generation",
    "QuestionAnswering": "question-answering",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "ImageClassification": "image-classification",
}
# What goes into the YAML block, for programs that compare models.
_BLOCK = (
    "private", "epsilon", "delta", "total_epsilon", "adjacency", "unit", "units", "rows_per_unit_and_step",
    "expected_batch_size", "sample_rate", "steps", "noise_multiplier", "clip_norm", "clipping", "noise", "bands",
    "accountant", "secret", "private_metrics_logged",
)  # fmt: skip
_SETTINGS = (
    "learning_rate", "lr_scheduler_type", "optim", "weight_decay", "loss_type", "beta", "max_length",
)  # fmt: skip


def privacy_card(trainer: Any, **given: Any) -> ModelCard:
    """Return the card of a private run, from `trainer.privacy_report()`, its settings and its last evaluation.

    Args:
        trainer ([`~hfnoise.DPTrainerMixin`]): a private Trainer.
        **given: fields of [`~hfnoise.cards.CardArguments`].
    """
    user, report = CardArguments(**given), trainer.privacy_report()
    base, task = trained_base(trainer.model, user.finetuned_from), _task(trainer.model)
    is_adapter, has_label_noise = hasattr(trainer.model, "peft_config"), hasattr(trainer, "injected_flip_rate")
    tags = [*_TAGS, "differential-privacy" if report["private"] else "not-private", *user.more_tags]
    return CardFacts(
        name=user.model_name or Path(trainer.args.output_dir).name,
        lead=(
            f"{base.capitalized}, fine-tuned{user.trained_on} with `{type(trainer).__name__}` of "
            "hfnoise: gradients clipped per unit, noise added to their sum "
            "([DP-SGD](https://huggingface.co/papers/1607.00133))."
        ),
        method=type(trainer).__name__,
        base=base,
        relation="adapter" if is_adapter else "finetune",
        library_name="peft" if is_adapter else "transformers",
        tags=sorted({*tags, *(getattr(trainer, "_tag_names", None) or ())}),
        metadata={"pipeline_tag": _PIPELINES.get(task), **user.metadata},
        block={**_block(report), **(label_noise_block(trainer) if has_label_noise else {}), "seed": trainer.args.seed},
        noise=_privacy_rows(report) + (label_noise_rows(trainer) if has_label_noise else []),
        seeds=[*run_seeds(trainer.args), ("seed of the privacy noise", _noise_seed(trainer, report))],
        settings=_training_rows(trainer),
        snippet=_snippet(trainer, is_adapter, task),
        metrics=_metrics(trainer),
        results_note="Computed without noise on evaluation data, which the guarantee does not cover.",
        citation="\n\n".join(_citations(trainer, report)),
    ).render(
        "privacy.md",
        statement=report["statement"],
        meaning=_meaning(report),
        not_covered=report["not_covered"],
        check_note=_check_note(report),
        check_command=check_command(report),
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


def _block(report: dict[str, Any]) -> dict[str, Any]:
    block = {name: report[name] for name in _BLOCK}
    if report["audit"] is not None:
        audit = report["audit"]
        block["audit_epsilon_lower_bound"] = audit.get("epsilon_lower_bound") if isinstance(audit, dict) else audit
    return block


def _noise_seed(trainer: Any, report: dict[str, Any]) -> str:
    if report["secret"].startswith("UNSAFE"):
        return f"{trainer.dp_config.unsafe_seed}, which is not secret"
    return "a secret, which is not told"


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
    return [
        *setting_rows(args, _SETTINGS),
        ("optimizer steps", trainer.steps_text()),
        ("processes", str(trainer.accelerator.num_processes)),
        ("precision", "bf16" if args.bf16 else "fp32"),
    ]


def _metrics(trainer: Any) -> list[Metric]:
    """Return the last value of each metric of evaluation; of shares of pairs, with an interval."""
    rows = rows_of(trainer.eval_dataset)
    return [
        rate(name, value, rows, "pairs") if name == "rewards/accuracies" else Metric(name, number(value))
        for name, value in last_metrics(trainer.evaluation_log()).items()
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
