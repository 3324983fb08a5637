"""Folders of One More Step: the module, `one_more_step.json` with its options, its own embeddings and text encoder."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from os import PathLike
from typing import Any

from safetensors.torch import load_file, save_file

from hfnoise.hf_sharing import upload_command
from hfnoise.latents.hf_checkpoints import MODULE_FOLDER, find_file, load_module, load_oms_components, read_json
from hfnoise.pipelines.staged_folder import staged_folder
from hfnoise.pipelines.start_text import one_or_the_other
from hfnoise.pipelines.terminal_prior import TerminalPrior

OPTIONS_FILE = "one_more_step.json"
EMBEDDINGS_FILE = "prompt_embeds.safetensors"
_OPTIONS = (
    "eta", "guidance_scale", "guidance_mode", "prediction_type", "prompt", "negative_prompt", "terminal_prior",
    "scale", "compat",
)  # fmt: skip
_EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds")
_TEXT_PARTS = ("text_encoder", "tokenizer")
_MODEL_OPTIONS = ("variant", "dtype", "torch_dtype", "use_safetensors")


def one_more_step_options(step: Any) -> dict[str, Any]:
    """Return the options of a [`OneMoreStep`], as JSON has them; see its `to_config`."""
    options = {name: getattr(step, name) for name in _OPTIONS}
    # Numbers may come from numpy or torch.
    options = {name: value.item() if hasattr(value, "item") else value for name, value in options.items()}
    prior = options["terminal_prior"]
    if isinstance(prior, TerminalPrior):
        options["terminal_prior"] = {"scale": prior.scale, **prior.statistics.to_config()}
    return options


def save_one_more_step(step: Any, save_directory: str | PathLike[str], kwargs: dict[str, Any]) -> None:
    """Write a [`OneMoreStep`] into a folder; see its `save_pretrained`."""
    folder = os.fspath(save_directory)
    if os.path.isfile(folder):
        raise ValueError(f"save_directory must be a folder, and {folder} is a file.")
    if kwargs.get("push_to_hub"):
        raise ValueError(
            "push_to_hub would push the module without its options. Save the folder and run "
            f"`{upload_command('REPOSITORY', folder)}`, or push it with its pipeline."
        )
    if not hasattr(step.module, "save_pretrained"):
        raise TypeError(f"{type(step.module).__name__} cannot be saved: it is no model of diffusers.")
    embeddings = {name: getattr(step, name) for name in _EMBEDDINGS if getattr(step, name) is not None}
    has_own = {"text_encoder": step.text_encoder is not None, "embeddings": sorted(embeddings)}
    text = json.dumps({**step.to_config(), **has_own}, indent=2, allow_nan=False)  # fails before anything is written
    with staged_folder(folder, OPTIONS_FILE, kwargs.get("variant")) as staging:
        step.module.save_pretrained(staging, **kwargs)
        if embeddings:
            rows = {name: value.detach().cpu().contiguous() for name, value in embeddings.items()}
            save_file(rows, os.path.join(staging, EMBEDDINGS_FILE))
        if step.text_encoder is not None:
            # transformers 5 writes safetensors only.
            options = {name: kwargs[name] for name in ("variant", "max_shard_size") if name in kwargs}
            step.text_encoder.save_pretrained(os.path.join(staging, "text_encoder"), **options)
            step.tokenizer.save_pretrained(os.path.join(staging, "tokenizer"))
        with open(os.path.join(staging, OPTIONS_FILE), "w", encoding="utf-8") as stream:
            stream.write(text + "\n")


def load_one_more_step(
    step_class: Any, repository: str | PathLike[str], subfolder: str | None, kwargs: dict[str, Any]
) -> Any:
    """Return the [`OneMoreStep`] of a folder or Hub repository; see its `from_pretrained`."""
    known = set(inspect.signature(step_class).parameters) - {"module"}
    given = {name: kwargs.pop(name) for name in sorted(known & set(kwargs))}
    hub = {name: value for name, value in kwargs.items() if name not in _MODEL_OPTIONS}
    if subfolder is None and read_json(repository, "oms_text_encoder/config.json", **hub) is not None:
        text = {name: given.pop(name, None) for name in _TEXT_PARTS}
        found = load_oms_components(repository, **text, **kwargs)
        return step_class(found.module, text_encoder=found.text_encoder, tokenizer=found.tokenizer, **given)
    if subfolder is None:
        subfolder = "" if read_json(repository, "config.json", **hub) is not None else MODULE_FOLDER
    module = load_module(repository, subfolder, **kwargs)
    name = f"{subfolder}/{OPTIONS_FILE}".lstrip("/")
    options = _read_options(read_json(repository, name, **hub) or {}, name)
    if options.pop("text_encoder", False) and given.get("text_encoder") is None:
        given |= _text_parts(repository, subfolder, module.dtype, kwargs.get("variant"), hub)
    if embeddings := options.pop("embeddings", []):
        options |= _embeddings(repository, f"{subfolder}/{EMBEDDINGS_FILE}".lstrip("/"), embeddings, hub)
    return _made(step_class, module, options, given, name)


def _made(step_class: Any, module: Any, options: Mapping[str, Any], given: Mapping[str, Any], name: str) -> Any:
    try:
        prior = options.get("terminal_prior")
        if isinstance(prior, dict):
            statistics = {key: value for key, value in prior.items() if key != "scale"}
            options = {**options, "terminal_prior": TerminalPrior(statistics, prior.get("scale", 1.0))}
        return step_class(module, **{**options, **one_or_the_other(given)})
    except (TypeError, ValueError) as error:
        if not options:
            raise
        raise ValueError(
            f"the options of {name}, with those given in the call, cannot be used: {str(error).rstrip('.')}. Correct "
            "the file, or give them."
        ) from error


def _read_options(options: dict[str, Any], name: str) -> dict[str, Any]:
    unknown = sorted(set(options) - set(_OPTIONS) - {"text_encoder", "embeddings"})
    if unknown:
        raise ValueError(
            f"{name} has the options {', '.join(unknown)}, which this hfnoise does not know. If a newer one saved it: "
            "pip install -U hfnoise."
        )
    return options


def _embeddings(repository: Any, place: str, names: list[str], hub: dict[str, Any]) -> dict[str, Any]:
    file = find_file(repository, place, **hub)
    found = {} if file is None else load_file(file)
    if set(found) != set(names) or not set(names) <= set(_EMBEDDINGS):
        raise ValueError(f"{place} must hold {', '.join(map(str, names))}, and holds {', '.join(found) or 'nothing'}.")
    return found


def _text_parts(
    repository: Any, subfolder: str, dtype: Any, variant: str | None, hub: dict[str, Any]
) -> dict[str, Any]:
    from transformers import AutoTokenizer

    # transformers would take that of the config, which the variant that was saved last has written.
    options = {"dtype": dtype}
    place, tokens = (f"{subfolder}/{name}".lstrip("/") for name in _TEXT_PARTS)
    names = (f"{place}/model.{variant}.safetensors", f"{place}/model.safetensors.index.{variant}.json")
    # One that was saved before variants were has none.
    if variant and any(find_file(repository, name, **hub) is not None for name in names):
        options["variant"] = variant
    encoder_class = _text_encoder_class(read_json(repository, f"{place}/config.json", **hub) or {}, place)
    return {
        "text_encoder": encoder_class.from_pretrained(repository, subfolder=place, **options, **hub).eval(),
        "tokenizer": AutoTokenizer.from_pretrained(repository, subfolder=tokens, **hub),
    }


def _text_encoder_class(config: Mapping[str, Any], place: str) -> Any:
    import transformers

    name = (config.get("architectures") or ["CLIPTextModel"])[0]
    found = getattr(transformers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(f"{place}/config.json names the architecture {name!r}, which is no model of transformers.")
    return found
