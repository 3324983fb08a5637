"""Prompts by name: of a text file, of a dataset, or of an embedded world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfnoise.trainers.dataset_loading import load_any
from hfnoise.trainers.image_datasets import IMAGE_WORLDS


def load_prompts(script: Any) -> list[str]:
    """Return the distinct prompts that the script arguments name, in their order.

    Of an embedded world these are all that its generator was trained on, in all wordings.

    Args:
        script ([`~hfnoise.trainers.golden_noise_arguments.GoldenNoiseScriptArguments`]): of the command line.

    Raises:
        ValueError: for a missing file, split or column, or if there are no prompts.

    Example:
        >>> from hfnoise.trainers.golden_noise_arguments import GoldenNoiseScriptArguments
        >>> from hfnoise.trainers.prompt_lists import load_prompts
        >>> load_prompts(GoldenNoiseScriptArguments("digits", dataset_name="hfnoise:digits"))[7]
        'a photo of the digit seven'
    """
    if script.prompts_file is not None:
        try:
            text = Path(script.prompts_file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"prompts_file {script.prompts_file!r} cannot be read: {error}.") from None
        found, place = [line.strip() for line in text.splitlines()], script.prompts_file
    else:
        found, place = _of_dataset(script), script.dataset_name
    prompts = list(dict.fromkeys(prompt for prompt in found if prompt))[: script.max_prompts]
    if not prompts:
        raise ValueError(f"there are no prompts in {place!r}.")
    return prompts


def _of_dataset(script: Any) -> list[str]:
    name, column = script.dataset_name, script.caption_column
    if name in IMAGE_WORLDS:
        world = IMAGE_WORLDS[name]
        labels = world.combinations()
        seen = labels[~world.is_held_out(labels)].tolist()
        return [world.prompt(row, template) for template in world.templates for row in seen]
    if str(name).startswith("hfnoise:"):
        raise ValueError(f"there are no prompts named {name!r}; there are {', '.join(IMAGE_WORLDS)}.")
    splits = load_any(name, script.dataset_config)
    if script.dataset_train_split not in splits:
        raise ValueError(
            f"dataset {name!r} has no split {script.dataset_train_split!r}; it has {sorted(splits)}. Name one with "
            "--dataset_train_split."
        )
    rows = splits[script.dataset_train_split]
    if column not in rows.column_names:
        raise ValueError(
            f"the dataset has no column {column!r}; it has {rows.column_names}. Name it by --caption_column."
        )
    prompts = rows[column][:]
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"column {column!r} of {name!r} holds no texts: name another by --caption_column.")
    return list(prompts)
