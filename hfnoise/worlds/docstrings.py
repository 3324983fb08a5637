"""Real English and code without a download: the docstrings of the Python standard library, as text and as pairs.

Documents are split by a hash of their name, so a
document is in the same split under every Python version; the tiny Llama of this world (`model_path`) has seen none of
the validation documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfnoise.worlds.standard_library import Document, standard_library_documents
from hfnoise.worlds.text_windows import (
    COMPLETION_BYTES,
    MAX_TOKENS,
    PROMPT_BYTES,
    Window,
    corrupted_pairs,
    text_windows,
)

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["COMPLETION_BYTES", "MAX_TOKENS", "PROMPT_BYTES", "DemoRecipe", "corpus", "model_path", "preference_pairs"]

NAME = "hfnoise:docstrings"  # of the model and of the pairs, on command lines and in cards
MODEL_FOLDER = "docstrings-llama"

_SPLITS = ("train", "validation", "all")
_PAIR_SPLITS = ("train", "validation")


@dataclass(frozen=True)
class DemoRecipe:
    """Settings of a preference run on this world that takes well under a minute on 2 CPU cores.

    Args:
        train_size (`int`): training pairs.
        eval_size (`int`): held-out pairs.
        beta (`float`): of the DPO loss.
        learning_rate (`float`): peak, linear decay.
        num_train_epochs (`int`): passes over the training pairs.
        per_device_train_batch_size (`int`): pairs per step.
        per_device_eval_batch_size (`int`): pairs per evaluation step. It divides `eval_size`: TRL's accuracy is the
            mean of the batches' means, and only with equal batches that of the pairs.
        max_length (`int`): tokens of prompt and answer together.
        flip_rate (`float`): share of labels that the noisy runs flip.
    """

    train_size: int = 1280
    eval_size: int = 500
    beta: float = 2.0
    learning_rate: float = 2e-4
    num_train_epochs: int = 2
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 50
    max_length: int = MAX_TOKENS
    flip_rate: float = 0.3

    def __post_init__(self) -> None:
        if self.eval_size % self.per_device_eval_batch_size:
            raise ValueError(
                f"per_device_eval_batch_size={self.per_device_eval_batch_size} must divide eval_size="
                f"{self.eval_size}, or the accuracy is not that of the pairs."
            )


# Measured with TRL 1.16 (`sym`: ours): share of clean held-out pairs with a positive margin; seeds 0, 1, 2 of flips
# and order, on the same pairs; standard error of a number about 0.015. The recipe was chosen on these held-out pairs.
#   flips  sigmoid               robust, told 0.3      sym, told nothing
#   0      .871 .891 .894 (.885)                       .873 .890 .888 (.884)
#   0.3    .682 .712 .659 (.684) .778 .792 .797 (.789) .766 .805 .795 (.789)
# One run: 51 to 73 s of processor time; 33 s on 2 cores that were almost free, up to 110 s on 2 busy ones.
# Half the beta and twice the epochs on half the pairs cost as much, and sym does not help: sigmoid .870 clean, and
# at 0.3 sigmoid .746, robust .804, sym .747.
DEMO_RECIPE = DemoRecipe()


def corpus(split: str = "train") -> list[Document]:
    """Return the docstrings of the installed standard library, sorted by source file, each text once.

    Args:
        split (`str`, defaults to `"train"`): `"train"` (7 of 8 documents), `"validation"` (1 of 8) or `"all"`.

    Returns:
        Documents, 1 to 2 MB of text in all; which ones exist depends on the version of Python.

    Raises:
        ValueError: if the split is unknown.
        RuntimeError: if this Python comes without the sources of its standard library.

    Example:
        >>> from hfnoise.worlds.docstrings import corpus
        >>> next(document.text for document in corpus("all") if document.name == "json.dumps").splitlines()[0]
        'Serialize ``obj`` to a JSON formatted ``str``.'
    """
    if split not in _SPLITS:
        raise ValueError(f"split must be one of {', '.join(_SPLITS)}, got {split!r}.")
    return [document for document in standard_library_documents() if split in ("all", _split_of(document))]


def model_path() -> str:
    """Return the folder of the tiny Llama of this world, for `from_pretrained`.

    Raises:
        FileNotFoundError: if the weights are not there; the message holds the command that trains them.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> from hfnoise.worlds.docstrings import model_path
        >>> model = AutoModelForCausalLM.from_pretrained(model_path())
    """
    folder = Path(str(files("hfnoise.model_cards"))) / MODEL_FOLDER
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no weights in {folder}. Train them in a few minutes with: "
            f"python -m hfnoise.worlds.docstrings_model --output_dir {folder}"
        )
    return str(folder)


def preference_pairs(split: str = "train", size: int = 1000, seed: int = 0) -> Dataset:
    """Return pairs whose clean label is known: the true continuation against a subtly corrupted one.

    Prompt and chosen are neighbouring pieces of one docstring; rejected is chosen with one or two small errors (see
    [`~hfnoise.worlds.text_corruptions.corrupt`]). No piece is used twice, a smaller `size` gives the first pairs of a
    larger one, and a validation answer that stands word for word in a training document is left out.

    Args:
        split (`str`, defaults to `"train"`): `"train"` or `"validation"`.
        size (`int`, defaults to `1000`): number of pairs, from 1 to what the corpus holds (about 10000 and 1200).
        seed (`int`, defaults to `0`): another seed draws other pieces and other errors.

    Returns:
        `datasets.Dataset` with the string columns `prompt`, `chosen`, `rejected` (no end-of-text token: TRL adds it);
        prompt and answer take at most 96 tokens of any byte-level tokenizer, end-of-text included.

    Raises:
        ValueError: if the split is unknown, or the size or the seed is out of range.

    Example:
        >>> from hfnoise.worlds.docstrings import preference_pairs
        >>> pairs = preference_pairs("validation", size=3)
        >>> pairs.column_names
        ['prompt', 'chosen', 'rejected']
    """
    if split not in _PAIR_SPLITS:
        raise ValueError(f"split must be one of {', '.join(_PAIR_SPLITS)}, got {split!r}.")
    _check_integer("size", size, 1)
    _check_integer("seed", seed, 0)
    rows = list(islice(_pair_rows(split, seed), size))
    if size > len(rows):
        raise ValueError(
            f"size={size} is more than the {len(rows)} {split} pairs that the docstrings of this Python give. "
            f"Ask for at most {len(rows)}."
        )
    from datasets import Dataset

    return Dataset.from_list(rows)


def _check_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")


def _split_of(document: Document) -> str:
    return "validation" if hashlib.sha256(document.name.encode()).digest()[0] < 32 else "train"


def _pair_rows(split: str, seed: int) -> Iterator[dict[str, str]]:
    """Yield all pairs of a split in the order that the seed gives them."""
    seen = "\n\n".join(document.text for document in corpus("train")) if split == "validation" else ""
    return corrupted_pairs(_windows(split), seed, seen)


@lru_cache(maxsize=2)
def _windows(split: str) -> list[Window]:
    return text_windows(corpus(split))
