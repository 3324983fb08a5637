"""Images with captions by name: the Hub, local files and folders, or an embedded world."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets

from hfnoise.trainers.dataset_loading import load_any
from hfnoise.worlds.coloured_digits import COLOURED_DIGITS
from hfnoise.worlds.digit_world import DigitWorld, LabelledImages
from hfnoise.worlds.digits import DIGITS
from hfnoise.worlds.shaded_digits import SHADED_DIGITS

logger = logging.getLogger(__name__)

IMAGE_WORLDS: dict[str, DigitWorld] = {
    f"hfnoise:{world.name}": world for world in (DIGITS, COLOURED_DIGITS, SHADED_DIGITS)
}


def load_images(script: Any, seed: int) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Return the training and the evaluation images that the script arguments name.

    Where there is no split to evaluate on, `validation_size` of the training split is taken from it.

    Args:
        script ([`~hfnoise.trainers.image_arguments.ImageScriptArguments`]): of the command line.
        seed (`int`): of what is taken.

    Raises:
        ValueError: for a missing split, column, caption or file.
    """
    name = script.dataset_name
    if name in IMAGE_WORLDS:
        splits: Any = world_images(IMAGE_WORLDS[name], script.image_column, script.caption_column)
    elif str(name).startswith("hfnoise:"):
        raise ValueError(f"there are no images named {name!r}; there are {', '.join(IMAGE_WORLDS)}.")
    else:
        splits = load_any(name, script.dataset_config)
    if script.dataset_train_split not in splits:
        raise ValueError(
            f"dataset {name!r} has no split {script.dataset_train_split!r}; it has {sorted(splits)}. Name one with "
            "--dataset_train_split."
        )
    # Before some are held out: rows are named by their number.
    train = _checked(splits[script.dataset_train_split], script)
    test = script.dataset_test_split
    held_out = _checked(splits[test], script) if test in splits else None
    if held_out is None and script.validation_size:
        size = script.validation_size
        rows = int(size) if size >= 1 else round(size * len(train))
        if not 2 <= rows <= len(train) - 1:
            raise ValueError(
                f"validation_size={size:g} of {len(train)} images is {rows}: at least 2 are needed to evaluate on, "
                "and one to train on. Set another --validation_size, or 0 for no evaluation."
            )
        parts = train.train_test_split(test_size=rows, seed=seed)
        train, held_out = parts["train"], parts["test"]
        logger.info("%d of %d images are held out for evaluation.", rows, rows + len(train))
    return train, held_out


def world_images(world: DigitWorld, image_column: str = "image", caption_column: str = "text") -> dict[str, Any]:
    """Return the images of a world of digits with captions, whose wording changes from row to row.

    Args:
        world ([`~hfnoise.worlds.digit_world.DigitWorld`]): which.
        image_column (`str`, defaults to `"image"`), caption_column (`str`, defaults to `"text"`): how to call them.

    Returns:
        `dict` with `train`, without the combinations that no generator of the world is trained on, and `test`.

    Raises:
        ImportError: if scikit-learn, which has the images, is missing.

    Example:
        >>> from hfnoise.trainers.image_datasets import world_images
        >>> from hfnoise.worlds.digits import DIGITS
        >>> world_images(DIGITS)["train"][0]["text"]  # doctest: +SKIP
        'a photo of the digit eight'
    """
    train, test = world.load()
    train = train[~world.is_held_out(train.labels)]
    return {
        "train": _rows(world, train, image_column, caption_column),
        "test": _rows(world, test, image_column, caption_column),
    }


def _rows(world: DigitWorld, data: LabelledImages, image_column: str, caption_column: str) -> datasets.Dataset:
    from PIL import Image

    levels = ((data.images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    images = [Image.fromarray(one.squeeze(-1) if world.channels == 1 else one) for one in levels]
    captions = [
        world.prompt(labels, world.templates[row % len(world.templates)])
        for row, labels in enumerate(data.labels.tolist())
    ]
    features = datasets.Features({image_column: datasets.Image(), caption_column: datasets.Value("string")})
    return datasets.Dataset.from_dict({image_column: images, caption_column: captions}, features=features)


def _checked(dataset: Any, script: Any) -> datasets.Dataset:
    """Return rows of two columns, the images loaded from their files if need be."""
    columns = {"image_column": script.image_column, "caption_column": script.caption_column}
    for option, name in columns.items():
        if name not in dataset.column_names:
            raise ValueError(
                f"the dataset has no column {name!r}; it has {dataset.column_names}. Name it by --{option}."
            )
    dataset = dataset.select_columns(list(columns.values()))
    captions = dataset[script.caption_column]
    broken = [row for row, caption in enumerate(captions) if not isinstance(caption, str)]
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(dataset)} rows have no text in {script.caption_column!r} (the first is row "
            f"{broken[0]}: {captions[broken[0]]!r:.80}). Write a caption for each, an empty one if need be, or leave "
            "the rows out."
        )
    kind = dataset.features[script.image_column]
    if isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string"):
        dataset = _opened(dataset, script)
    elif not isinstance(kind, (datasets.Image, datasets.Array3D, datasets.List)):
        raise ValueError(f"column {script.image_column!r} holds {kind}, no images: name another by --image_column.")
    return dataset


def _opened(dataset: Any, script: Any) -> datasets.Dataset:
    """Return rows with images in the place of the names of their files, which are beside the dataset's file."""
    column = script.image_column
    source = Path(script.dataset_name).expanduser()
    folder = source.parent if source.is_file() else source
    paths = [str(folder / str(name)) for name in dataset[column]]
    missing = next((row for row, path in enumerate(paths) if not Path(path).is_file()), None)
    if missing is not None:
        raise ValueError(
            f"row {missing} names the image {dataset[column][missing]!r}, and there is no file {paths[missing]!r}. "
            f"Names are relative to {str(folder)!r}; images on the web have to be downloaded first."
        )
    return dataset.remove_columns(column).add_column(column, paths).cast_column(column, datasets.Image())
