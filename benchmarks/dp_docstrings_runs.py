"""The runs behind `dp_docstrings`: a public model of docstrings, private code, secretly chosen canaries in it."""

from __future__ import annotations

import logging
import math
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hfnoise import DPConfig, DPSFTTrainer, dp_audit, make_canaries
from hfnoise.worlds.code import code_texts
from hfnoise.worlds.docstrings import model_path

BASE, ORDINARY = "base model", "no privacy"
_MAX_LENGTH = 48
_CANARY_TOKENS = 24
_SCORED_AT_ONCE = 128


@dataclass(frozen=True)
class Settings:
    """What the runs share.

    Args:
        rows (`int`): private rows of code, canaries not counted.
        canaries (`int`): each in the training data by a fair coin.
        batch (`int`): rows in a step; of private runs the expected number.
        steps (`int`): of the optimizer, AdamW, in every run.
        learning_rate (`float`): of private runs, constant.
        ordinary_learning_rate (`float`): of runs without privacy, constant.
        clip_norm (`float`): of private runs.
    """

    rows: int = 6000
    canaries: int = 500
    batch: int = 512
    steps: int = 50
    learning_rate: float = 8e-3
    ordinary_learning_rate: float = 1.5e-2
    clip_norm: float = 0.1


@dataclass(frozen=True)
class Outcome:
    """What one run gave.

    Args:
        perplexity (`float`): per token of held-out modules.
        exposure (`float`): mean over the canaries that were in, in bits; 1.44 without memory.
        auroc (`float`): probability that a canary that was in lost more of its loss than one that was not.
        epsilon (`float`): claimed; infinite without privacy.
        epsilon_lower_bound (`float`): what the white-box audit of the same run proves, 95 % confidence.
        noise_multiplier (`float`): of a private run.
        seconds (`float`): of the training.
    """

    perplexity: float
    exposure: float
    auroc: float
    epsilon: float
    epsilon_lower_bound: float
    noise_multiplier: float
    seconds: float


def run(epsilon: float | None, settings: Settings, seed: int) -> Outcome:
    """Train once and return what was learnt, of the language and of the canaries.

    Args:
        epsilon (`float`, *optional*): budget; `math.inf` clips and adds no noise; None is `trl.SFTTrainer`.
        settings ([`Settings`]): of the training.
        seed (`int`): of adapter, order and coins; also which canaries there are.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    data = code_texts("train", size=settings.rows).select_columns("text")
    canaries = make_canaries(tokenizer, settings.canaries, seed=seed, tokens=_CANARY_TOKENS)
    before = losses(AutoModelForCausalLM.from_pretrained(model_path()), tokenizer, canaries["text"])[0]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        if epsilon is None:
            coins = random.Random(seed)
            included = torch.tensor([coins.random() < 0.5 for _ in range(len(canaries))])
            rows = concatenate_datasets([data, canaries.select(included.nonzero().flatten().tolist())])
            trainer: Any = _trainer(SFTTrainer, rows, folder, settings, settings.ordinary_learning_rate, seed)
            trainer.train()
            claimed, bound, noise = math.inf, math.nan, 0.0
        else:
            finding = dp_audit(_maker(epsilon, folder, settings, seed), data, canaries, unsafe_seed=seed)
            trainer, included = finding.trainer, finding.included
            claimed, bound = finding.claimed_epsilon, finding.epsilon_lower_bound
            noise = trainer.private_run.state.noise_multiplier
        seconds = time.perf_counter() - started
        drop = before - losses(trainer.model, tokenizer, canaries["text"])[0]
        held_out = losses(trainer.model, tokenizer, code_texts("validation", size=1500)["text"])
    perplexity = math.exp(float(held_out[0].sum() / held_out[1].sum()))
    return Outcome(perplexity, *exposure(drop, included), claimed, bound, noise, seconds)


def base_perplexity() -> float:
    """Return the perplexity of the model that nobody fine-tuned."""
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path())
    nats, tokens = losses(model, tokenizer, code_texts("validation", size=1500)["text"])
    return math.exp(float(nats.sum() / tokens.sum()))


def exposure(scores: Tensor, included: Tensor) -> tuple[float, float]:
    """Return the mean exposure of the canaries that were in, in bits, and the area under the ROC curve.

    Carlini et al. (arXiv 1802.08232), definition 6: log2(candidates) - log2(rank), where the candidates of a canary
    are itself and those that were not in. Without memory the rank is uniform and the mean 1 / ln 2 = 1.44 bits.

    Args:
        scores (`Tensor[canaries]`): higher means more likely in.
        included (`Tensor[canaries]`, bool): who was in.
    """
    out = scores[~included]
    ranks = 1 + (out[None] >= scores[included][:, None]).sum(1)
    bits = math.log2(len(out) + 1) - ranks.double().log2()
    return float(bits.mean()), float(1 - (ranks - 1).double().mean() / len(out))


def losses(model: Any, tokenizer: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return the summed negative log-likelihood of each text in nats, end of text included, and its tokens.

    Args:
        model (`PreTrainedModel`): a causal language model; put into eval mode.
        tokenizer (`PreTrainedTokenizer`): its own.
        texts (`list[str]`): to be scored.
    """
    model.eval()
    nats, tokens = [], []
    with torch.no_grad():
        for start in range(0, len(texts), _SCORED_AT_ONCE):
            rows = [text + tokenizer.eos_token for text in texts[start : start + _SCORED_AT_ONCE]]
            batch = tokenizer(rows, return_tensors="pt", padding=True, truncation=True, max_length=_MAX_LENGTH)
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            counts = batch["attention_mask"][:, 1:].double()
            each = functional.cross_entropy(logits.mT, batch["input_ids"][:, 1:], reduction="none").double()
            nats.append((each * counts).sum(1))
            tokens.append(counts.sum(1))
    return torch.cat(nats), torch.cat(tokens)


def _maker(epsilon: float, folder: str, settings: Settings, seed: int) -> Callable[[Dataset], Any]:
    budget: dict[str, Any] = {"noise_multiplier": 0.0} if math.isinf(epsilon) else {"target_epsilon": epsilon}
    config = DPConfig(clip_norm=settings.clip_norm, unsafe_seed=seed, **budget)
    return lambda rows: _trainer(DPSFTTrainer, rows, folder, settings, settings.learning_rate, seed, dp_config=config)


def _trainer(
    kind: type, rows: Dataset, folder: str, settings: Settings, learning_rate: float, seed: int, **private: Any
) -> Any:
    micro_batch = math.gcd(settings.batch, 64)
    arguments = SFTConfig(
        folder,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=settings.batch // micro_batch,
        max_steps=settings.steps,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        max_length=_MAX_LENGTH,
        save_strategy="no",
        report_to="none",
        logging_steps=settings.steps,
        disable_tqdm=True,
        seed=seed,
    )
    logging.getLogger("hfnoise").setLevel(logging.ERROR)
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return kind(model_path(), args=arguments, train_dataset=rows, peft_config=adapter, **private)
