"""The text format of reasoning traces: `<think>`, the trace, `</think>`, and then the answer.

It is that of DeepSeek-R1 and of the models distilled from it; Qwen3 writes the same. All text that is built here keeps
the trace. The chat templates of those models do not: they drop it from a finished assistant turn.
"""

from __future__ import annotations

TRACE_START = "<think>\n"
TRACE_END = "</think>"
# What stands before an answer that was given without thinking.
EMPTY_TRACE = "<think>\n\n</think>\n\n"


def without_trace_start(text: str) -> str:
    """Return a prompt up to the point where the trace starts: without a final `<think>`, or a final empty trace.

    The generation prompts of reasoning models end in one of them, in the other, or in neither.

    Args:
        text (`str`): a rendered prompt.

    Example:
        >>> from hfnoise.preference.traces import without_trace_start
        >>> without_trace_start("<|Assistant|><think>\\n")
        '<|Assistant|>'
    """
    for ending in (EMPTY_TRACE, EMPTY_TRACE.rstrip(), TRACE_START, TRACE_START.rstrip()):
        if text.endswith(ending):
            return text.removesuffix(ending)
    return text


def split_trace(text: str) -> tuple[str | None, str]:
    """Return the trace, `None` if there is none, and the answer, both without surrounding white space.

    Args:
        text (`str`): an answer with or without a trace. An opening `<think>` may be missing, since it often belongs to
            the prompt. The answer is what follows the last `</think>`.

    Example:
        >>> from hfnoise.preference.traces import split_trace
        >>> split_trace("<think>\\n1+1=2\\n</think>\\n\\n2")
        ('1+1=2', '2')
        >>> split_trace("2")
        (None, '2')
    """
    trace, end, answer = text.rpartition(TRACE_END)
    if not end:
        return None, text.strip()
    return trace.removeprefix(TRACE_START.strip()).strip(), answer.strip()
