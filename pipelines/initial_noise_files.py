"""The slot `initial_noise` in a repository: a list of its members, and a sub-folder for the weights of each.

A lone member with weights is its sub-folder and nothing else, as One More Step has been from the start.
"""

from __future__ import annotations

import inspect
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from typing import Any

from hfnoise.pipelines.initial_noise import InitialNoise
from hfnoise.pipelines.noise_chain import InitialNoiseChain, members_of
from hfnoise.strict_json import parse_json

NOISE_FOLDER = "initial_noise"
NOISE_FILE = "initial_noise_config.json"
# Public name in hfnoise -> sub-folder of its weights, if it has any. Nothing else is saved or loaded.
INITIAL_NOISES: dict[str, str | None] = {
    "BrightnessOffset": None,
    "ConditioningNoise": None,
    "NPNet": "npnet",
    "NoiseLevelGuidance": None,
    "NoisePromptNet": "npnet",
    "OneMoreStep": "oms_module",
    "ReDenoise": None,
    "SeedVariation": None,
    "TerminalPrior": None,
}

_NEWER = "If a newer hfnoise saved it: pip install -U hfnoise."


def weight_folders() -> list[str]:
    """Return the sub-folders of members with weights.

    Example:
        >>> from hfnoise.pipelines.initial_noise_files import weight_folders
        >>> weight_folders()
        ['npnet', 'oms_module']
    """
    return sorted({folder for folder in INITIAL_NOISES.values() if folder is not None})


def noise_class(name: str) -> Any:
    """Return the class of a name in the table.

    Example:
        >>> from hfnoise.pipelines.initial_noise_files import noise_class
        >>> noise_class("BrightnessOffset").__name__
        'BrightnessOffset'
    """
    return getattr(import_module("hfnoise"), name)


def saved_members(initial_noise: InitialNoise | None) -> list[InitialNoise]:
    """Return those members of a slot that are saved with the pipeline, in their order.

    Example:
        >>> from hfnoise.pipelines import BrightnessOffset
        >>> from hfnoise.pipelines.initial_noise_files import saved_members
        >>> saved_members(BrightnessOffset(0.5))
        [BrightnessOffset(0.5, direction=None)]
    """
    return [member for member in members_of(initial_noise) if _is_saved(member)]


def check_can_be_saved(initial_noise: InitialNoise | None) -> None:
    """Raise ValueError if two members need the same sub-folder; told before anything is written.

    Example:
        >>> from hfnoise.pipelines import BrightnessOffset
        >>> from hfnoise.pipelines.initial_noise_files import check_can_be_saved
        >>> check_can_be_saved(BrightnessOffset(0.5))
    """
    folders = Counter(INITIAL_NOISES[type(member).__name__] for member in saved_members(initial_noise))
    for folder, count in folders.items():
        if folder is not None and count > 1:
            raise ValueError(
                f"initial_noise has {count} members whose weights go to {folder}/, and a repository has room for one. "
                "Save each by itself with its save_pretrained, the pipeline with initial_noise = None, and give "
                "initial_noise=[...] when it is loaded."
            )


def save_initial_noise(
    initial_noise: InitialNoise | None, directory: str, options: dict[str, Any], stacklevel: int = 2
) -> None:
    """Write what a slot holds; warn of members that are no classes of hfnoise, or cannot be saved.

    Args:
        initial_noise ([`InitialNoise`], *optional*): of the slot.
        directory (`str`): of the pipeline.
        options (`dict`): of `save_pretrained`: `variant`, `safe_serialization`, `max_shard_size`; a member with
            weights is given those that it names.
        stacklevel (`int`, defaults to `2`): of the warning.
    """
    members, saved = members_of(initial_noise), saved_members(initial_noise)
    left_out = [type(member).__name__ for member in members if not _is_saved(member)]
    if left_out:
        rest = f" Saved without: {', '.join(type(member).__name__ for member in saved)}." if saved else ""
        verb = "is" if len(left_out) == 1 else "are"
        warnings.warn(
            f"{' and '.join(left_out)} {verb} not saved with the pipeline: give initial_noise= again when it is "
            f"loaded.{rest}",
            stacklevel=stacklevel + 1,
        )
    entries = [_written(member, directory, options) for member in saved]
    if not entries or (len(members) == 1 and "subfolder" in entries[0]):
        return
    config = {"members": entries, **({"not_saved": left_out} if left_out else {})}
    text = json.dumps(config, indent=2, allow_nan=False)
    os.makedirs(os.path.join(directory, NOISE_FOLDER), exist_ok=True)
    with open(os.path.join(directory, NOISE_FOLDER, NOISE_FILE), "w", encoding="utf-8") as stream:
        stream.write(text + "\n")


def read_initial_noise(file: str, place: str, load: Callable[[str], InitialNoise]) -> InitialNoise:
    """Return what `save_initial_noise` wrote.

    Args:
        file (`str`): on this machine.
        place (`str`): how it is called, for errors.
        load (callable): returns the member with weights of a public name; called when all the file is found right.

    Raises:
        ValueError: if the file cannot be used; the message names it.
    """
    try:
        with open(file, encoding="utf-8") as stream:
            config = parse_json(stream.read())
        entries, left_out = _checked(config)
        members = [_member(number, entry) for number, entry in enumerate(entries, 1)]
    except ValueError as error:
        raise unusable(place, error) from error
    members = [load(member) if isinstance(member, str) else member for member in members]
    try:
        noise: InitialNoise = members[0] if len(members) == 1 else InitialNoiseChain(members)
    except ValueError as error:
        raise unusable(place, error) from error
    if left_out:
        warnings.warn(
            f"the initial noise of this pipeline had {' and '.join(left_out)} too, not saved in {place}: "
            "give initial_noise=[...] with all members, in their order.",
            stacklevel=6,
        )
    return noise


def unusable(place: str, error: Exception) -> ValueError:
    """Return the error of a file of an initial noise that cannot be used.

    Example:
        >>> from hfnoise.pipelines.initial_noise_files import unusable
        >>> print(unusable("config.json", ValueError("it is empty")))
        the initial noise in config.json cannot be used: it is empty. Correct the file, or ...
    """
    return ValueError(
        f"the initial noise in {place} cannot be used: {str(error).rstrip('.')}. Correct the file, or give "
        "initial_noise=..., or [] to load without it."
    )


def _is_saved(member: InitialNoise) -> bool:
    name = type(member).__name__
    # A subclass, or a namesake, would come back as another class.
    return name in INITIAL_NOISES and noise_class(name) is type(member) and member.to_config() is not None


def _written(member: InitialNoise, directory: str, options: dict[str, Any]) -> dict[str, Any]:
    name = type(member).__name__
    folder = INITIAL_NOISES[name]
    if folder is None:
        return {"_class_name": name, **(member.to_config() or {})}
    save: Any = member.save_pretrained  # type: ignore[attr-defined]
    known = inspect.signature(save).parameters
    takes_any = any(option.kind is option.VAR_KEYWORD for option in known.values())
    save(os.path.join(directory, folder), **{key: options[key] for key in options if takes_any or key in known})
    return {"_class_name": name, "subfolder": folder}


def _checked(config: Any) -> tuple[list[Any], list[str]]:
    if not isinstance(config, dict):
        raise ValueError(f"it must hold an object, and holds a {type(config).__name__}")
    if unknown := sorted(set(config) - {"members", "not_saved"}):
        raise ValueError(f"it has the entries {', '.join(unknown)}, which this hfnoise does not know. {_NEWER}")
    entries, left_out = config.get("members"), config.get("not_saved", [])
    if not isinstance(entries, list) or not entries:
        raise ValueError("'members' must be a list with a member")
    if not isinstance(left_out, list) or not all(isinstance(name, str) for name in left_out):
        raise ValueError("'not_saved' must be a list of class names")
    named = [entry["subfolder"] for entry in entries if isinstance(entry, dict) and "subfolder" in entry]
    if double := [folder for folder, count in Counter(map(str, named)).items() if count > 1]:
        raise ValueError(f"several members have the sub-folder {double[0]}")
    return entries, left_out


def _member(number: int, entry: Any) -> Any:
    """Return a member, or the name of one whose weights are still to be loaded."""
    name = entry.get("_class_name") if isinstance(entry, dict) else None
    if not isinstance(name, str) or name not in INITIAL_NOISES:
        known = ", ".join(INITIAL_NOISES)
        raise ValueError(f"member {number} is of class {name!r}; known are {known}. {_NEWER}")
    options = {key: value for key, value in entry.items() if key != "_class_name"}
    folder = INITIAL_NOISES[name]
    if folder is not None:
        if options != {"subfolder": folder}:
            raise ValueError(f"member {number}, {name}, must be {{'subfolder': {folder!r}}} and is {options}")
        return name
    try:
        return noise_class(name).from_config(options)
    except Exception as error:  # whatever the options did to the constructor
        raise ValueError(f"member {number}, {name}: {error}") from error
