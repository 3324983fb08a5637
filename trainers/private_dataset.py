"""Which dataset the ledger knows: the one that was given, before the Trainer tokenised it, and where its files are."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

_DIGITS = 16  # of the fingerprint, 64 bits: no two datasets of a user share a folder by chance


def given_train_dataset(classes: tuple[type, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a Trainer is given as `train_dataset`, by name or by place; None if there is none.

    Args:
        classes (`tuple[type, ...]`): whose `__init__` the arguments go through, in this order; one that only passes
            `*args` on does not know the places, and the next is asked.
        args (`tuple`), kwargs (`dict`): without `self`.

    Example:
        >>> from transformers import Trainer
        >>> from hfnoise.trainers.private_dataset import given_train_dataset
        >>> given_train_dataset((Trainer, object), ("model", None, None, ["a row"]), {})
        ['a row']
    """
    if "train_dataset" in kwargs:
        return kwargs["train_dataset"]
    for one in classes:
        constructor = vars(one).get("__init__")  # its own, not an inherited one
        signature = None if constructor is None else inspect.signature(constructor)
        if signature is not None and "train_dataset" in signature.parameters:
            return signature.bind_partial(None, *args, **kwargs).arguments.get("train_dataset")
    return None


def is_processed(trainer: Any) -> bool:
    """Return whether a built Trainer has made rows of its own out of the dataset, as those of TRL do."""
    return any(one.__module__.startswith("trl.") for one in type(trainer).__mro__)


def privacy_folder(fingerprint: str) -> Path:
    """Return the folder for secret and ledger of a dataset, below the Hugging Face home folder.

    Earlier versions named it by the first characters of the fingerprint, "sha256:" among them. Such a folder goes on
    to be used, or its ledger would be forgotten.

    Args:
        fingerprint (`str`): "sha256:" and hexadecimal digits, see `dataset_fingerprint`.
    """
    root = Path(HF_HOME) / "hfnoise" / "privacy"
    folder, old = root / fingerprint.removeprefix("sha256:")[:_DIGITS], root / fingerprint[:_DIGITS]
    return old if old.is_dir() and not folder.exists() else folder
