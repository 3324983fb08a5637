"""Folders of One More Step: the module, `one_more_step.json` with its options, a text encoder of its own."""

from __future__ import annotations

import inspect
import json
import os
import warnings
from os import PathLike
from typing import Any

from hfnoise.latents.hf_checkpoints import (
    MODULE_FOLDER,
    load_module,
    load_oms_components,
    load_text_encoder,
    read_json,
)
from hfnoise.pipelines.terminal_prior import TerminalPrior

OPTIONS_FILE = "one_more_step.json"
_OPTIONS = (
    "eta", "guidance_scale", "guidance_mode", "prediction_type", "prompt", "negative_prompt", "terminal_prior",
    "scale", "compat",
)  # fmt: skip
_TEXT_PARTS = ("text_encoder", "tokenizer")


def save_one_more_step(step: Any, save_directory: str | PathLike[str], kwargs: dict[str, Any]) -> None:
    """Write a [`OneMoreStep`] into a folder; see its `save_pretrained`."""
    folder = os.fspath(save_directory)
    if os.path.isfile(folder):
        raise ValueError(f"save_directory must be a folder, and {folder} is a file.")
    if not hasattr(step.module, "save_pretrained"):
        raise TypeError(f"{type(step.module).__name__} cannot be saved: it is no model of diffusers.")
    if step.prompt_embeds is not None or step.negative_prompt_embeds is not None:
        warnings.warn("the embeddings of OneMoreStep are not saved with it: give them again.", stacklevel=4)
    os.makedirs(folder, exist_ok=True)
    step.module.save_pretrained(folder, **kwargs)
    options = {name: getattr(step, name) for name in _OPTIONS}
    prior = options["terminal_prior"]
    if isinstance(prior, TerminalPrior):
        options["terminal_prior"] = {"scale": prior.scale, **prior.statistics.to_config()}
    for name in _TEXT_PARTS:
        if getattr(step, name) is not None:
            getattr(step, name).save_pretrained(os.path.join(folder, name))
    options["text_encoder"] = step.text_encoder is not None
    with open(os.path.join(folder, OPTIONS_FILE), "w", encoding="utf-8") as stream:
        json.dump(options, stream, indent=2)
        stream.write("\n")


def load_one_more_step(
    step_class: Any, repository: str | PathLike[str], subfolder: str | None, kwargs: dict[str, Any]
) -> Any:
    """Return the [`OneMoreStep`] of a folder or Hub repository; see its `from_pretrained`."""
    known = set(inspect.signature(step_class).parameters) - {"module"}
    given = {name: kwargs.pop(name) for name in sorted(known & set(kwargs))}
    old = kwargs.pop("torch_dtype", None)
    kwargs["dtype"] = kwargs.get("dtype") or old
    hub = {name: value for name, value in kwargs.items() if name not in ("variant", "dtype")}
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
        given |= _text_parts(repository, subfolder, kwargs["dtype"], hub)
    return step_class(module, **{**options, **given})


def _read_options(options: dict[str, Any], name: str) -> dict[str, Any]:
    unknown = sorted(set(options) - set(_OPTIONS) - {"text_encoder"})
    if unknown:
        raise ValueError(
            f"{name} has the options {', '.join(unknown)}, which this hfnoise does not know. If a newer one saved it: "
            "pip install -U hfnoise."
        )
    prior = options.get("terminal_prior")
    if isinstance(prior, dict):
        statistics = {key: value for key, value in prior.items() if key != "scale"}
        options = {**options, "terminal_prior": TerminalPrior(statistics, prior.get("scale", 1.0))}
    return options


def _text_parts(repository: Any, subfolder: str, dtype: Any, hub: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    places = [f"{subfolder}/{name}".lstrip("/") for name in _TEXT_PARTS]
    return {
        "text_encoder": load_text_encoder(repository, places[0], dtype, hub),
        "tokenizer": AutoTokenizer.from_pretrained(repository, subfolder=places[1], **hub),
    }
