"""What a repository of a pipeline holds beside the stock parts: a guider and initial noises, in sub-folders.

No index names them: stock diffusers neither loads nor downloads them.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.guiders import BaseGuidance
from huggingface_hub import get_cached_repo_tree, hf_hub_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError, EntryNotFoundError, LocalEntryNotFoundError

from hfnoise.latents.hf_checkpoints import HUB_OPTIONS, read_json
from hfnoise.pipelines.guiders import AutoGuider
from hfnoise.pipelines.initial_noise import InitialNoise
from hfnoise.pipelines.initial_noise_files import (
    INITIAL_NOISES,
    NOISE_FILE,
    NOISE_FOLDER,
    noise_class,
    read_initial_noise,
    saved_members,
    weight_folders,
)

GUIDER_FOLDER = "guider"

# What saving writes into a part; whatever else lies there (checkpoints of a training) is somebody else's.
_WRITTEN = ("config.json", "guider_config.json", NOISE_FILE, "one_more_step.json", "prompt_embeds.safetensors")
_WEIGHTS = "diffusion_pytorch_model"
_WRITTEN_FOLDERS = ("text_encoder", "tokenizer")
_LOADING = ("dtype", "torch_dtype", "variant", "use_safetensors")


def marker_files() -> dict[str, str]:
    """Return the file without which a sub-folder of ours is none, by sub-folder.

    Example:
        >>> from hfnoise.pipelines.saved_parts import marker_files
        >>> marker_files()["guider"]
        'guider_config.json'
    """
    return {
        GUIDER_FOLDER: "guider_config.json",
        NOISE_FOLDER: NOISE_FILE,
        **dict.fromkeys(weight_folders(), "config.json"),
    }


def remove_earlier(directory: str, staging: str) -> None:
    """Remove from a folder the parts of an earlier save that a new one has not.

    Args:
        directory (`str`): with the earlier save.
        staging (`str`): the new one.

    Example:
        >>> from pathlib import Path
        >>> from hfnoise.pipelines.saved_parts import remove_earlier
        >>> for folder in ("pipeline/guider", "new"):
        ...     Path(folder).mkdir(parents=True)
        >>> _ = Path("pipeline/guider/guider_config.json").write_text("{}")
        >>> remove_earlier("pipeline", "new")
        >>> Path("pipeline/guider").exists()
        False
    """
    for part, marker in marker_files().items():
        folder, new = os.path.join(directory, part), os.path.join(staging, part)
        if not os.path.isfile(os.path.join(folder, marker)):
            continue
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if os.path.isdir(path):
                if name in _WRITTEN_FOLDERS and not os.path.isdir(os.path.join(new, name)):
                    shutil.rmtree(path)
            # The weights of a variant stay beside those of another.
            elif (name in _WRITTEN and not os.path.isfile(os.path.join(new, name))) or (
                name.startswith(_WEIGHTS) and not os.path.isdir(new)
            ):
                os.remove(path)
        if not os.listdir(folder):
            os.rmdir(folder)


def stale_patterns(folder: str, variant: str | None) -> list[str]:
    """Return what of an earlier push is no part of a new one: whole parts, and weights in another number of files.

    Args:
        folder (`str`): what is pushed.
        variant (`str`, *optional*): of its weights; those of others stay.

    Example:
        >>> from hfnoise.pipelines.saved_parts import stale_patterns
        >>> stale_patterns(".", None)
        ['guider/*', 'initial_noise/*', 'npnet/*', 'oms_module/*']
    """
    marked = f".{variant}" if variant else ""
    weights = [f"*model{marked}.safetensors", f"*model{marked}.bin", f"*model{marked}-*-of-*", f"*.index{marked}.json"]
    patterns = []
    for part, marker in marker_files().items():
        if not os.path.isfile(os.path.join(folder, part, marker)):
            patterns.append(f"{part}/*")
        elif part in weight_folders():
            gone = [f"{name}/*" for name in _WRITTEN_FOLDERS if not os.path.isdir(os.path.join(folder, part, name))]
            # What is uploaded is not deleted, whatever the pattern.
            patterns += [f"{part}/{pattern}" for pattern in (*weights, *gone, *_WRITTEN)]
    return patterns


def part_dtype(arguments: dict[str, Any], part: str) -> Any:
    """Return the dtype of one part by the arguments of `from_pretrained`, as diffusers reads them.

    Args:
        arguments (`dict`): with `dtype` or `torch_dtype`: one for all, or one by part with a `"default"`.
        part (`str`): sub-folder.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.saved_parts import part_dtype
        >>> part_dtype({"dtype": {"oms_module": torch.float32, "default": torch.bfloat16}}, "oms_module")
        torch.float32
    """
    dtype = arguments.get("dtype") if arguments.get("dtype") is not None else arguments.get("torch_dtype")
    if isinstance(dtype, dict):
        return dtype.get(part, dtype.get("default", torch.float32))
    # diffusers says so of the stock parts.
    return dtype if dtype is None or isinstance(dtype, torch.dtype) else torch.float32


@dataclass(frozen=True)
class PipelineRepository:
    """A folder, or a Hub repository at one commit, that holds a pipeline.

    Args:
        path (`str`): folder or name on the Hub.
        options (`dict`): of downloads, as `from_pretrained` takes them; `revision` is the commit.
        index (`dict`): `model_index.json`.
        loading (`dict`, *optional*): the `dtype`, `variant` and `use_safetensors` that all networks are loaded with.
    """

    path: str
    options: dict[str, Any]
    index: dict[str, Any]
    loading: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | PathLike[str], arguments: dict[str, Any]) -> tuple[PipelineRepository, dict[str, Any]]:
        """Return the repository and the arguments with which diffusers loads the stock parts of the same commit.

        Args:
            path (`str` or `os.PathLike`): folder or name on the Hub.
            arguments (`dict`): of `from_pretrained`.

        Raises:
            OSError: if there is no `model_index.json`.
            ValueError: if a `subfolder` is asked of a Hub repository, where diffusers has none for pipelines.
        """
        arguments = dict(arguments)
        subfolder = arguments.pop("subfolder", None)
        path = os.fspath(path)
        if subfolder:
            if not os.path.isdir(path):
                raise ValueError(
                    f"subfolder={subfolder!r}: diffusers loads no pipeline from a sub-folder of a Hub repository. "
                    f"Download it (huggingface_hub.snapshot_download({path!r})) and give the folder."
                )
            path = os.path.join(path, subfolder)
        options = {name: arguments[name] for name in HUB_OPTIONS if arguments.get(name) is not None}
        index, commit = DiffusionPipeline.load_config(path, return_commit_hash=True, **options)
        if commit is not None and not os.path.isdir(path):
            # One commit for all parts, even if somebody pushes in between.
            options["revision"] = arguments["revision"] = commit
        loading = {name: arguments[name] for name in _LOADING if arguments.get(name) is not None}
        return cls(path, options, index, loading), arguments

    def file(self, name: str) -> str | None:
        """Return where a file lies on this machine, downloaded if need be; `None` if the repository has none.

        Raises:
            OSError: if it has, but without a connection, and the file is not in the cache.
        """
        if os.path.isdir(self.path):
            found = os.path.join(self.path, *name.split("/"))
            return found if os.path.isfile(found) else None
        try:
            return hf_hub_download(self.path, name, **self.options)
        except LocalEntryNotFoundError as error:
            self._missing_from_cache(name, error)
        except EntryNotFoundError:
            pass
        return None

    def _missing_from_cache(self, name: str, error: Exception) -> None:
        places = {key: self.options[key] for key in ("revision", "cache_dir") if key in self.options}
        try:
            files = [entry.path for entry in get_cached_repo_tree(self.path, **places)]
        except CachedRepoTreeNotFoundError:
            warnings.warn(
                f"without a connection it is not known whether {self.path} holds {name}; the pipeline is loaded "
                "without it.",
                stacklevel=6,
            )
            return
        if name in files:
            slot = "guider" if name.startswith(f"{GUIDER_FOLDER}/") else "initial_noise"
            raise OSError(
                f"{self.path} holds {name}, which is not in the cache, since stock diffusers does not download it. "
                f"Load it once with a connection, or give {slot}=... yourself."
            ) from error

    def guider(self) -> BaseGuidance | None:
        """Return the saved guider; `None` if there is none.

        Raises:
            ValueError: if it cannot be used; the message names the file.
        """
        file = self.file(f"{GUIDER_FOLDER}/guider_config.json")
        if file is None:
            return None
        try:
            return AutoGuider.from_pretrained(file)
        except Exception as error:  # whatever its options did to the guider's constructor
            place = self._place(f"{GUIDER_FOLDER}/guider_config.json")
            raise ValueError(
                f"the guider in {place} cannot be used: {error}. Correct the file, or give guider=... to load without "
                "it."
            ) from error

    def initial_noise(self) -> InitialNoise | None:
        """Return the saved initial noise, a chain if there are several; `None` if there is none.

        Raises:
            ValueError: if it cannot be used, which the message names, or it is not known in which order.
        """
        listed = f"{NOISE_FOLDER}/{NOISE_FILE}"
        file = self.file(listed)
        if file is not None:
            noise = read_initial_noise(file, self._place(listed), self._with_weights)
            used = {INITIAL_NOISES[type(member).__name__] for member in saved_members(noise)}
            if unused := self._found_weights(set(weight_folders()) - used):
                warnings.warn(
                    f"{self.path} holds {' and '.join(unused)}, which {listed} does not list: not used. Give "
                    "initial_noise=[...] with it, and save the pipeline again.",
                    stacklevel=4,
                )
            return noise
        found = self._found_weights(weight_folders())
        if len(found) > 1:
            raise ValueError(
                f"{self.path} holds {' and '.join(found)}, and no {listed} that says in which order. Give "
                "initial_noise=[...], and save the pipeline again."
            )
        return self._with_weights(self._class_in(found[0])) if found else None

    def _found_weights(self, folders: Iterable[str]) -> list[str]:
        return [folder for folder in sorted(folders) if self.file(f"{folder}/config.json") is not None]

    def _class_in(self, folder: str) -> str:
        """Return the public name of what a sub-folder of weights holds."""
        names = [name for name, place in INITIAL_NOISES.items() if place == folder]
        config = read_json(self.path, f"{folder}/config.json", **self.options) or {}
        # A network may say what it is of itself; those of One More Step are plain UNets.
        return config["_class_name"] if config.get("_class_name") in names else names[0]

    def _with_weights(self, name: str) -> InitialNoise:
        folder = INITIAL_NOISES[name]
        assert folder is not None
        if self.file(f"{folder}/config.json") is None:
            raise ValueError(
                f"{self._place(f'{NOISE_FOLDER}/{NOISE_FILE}')} lists {name}, and there is no {folder}/config.json. "
                "Give initial_noise=..., or [] to load without it."
            )
        loading: dict[str, Any] = {"dtype": part_dtype(self.loading, folder)}
        loading["use_safetensors"] = self.loading.get("use_safetensors")
        loading["variant"] = self._variant_of(folder)
        given = {key: value for key, value in loading.items() if value is not None}
        return noise_class(name).from_pretrained(self.path, subfolder=folder, **given, **self.options)

    def _variant_of(self, folder: str) -> str | None:
        """Return the asked variant where a part has it, as diffusers does with every part of a pipeline."""
        variant = self.loading.get("variant")
        stem = f"{folder}/{_WEIGHTS}"
        names = [f"{stem}.{variant}.{kind}" for kind in ("safetensors", "bin")]
        names += [f"{stem}.{kind}.index.{variant}.json" for kind in ("safetensors", "bin")]
        return variant if variant is not None and any(self.file(name) is not None for name in names) else None

    def _place(self, name: str) -> str:
        return os.path.join(self.path, *name.split("/")) if os.path.isdir(self.path) else f"{self.path}/{name}"
