"""A text from the saved, quantised model, and how fast it is written, next to float32."""

from __future__ import annotations

import time
from typing import Any

import torch

from hfnoise.quantization.weight_cache import cached_weights


@torch.no_grad()
def sampled_text(model: Any, tokenizer: Any, prompt: str, tokens: int = 48) -> tuple[str, float]:
    """Return `prompt` with a greedy continuation, and the tokens that were written per second.

    Args:
        model (`PreTrainedModel`): quantised or not.
        tokenizer (`PreTrainedTokenizerBase`).
        prompt (`str`): at least one token.
        tokens (`int`, defaults to 48): new tokens, exactly.
    """
    model.eval()
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)
    settings: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "use_cache": True}
    settings["pad_token_id"] = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with cached_weights():
        model.generate(**inputs, max_new_tokens=2, **settings)  # what the first call sets up is not timed
        start = time.perf_counter()
        ids = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, **settings)
        seconds = time.perf_counter() - start
    return tokenizer.decode(ids[0], skip_special_tokens=True), tokens / seconds


def print_samples(folder: str, base: Any, tokenizer: Any, prompt: str) -> None:
    """Load the model in `folder` and print its continuation and its speed beside those of the float model.

    Args:
        folder (`str`): what `save_model` wrote.
        base (`PreTrainedModel`): the float model.
        tokenizer (`PreTrainedTokenizerBase`).
        prompt (`str`).
    """
    saved = type(base).from_pretrained(folder).to(base.device)
    config = getattr(saved.config, "quantization_config", None)
    bits = "dense" if config is None else f"{config.weight_bits} bit"
    for name, model in ((f"float32, before training ({base.device.type})", base), (f"{folder}, {bits}", saved)):
        text, speed = sampled_text(model, tokenizer, prompt)
        print(f"--- {name}: {speed:.0f} tokens/s\n{text}\n")
