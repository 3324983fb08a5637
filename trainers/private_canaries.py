"""Canaries: rows of random tokens that no other row resembles, to be found again in what a training released."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from datasets import Dataset

_KINDS = ("text", "pairs")
_TRIES = 100  # for each canary; with fewer than a handful of words there are no more different ones
_UNKNOWN = "\ufffd"  # what a tokenizer makes of half a character


def make_canaries(
    vocabulary: Any, m: int, *, seed: int = 0, tokens: int = 12, kind: str = "text", column: str = "text"
) -> Dataset:
    """Return m distinct rows of random tokens, for [`dp_audit`].

    Random strings are the hardest to predict, so their gradients are large and point in directions of their own: what
    is left of one in a model is easy to see. What the canaries are need not be secret; only who was in is.

    Args:
        vocabulary (tokenizer, or sequence of `str`): what to draw from: the tokens of a tokenizer that are whole
            characters and not special, or words, which are joined by spaces.
        m (`int`): number of canaries, at least 1.
        seed (`int`, defaults to `0`): of the draws.
        tokens (`int`, defaults to `12`): tokens or words of a string, at least 1.
        kind (`str`, defaults to `"text"`): `"text"`, one column; or `"pairs"`, the columns `prompt`, `chosen` and
            `rejected`, each a string of its own.
        column (`str`, defaults to `"text"`): name of the one column.

    Returns:
        `datasets.Dataset` with m rows.

    Raises:
        ValueError: for numbers out of range, an unknown kind, or a vocabulary without so many different strings.

    Example:
        >>> from hfnoise import make_canaries
        >>> make_canaries(["red", "green", "blue"], m=2, tokens=3)["text"][0]
        'blue blue green'
    """
    for name, value in (("m", m), ("tokens", tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
    if kind not in _KINDS:
        raise ValueError(f"kind must be 'text' or 'pairs', got {kind!r}.")
    random, words = Random(seed), _words(vocabulary)
    joint = "" if hasattr(vocabulary, "decode") else " "
    found: dict[str, None] = {}
    needed = m * (3 if kind == "pairs" else 1)
    for _ in range(_TRIES * needed):
        found[joint.join(random.choices(words, k=tokens))] = None
        if len(found) == needed:
            break
    else:
        raise ValueError(
            f"a vocabulary of {len(words)} gives only {len(found)} different strings of {tokens} tokens, {needed} are "
            "needed: equal canaries cannot be told apart. Use more tokens, or a larger vocabulary."
        )
    strings = list(found)
    if kind == "text":
        return Dataset.from_dict({column: strings})
    # The space makes chosen and rejected continue the prompt at the border of a token.
    return Dataset.from_dict(
        {
            "prompt": strings[:m],
            "chosen": [f" {text.strip()}" for text in strings[m : 2 * m]],
            "rejected": [f" {text.strip()}" for text in strings[2 * m :]],
        }
    )


def _words(vocabulary: Any) -> Sequence[str]:
    if not hasattr(vocabulary, "decode"):
        words = [str(word) for word in vocabulary]
    elif not vocabulary.is_fast or vocabulary.backend_tokenizer.decoder is None:
        # Words without spaces in between would run together.
        raise ValueError("this tokenizer does not put text together again; give a list of words instead.")
    else:
        special = set(vocabulary.all_special_ids)
        texts = [vocabulary.decode([number]) for number in range(len(vocabulary)) if number not in special]
        words = [text for text in texts if text and _UNKNOWN not in text]
    if not words:
        raise ValueError("the vocabulary is empty.")
    return words
