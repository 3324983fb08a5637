"""Cut texts into pieces that fit a tiny model, and make preference pairs of them whose clean label is known."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple

from hfnoise.worlds.standard_library import Document
from hfnoise.worlds.text_corruptions import corrupt

# A byte-level tokenizer never needs more tokens than bytes: 95 bytes and the end-of-text token fit in 96 tokens.
MAX_TOKENS = 96
PROMPT_BYTES = 44
COMPLETION_BYTES = 48

_PIECE = re.compile(r"\s*\S+")


class Window(NamedTuple):
    """A prompt and the answer that follows it in a document; `key` is unique."""

    key: str
    prompt: str
    answer: str


def text_windows(documents: Sequence[Document]) -> list[Window]:
    """Return all pieces of the documents that are long enough to hold an error."""
    return [
        Window(f"{document.name} {index}", prompt, answer)
        for document in documents
        for index, (prompt, answer) in enumerate(_cut(document.text))
        if len(_PIECE.findall(prompt)) >= 3 and len(re.findall(r"[A-Za-z]{2,}", answer)) >= 5
    ]


def corrupted_pairs(windows: Sequence[Window], seed: int, seen: str = "") -> Iterator[dict[str, str]]:
    """Yield preference pairs, true against corrupted answer, in the order that the seed gives them.

    Args:
        windows (`Sequence[Window]`): from [`text_windows`].
        seed (`int`): another one draws other pieces first, and other errors.
        seen (`str`, defaults to `""`): text whose pieces are left out.
    """
    vocabulary = [word for _, _, answer in windows for word in answer.split() if re.fullmatch("[a-z]{3,}", word)]
    for key, prompt, chosen in sorted(windows, key=lambda window: seeded_digest(seed, window.key)):
        # A generator per piece: a pair does not depend on the pairs before it.
        rejected = corrupt(chosen, Random(seeded_digest(seed, key)), vocabulary)
        fits = len((prompt + rejected).encode()) < MAX_TOKENS
        if fits and rejected != chosen and chosen not in seen:
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def seeded_digest(seed: int, key: str) -> bytes:
    """Return a key to sort by that looks random and is the same everywhere."""
    return hashlib.sha256(f"{seed} {key}".encode()).digest()


def cut_into_rows(text: str, limit: int) -> Iterator[str]:
    """Cut a text at white space into rows of at most `limit` bytes; longer words are skipped."""
    pieces = _PIECE.findall(text)
    start = 0
    while start < len(pieces):
        end = _fill(pieces, start, limit)
        if end > start:
            yield "".join(pieces[start:end]).strip()
        start = max(end, start + 1)


def _cut(text: str) -> Iterator[tuple[str, str]]:
    """Cut a text into neighbouring prompts and answers, at white space, which belongs to the answer.

    So "prompt" and "prompt + answer" start with the same tokens: byte-level tokenizers join a space to the next word.
    """
    pieces = _PIECE.findall(text)
    start = 0
    while start < len(pieces):
        middle = _fill(pieces, start, PROMPT_BYTES)
        end = _fill(pieces, middle, COMPLETION_BYTES)
        yield "".join(pieces[start:middle]).lstrip(), "".join(pieces[middle:end])
        start = max(end, start + 1)  # a word longer than the limit is skipped


def _fill(pieces: list[str], start: int, limit: int) -> int:
    """Return the end of the longest run of pieces from `start` that has at most `limit` bytes."""
    size = 0
    for end in range(start, len(pieces)):
        size += len(pieces[end].encode())
        if size > limit:
            return end
    return len(pieces)
