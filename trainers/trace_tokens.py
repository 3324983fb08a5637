"""Token ids of a pair of reasoning answers: with its trace, and without, on one prompt.

The chat templates of reasoning models delete the trace of a finished turn (DeepSeek-R1's does), so that a preference
dataset tokenized through them would train on answers without traces. The ids are built here from the template's
generation prompt and the text of the answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hfnoise.preference.traces import EMPTY_TRACE, TRACE_END, TRACE_START, split_trace, without_trace_start

BRANCHES = ("chosen", "rejected", "chosen_nothink", "rejected_nothink")
Text = str | Sequence[dict[str, Any]]


class TraceFaultError(ValueError):
    """A row that cannot be trained on, with the reason in a few words."""


def answer_text(completion: Text) -> str:
    """Return the text of a completion: a string, or the messages of one assistant turn."""
    if isinstance(completion, str):
        return completion
    if len(completion) != 1 or completion[0].get("role") != "assistant":
        raise TraceFaultError("have a completion that is not one assistant message")
    message = completion[0]
    reasoning = message.get("reasoning_content") or message.get("thinking")
    content = message.get("content") or ""
    return f"{TRACE_START}{reasoning}\n{TRACE_END}\n\n{content}" if reasoning else content


def trace_and_answer(text: str) -> tuple[str, str]:
    """Return the trace, which a model may leave empty, and the answer of a completion.

    Raises:
        TraceFaultError: if the trace does not end, or no answer follows.
    """
    trace, answer = split_trace(text)
    if trace is None:
        raise TraceFaultError(f"have a trace without {TRACE_END}")
    if not answer:
        raise TraceFaultError("have no answer after the trace")
    return trace, answer


def bare_answer(text: str) -> str:
    """Return an answer that was given without a trace, its empty scaffold removed.

    Raises:
        TraceFaultError: if there is a trace after all, or nothing.
    """
    trace, answer = split_trace(text)
    if trace:
        raise TraceFaultError("have a trace in an answer without traces (chosen_nothink, rejected_nothink)")
    if not answer or answer.startswith(TRACE_START.strip()):
        raise TraceFaultError("have no answer in chosen_nothink or rejected_nothink")
    return answer


def generation_prefix(tokenizer: Any, prompt: Text, **template_arguments: Any) -> str:
    """Return the text in front of a trace: the template's generation prompt without the opening of a trace.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with a chat template, if the prompt is a conversation.
        prompt (`str` or `list[dict]`): text, taken as it is, or messages.
        **template_arguments: for the chat template, for instance `tools`.
    """
    if isinstance(prompt, str):
        return without_trace_start(prompt)
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, **template_arguments)
    return without_trace_start(text)


def trace_pair_ids(example: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """Return the token ids of the four branches of a row, each pair with the prompt its two answers share.

    Args:
        example (`dict`): with `prompt`, `chosen`, `rejected` (with traces), `chosen_nothink`, `rejected_nothink`.
        tokenizer (`PreTrainedTokenizerBase`): of the model.

    Returns:
        `dict[str, list[int]]`: `prompt_ids`, `chosen_ids`, `rejected_ids`, and the same with `nothink_` in front. The
        empty scaffold belongs to the prompt: it is common to both answers and cancels in their margin.

    Raises:
        TraceFaultError: why the row cannot be trained on.
    """
    prompt = example["prompt"]
    given = example.get("tools")
    tools = {"tools": json.loads(given) if isinstance(given, str) else given} if given else {}
    prefix = generation_prefix(tokenizer, prompt, **tools, **(example.get("chat_template_kwargs") or {}))
    # The template has written the special tokens of a conversation; plain text gets those the tokenizer adds.
    special = {"add_special_tokens": isinstance(prompt, str)}
    texts = {name: answer_text(example[name]) for name in BRANCHES}
    parts = [trace_and_answer(texts[name]) for name in BRANCHES[:2]]
    traces = [f"{trace}\n{TRACE_END}\n\n{answer}" for trace, answer in parts]
    answers = [bare_answer(texts[name]) for name in BRANCHES[2:]]
    with_trace = _pair_ids(tokenizer, prefix + TRACE_START, traces, special)
    without = _pair_ids(tokenizer, prefix + EMPTY_TRACE, answers, special)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return dict(zip(names, with_trace, strict=True)) | {
        f"nothink_{name}": ids for name, ids in zip(names, without, strict=True)
    }


def _pair_ids(tokenizer: Any, prefix: str, answers: list[str], special: dict[str, bool]) -> list[list[int]]:
    """Return prompt, chosen and rejected ids; tokens that an answer merges with the prompt belong to the answers."""
    prompt = _ids(tokenizer, prefix, special)
    end = tokenizer.eos_token
    full = [_ids(tokenizer, prefix + answer.removesuffix(end) + end, special) for answer in answers]
    if full[0] == full[1]:
        raise TraceFaultError("have two equal branches")
    common = 0
    for tokens in zip(prompt, *full, strict=False):
        if len(set(tokens)) > 1:
            break
        common += 1
    return [prompt[:common], *(ids[common:] for ids in full)]


def _ids(tokenizer: Any, text: str, special: dict[str, bool]) -> list[int]:
    ids: list[int] = tokenizer(text, **special)["input_ids"]
    return ids
