"""Make the data of BVPO: preference pairs with reasoning traces and without, sampled from the model and scored.

For every prompt the model answers some times with a trace and some times after an empty one; the best and the worst
answer of each mode make a pair. The four answers of a row belong to one prompt, and are different answers.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from datasets import Dataset

from hfnoise.preference.hf_trace_sampling import Completion, SamplingSettings, sample_completions
from hfnoise.preference.traces import EMPTY_TRACE, TRACE_END, TRACE_START, split_trace, without_trace_start

logger = logging.getLogger(__name__)

MODES = ("think", "nothink")
_STARTS = {"think": TRACE_START, "nothink": EMPTY_TRACE}
_SUFFIXES = {"think": "", "nothink": "_nothink"}
RewardFunction = Callable[[Any, str], float]


def make_trace_pairs(
    model: Any,
    prompts: Iterable[Any],
    reward_fn: RewardFunction,
    samples: int = 5,
    tokenizer: Any = None,
    *,
    max_new_tokens: int = 1024,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    batch_size: int = 16,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Dataset:
    """Return preference pairs with and without traces, four answers a row, as BVPO trains on them.

    BVPO (arXiv 2510.05095) samples 5 answers per prompt and mode and takes the best as chosen and the worst as
    rejected. Departures: an answer that was cut, or has no well-formed trace, is never taken, so that no branch lacks
    its answer; of equal rewards the first sample counts; a prompt without a difference in one mode is left out whole,
    since the loss needs both pairs.

    The result depends on the seed and not on the batch size or on the other prompts, up to the rounding of the model:
    see [`~hfnoise.preference.hf_trace_sampling.sample_completions`].

    Args:
        model (`PreTrainedModel` or `str`): a reasoning model, or its Hub id or folder.
        prompts (`Iterable`): texts, or conversations (lists of messages, the last one not the assistant's). Texts are
            continued as they are; conversations go through the chat template. `<think>` is opened, or opened and
            closed, by this function, whether the prompt already ends in it or not.
        reward_fn (`Callable`): `reward_fn(prompt, answer) -> float`, higher is better; `prompt` as it was given,
            `answer` as it goes into the dataset: `<think>\\n{trace}\\n</think>\\n\\n{answer}`, or the bare answer.
        samples (`int`, defaults to `5`): answers per prompt and mode, at least 2.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): that of the model by default; with padding and
            end-of-sequence tokens.
        max_new_tokens (`int`, defaults to `1024`): longest trace and answer; longer ones are cut and not used.
        temperature (`float`, defaults to `1.0`): above 0; 1 samples from the model itself.
        top_p (`float`, defaults to `1.0`): share of probability that is sampled from, in (0, 1].
        top_k (`int`, defaults to `0`): number of tokens that are sampled from; 0: all.
        seed (`int`, defaults to `0`): at least 0.
        batch_size (`int`, defaults to `16`): answers sampled at once.
        chat_template_kwargs (`dict`, *optional*): further arguments of the chat template.

    Returns:
        `datasets.Dataset` with `prompt`, `chosen`, `rejected`, `chosen_nothink`, `rejected_nothink` (text, or messages
        where the prompts are conversations) and the reward of each answer: `chosen_reward`, `rejected_reward`,
        `chosen_nothink_reward`, `rejected_nothink_reward`. [`trace_report`] returns what was counted.

    Raises:
        ValueError: for bad arguments, a reward that is not finite, or if no prompt gives a pair.

    Example:
        >>> from hfnoise import make_trace_pairs
        >>> from hfnoise.worlds.arithmetic import model_path, prompts, reward
        >>> pairs = make_trace_pairs(model_path(), prompts("train", 30), reward, max_new_tokens=128, batch_size=150)
        >>> pairs[0]["chosen"].startswith("<think>\\n"), pairs[0]["chosen_reward"], pairs[0]["rejected_reward"]
        (True, 1.0, 0.0)
    """
    prompts = _checked_prompts(prompts)
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 2:
        raise ValueError(f"samples must be an integer of at least 2, a best and a worst, got {samples!r}.")
    if temperature == 0:
        raise ValueError("temperature must be above 0: at 0 all samples of a prompt are equal.")
    settings = SamplingSettings(max_new_tokens, temperature, top_p, top_k, seed, batch_size)
    model, tokenizer = _loaded(model, tokenizer)
    is_conversation = not isinstance(prompts[0], str)
    prefixes = [_prefix(prompt, tokenizer, chat_template_kwargs or {}) for prompt in prompts]
    sampled = {
        mode: sample_completions(
            model, tokenizer, [prefix + _STARTS[mode] for prefix in prefixes], samples, settings,
            add_special_tokens=not is_conversation, description=f"{samples} answers each ({mode})",
        )
        for mode in MODES
    }  # fmt: skip
    found = {mode: _score(mode, prompts, sampled[mode], reward_fn) for mode in MODES}
    rows = []
    for number, prompt in enumerate(prompts):
        pairs = {mode: _best_and_worst(found[mode][number]) for mode in MODES}
        if all(pair is not None for pair in pairs.values()):
            rows.append(_row(prompt, pairs))
    report = {
        "model": model.config._name_or_path,
        "reward": _name_of(reward_fn),
        "prompts": len(prompts),
        "pairs": len(rows),
        "samples": samples,
        "sampling": asdict(settings),
        **{mode: _counts(sampled[mode], found[mode]) for mode in MODES},
    }
    if not rows:
        raise ValueError(
            f"none of {len(prompts)} prompts gives a pair in both modes. With traces: {report['think']}; without: "
            f"{report['nothink']}. Use prompts of medium difficulty, more samples or a larger max_new_tokens."
        )
    logger.info("%d pairs from %d prompts", len(rows), len(prompts))
    dataset = Dataset.from_list(rows)
    # Kept by select, shuffle and save_to_disk.
    dataset.info.description = json.dumps(report)
    return dataset


def trace_report(dataset: Dataset) -> dict[str, Any]:
    """Return what [`make_trace_pairs`] counted and how it sampled.

    Args:
        dataset (`datasets.Dataset`): what it returned, or a selection of it.

    Returns:
        `model`, `reward`, `prompts`, `pairs`, `samples`, `sampling` (settings), and for `think` and `nothink`:
        `completions`, `cut` (not ended within the limit), `malformed` (no trace where there should be one, a trace
        where there should be none, or no answer), `mean_reward` of the others and
        `no_difference` (prompts without two answers of different reward). `pairs` is the number that was made, of
        which a selection holds fewer.

    Raises:
        ValueError: if the dataset does not come from `make_trace_pairs`.

    Example:
        >>> from datasets import Dataset
        >>> from hfnoise.trainers.trace_pairs import trace_report
        >>> trace_report(Dataset.from_dict({"prompt": ["1+1="]}))
        Traceback (most recent call last):
        ...
        ValueError: the dataset holds no report of make_trace_pairs; ...
    """
    try:
        return dict(json.loads(dataset.info.description))
    except ValueError:
        raise ValueError(
            "the dataset holds no report of make_trace_pairs; pass what that function returned, or a selection of it."
        ) from None


def _checked_prompts(prompts: Any) -> list[Any]:
    """Return the prompts as a list, all texts or all conversations."""
    wanted = "a list of texts, or a list of conversations (lists of messages with 'role' and 'content')"
    if isinstance(prompts, (str, dict)) or not isinstance(prompts, Iterable):
        raise ValueError(f"prompts must be {wanted}, got {type(prompts).__name__}.")
    found = list(prompts)
    if not found:
        raise ValueError(f"prompts is empty: give {wanted}.")
    for number, prompt in enumerate(found):
        if type(prompt) is not type(found[0]) or not (isinstance(prompt, str) or _is_conversation(prompt)):
            raise ValueError(f"prompts must be {wanted}, of one kind; prompt {number} is {prompt!r}.")
        if not prompt:
            raise ValueError(f"prompt {number} is empty.")
        if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
            raise ValueError(f"prompt {number} ends with an answer of the assistant; leave that message out.")
    return found


def _is_conversation(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt)


def _loaded(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if isinstance(model, str):
        model = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    if tokenizer is None:
        if not model.config._name_or_path:
            raise ValueError("a model that was built in memory has no tokenizer of its own: give tokenizer.")
        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    for name in ("pad_token", "eos_token"):
        if getattr(tokenizer, name) is None:
            raise ValueError(
                f"the tokenizer has no {name}; set tokenizer.{name}, the padding one not to the last one."
            )
    return model, tokenizer


def _prefix(prompt: Any, tokenizer: Any, chat_template_kwargs: dict[str, Any]) -> str:
    """Return what the model continues, up to where the trace starts."""
    if isinstance(prompt, str):
        return without_trace_start(prompt)
    if tokenizer.chat_template is None:
        raise ValueError("the prompts are conversations and the tokenizer has no chat template; give texts.")
    rendered = tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=True, **chat_template_kwargs
    )
    return without_trace_start(rendered)


def is_well_formed(mode: str, text: str) -> bool:
    """Return whether a completion holds an answer, and exactly the trace that the mode asks for.

    Args:
        mode (`str`): `"think"`: one `</think>`, since the prompt has opened the trace; `"nothink"`: neither mark.
        text (`str`): what the model wrote.

    Example:
        >>> from hfnoise.trainers.trace_pairs import is_well_formed
        >>> is_well_formed("think", "1+1=2\\n</think>\\n\\n2"), is_well_formed("nothink", "2\\n</think>")
        (True, False)
    """
    if TRACE_START.strip() in text or text.count(TRACE_END) != (mode == "think"):
        return False
    return bool(split_trace(text)[1])


def _score(
    mode: str, prompts: Sequence[Any], sampled: Sequence[Sequence[Completion]], reward_fn: RewardFunction
) -> list[list[tuple[float, str]]]:
    """Return (reward, answer) of the usable completions of every prompt, in the order they were drawn."""
    start = TRACE_START if mode == "think" else ""
    scored = []
    for number, (prompt, completions) in enumerate(zip(prompts, sampled, strict=True)):
        answers = [start + c.text for c in completions if c.finished and is_well_formed(mode, c.text)]
        scored.append([(_reward(reward_fn, prompt, answer, number), answer) for answer in answers])
    return scored


def _reward(reward_fn: RewardFunction, prompt: Any, answer: str, number: int) -> float:
    value = reward_fn(prompt, answer)
    try:
        reward = float(value)
    except (TypeError, ValueError):
        reward = math.nan
    if not math.isfinite(reward):
        raise ValueError(
            f"reward_fn must return a finite number, got {value!r} for prompt {number}, answer {answer!r}."
        )
    return reward


def _name_of(reward_fn: Any) -> str:
    named = reward_fn if hasattr(reward_fn, "__qualname__") else type(reward_fn)
    return f"{named.__module__}.{named.__qualname__}"


def _best_and_worst(scored: list[tuple[float, str]]) -> tuple[tuple[float, str], tuple[float, str]] | None:
    if not scored:
        return None
    best, worst = max(scored, key=lambda pair: pair[0]), min(scored, key=lambda pair: pair[0])
    return (best, worst) if best[0] > worst[0] else None


def _row(prompt: Any, pairs: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": prompt}
    rewards = {}
    for mode, pair in pairs.items():
        for side, (reward, answer) in zip(("chosen", "rejected"), pair, strict=True):
            name = side + _SUFFIXES[mode]
            row[name] = answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
            rewards[f"{name}_reward"] = reward
    return row | rewards


def _counts(sampled: Sequence[Sequence[Completion]], scored: Sequence[list[tuple[float, str]]]) -> dict[str, Any]:
    everything = [completion for completions in sampled for completion in completions]
    rewards = [reward for pairs in scored for reward, _ in pairs]
    finished = sum(completion.finished for completion in everything)
    return {
        "completions": len(everything),
        "cut": len(everything) - finished,
        "malformed": finished - len(rewards),
        "mean_reward": sum(rewards) / len(rewards) if rewards else None,
        "no_difference": sum(_best_and_worst(pairs) is None for pairs in scored),
    }
