"""What a repository of a pipeline holds beside the stock parts: a guider and an initial noise, in sub-folders.

No index names them: stock diffusers neither loads nor downloads them.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.guiders import BaseGuidance
from huggingface_hub import get_cached_repo_tree, hf_hub_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError, EntryNotFoundError, LocalEntryNotFoundError

from hfnoise.pipelines.guiders import AutoGuider
from hfnoise.pipelines.initial_noise import InitialNoise

GUIDER_FOLDER = "guider"
# Sub-folder -> public name in hfnoise of the InitialNoise that is saved there.
INITIAL_NOISES: dict[str, str] = {"oms_module": "OneMoreStep"}

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


def marker_files() -> dict[str, str]:
    """Return the file without which a sub-folder of ours is none, by sub-folder.

    Example:
        >>> from hfnoise.pipelines.saved_parts import marker_files
        >>> marker_files()["guider"]
        'guider_config.json'
    """
    return {GUIDER_FOLDER: "guider_config.json", **dict.fromkeys(INITIAL_NOISES, "config.json")}


@dataclass(frozen=True)
class PipelineRepository:
    """A folder, or a Hub repository at one commit, that holds a pipeline.

    Args:
        path (`str`): folder or name on the Hub.
        options (`dict`): of downloads, as `from_pretrained` takes them; `revision` is the commit.
        index (`dict`): `model_index.json`.
    """

    path: str
    options: dict[str, Any]
    index: dict[str, Any]

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
        options = {name: arguments[name] for name in _HUB_OPTIONS if arguments.get(name) is not None}
        index, commit = DiffusionPipeline.load_config(path, return_commit_hash=True, **options)
        if commit is not None and not os.path.isdir(path):
            # One commit for all parts, even if somebody pushes in between.
            options["revision"] = arguments["revision"] = commit
        return cls(path, options, index), arguments

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
            raise OSError(
                f"{self.path} holds {name}, which is not in the cache, since stock diffusers does not download it. "
                "Load it once with a connection, or give guider=... yourself."
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
            raise ValueError(
                f"the guider in {self._place(file)} cannot be used: {error}. Correct the file, or give guider=... "
                "to load without it."
            ) from error

    def initial_noise_folder(self) -> str | None:
        """Return the sub-folder of the saved initial noise; `None` if there is none."""
        return next((folder for folder in INITIAL_NOISES if self.file(f"{folder}/config.json") is not None), None)

    def initial_noise(self, **options: Any) -> InitialNoise | None:
        """Return the saved initial noise; `None` if there is none.

        Args:
            options: of its `from_pretrained`, such as `torch_dtype`.
        """
        folder = self.initial_noise_folder()
        if folder is None:
            return None
        noise_class = getattr(import_module("hfnoise"), INITIAL_NOISES[folder])
        return noise_class.from_pretrained(self.path, subfolder=folder, **self.options, **options)

    def _place(self, file: str) -> str:
        return file if os.path.isdir(self.path) else f"{self.path}/{GUIDER_FOLDER}/guider_config.json"
