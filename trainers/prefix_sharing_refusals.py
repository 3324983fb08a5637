"""What prefix sharing refuses: whatever would make a tree row differ from its padded rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model

logger = logging.getLogger(__name__)

# Layers that mix tokens by softmax attention alone; transformers names every other kind otherwise.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
# Largest mean difference of log-probabilities on the probe. A leak moves those of a trained model by tenths; sums in
# another order move them by 1e-6 in float32 and by hundredths in half precision.
_PROBE_TOLERANCE = {"float32": 1e-2, "half": 0.25}


def refuse_prefix_sharing(model: Any, args: Any, attention: str) -> None:
    """Raise ValueError for a model or a setting with which prefix sharing would be inexact.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): not wrapped by DDP.
        args (`TrainingArguments`): with `max_length`.
        attention (`str`): the attention implementation the model was loaded with.

    Raises:
        ValueError: what was given, what is allowed, and that `prefix_sharing=False` works.
    """
    name = type(model.get_base_model() if is_peft_model(model) else model).__name__
    for given, allowed in _faults(model, args, attention):
        raise ValueError(f"prefix_sharing=True got {name} with {given}; {allowed}. Or set prefix_sharing=False.")
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        logger.info(
            "prefix_sharing=True: the auxiliary loss of the experts counts the tokens of a shared prompt once, so its "
            "value differs from that of padded rows."
        )


def _faults(model: Any, args: Any, attention: str) -> Iterator[tuple[str, str]]:
    """Yield what was given and what is allowed, for every fault."""
    config = model.config.get_text_config()
    for adapter in model.peft_config.values() if is_peft_model(model) else ():
        if adapter.is_prompt_learning:
            yield f"{adapter.peft_type.value} adapters, which put tokens in front of every row", "use LoRA"
        if getattr(adapter, "alora_invocation_tokens", None):
            yield "aLoRA adapters, which look for tokens in every row", "use LoRA"
    if any(hasattr(model.config, part) for part in ("vision_config", "audio_config")):
        yield "images or audio", "text models are supported"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        yield f"attn_logit_softcapping={config.attn_logit_softcapping}", "plain softmax attention is supported"
    if any(parameter.endswith(".sinks") for parameter, _ in model.named_parameters()):
        yield "attention sinks", "plain softmax attention is supported"
    base = model.get_base_model() if is_peft_model(model) else model
    if not base._can_set_attn_implementation():
        yield (
            "attention outside of transformers' AttentionInterface",
            "use a model of transformers that goes through it",
        )
    foreign = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if foreign or any(isinstance(module, torch.nn.Conv1d) for module in model.modules()):
        kinds = ", ".join(sorted(foreign)) or "convolutions over tokens"
        yield f"layers of the kind {kinds}, which carry state across branches", "full attention is supported"
    if attention != "sdpa":
        yield f"attn_implementation={attention!r}", "load the model with attn_implementation='sdpa'"
    if getattr(config, "attention_dropout", 0.0):
        yield f"attention_dropout={config.attention_dropout}", "load the model with attention_dropout=0.0"
    window = _sliding_window(config)
    if window is not None and (args.max_length is None or args.max_length > window):
        yield f"a sliding window of {window} and max_length={args.max_length}", f"set max_length={window} or less"
    if args.torch_compile:
        yield "torch_compile=True", "set torch_compile=False: each tree row has another shape"
    if args.n_gpu > 1:
        yield f"{args.n_gpu} GPUs in one process", "start one process per GPU with `accelerate launch --multi_gpu`"


def _sliding_window(config: Any) -> int | None:
    """Return the sliding window, if any layer uses it."""
    kinds = getattr(config, "layer_types", None)
    is_used = kinds is None or "sliding_attention" in kinds
    return getattr(config, "sliding_window", None) if is_used else None


@torch.no_grad()
def refuse_leaks(model: Any, shared: Callable[..., Any], branches: int) -> None:
    """Raise ValueError if a tree row scores a few made-up tokens otherwise than padded rows do.

    Two tiny forward passes at construction find what no list of models can: layers that mix tokens outside of
    attention, ignore `position_ids`, or do not hand arguments on to attention.

    Args:
        model (`torch.nn.Module`): with TRL's fused head.
        shared (`Callable`): the same model on tree rows.
        branches (`int`): rows per prompt.
    """
    # Two prompts of 3 tokens, with 2 to 5 tokens after them.
    rows, prompt, width = 2 * branches, 3, 8
    row, column = torch.arange(rows)[:, None], torch.arange(width)[None]
    owner = torch.where(column < prompt, row % 2, row + 2)
    input_ids = (7 * owner + column) % model.config.get_text_config().vocab_size
    real = column < width - row % (width - prompt - 1)
    device = model.get_input_embeddings().weight.device
    arguments = {
        "input_ids": input_ids.to(device),
        "attention_mask": real.long().to(device),
        "labels": input_ids.masked_fill((column < prompt) | ~real, -100).to(device),
        "use_cache": False,
        "fused_lm_head": True,
    }
    name = type(model).__name__
    with _evaluating(model):
        expected = model(**arguments).log_probs
        try:
            found = shared(**arguments).log_probs
        except TypeError as error:
            raise ValueError(
                f"prefix_sharing=True got {name}, which does not take the arguments of a tree row ({error}); models "
                "of transformers that hand them on to their attention are supported. Set prefix_sharing=False."
            ) from error
    is_single = all(p.dtype == torch.float32 for p in model.parameters())
    tolerance = _PROBE_TOLERANCE["float32" if is_single else "half"]
    difference = (found - expected).abs().sum().item() / int((expected != 0).sum())
    if not difference <= tolerance:
        raise ValueError(
            f"prefix_sharing=True got {name}, whose log-probabilities it would change (by {difference:.2g} per token "
            "on a probe): a layer mixes tokens outside of causal attention or ignores position_ids. Models without "
            "such layers are supported. Set prefix_sharing=False."
        )


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode for a while."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
