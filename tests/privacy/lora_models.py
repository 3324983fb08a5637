"""Tiny models with adapters, their loss per row, and the golden vectors, for the tests of this folder."""

from pathlib import Path

import numpy
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

VECTORS = Path(__file__).parent.parent / "vectors" / "privacy"
PAD = -100


def load_vectors(name):
    """Return a file of golden privacy vectors as tensors."""
    return {key: torch.tensor(value) for key, value in numpy.load(VECTORS / f"dev_{name}.npz").items()}


def train_only(model, *parts):
    """Leave trainable what has one of these parts in its name, at values where gradients differ from zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in parts))
        if parameter.requires_grad and ("lora_B" in name or "bias" in name):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def tiny_llama(**settings):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 50, "initializer_range": 0.1, "pad_token_id": None,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **settings}))


def lora_llama(*parts, targets=("q_proj", "v_proj"), **settings):
    """Return a tiny Llama with LoRA of which the parameters with these parts in their names train."""
    config = LoraConfig(r=4, target_modules=list(targets), **settings)
    return train_only(get_peft_model(tiny_llama(), config), *(parts or ("lora_B",)))


def token_batch(rows=5, length=12, seed=0, vocabulary=50):
    """Return token ids of which rows end at different places, with their mask and labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    mask = (torch.arange(length) < torch.arange(length, length - rows, -1)[:, None].clamp(min=4)).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, PAD)}


def mean_nll(model, batch):
    """Return the mean negative log-likelihood of each row's tokens."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    nll = nn.functional.cross_entropy(logits[:, :-1].float().mT, labels, reduction="none", ignore_index=PAD)
    return nll.sum(1) / (labels != PAD).sum(1)


def golden_llama():
    """Return the model of `dev_dp_lora_llama.npz`, its batch, and the file."""
    vectors = load_vectors("dp_lora_llama")
    hidden, intermediate, layers, heads, kv_heads, vocabulary, rank, alpha = (int(v) for v in vectors["cfg"])
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary,
    )  # fmt: skip
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(LlamaForCausalLM(config), lora)
    model.load_state_dict({key[4:]: value for key, value in vectors.items() if key.startswith("sd::")})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    return model, {key: vectors[key] for key in ("input_ids", "attention_mask", "labels")}, vectors


def largest_error(found, expected):
    """Return the largest difference of two dicts of gradients; they hold the same names."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)
