"""What per-unit gradients cost: a clipped step against the ordinary LoRA step, and Opacus, measured in one run."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker

from hfnoise.benchmarks import reporting
from hfnoise.privacy import UnitGradientRecorder, clip_per_unit

_WARM_UP = 3  # the first steps allocate
_VOCABULARY = 1024
_CLIP_NORM = 1.0
_RANK = 8
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """A model, its adapted layers, and the shape of a micro-batch."""

    name: str
    architecture: str
    targets: tuple[str, ...]
    rows: int
    length: int


CASES = (
    Case("Llama q,v B8 T128", "llama", ("q_proj", "v_proj"), 8, 128),
    Case("Llama q,v B4 T512", "llama", ("q_proj", "v_proj"), 4, 512),
    Case("Llama all-linear B8 T128", "llama", ALL_LINEAR, 8, 128),
    Case("Llama all-linear B2 T1024", "llama", ALL_LINEAR, 2, 1024),
    Case("Llama q,v B32 T32", "llama", ("q_proj", "v_proj"), 32, 32),
    Case("BERT q,v B8 T128", "bert", ("query", "value"), 8, 128),
)


def build(case: Case) -> nn.Module:
    """Return the model of a case: hidden size 256, 4 layers, LoRA of rank 8 of which only B trains."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": _VOCABULARY, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
        "max_position_embeddings": 1024,
    }  # fmt: skip
    base: Any
    if case.architecture == "llama":
        base = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=688))
    else:
        base = BertForSequenceClassification(
            BertConfig(**sizes, intermediate_size=1024, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        )
    model = get_peft_model(base, LoraConfig(r=_RANK, target_modules=list(case.targets)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)  # at 0 no gradient would flow through the adapter
    return model.train()


def losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the loss of each row: mean cross-entropy of its tokens, or of its label."""
    logits = model(input_ids=tokens).logits
    if logits.dim() == 2:
        return nn.functional.cross_entropy(logits, tokens[:, 0] % logits.shape[1], reduction="none")
    entropy = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return entropy.view(len(tokens), -1).mean(1)


def ordinary_step(model: nn.Module) -> Callable[[Tensor], None]:
    """Return the non-private step."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step(tokens: Tensor) -> None:
        losses(model, tokens).mean().backward()
        for parameter in trainable:
            parameter.grad = None

    return step


def recorded_step(model: nn.Module, rows: int) -> Callable[[Tensor], None]:
    """Return the step with per-unit gradients and flat clipping."""
    recorder = UnitGradientRecorder(model, rows)
    unit, weight = torch.arange(rows), torch.ones(rows)

    def step(tokens: Tensor) -> None:
        with recorder.record(unit, weight):
            losses(model, tokens).sum().backward()
        clip_per_unit(recorder.collect(), _CLIP_NORM)
        recorder.reset()

    return step
