"""Loading and converting checkpoints of One More Step: official, SingDiffusion's, ours."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from torch import nn

from hfnoise.latents.hf_time_free_unet import (
    TimeFreeUNet2DConditionModel,
    module_residuals,
    set_module_residuals,
)
from hfnoise.strict_json import parse_json

MODULE_FOLDER = "oms_module"
_STOCK_NAME = "UNet2DConditionModel"
# Of `from_pretrained`, about downloads.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


def find_file(repository: str | PathLike[str], name: str, **hub_options: Any) -> str | None:
    """Return where a file of a folder or Hub repository lies on this machine; `None` if the repository has none.

    Args:
        repository (`str` or `os.PathLike`): folder or name on the Hub.
        name (`str`): path of the file in it.
        hub_options: `revision`, `token`, `cache_dir`, `local_files_only`, ...

    Raises:
        OSError: if there is no such repository, or the Hub is out of reach and nothing of it is in the cache.
        ValueError: if `repository` can be neither.

    Example:
        >>> from hfnoise.latents.hf_checkpoints import find_file
        >>> find_file(".", "config.json") is None
        True
    """
    path = os.fspath(repository)
    if os.path.isdir(path):
        file = os.path.join(path, *name.split("/"))
        return file if os.path.isfile(file) else None
    hub_options = {key: hub_options[key] for key in HUB_OPTIONS if hub_options.get(key) is not None}
    try:
        found: str = hf_hub_download(path, name, **hub_options)
    except LocalEntryNotFoundError:
        _check_cached(path, hub_options)
        return None
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise ValueError(f"{path} is neither a folder nor the name of a repository on the Hub.") from error
    return found


def _check_cached(repository: str, hub_options: dict[str, Any]) -> None:
    """Raise unless something of a repository is in the cache: offline, a file that is not there is no news then."""
    try:
        snapshot_download(repository, **hub_options | {"local_files_only": True})
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"{repository!r} is no folder here, and the Hub cannot be asked for it: it is out of reach, or switched "
            "off by HF_HUB_OFFLINE, and nothing of the repository is in the cache."
        ) from error


def read_json(repository: str | PathLike[str], name: str, **hub_options: Any) -> dict[str, Any] | None:
    """Return a JSON file of a folder or Hub repository; `None` if it has none.

    Args:
        repository (`str` or `os.PathLike`): folder or name on the Hub.
        name (`str`): path of the file in it.
        hub_options: `revision`, `token`, `cache_dir`, `local_files_only`, ...

    Raises:
        OSError: if there is no such repository.
        ValueError: if `repository` can be neither, or the file is no JSON object.

    Example:
        >>> from pathlib import Path
        >>> from hfnoise.latents.hf_checkpoints import read_json
        >>> _ = Path("config.json").write_text('{"in_channels": 4}')
        >>> read_json(".", "config.json")
        {'in_channels': 4}
    """
    file = find_file(repository, name, **hub_options)
    if file is None:
        return None
    try:
        with open(file, encoding="utf-8") as stream:
            content = parse_json(stream.read())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold an object, and holds a {type(content).__name__}.")
    return content


def load_module(
    repository: str | PathLike[str], subfolder: str | None = None, *, variant: str | None = None, **kwargs: Any
) -> nn.Module:
    """Return the network of One More Step of a folder or Hub repository, in evaluation mode.

    Args:
        repository (`str` or `os.PathLike`): of the module, or of a pipeline that has it in `oms_module`.
        subfolder (`str`, *optional*): where the module is; the repository itself or its `oms_module` by default.
        variant (`str`, *optional*): `"fp16"` for the official ones, which have no other weights.
        kwargs: of `from_pretrained`, such as `dtype` (`torch_dtype` is another name of it) and `revision`.

    Returns:
        A `UNet2DConditionModel` if it was saved as that with all its weights (the timestep is fixed to 0), a
        [`TimeFreeUNet2DConditionModel`] otherwise.

    Raises:
        ValueError: if there is no module.
    """
    path = os.fspath(repository)
    places = [subfolder] if subfolder is not None else ["", MODULE_FOLDER]
    for place in places:
        config = read_json(path, f"{place}/config.json".lstrip("/"), **kwargs)
        # An autoencoder has the first too, and reads no text.
        if config is not None and {"block_out_channels", "cross_attention_dim"} <= set(config):
            break
    else:
        wanted = " or ".join(f"{place}/config.json".lstrip("/") for place in places)
        raise ValueError(
            f"{path} holds no module of One More Step: there is no {wanted} of a UNet. Give the folder that "
            "save_pretrained wrote, or name the sub-folder."
        )
    if "torch_dtype" in kwargs:  # diffusers 0.42 warns of the name
        kwargs["dtype"] = kwargs.pop("torch_dtype")
    # diffusers asks for None where there is no sub-folder.
    options = {"subfolder": place or None, "variant": variant, **kwargs}
    if config.get("_class_name") == _STOCK_NAME:
        stock, found = UNet2DConditionModel.from_pretrained(path, output_loading_info=True, **options)
        if not found["missing_keys"]:
            module: nn.Module = stock.eval()
            return module
        # SingDiffusion's: saved by a copy of the class that leaves out the projections of the time.
    return TimeFreeUNet2DConditionModel.from_pretrained(path, **options).eval()  # type: ignore[no-any-return]


def convert_oms_checkpoint(
    src: str | PathLike[str],
    dst: str | PathLike[str],
    stock: bool = True,
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Write a module of One More Step in another form, which computes the same; return it.

    The stock form is a `UNet2DConditionModel`, which diffusers loads without hfnoise and without trusted remote code:
    all that has to do with the time is zero in it. The way back adds what a fixed timestep 0 contributes to the biases
    of the convolutions, so that any stock UNet without class labels can be converted. Only the network is written, not
    the options and the text encoder that [`OneMoreStep`] saves beside it.

    Args:
        src (`str` or `os.PathLike`): folder or Hub repository of a module, or of a pipeline with an `oms_module`.
        dst (`str` or `os.PathLike`): folder to write.
        stock (`bool`, defaults to `True`): the stock form; `False`: a [`TimeFreeUNet2DConditionModel`].
        subfolder, variant, kwargs: as in [`load_module`].

    Raises:
        ValueError: if `src` holds no module, or `dst` is a file.
    """
    if os.path.isfile(dst):
        raise ValueError(f"dst must be a folder, and {os.fspath(dst)} is a file.")
    module = load_module(src, subfolder, variant=variant, **kwargs)
    converted = _stock_form(module) if stock else _time_free_form(module)
    set_module_residuals(converted, module_residuals(module))
    converted.save_pretrained(dst)
    result: nn.Module = converted
    return result


def _new(unet_class: Any, module: Any) -> Any:
    """Return a network of the sizes and the dtype of a module."""
    # The configs of released modules hold other entries too.
    known = inspect.signature(UNet2DConditionModel).parameters
    made = unet_class(**{name: value for name, value in module.config.items() if name in known}).eval()
    # That of diffusers warns that no part of it stays in float32.
    return nn.Module.to(made, module.dtype)


def _stock_form(module: Any) -> Any:
    if not isinstance(module, TimeFreeUNet2DConditionModel):
        return module
    converted = _new(UNet2DConditionModel, module)
    weights = module.state_dict()
    zeros = {name: torch.zeros_like(value) for name, value in converted.state_dict().items() if name not in weights}
    converted.load_state_dict({**weights, **zeros})
    return converted


def _time_free_form(module: Any) -> Any:
    if isinstance(module, TimeFreeUNet2DConditionModel):
        return module
    converted = _new(TimeFreeUNet2DConditionModel, module)
    names = set(converted.state_dict())
    weights = {name: value.clone() for name, value in module.state_dict().items() if name in names}
    with torch.no_grad():
        sample = torch.zeros(1, 1, dtype=module.dtype)
        embedded = module.time_embedding(module.get_time_embed(sample, 0))
        if module.time_embed_act is not None:
            embedded = module.time_embed_act(embedded)
        for name, block in module.named_modules():
            projection = getattr(block, "time_emb_proj", None)
            if projection is not None:
                time = embedded if block.skip_time_act else block.nonlinearity(embedded)
                weights[f"{name}.conv1.bias"] += projection(time)[0]
    converted.load_state_dict(weights)
    return converted


@dataclass(frozen=True)
class OMSComponents:
    """A module of One More Step with what it reads prompts with.

    Args:
        module (`torch.nn.Module`): the network.
        text_encoder, tokenizer (*optional*): of the module; `None` where it takes the embeddings of the pipeline.
    """

    module: Any
    text_encoder: Any = None
    tokenizer: Any = None


def load_oms_components(
    repo: str | PathLike[str],
    variant: str | None = None,
    *,
    text_encoder: Any = None,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    torch_dtype: torch.dtype | None = None,
    **hub_options: Any,
) -> OMSComponents:
    """Return what an official repository of One More Step holds, or points to.

    Those repositories have no weights of a text encoder: `oms_text_encoder/config.json` names another repository,
    which may be gone, or renamed, or moved. Give `text_encoder` and `tokenizer` then.

    Args:
        repo (`str` or `os.PathLike`): such as `"h1t/oms_b_openclip_xl"`, or a folder.
        variant (`str`, *optional*): `"fp16"` for the official ones.
        text_encoder (*optional*): a model to take instead; or a repository or folder of a pipeline with
            `text_encoder` and `tokenizer`; or `False` for the embeddings of the pipeline.
        tokenizer (*optional*): a tokenizer to take instead, or its repository.
        dtype, torch_dtype (`torch.dtype`, *optional*): of both networks; the second is the old name.
        hub_options: `revision`, `token`, `cache_dir`, `local_files_only`, ... of `repo`.

    Raises:
        ValueError: if there is no module.
        OSError: if the text encoder cannot be loaded; the message names the repository that is pointed to.

    Example:
        >>> import hfnoise.latents.hf_checkpoints as checkpoints
        >>> checkpoints.OMSComponents(module=None).text_encoder is None
        True
    """
    dtype = torch_dtype if dtype is None else dtype
    module = load_module(repo, MODULE_FOLDER, variant=variant, dtype=dtype, **hub_options)
    if text_encoder is False:
        return OMSComponents(module)
    if text_encoder is not None and not isinstance(text_encoder, (str, PathLike)):
        if tokenizer is None:
            raise ValueError("text_encoder is given as a model: give its tokenizer too.")
        return OMSComponents(module, text_encoder, _tokenizer(tokenizer, None, {}))
    places: list[tuple[Any, str | None]]
    if text_encoder is not None:
        places = [(text_encoder, "text_encoder"), (text_encoder, "tokenizer")]
    else:
        found = _redirected(repo, "oms_text_encoder", hub_options)
        if found is None:
            return OMSComponents(module)
        places = [found, _redirected(repo, "oms_tokenizer", hub_options) or (found[0], "tokenizer")]
    place, folder = places[0]
    # A commit of one repository is none of another.
    elsewhere = os.fspath(place) != os.fspath(repo)
    own = {name: value for name, value in hub_options.items() if not (elsewhere and name == "revision")}
    try:
        encoder = _text_encoder(place, folder, dtype, own)
        read = _tokenizer(tokenizer, places[1], own)
    except (OSError, ValueError) as error:
        raise OSError(
            f"the module of {os.fspath(repo)} reads prompts with {folder!r} of {os.fspath(place)}, which cannot be "
            f"loaded: {error} Give text_encoder=... (a repository with the same text encoder, or the model with "
            "tokenizer=...)."
        ) from error
    return OMSComponents(module, encoder, read)


def _redirected(
    repo: str | PathLike[str], folder: str, hub_options: dict[str, Any]
) -> tuple[str | PathLike[str], str | None] | None:
    """Return repository and sub-folder of a component; `None` if it is the base's own."""
    config = read_json(repo, f"{folder}/config.json", **hub_options)
    if config is None:
        saved = read_json(repo, f"{folder}/tokenizer_config.json", **hub_options)
        return None if saved is None else (repo, folder)
    # Both encoders of SDXL, joined: what the pipeline computes anyway.
    if "SDXL" in str(config.get("_class_name")):
        return None
    # What transformers saves has no "subfolder" and names its own type.
    if "subfolder" not in config and "model_type" in config:
        return repo, folder
    if not config.get("_name_or_path"):
        raise ValueError(f"{os.fspath(repo)}/{folder}/config.json names no repository (_name_or_path).")
    return config["_name_or_path"], config.get("subfolder")


def _text_encoder(place: Any, folder: str | None, dtype: torch.dtype | None, options: dict[str, Any]) -> Any:
    """Return a text encoder of CLIP of a sub-folder, in evaluation mode; `dtype=None` is the saved one's."""
    from transformers import CLIPTextModel

    given = {} if dtype is None else {"dtype": dtype}
    return CLIPTextModel.from_pretrained(place, subfolder=folder or "", **given, **options).eval()


def _tokenizer(given: Any, place: tuple[Any, str | None] | None, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    if given is not None and not isinstance(given, (str, PathLike)):
        return given
    if given is not None:
        return AutoTokenizer.from_pretrained(given)
    assert place is not None
    return AutoTokenizer.from_pretrained(place[0], subfolder=place[1] or "", **options)
