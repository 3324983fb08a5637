"""Sample completions of a causal language model, each with random numbers of its own.

`generate` draws one random number after the other for a whole batch, so a sample changes with the batch it is in.
Here every sample has its own stream of uniform numbers, keyed by (seed, prefix, how often the prefix came before,
number of the sample), and takes token k by inverting the cumulative distribution at number k.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are drawn.

    Args:
        max_new_tokens (`int`, defaults to `1024`): longest completion, end-of-sequence token included.
        temperature (`float`, defaults to `1.0`): divides the logits; 0 takes the likeliest token.
        top_p (`float`, defaults to `1.0`): share of probability that is sampled from, in (0, 1].
        top_k (`int`, defaults to `0`): number of tokens that are sampled from; 0: all.
        seed (`int`, defaults to `0`): at least 0.
        batch_size (`int`, defaults to `16`): completions that are drawn at once.

    Raises:
        ValueError: for a value out of range.

    Example:
        >>> from hfnoise.preference.hf_trace_sampling import SamplingSettings
        >>> SamplingSettings(temperature=0.6, top_p=0.95).max_new_tokens
        1024
    """

    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("top_k", 0), ("seed", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0 (0: the likeliest token), got {self.temperature!r}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}.")


@dataclass(frozen=True)
class Completion:
    """A sampled text; `finished` says whether the model ended it, rather than the limit of tokens."""

    text: str
    finished: bool


def sample_completions(
    model: Any,
    tokenizer: Any,
    prefixes: Sequence[str],
    samples: int,
    settings: SamplingSettings,
    add_special_tokens: bool = True,
    description: str = "sampling",
) -> list[list[Completion]]:
    """Return `samples` completions of every prefix.

    A completion does not depend on the batch size nor on the other prefixes, up to the rounding of the model: a batch
    of another shape may move a probability in its last bits, and a random number that falls between the two values
    gives another token. In float32 that is rare, in bfloat16 it is not.

    Args:
        model (`PreTrainedModel`): a causal language model. Its generation configuration is kept but for the settings
            below, so that for instance a repetition penalty stays.
        tokenizer (`PreTrainedTokenizerBase`): with a padding and an end-of-sequence token.
        prefixes (`Sequence[str]`): rendered prompts.
        samples (`int`): completions of each, at least 1.
        settings ([`SamplingSettings`]): how to draw.
        add_special_tokens (`bool`, defaults to `True`): `False` for prefixes from a chat template, which writes them.
        description (`str`): of the progress bar.

    Returns:
        One list per prefix. Texts hold all tokens but the end-of-sequence token: `</think>` is a special token in
        some vocabularies.

    Raises:
        ValueError: if a prefix and its completion do not fit into the positions of the model.

    Example:
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> from hfnoise.preference.hf_trace_sampling import SamplingSettings, sample_completions
        >>> from hfnoise.worlds.arithmetic import model_path
        >>> model = AutoModelForCausalLM.from_pretrained(model_path())
        >>> tokenizer = AutoTokenizer.from_pretrained(model_path())
        >>> settings = SamplingSettings(max_new_tokens=80)
        >>> [[completion]] = sample_completions(model, tokenizer, ["3+4-2=<think>\\n"], 1, settings)
        >>> completion.finished
        True
    """
    ids = tokenizer(list(prefixes), add_special_tokens=add_special_tokens)["input_ids"]
    _check_fits(model, ids, settings.max_new_tokens)
    earlier: Counter[str] = Counter()
    rows = []
    for number, prefix in enumerate(prefixes):
        rows += [(number, _key(settings.seed, prefix, earlier[prefix], sample)) for sample in range(samples)]
        earlier[prefix] += 1
    found: list[list[Completion]] = [[] for _ in prefixes]
    # Prefixes of one length together need no padding; the order of equals, so that of the samples, stays.
    rows.sort(key=lambda row: len(ids[row[0]]))
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=len(rows), desc=description, unit="completion", name=__name__) as bar:
            for start in range(0, len(rows), settings.batch_size):
                batch = rows[start : start + settings.batch_size]
                keys = [key for _, key in batch]
                texts = _generate(model, tokenizer, [ids[number] for number, _ in batch], keys, settings)
                for (number, _), completion in zip(batch, texts, strict=True):
                    found[number].append(completion)
                bar.update(len(batch))
    finally:
        model.train(was_training)
    return found


def _check_fits(model: Any, ids: list[list[int]], max_new_tokens: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, ids), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise ValueError(
            f"the longest prompt has {longest} tokens; with max_new_tokens={max_new_tokens} that is more than the "
            f"{limit} positions of the model. Leave long prompts out, or set max_new_tokens to at most "
            f"{limit - longest}."
        )


def _key(seed: int, prefix: str, earlier: int, sample: int) -> int:
    digest = hashlib.sha256(f"{seed} {earlier} {sample} {prefix}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # a generator takes 63 bits and a sign


class _KeyedSampler(LogitsProcessor):  # type: ignore[misc]
    """Leaves one token: the one that the row's next uniform number selects."""

    def __init__(self, keys: list[int], steps: int, prompt_length: int, device: torch.device) -> None:
        # Drawn on the CPU, so that another device samples the same; 24 bits each, as a float32 holds.
        uniforms = [torch.rand(steps, generator=torch.Generator().manual_seed(key)) for key in keys]
        self.uniforms = torch.stack(uniforms).to(device)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # A cumulative sum over a vocabulary of 1e5 loses too much in float32; Apple's devices have nothing wider.
        dtype = torch.float32 if scores.device.type == "mps" else torch.float64
        cumulative = scores.to(dtype).softmax(-1).cumsum(-1)
        total = cumulative[:, -1:]
        # Below the total even after rounding: a token of probability zero is never taken.
        at = self.uniforms[:, input_ids.shape[1] - self.prompt_length, None].to(dtype) * total
        at = torch.minimum(at, torch.nextafter(total, torch.zeros_like(total)))
        token = torch.searchsorted(cumulative, at, right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def _generate(
    model: Any, tokenizer: Any, ids: list[list[int]], keys: list[int], settings: SamplingSettings
) -> list[Completion]:
    longest = max(map(len, ids))
    padded = [[tokenizer.pad_token_id] * (longest - len(row)) + row for row in ids]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in ids]
    processors: list[LogitsProcessor] = []
    if settings.temperature > 0:
        processors = [TemperatureLogitsWarper(float(settings.temperature))] if settings.temperature != 1 else []
        processors += [TopKLogitsWarper(settings.top_k)] if settings.top_k else []
        processors += [TopPLogitsWarper(settings.top_p)] if settings.top_p < 1 else []
        processors.append(_KeyedSampler(keys, settings.max_new_tokens, longest, model.device))
    ends = _ends(model, tokenizer)
    # Greedy for `generate`: the sampler above has left one token. The values of sampling are those it takes as unset.
    config = GenerationConfig(
        do_sample=False, temperature=1.0, top_p=1.0, top_k=50, num_beams=1, max_new_tokens=settings.max_new_tokens,
        eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, use_cache=True,
    )  # fmt: skip
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList(processors),
        )
    return [_completion(tokenizer, row, ends) for row in output[:, longest:].tolist()]


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a completion: those the model is configured with, and that of the tokenizer."""
    own = model.generation_config.eos_token_id
    configured = [] if own is None else own if isinstance(own, list) else [own]
    return sorted({tokenizer.eos_token_id, *configured})


def _completion(tokenizer: Any, row: list[int], ends: list[int]) -> Completion:
    end = next((position for position, token in enumerate(row) if token in ends), None)
    text = tokenizer.decode(row if end is None else row[:end], skip_special_tokens=False)
    return Completion(text, end is not None)
