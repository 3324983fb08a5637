"""Report and card of a federation: rounds, clients, participation, epsilon of each, and what none of it covers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hfnoise.cards import CardArguments, CardFacts, Metric, last_metrics, number, setting_rows, trained_base
from hfnoise.citations import DP_SGD_BIBTEX, FEDSVD_BIBTEX
from hfnoise.privacy.hf_card import format_epsilon
from hfnoise.trainers.federated_local import SpentBudgetError
from hfnoise.trainers.private_mixin import DPTrainerMixin

REPORT_FILE = "federation_report.json"
_PAPERS = {
    "fedsvd": ("FedSVD", "2505.12805"),
    "ffa": ("FFA-LoRA", "2403.12313"),
    "fedavg": ("FedAvg on LoRA factors", "1602.05629"),
    "flora": ("FLoRA", "2409.05976"),
    "fedex": ("FedEx-LoRA", "2410.09432"),
}
_NOT_COVERED = (
    "evaluation metrics, which were computed without noise",
    "the choice of hyperparameters",
    "in which rounds a client took part, which the server knows: nothing is gained from its choice of clients",
    "the pretrained weights",
)
_HIDDEN = (
    "the numbers of examples: they were not sent, but can be estimated from epsilon by whoever knows batch and noise"
)


def federation_report(trainer: Any) -> dict[str, Any]:
    """Return what is known of a federation, from the clients themselves.

    Args:
        trainer ([`~hfnoise.FedSVDTrainer`]): before, in the middle of or after its rounds.
    """
    clients = {}
    for client in trainer.clients:
        private = isinstance(client.trainer, DPTrainerMixin)
        clients[client.name] = {
            "examples": client.examples if trainer.fedsvd_config.weighting == "examples" else None,
            "participations": client.participations,
            "max_participations": client.cap,
            "epsilon": client.epsilon(),
            "delta": client.delta,
            "noise_multiplier": _noise_multiplier(client),
            "secret_noise": private and client.trainer.dp_config.unsafe_seed is None,
        }
    report = {**trainer.server.report(), "clients": clients, "epsilon": trainer.epsilon()}
    report["private"] = trainer.is_private and all(one["secret_noise"] for one in clients.values())
    report["not_covered"] = [
        *_NOT_COVERED,
        "the numbers of examples, by which clients are weighted" if _weighs(trainer) else _HIDDEN,
    ]
    report["statement"] = _statement(trainer, report)
    return report


def _noise_multiplier(client: Any) -> float | None:
    """Return what may be said of it: one that was calibrated follows from the number of examples."""
    if client.config.weighting == "uniform" and client.is_calibrated:
        return None
    try:
        return None if client.noise_multiplier is None else float(client.noise_multiplier)
    except SpentBudgetError:  # it has none, and took no part
        return None


def write_card_and_report(trainer: Any, folder: Path) -> None:
    """Write `README.md` and `federation_report.json` into a folder, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    report = federation_report(trainer)
    temporary = folder / f".{REPORT_FILE}.{os.getpid()}"
    temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / REPORT_FILE)
    _card(trainer, report, folder).save(folder / "README.md")


def _card(trainer: Any, report: dict[str, Any], folder: Path) -> Any:
    user, config = CardArguments(**trainer._card_values), trainer.fedsvd_config
    name, paper = _PAPERS[config.aggregation]
    base = trained_base(trainer.model, user.finetuned_from)
    kind = type(trainer.model.get_base_model()).__name__
    is_classifier = kind.endswith("ForSequenceClassification")
    auto = f"AutoPeftModelFor{'SequenceClassification' if is_classifier else 'CausalLM'}"
    return CardFacts(
        name=user.model_name or folder.name,
        lead=(
            f"{base.capitalized}, adapted{user.trained_on} by {len(report['clients'])} clients together with {name} "
            f"([paper](https://huggingface.co/papers/{paper})), by `FedSVDTrainer` of hfnoise. Only LoRA factors left "
            "the clients."
        ),
        method=config.aggregation,
        base=base,
        relation="adapter",
        library_name="peft",
        tags=sorted({"hfnoise", "federated", config.aggregation, *_privacy_tags(report), *user.more_tags}),
        metadata=user.metadata,
        block={
            "subspace": config.subspace,
            "rounds": report["rounds"],
            "clients": len(report["clients"]),
            "local_steps": config.local_steps,
            "private": report["private"],
            **({} if report["epsilon"] is None else {"epsilon": report["epsilon"]}),
            "seed": config.federation_seed,
        },
        noise=_noise_rows(trainer, report),
        seeds=[
            ("public seed of the federation (clients of a round, first rows of A)", str(config.federation_seed)),
            ("seed of the clients' local steps", str(trainer.args.seed)),
            ("seed of the privacy noise", _noise_seed(trainer, report)),
        ],
        settings=_setting_rows(trainer, report),
        snippet=(
            f"from peft import {auto}\n\n"
            f'model = {auto}.from_pretrained("{trainer.args.hub_model_id or trainer.args.output_dir}")'
        ),
        metrics=[Metric(key, number(value)) for key, value in last_metrics(trainer.state.log_history).items()],
        citation="\n\n".join([FEDSVD_BIBTEX, *([DP_SGD_BIBTEX] if trainer.is_private else [])]),
    ).render(
        "federated.md",
        statement=report["statement"],
        client_rows=[_client_row(name, one) for name, one in report["clients"].items()],
        not_covered=report["not_covered"],
    )


def _noise_rows(trainer: Any, report: dict[str, Any]) -> list[tuple[str, str]]:
    if not trainer.is_private:
        return [("noise", "none was added")]
    delta = max(one["delta"] for one in report["clients"].values())
    condition = "" if report["private"] else ", if the noise were secret"
    return [(f"largest epsilon of a client{condition}", f"{format_epsilon(report['epsilon'])} at delta {delta:g}")]


def _noise_seed(trainer: Any, report: dict[str, Any]) -> str:
    if not trainer.is_private:
        return "there is no such noise"
    return "secrets of the clients, which are not told" if report["private"] else "known, so the noise is not secret"


def _privacy_tags(report: dict[str, Any]) -> list[str]:
    return ["differential-privacy", "dp-sgd"] if report["private"] else ["not-private"]


def _weighs(trainer: Any) -> bool:
    return bool(trainer.fedsvd_config.weighting == "examples")


def _statement(trainer: Any, report: dict[str, Any]) -> str:
    if not trainer.is_private:
        return (
            "Not private: no noise was added. Data stayed at the clients, and the adapter may still tell about them."
        )
    if not report["private"]:
        return "NOT PRIVATE: unsafe_seed was used, so anybody can subtract the noise."
    delta = max(one["delta"] for one in report["clients"].values())
    return (
        f"The adapter is ({format_epsilon(report['epsilon'])}, {delta:g})-differentially private with respect to "
        "adding or removing one unit of one client, if no unit is at two clients; what each client sent is private "
        "towards the server as well."
    )


def _setting_rows(trainer: Any, report: dict[str, Any]) -> list[tuple[str, str]]:
    config = trainer.fedsvd_config
    drawn = config.sampled(len(report["clients"]))
    return [
        ("aggregation", config.aggregation),
        ("subspace", f"refresh every {config.refresh_every} rounds" if config.subspace == "refresh" else "fixed"),
        ("first rows of A", config.init_lora_A),
        ("rounds", f"{report['rounds']} of {config.rounds}"),
        ("clients in a round", f"{drawn} of {len(report['clients'])}"),
        ("local steps in a round", str(config.local_steps)),
        ("weights", "numbers of examples" if config.weighting == "examples" else "all clients alike"),
        *setting_rows(trainer.args, ("learning_rate", "optim", "per_device_train_batch_size", "max_length")),
    ]


def _client_row(name: str, one: dict[str, Any]) -> tuple[str, str, str, str, str]:
    epsilon = "no noise" if one["epsilon"] is None else f"{format_epsilon(one['epsilon'])} at delta {one['delta']:g}"
    hidden = "no noise" if one["epsilon"] is None else "hidden"
    noise = hidden if one["noise_multiplier"] is None else f"{one['noise_multiplier']:.4g}"
    examples = "hidden" if one["examples"] is None else str(one["examples"])
    return name, examples, f"{one['participations']} of at most {one['max_participations']}", noise, epsilon
