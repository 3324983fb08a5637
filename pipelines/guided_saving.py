"""Saving, pushing and loading guided pipelines, such that stock diffusers loads what was saved as its own."""

from __future__ import annotations

import os
import tempfile
from contextlib import AbstractContextManager
from os import PathLike
from typing import Any

from diffusers.guiders import BaseGuidance, ClassifierFreeGuidance
from huggingface_hub import create_repo

from hfnoise.hf_sharing import explained_push, upload_command, upload_in_one_commit
from hfnoise.pipelines.guidance_card import pipeline_card
from hfnoise.pipelines.guider_base import UpdateGuidance
from hfnoise.pipelines.guider_checks import check_guider, own_scale, takes_guider
from hfnoise.pipelines.initial_noise import InitialNoise, check_initial_noise
from hfnoise.pipelines.initial_noise_files import check_can_be_saved, save_initial_noise
from hfnoise.pipelines.saved_parts import GUIDER_FOLDER, PipelineRepository, remove_earlier, stale_patterns
from hfnoise.pipelines.staged_folder import staged_folder
from hfnoise.pipelines.unsaved_layers import check_layers

_INDEX = "model_index.json"
_WEIGHT_OPTIONS = ("safe_serialization", "variant", "max_shard_size")
_PUSH_OPTIONS = ("repo_id", "commit_message", "private", "create_pr", "token")


class GuidedSaving:
    """The part of [`GuidedPipeline`] that reads and writes repositories.

    What is saved is a stock pipeline: `model_index.json` has the class of diffusers and no entry of ours. The guider
    lies beside it in `guider/guider_config.json`; the members of the initial noise in
    `initial_noise/initial_noise_config.json`, with a sub-folder more for each that has weights, such as `oms_module/`.
    """

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the stock pipeline, with the guider and the initial noise beside it, all of it or nothing.

        Everything is written to a folder inside `save_directory` first and moved when it is complete. A guider or an
        initial noise of an earlier save is removed if there is none now. The pipeline itself is not touched. A
        [`InitialNoise`] that is no class of hfnoise is not saved, with a warning.

        Args:
            save_directory (`str` or `os.PathLike`): made if need be.
            safe_serialization, variant, max_shard_size: as in diffusers; of the initial noise too.
            push_to_hub (`bool`, defaults to `False`): then push the folder, with a card, in one commit.
            kwargs: `repo_id` (the name of the folder by default), `commit_message`, `private`, `create_pr` and
                `token` of the push; `use_flashpack` as in diffusers.

        Raises:
            ValueError: if `save_directory` is a file, or two members of the initial noise need the same sub-folder, or
                a network carries a LoRA, an IP-Adapter or layers of bitsandbytes that were put in by hand, which stock
                would write so that nothing reads them.
            PushError: if the push did not go through; what is saved is in `save_directory`.
        """
        check_can_be_saved(self.initial_noise)  # type: ignore[attr-defined]
        check_layers(self.components)  # type: ignore[attr-defined]
        directory = os.fspath(save_directory)
        if os.path.isfile(directory):
            raise ValueError(f"save_directory must be a folder, and {directory} is a file.")
        push = {name: kwargs.pop(name) for name in _PUSH_OPTIONS if name in kwargs}
        if push_to_hub:  # before gigabytes are written
            name = push.get("repo_id") or os.path.basename(os.path.normpath(directory))
            with self._explained(name, "Nothing was written. To save it without a push: push_to_hub=False."):
                push["repo_id"] = _created({**push, "repo_id": name})
            push.pop("private", None)  # of the repository, which is there now
        with staged_folder(directory, _INDEX, variant) as staging:
            self._write(staging, safe_serialization, variant=variant, max_shard_size=max_shard_size, **kwargs)
            remove_earlier(directory, staging)
        if push_to_hub:
            with self._explained(push["repo_id"], f"It is saved in {directory!r}.", directory):
                self._upload(directory, variant=variant, **push)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> Any:
        """Push what `save_pretrained` writes and a card, in one commit, and return what was committed.

        The card names the guider and the initial noise with their options, and the figures of the last run. One that
        is on the Hub already is kept, but for the part that hfnoise wrote.

        Args:
            repo_id (`str`): name on the Hub.
            commit_message, private, token, create_pr, safe_serialization, variant, subfolder: as in diffusers; in a
                sub-folder no card is written.

        Raises:
            ValueError: if two members of the initial noise need the same sub-folder, or a network carries what
                would not be read again.
            PushError: if the push did not go through; what is on the Hub is what was there.
        """
        check_can_be_saved(self.initial_noise)  # type: ignore[attr-defined]
        check_layers(self.components)  # type: ignore[attr-defined]
        with self._explained(repo_id, "It is in memory as it was."):
            repo_id = _created({"repo_id": repo_id, "private": private, "token": token})
        with tempfile.TemporaryDirectory() as folder:
            self._write(folder, safe_serialization, variant=variant)
            with self._explained(repo_id, "It is in memory as it was."):
                return self._upload(
                    folder, repo_id, commit_message, token=token, create_pr=create_pr, subfolder=subfolder,
                    variant=variant,
                )  # fmt: skip

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        guider: BaseGuidance | None = None,
        initial_noise: InitialNoise | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the pipeline of a folder or Hub repository, with the guider and the initial noise saved there.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): of a stock pipeline too.
            guider ([`AdaptiveGuidance`], [`ProjectedGuidance`] or [`LinearGuidance`], *optional*): instead of the
                saved one, which is then not read. To do without: `pipe.guider = None` afterwards.
            initial_noise ([`InitialNoise`] or a list of such, *optional*): instead of the saved one, which is then
                not read; `[]` to do without.
            kwargs: as in `DiffusionPipeline.from_pretrained`; `revision`, `token`, `cache_dir` and so on hold for the
                guider and the initial noise as well. Everything is of one commit. Weights of the initial noise are
                loaded in `dtype`, of which a dictionary names them by sub-folder (`{"oms_module": torch.float32,
                "default": torch.float16}`), and of the `variant` where they have it.

        Raises:
            ValueError: if the saved guider or initial noise cannot be used; the message names the file.
            TypeError: if `custom_pipeline` is given.
        """
        if kwargs.get("custom_pipeline") is not None:
            raise TypeError(
                f"{cls.__name__} is the class already; for a custom pipeline use AutoGuidedPipeline.from_pretrained."
            )
        if guider is not None:
            check_guider(cls, guider)
        repository, kwargs = PipelineRepository.open(pretrained_model_name_or_path, kwargs)
        parts = read_parts(cls, repository, guider, initial_noise)
        return fill_slots(super().from_pretrained(repository.path, **kwargs), *parts)  # type: ignore[misc]

    def _write(self, folder: str, safe_serialization: bool, **kwargs: Any) -> None:
        pipe: Any = self
        stock = _stock_copy(pipe)
        stock.save_pretrained(folder, safe_serialization=safe_serialization, **kwargs)
        guider = pipe.guider
        if isinstance(guider, UpdateGuidance):
            if takes_guider(type(pipe)) and guider.config["guidance_scale"] is None:
                # Stock diffusers reads this file as that of its ClassifierFreeGuidance, and would find no scale.
                guider = guider.new(guidance_scale=own_scale(pipe, guider))
            guider.save_pretrained(os.path.join(folder, GUIDER_FOLDER))
        options = {"safe_serialization": safe_serialization, **kwargs}
        given = {name: options[name] for name in _WEIGHT_OPTIONS if options.get(name) is not None}
        save_initial_noise(pipe.initial_noise, folder, given, stacklevel=3)

    def _explained(self, repo_id: str, kept: str, folder: str = "FOLDER") -> AbstractContextManager[None]:
        saved = "" if os.path.isdir(folder) else "save_pretrained() to a folder and "
        again = (
            f"call push_to_hub({repo_id!r}) (large files that arrived are not sent twice), or {saved}run "
            f"`{upload_command(repo_id, folder)}`."
        )
        return explained_push(f"The {stock_class(type(self)).__name__}", repo_id, kept, again)

    def _upload(
        self,
        folder: str,
        repo_id: str,
        commit_message: str | None = None,
        *,
        token: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
        variant: str | None = None,
    ) -> Any:
        pipe: Any = self
        if not subfolder:
            pipeline_card(pipe, repo_id, token).save(os.path.join(folder, "README.md"))
        return upload_in_one_commit(
            repo_id, folder, commit_message or f"Upload {stock_class(type(pipe)).__name__} by hfnoise",
            path_in_repo=subfolder, token=token, create_pr=create_pr, delete_patterns=stale_patterns(folder, variant),
        )  # fmt: skip


def read_parts(
    pipeline_class: type, repository: PipelineRepository, guider: Any, initial_noise: Any
) -> tuple[Any, Any]:
    """Return what goes into the two slots: what is given, or else what the repository holds.

    Raises:
        ValueError: if a saved part cannot be used in this pipeline; the message names the place.
    """
    if guider is None:
        guider = repository.guider()
        try:
            check_guider(pipeline_class, guider)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the guider in {repository.path}/{GUIDER_FOLDER}/guider_config.json cannot be used: {error}"
            ) from error
    if initial_noise is not None:
        check_initial_noise(pipeline_class, initial_noise)
        return guider, initial_noise
    initial_noise = repository.initial_noise()
    try:
        check_initial_noise(pipeline_class, initial_noise)
    except ValueError as error:
        raise ValueError(
            f"the initial noise saved in {repository.path} cannot be used: {error} Give initial_noise=[] to load "
            "without it."
        ) from error
    return guider, initial_noise


def fill_slots(pipe: Any, guider: Any, initial_noise: Any) -> Any:
    """Put them in and return the pipeline; what is `None` leaves a pipeline's own guider where it is."""
    if guider is not None:
        pipe.guider = guider
    pipe.initial_noise = initial_noise
    return pipe


def stock_class(guided: type) -> type:
    """Return the pipeline class of diffusers that a guided one is made of.

    Example:
        >>> from diffusers import StableDiffusionPipeline
        >>> from hfnoise.pipelines.guided import guided_class
        >>> from hfnoise.pipelines.guided_saving import stock_class
        >>> stock_class(guided_class(StableDiffusionPipeline)).__name__
        'StableDiffusionPipeline'
    """
    return next(base for base in guided.__mro__ if not issubclass(base, GuidedSaving))


def _stock_copy(pipe: Any) -> Any:
    """Return a stock pipeline of the same components: diffusers changes the configuration of what it saves."""
    stock: Any = object.__new__(stock_class(type(pipe)))
    stock.__dict__.update(pipe.__dict__)
    stock.__dict__["_internal_dict"] = type(pipe.config)(pipe.config)
    stock.__dict__.pop("_initial_noise", None)
    if not takes_guider(type(pipe)):
        stock.__dict__.pop("guider", None)
    elif isinstance(pipe.guider, UpdateGuidance):
        stock.register_modules(guider=ClassifierFreeGuidance(guidance_scale=own_scale(pipe, pipe.guider)))
    return stock


def _created(push: dict[str, Any]) -> str:
    return create_repo(
        push["repo_id"], exist_ok=True, private=push.get("private"), token=push.get("token")
    ).repo_id  # fmt: skip
