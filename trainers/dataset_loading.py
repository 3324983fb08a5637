"""Load preference datasets and models by name: the Hub, local files, or the embedded world."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset, load_from_disk

from hfnoise.preference.corruption import flip_labels
from hfnoise.worlds import arithmetic, code, docstrings

logger = logging.getLogger(__name__)

# Names of the embedded worlds, on the command line and in YAML.
EMBEDDED = docstrings.NAME
ARITHMETIC = "hfnoise:arithmetic"
CODE = code.NAME
# Pairs of the code world: training pairs are the private data of a demonstration, so there are many.
_CODE_PAIRS = (8000, 400)
_CODE_TEST_ROWS = 400
_MODEL_PATHS = {EMBEDDED: docstrings.model_path, ARITHMETIC: arithmetic.model_path}
# Endings by which a name is meant as a file, beside those that can be read.
_FILE_ENDINGS = (".arrow", ".gz", ".tsv", ".txt", ".yaml", ".yml", ".zip", ".zst")
_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def resolve_model(name: str) -> str:
    """Return the name or path to load: for the name of an embedded world, the folder of its model."""
    return _MODEL_PATHS[name]() if name in _MODEL_PATHS else name


def load_any(name: str | None, config: str | None = None, streaming: bool = False, form: str = "pairs") -> Any:
    """Return the splits of a dataset: a Hub id, a folder of `save_to_disk`, a data file, or an embedded world.

    `hfnoise:docstrings` has preference pairs, `hfnoise:arithmetic` pairs with reasoning traces and without,
    `hfnoise:code` pairs and texts. The form matters for the embedded worlds only.

    Args:
        name (`str`): of the dataset.
        config (`str`, *optional*), streaming (`bool`, defaults to `False`): for `load_dataset`.
        form (`str`, defaults to `"pairs"`): `"pairs"` or `"text"`.

    Raises:
        ValueError: if no name is given, a local path does not exist or holds no dataset, or a world has no such form.
    """
    if not name:
        raise ValueError("give --dataset_name: a Hub id, a local file or folder, or hfnoise:docstrings.")
    if name == CODE:
        return _code(form)
    if form != "pairs" and name in (EMBEDDED, ARITHMETIC):
        raise ValueError(
            f"{name} holds preference pairs. As texts use {CODE}: code that the model {EMBEDDED} has not read, "
            "whereas it has read docstrings without any privacy."
        )
    if name == EMBEDDED:
        recipe = docstrings.DEMO_RECIPE
        return DatasetDict(
            train=docstrings.preference_pairs("train", size=recipe.train_size, seed=0),
            test=docstrings.preference_pairs("validation", size=recipe.eval_size, seed=0),
        )
    if name == ARITHMETIC:
        return DatasetDict(train=arithmetic.trace_pairs("train"), test=arithmetic.trace_pairs("validation"))
    path = Path(name).expanduser()
    name = str(path) if path.exists() else name
    if not path.exists() and _is_meant_as_path(name):
        # The Hub would be asked several times first, and would then be said not to have it.
        raise ValueError(f"no such file or folder: {str(path.absolute())!r}, given as --dataset_name {name}.")
    if path.is_dir() and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        stored = load_from_disk(name)
        return stored if isinstance(stored, dict) else DatasetDict(train=stored)
    if path.is_file():
        if path.suffix not in _READERS:
            raise ValueError(f"dataset file {name!r} must end in {', '.join(_READERS)}.")
        return load_dataset(_READERS[path.suffix], data_files=name, streaming=streaming)
    return load_dataset(name, name=config, streaming=streaming)


def _code(form: str) -> DatasetDict:
    if form == "text":
        return DatasetDict(train=code.code_texts("train"), test=code.code_texts("validation", _CODE_TEST_ROWS))
    train_size, test_size = _CODE_PAIRS
    return DatasetDict(train=code.code_pairs("train", train_size), test=code.code_pairs("validation", test_size))


def _is_meant_as_path(name: str) -> bool:
    """Return whether a dataset name cannot be a Hub id, which is `name` or `owner/name`."""
    looks_like_path = name.startswith((".", "~", "/")) or "\\" in name or name.count("/") > 1
    return looks_like_path or Path(name).suffix.lower() in (*_READERS, *_FILE_ENDINGS)


def load_splits(script: Any, form: str = "pairs") -> tuple[Any, Any]:
    """Return the training and the evaluation split that the script arguments name, with the flips they ask for.

    The evaluation split is `None` where the dataset has none of that name.

    Args:
        script (`trl.ScriptArguments`): of the command line.
        form (`str`, defaults to `"pairs"`): what to take of an embedded world, `"pairs"` or `"text"`.

    Raises:
        ValueError: if the training split does not exist.
    """
    splits = load_any(script.dataset_name, script.dataset_config, script.dataset_streaming, form)
    if script.dataset_train_split not in splits:
        raise ValueError(
            f"dataset {script.dataset_name!r} has no split {script.dataset_train_split!r}; it has {sorted(splits)}. "
            "Name one with --dataset_train_split."
        )
    train, evaluation = splits[script.dataset_train_split], splits.get(script.dataset_test_split)
    if evaluation is None:
        logger.warning(
            "dataset %r has no split %r, so there is no evaluation; name one with --dataset_test_split.",
            script.dataset_name, script.dataset_test_split,
        )  # fmt: skip
    if getattr(script, "inject_flip_rate", 0.0):
        train = flip_labels(train, script.inject_flip_rate, script.flip_seed)
        evaluation = None if evaluation is None else flip_labels(evaluation, script.inject_flip_rate, script.flip_seed)
    return train, evaluation
