"""Imperfect worked solutions of sums: what the tiny model of the arithmetic world learns to write.

A writer is in one of two moods, which show. A careful one makes few slips; a sloppy one makes many, and says "hmm"
and "maybe". So traces of one prompt differ in length and in quality, and both can be told from the text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from hfnoise.preference.traces import EMPTY_TRACE, TRACE_END, TRACE_START

_TERM = re.compile(r"[+-]?\d+")


@dataclass(frozen=True)
class Mood:
    """How one trace is written; every number is a probability.

    Args:
        slip (`float`): a step has a wrong result.
        notice (`float`): a wrong result is corrected in the next line.
        doubt (`float`): a right result is doubted and repeated.
        ramble (`float`): a filler line comes before a step.
    """

    slip: float
    notice: float
    doubt: float
    ramble: float


CAREFUL = Mood(slip=0.03, notice=0.5, doubt=0.05, ramble=0.05)
SLOPPY = Mood(slip=0.25, notice=0.25, doubt=0.15, ramble=0.5)
SLOPPY_SHARE = 0.5
# Share of wrong answers among the examples without a trace, beside what the model gets wrong by itself.
WRONG_ANSWERS = 0.1
_FILLERS = {CAREFUL: ("so", "next"), SLOPPY: ("hmm", "maybe", "hmm maybe", "i guess")}
# Slips are of the size people make: one off, the tens wrong.
_ERRORS = (-10, -2, -1, -1, 1, 1, 2, 10)


def terms(prompt: str) -> list[int]:
    """Return the signed numbers of a prompt: "7+5-3=" gives [7, 5, -3].

    Raises:
        ValueError: if it is no sum of this world.
    """
    body = prompt.removesuffix("=")
    found = _TERM.findall(body)
    if not prompt.endswith("=") or "".join(found) != body or len(found) < 2:
        raise ValueError(f'a prompt of the arithmetic world looks like "7+5-9=", got {prompt!r}.')
    return [int(term) for term in found]


def write_trace(prompt: str, random: Random) -> tuple[str, int]:
    """Return a worked solution and the answer it arrives at, right or wrong.

    Args:
        prompt (`str`): a sum such as "7+5-9=".
        random (`random.Random`): where mood and slips come from.

    Example:
        >>> from random import Random
        >>> from hfnoise.worlds.arithmetic_traces import write_trace
        >>> write_trace("7+5-9=", Random(1))
        ('7+5=12\\ni guess\\n12-9=3', 3)
    """
    mood = SLOPPY if random.random() < SLOPPY_SHARE else CAREFUL
    total, *rest = terms(prompt)
    lines = []
    for term in rest:
        if random.random() < mood.ramble:
            lines.append(random.choice(_FILLERS[mood]))
        question = f"{total}{term:+d}="
        right = total + term
        if random.random() < mood.slip:
            wrong = max(0, right + random.choice(_ERRORS))
            lines.append(f"{question}{wrong}")
            noticed = random.random() < mood.notice
            total = right if noticed else wrong
            lines += ["wait", f"{question}{right}"] if noticed else []
        else:
            lines.append(f"{question}{right}")
            lines += ["wait", f"{question}{right}"] if random.random() < mood.doubt else []
            total = right
    return "\n".join(lines), total


def write_example(prompt: str, with_trace: bool, random: Random) -> tuple[str, str]:
    """Return the opening, `<think>\\n` or an empty trace, and what the model shall write after it."""
    if with_trace:
        trace, answer = write_trace(prompt, random)
        return TRACE_START, f"{trace}\n{TRACE_END}\n\n{answer}"
    answer = sum(terms(prompt))
    if random.random() < WRONG_ANSWERS:
        answer = max(0, answer + random.choice(_ERRORS))
    return EMPTY_TRACE, str(answer)
