"""Loading and converting the official checkpoints of NPNet, in both of their layouts."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from huggingface_hub import hf_hub_download, list_repo_files
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hfnoise.latents.hf_checkpoints import HUB_OPTIONS
from hfnoise.latents.hf_npnet import NPNetModel
from hfnoise.latents.singular_values import tile_shape

_FILES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
# Parts of the pickles -> modules of ours; "embeeding" is what the official code calls it.
_PARTS = {
    "unet_svd": "unet_svd",
    "unet_embedding": "unet_embedding",
    "embeeding": "text_embedding",
    "text_embedding": "text_embedding",
}
# Without a part in what NPNet computes, or computed from the sizes.
_NO_PART = re.compile(r"unet_svd\.bn\..*|unet_embedding\.swin\.head\..*|.*\.(attn_mask|relative_position_index)")
_SWIN = "unet_embedding.swin."
_MERGING = re.compile(r"(.*swin\.layers\.)(\d+)(\.downsample\..*)")
_BLOCK = re.compile(r".*swin\.layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table")
_HUBS = "|".join(map(re.escape, ("https://huggingface.co", "https://hf.co", ENDPOINT)))
_ADDRESS = re.compile(
    rf"(?:{_HUBS})/(?P<repository>[^/]+/[^/]+)/(?:blob|resolve)/(?P<revision>[^/]+)/(?P<file>[^?]+)(?:\?.*)?"
)
# Without these the sizes of the others are not known.
_NEEDED = (
    "unet_svd.mlp1.0.weight", "unet_svd.mlp4.0.weight", "unet_embedding.downconv.weight",
    "unet_embedding.upconv.weight", f"{_SWIN}patch_embed.proj.weight", "text_embedding.linear.weight",
    f"{_SWIN}layers.0.blocks.0.attn.relative_position_bias_table",
)  # fmt: skip


def load_npnet_checkpoint(
    checkpoint: str | PathLike[str],
    *,
    filename: str | None = None,
    num_tokens: int = 77,
    svd_attention: bool | None = None,
    torch_dtype: torch.dtype | None = None,
    model_class: type[NPNetModel] = NPNetModel,
    **kwargs: Any,
) -> Any:
    """Return the network of an official checkpoint, in evaluation mode.

    Both layouts are read, those of SDXL, DreamShaper-XL and Hunyuan-DiT alike: the pickled dictionary of dictionaries
    (`.pth`), of which nothing is executed, and flat safetensors. All sizes follow from the shapes of the weights, but
    for the number of tokens. Weights of timm below 0.9, which count the merging of patches to another stage, are
    renamed; what has no part in the result (classifier, batch norm, tables) is left out.

    Args:
        checkpoint (`str` or `os.PathLike`): file, or its address on the Hub; or folder or Hub repository that holds
            one.
        filename (`str`, *optional*): of the file in a folder or repository that holds several.
        num_tokens (`int`, defaults to `77`): of a prompt.
        svd_attention (`bool`, *optional*): `False` leaves out the attention over singular vectors that is in the
            checkpoint: the published training code never trains it.
        torch_dtype (`torch.dtype`, *optional*): of the weights; float32 by default, in which all is computed anyway.
        model_class (`type`, defaults to [`NPNetModel`]): to make.
        kwargs: `revision`, `token`, ... of a Hub repository; `scale`, `renormalize`, `long_prompts` of the network.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint of NPNet; the message says what is missing or too much.
    """
    hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
    path = _file(checkpoint, filename, hub)
    state = _named(_read(path), path)
    if svd_attention is False:
        state = {name: value for name, value in state.items() if not name.startswith("unet_svd.attention.")}
    elif svd_attention and "unet_svd.attention.qkv.weight" not in state:
        raise ValueError(f"{path} has no attention over singular vectors: leave svd_attention away.")
    config = npnet_config(state, num_tokens, path)
    with torch.device("meta"):
        model = model_class(**{**config, **kwargs})
    _check_names({name: value.shape for name, value in model.state_dict().items()}, state, path)
    model.load_state_dict(state, assign=True)
    return model.to(torch_dtype or torch.float32).eval()


def convert_npnet_checkpoint(src: str | PathLike[str], dst: str | PathLike[str], **kwargs: Any) -> NPNetModel:
    """Write the network of an official checkpoint as a folder for `NPNet.from_pretrained`; return it.

    Args:
        src (`str` or `os.PathLike`): file, folder or Hub repository, as in [`load_npnet_checkpoint`].
        dst (`str` or `os.PathLike`): folder to write.
        kwargs: as in [`load_npnet_checkpoint`].

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if `src` is no checkpoint of NPNet, or `dst` is a file.
    """
    if os.path.isfile(dst):
        raise ValueError(f"dst must be a folder, and {os.fspath(dst)} is a file.")
    model: NPNetModel = load_npnet_checkpoint(src, **kwargs)
    model.save_pretrained(dst)
    return model


def npnet_config(state: Mapping[str, Tensor], num_tokens: int = 77, name: str = "the state") -> dict[str, Any]:
    """Return the options of [`NPNetModel`] that weights under our names belong to.

    Args:
        state (`Mapping`): name to weight, or to anything with a shape.
        num_tokens (`int`, defaults to `77`): of a prompt.
        name (`str`): of the file, for messages.

    Raises:
        ValueError: if weights are missing, or their sizes do not fit each other.
    """
    missing = [part for part in _NEEDED if part not in state]
    if missing:
        raise ValueError(f"{name} is no checkpoint of NPNet: it has no {', '.join(missing)}.")
    shape = {part: tuple(state[part].shape) for part in _NEEDED}
    channels, text = shape["unet_embedding.downconv.weight"][1], shape["text_embedding.linear.weight"][1]
    rows, _ = tile_shape(channels)
    side, rest = divmod(shape["unet_svd.mlp1.0.weight"][1], rows)
    width, uneven = divmod(text, num_tokens)
    if uneven or rest:
        raise ValueError(
            f"{name}: its text branch reads {text} numbers, which {num_tokens} tokens cannot share evenly, or its "
            f"singular vectors of {shape['unet_svd.mlp1.0.weight'][1]} do not fit {channels} channels. Give "
            "num_tokens=... of the prompts that it was trained with."
        )
    blocks = [match for match in map(_BLOCK.fullmatch, state) if match]
    stages = 1 + max(int(match[1]) for match in blocks)
    embed_dim, _, patch, _ = shape[f"{_SWIN}patch_embed.proj.weight"]
    window = (round(shape[_NEEDED[-1]][0] ** 0.5) + 1) // 2
    tables = {int(match[1]): tuple(state[match[0]].shape) for match in blocks}
    return {
        "sample_size": side, "in_channels": channels, "num_tokens": num_tokens, "encoder_hid_dim": width,
        "svd_attention": "unet_svd.attention.qkv.weight" in state, "svd_sign": "lapack",
        "svd_vector_dim": shape["unet_svd.mlp1.0.weight"][0], "svd_value_dim": shape["unet_svd.mlp4.0.weight"][0],
        "swin_image_size": shape["unet_embedding.upconv.weight"][1] * patch * 2 ** (stages - 1),
        "swin_patch_size": patch, "swin_window_size": window, "swin_embed_dim": embed_dim,
        "swin_depths": [sum(int(match[1]) == stage for match in blocks) for stage in range(stages)],
        "swin_num_heads": [tables[stage][1] for stage in sorted(tables)],
    }  # fmt: skip


def _file(checkpoint: str | PathLike[str], filename: str | None, hub: dict[str, Any]) -> str:
    path = os.path.expanduser(os.fspath(checkpoint))
    if os.path.isfile(path):
        return path
    if address := _ADDRESS.fullmatch(path):
        # The address in a browser, as from_single_file of diffusers takes it.
        path, filename = address["repository"], filename or address["file"]
        hub = {"revision": address["revision"], **hub}
        return _from_hub(path, filename, hub)
    if os.path.isdir(path):
        name = filename or _only(os.listdir(path), path)
        found = os.path.join(path, name)
        if not os.path.isfile(found):
            raise FileNotFoundError(f"{path} has no file {name}.")
        return found
    if path.endswith(_FILES) or path.startswith((".", os.sep)):
        raise FileNotFoundError(f"there is no file {path}.")
    return _from_hub(path, filename, hub)


def _from_hub(path: str, filename: str | None, hub: dict[str, Any]) -> str:
    try:
        if filename is None:
            where = {name: hub[name] for name in ("revision", "token") if name in hub}
            filename = _only(list_repo_files(path, **where), path)
        return str(hf_hub_download(path, filename, **hub))
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{path} has no file {filename}.") from error
    except HFValidationError as error:
        raise ValueError(f"{path} is no file, no folder and no name of a repository on the Hub.") from error


def _only(names: list[str], place: str) -> str:
    found = sorted(name for name in names if name.endswith(_FILES))
    if len(found) != 1:
        listed = ", ".join(found) or "none"
        raise ValueError(
            f"{place} must hold one checkpoint ({', '.join(_FILES)}), and has {listed}. Give filename=..."
        )
    return found[0]


def _read(path: str) -> Mapping[str, Any]:
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        # Only weights: a pickle may hold any code.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} cannot be read as weights: {first}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} is no checkpoint of NPNet: it holds a {type(content).__name__}.")
    return content


def _named(content: Mapping[str, Any], path: str) -> dict[str, Tensor]:
    """Return the weights under our names, those without a part left out."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            if name not in _PARTS:
                raise ValueError(f"{path} is no checkpoint of NPNet: it has a part {name!r}.")
            flat |= {f"{_PARTS[name]}.{inner}": weight for inner, weight in value.items()}
        else:
            flat[name] = value
    kept = {name: value for name, value in flat.items() if not _NO_PART.fullmatch(name)}
    strange = [name for name, value in kept.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(f"{path} is no checkpoint of NPNet: {', '.join(strange)} is no tensor.")
    if any(name.startswith(f"{_SWIN}layers.0.downsample.") for name in kept):
        kept = {_of_next_stage(name): value for name, value in kept.items()}
    named = {name: value.detach() for name, value in kept.items()}
    # The two factors are vectors of one number in the pickles; whoever converted them may have made numbers of them.
    return {name: value.reshape(1) if value.dim() == 0 else value for name, value in named.items()}


def _of_next_stage(name: str) -> str:
    match = _MERGING.fullmatch(name)
    return name if match is None else f"{match[1]}{int(match[2]) + 1}{match[3]}"


def _check_names(wanted: Mapping[str, torch.Size], state: Mapping[str, Tensor], path: str) -> None:
    faults = {
        "lacks": sorted(set(wanted) - set(state)),
        "has, and NPNet has not,": sorted(set(state) - set(wanted)),
        "has in another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
            for name, shape in wanted.items()
            if name in state and state[name].shape != shape
        ],
    }
    found = [f"it {what} {', '.join(names[:5])}{' ...' * (len(names) > 5)}" for what, names in faults.items() if names]
    if found:
        raise ValueError(f"{path} is no checkpoint of NPNet: {'; '.join(found)}.")
