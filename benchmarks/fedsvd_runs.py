"""Federations for benchmarks/fedsvd.py: who the clients are, how they train, and what one run comes to.

All methods of a seed share the split of the data, the classifier, the draws of clients, the batches and, with privacy,
the noise multipliers and the seeds of the noise.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from hfnoise.privacy.calibration import calibrate_noise_multiplier
from hfnoise.trainers.federated import FedSVDClient, FedSVDConfig, FedSVDServer, freeze_lora_A, simulate_federation
from hfnoise.trainers.private import DPConfig, DPTrainer
from hfnoise.worlds.docstrings import model_path
from hfnoise.worlds.expressions import KINDS, expression_texts
from hfnoise.worlds.federated import dirichlet_split

DELTA = 1e-5
# With half of the clients in a round, and skewed labels, one round moves the accuracy by points.
LAST_ROUNDS = 3


@dataclass(frozen=True)
class Method:
    """An aggregation with its first rows, and the optimizer of its clients."""

    aggregation: str
    init_lora_A: str
    subspace: str = "fixed"
    optim: str = "sgd"


BASELINE = "FFA-LoRA (orthonormal)"
METHODS = {
    "FedAvg": Method("fedavg", "kaiming"),
    "FFA-LoRA (Kaiming)": Method("ffa", "kaiming"),
    BASELINE: Method("ffa", "orthonormal"),
    "FLoRA": Method("flora", "kaiming"),
    "FedEx-LoRA": Method("fedex", "kaiming"),
    "FedSVD": Method("fedsvd", "orthonormal"),
    "FedSVD + refresh": Method("fedsvd", "orthonormal", "refresh"),
    "FFA-LoRA (orthonormal), AdamW": Method("ffa", "orthonormal", optim="adamw_torch"),
    "FedSVD, AdamW": Method("fedsvd", "orthonormal", optim="adamw_torch"),
}


@dataclass(frozen=True)
class Setup:
    """What all runs share; the sizes are such that a run takes seconds on one core.

    Args:
        clients (`int`): half of which take part in a round, as in the paper.
        alpha (`float`): of the Dirichlet split; the paper's.
        rounds (`int`): of the federation.
        local_steps (`int`): optimizer steps of a client in a round.
        participations (`int`): of a client at most, to which the noise is calibrated.
        batch (`int`): rows in a step; expected rows with privacy.
        rank (`int`): of the adapters on query and value; lora_alpha is 4 times it.
        clip_norm (`float`): of private gradients.
        refresh_every (`int`): rounds between two refreshes of all directions.
        train_size (`int`): rows of all clients together.
        eval_size (`int`): held-out rows; another so many serve to choose learning rates.
        max_length (`int`): tokens of a row.
    """

    clients: int = 6
    alpha: float = 0.5
    rounds: int = 8
    local_steps: int = 5
    participations: int = 6
    batch: int = 24
    rank: int = 4
    clip_norm: float = 0.3
    refresh_every: int = 2
    train_size: int = 9000
    eval_size: int = 750
    max_length: int = 20

    def config(self, method: Method, seed: int) -> FedSVDConfig:
        """Return the configuration of server and clients."""
        return FedSVDConfig(
            aggregation=method.aggregation, subspace=method.subspace, init_lora_A=method.init_lora_A,
            refresh_every=self.refresh_every, rounds=self.rounds, clients_per_round=self.clients // 2,
            local_steps=self.local_steps, max_participations=self.participations, federation_seed=seed,
        )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """Of one federation.

    Args:
        accuracy (`float`): on held-out rows, mean over the last three rounds.
        by_round (`dict[int, float]`): the same after each of them.
        bytes_down (`list[int]`): of every round, arrays sent to a client, the most that one of them got.
        bytes_up (`int`): arrays that a client sends.
        epsilons (`dict[str, float]`): of every client, from its ledger; {} without privacy.
        participations (`dict[str, int]`): of every client.
        noise_multipliers (`dict[str, float]`): of every client; {} without privacy.
        rows (`dict[str, int]`): of every client.
    """

    accuracy: float
    by_round: dict[int, float]
    bytes_down: list[int]
    bytes_up: int
    epsilons: dict[str, float]
    participations: dict[str, int]
    noise_multipliers: dict[str, float]
    rows: dict[str, int]


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model_path())


@lru_cache(maxsize=2)
def _rows(split: str, size: int, max_length: int) -> Dataset:
    rows = expression_texts(split, size)
    return rows.map(
        lambda batch: _tokenizer()(batch["text"], truncation=True, max_length=max_length),
        batched=True, remove_columns=["text", "module"],
    )  # fmt: skip


@lru_cache(maxsize=64)
def _noise_multiplier(epsilon: float, rows: int, batch: int, steps: int) -> float:
    """Return what a client would calibrate for itself; once for all methods of a seed."""
    return calibrate_noise_multiplier(epsilon, DELTA, batch / rows, steps)


def build_model(setup: Setup, trains_only_B: bool, seed: int) -> Any:
    """Return the docstrings Llama with a frozen random classifier, as in the paper, and an adapter to be trained."""
    torch.manual_seed(seed)
    base = AutoModelForSequenceClassification.from_pretrained(model_path(), num_labels=len(KINDS), dtype=torch.float32)
    # No task_type: with SEQ_CLS PEFT would train the classifier.
    adapter = LoraConfig(
        r=setup.rank, lora_alpha=4 * setup.rank, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]
    )
    model = get_peft_model(base, adapter)
    return freeze_lora_A(model) if trains_only_B else model


def accuracy(model: Any, rows: Dataset) -> float:
    """Return the share of rows that the model classifies rightly."""
    collate = DataCollatorWithPadding(_tokenizer())
    right = 0
    model.eval()
    for start in range(0, len(rows), 250):
        batch = collate([rows[i] for i in range(start, min(start + 250, len(rows)))])
        labels = batch.pop("labels")
        with torch.no_grad():
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(rows)


def run_federation(
    method: Method, setup: Setup, seed: int, learning_rate: float, epsilon: float | None, tuning: bool = False
) -> Outcome:
    """Train one federation from the beginning and return what came of it.

    Args:
        method ([`Method`]): how.
        setup ([`Setup`]): of all.
        seed (`int`): of split, classifier, first rows, draws of clients, batches and noise.
        learning_rate (`float`): of the clients, constant.
        epsilon (`float`, *optional*): budget of every client; None trains without privacy.
        tuning (`bool`, defaults to `False`): evaluate on the held-out rows for choosing learning rates.
    """
    config = setup.config(method, seed)
    parts = dirichlet_split(
        _rows("train", setup.train_size, setup.max_length), setup.clients, setup.alpha, seed=seed,
        min_rows=4 * setup.batch,
    )  # fmt: skip
    first = setup.eval_size if tuning else 0
    held_out = _rows("validation", 2 * setup.eval_size, setup.max_length)
    held_out = held_out.select(range(first, first + setup.eval_size))
    model = build_model(setup, method.aggregation in ("ffa", "fedsvd"), seed)
    noises = {}
    # Trainer.train collects garbage, in every round of every client; over all modules that takes longer than training.
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        clients = []
        for k, (name, part) in enumerate(parts.items()):
            trainer = _trainer(model, part, setup, method, Path(folder, name), 100 * seed + k, learning_rate, epsilon)
            record = {}
            if epsilon is not None:
                steps = setup.local_steps * config.participations(setup.clients)
                noises[name] = _noise_multiplier(epsilon, len(part), setup.batch, steps)
                record = {"noise_multiplier": noises[name]}
            clients.append(
                FedSVDClient(name, trainer, config, clients=setup.clients, state_dir=Path(folder, name), record=record)
            )

        def evaluate(server: FedSVDServer) -> dict[str, float]:
            done = server.report()["rounds"]
            if done <= setup.rounds - LAST_ROUNDS:
                return {}
            return {"accuracy": accuracy(server.apply_to(model), held_out)}

        server = FedSVDServer(model, config)
        records = simulate_federation(server, clients, evaluate=evaluate, progress=False)
    by_round = {record.round + 1: record.metrics["accuracy"] for record in records if record.metrics}
    return Outcome(
        accuracy=statistics.fmean(by_round.values()),
        by_round=by_round,
        bytes_down=[record.bytes_down for record in records],
        bytes_up=max(record.bytes_up for record in records),
        epsilons={name: value for name, value in records[-1].epsilons.items() if value is not None},
        participations={client.name: client.participations for client in clients},
        noise_multipliers=noises,
        rows={name: len(part) for name, part in parts.items()},
    )


def _trainer(
    model: Any, rows: Dataset, setup: Setup, method: Method, folder: Path, seed: int, learning_rate: float,
    epsilon: float | None,
) -> Trainer:  # fmt: skip
    args = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, logging_strategy="no", save_strategy="no",
        per_device_train_batch_size=setup.batch, learning_rate=learning_rate, lr_scheduler_type="constant",
        optim=method.optim, seed=seed, max_grad_norm=1.0,
    )  # fmt: skip
    known = {"args": args, "train_dataset": rows, "data_collator": DataCollatorWithPadding(_tokenizer())}
    if epsilon is None:
        trainer = Trainer(model, **known)
    else:
        private = DPConfig(
            target_epsilon=epsilon,
            target_delta=DELTA,
            clip_norm=setup.clip_norm,
            unsafe_seed=seed,
            micro_batch_size=3 * setup.batch // 2,  # a Poisson batch is hardly ever larger
        )
        trainer = DPTrainer(model, dp_config=private, **known)
    trainer.remove_callback(PrinterCallback)
    return trainer
