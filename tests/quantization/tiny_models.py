"""Tiny real models with linear layers of every kind, random weights that are always the same."""

import torch

TOKENS = torch.arange(12).reshape(2, 6)
# Rotation groups of 32 and 64 in one model; heads and embeddings small.
SIZES = {"vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
LLAMA = {
    **SIZES, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "tie_word_embeddings": False,
}  # fmt: skip


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes})).eval()


def classifier():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=3)).eval()


def gpt2(width=32):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {**SIZES, "n_embd": width, "n_layer": 1, "n_head": 2, "initializer_range": 0.2, "bos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {**LLAMA, "num_hidden_layers": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes)).eval()


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=40, **sizes)).eval()


BUILDERS = {
    "llama": llama, "classifier": classifier, "gpt2": gpt2, "gpt2 48 wide": lambda: gpt2(48), "mixtral": mixtral,
    "t5": t5,
}  # fmt: skip


@torch.no_grad()
def logits(model):
    """Return what a model of transformers computes for `TOKENS`."""
    extra = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    return model(input_ids=TOKENS.to(model.device), **extra).logits


def train(model, steps=2):
    """Train a few steps on `TOKENS`, in eval mode afterwards; return the model."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, fused=True)
    extra = {"labels": torch.tensor([0, 2])} if hasattr(model, "score") else {"labels": TOKENS}
    for _ in range(steps):
        model(input_ids=TOKENS, **extra).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def quantized(model):
    """Return the names of the quantised layers."""
    return [name for name, module in model.named_modules() if hasattr(module, "quantization")]
