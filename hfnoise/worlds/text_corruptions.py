"""Subtle corruptions of a text: the rejected answers of the docstrings world.

Each kind edits one place of a list of words, in place, and leaves the list alone where it does not apply. The white
space between the words is kept apart, so line breaks and indentation never give a corrupted text away.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random

Corruption = Callable[[list[str], Random, Sequence[str]], None]

FUNCTION_WORDS = tuple("the a an of to in is are was be by for and or not this that with as from if it on at".split())
_PIECE = re.compile(r"(\s*)(\S+)")


def corrupt(text: str, rng: Random, vocabulary: Sequence[str], double_share: float = 0.75) -> str:
    """Return the text with one or two small errors.

    Args:
        text (`str`): what to corrupt.
        rng (`random.Random`): decides the kinds and the places; the same state gives the same result.
        vocabulary (`Sequence[str]`): words that may replace a word, not empty.
        double_share (`float`, defaults to `0.75`): probability of two errors instead of one, in [0, 1].

    Returns:
        The corrupted text; the text itself where no error could be placed (a text of one word, say).

    Example:
        >>> from random import Random
        >>> from hfnoise.worlds.text_corruptions import corrupt
        >>> corrupt("Return the name of the file.", Random(0), ["window"])
        'Return the window of the file.'
    """
    pieces = _PIECE.findall(text)
    words = [word for _, word in pieces]
    count = 2 if rng.random() < double_share else 1
    for kind in rng.sample(CORRUPTIONS, count):
        kind(words, rng, vocabulary)
    return "".join(space + word for (space, _), word in zip(pieces, words, strict=True))


def _swap(words: list[str], rng: Random, vocabulary: Sequence[str]) -> None:
    """Swap two neighbouring words."""
    places = [i for i in range(len(words) - 1) if words[i] != words[i + 1]]
    if places:
        i = rng.choice(places)
        words[i], words[i + 1] = words[i + 1], words[i]


def _repeat(words: list[str], rng: Random, vocabulary: Sequence[str]) -> None:
    """Write a word twice."""
    if len(words) > 1:
        i = rng.randrange(len(words) - 1)
        words[i] = f"{words[i]} {words[i]}"


def _reorder(words: list[str], rng: Random, vocabulary: Sequence[str]) -> None:
    """Shuffle four words in a row."""
    if len(words) >= 4:
        i = rng.randrange(len(words) - 3)
        run = words[i : i + 4]
        rng.shuffle(run)
        words[i : i + 4] = run


def _misspell(words: list[str], rng: Random, vocabulary: Sequence[str]) -> None:
    """Swap two letters inside a word."""
    places = [
        (i, j)
        for i, word in enumerate(words)
        if re.fullmatch("[A-Za-z]{4,}", word)
        for j in range(1, len(word) - 1)
        if word[j] != word[j + 1]
    ]
    if places:
        i, j = rng.choice(places)
        word = words[i]
        words[i] = word[:j] + word[j + 1] + word[j] + word[j + 2 :]


def _recase(words: list[str], rng: Random, vocabulary: Sequence[str]) -> None:
    """Change the case of a first letter."""
    places = [i for i, word in enumerate(words) if i and re.search("[A-Za-z]{2}", word) and word[0].isalpha()]
    if places:
        i = rng.choice(places)
        words[i] = words[i][0].swapcase() + words[i][1:]


def _renumber(words: list[str], rng: Random, vocabulary: Sequence[str]) -> None:
    """Add or remove a plural s."""
    nouns = [i for i, word in enumerate(words) if re.fullmatch("[a-z]{3,}", word) and word not in FUNCTION_WORDS]
    places = [i for i in nouns if not words[i].endswith("ss")]
    if places:
        i = rng.choice(places)
        words[i] = words[i][:-1] if words[i].endswith("s") else words[i] + "s"


def _replace(words: list[str], rng: Random, vocabulary: Sequence[str]) -> None:
    """Put a word of another document in place of a word."""
    places = [i for i, word in enumerate(words) if re.fullmatch("[A-Za-z]{3,}", word)]
    if places:
        words[rng.choice(places)] = rng.choice(vocabulary)


def _confuse(words: list[str], rng: Random, vocabulary: Sequence[str]) -> None:
    """Put a wrong function word: "of" for "to", "is" for "by"."""
    places = [i for i, word in enumerate(words) if word in FUNCTION_WORDS]
    if places:
        i = rng.choice(places)
        words[i] = rng.choice([word for word in FUNCTION_WORDS if word != words[i]])


# A word that is missing, or an answer from another place, is left out on purpose: such a rejected text differs in
# length or in topic, and a model of this size learns the length instead of the language (it ends below chance).
CORRUPTIONS: tuple[Corruption, ...] = (_swap, _repeat, _reorder, _misspell, _recase, _renumber, _replace, _confuse)
