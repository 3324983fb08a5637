"""The guiders of hfnoise in one place, and the one that loads any of them."""

from __future__ import annotations

import inspect
import warnings
from os import PathLike
from typing import Any

import diffusers.guiders
from diffusers.guiders import BaseGuidance

from hfnoise.pipelines.adaptive_guider import AdaptiveGuidance
from hfnoise.pipelines.guidance_report import GuidanceReport
from hfnoise.pipelines.guider_base import UpdateGuidance
from hfnoise.pipelines.linear_guider import GuidanceRecorder, LinearGuidance
from hfnoise.pipelines.projected_guider import ProjectedGuidance

__all__ = [
    "AdaptiveGuidance",
    "AutoGuider",
    "GuidanceRecorder",
    "GuidanceReport",
    "LinearGuidance",
    "ProjectedGuidance",
    "UpdateGuidance",
]


class AutoGuider:
    """Loads a guider, ours or one of diffusers, by the class in its `guider_config.json`.

    `BaseGuidance.from_pretrained` does not look at that class: it would make a plain guider of another's options.
    """

    def __init__(self) -> None:
        raise TypeError("AutoGuider is not made; call AutoGuider.from_pretrained(repo).")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> BaseGuidance:
        """Return the guider of a folder or Hub repository.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): folder, or name on the Hub.
            subfolder (`str`, *optional*): `"guider"` in a repository of a pipeline.
            kwargs: `revision`, `token`, `cache_dir` and so on, and options that replace saved ones.

        Raises:
            OSError: if there is no `guider_config.json`.
            ValueError: if the class is no guider of hfnoise or diffusers, or has no such options.

        Example:
            >>> from hfnoise.pipelines import AdaptiveGuidance, AutoGuider
            >>> AdaptiveGuidance(threshold=0.99).save_pretrained("guider")
            >>> AutoGuider.from_pretrained("guider").threshold
            0.99
        """
        try:
            with warnings.catch_warnings():
                # diffusers 0.42 calls the Hub's library with what it no longer knows.
                warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument is deprecated")
                config, kwargs = BaseGuidance.load_config(
                    pretrained_model_name_or_path, subfolder=subfolder, return_unused_kwargs=True, **kwargs
                )
        except OSError as error:
            if subfolder is not None:
                raise
            raise OSError(f"{error} That of a pipeline lies in a sub-folder of it: subfolder='guider'.") from error
        name = config.get("_class_name")
        guider_class: Any = UpdateGuidance._classes.get(name) or getattr(diffusers.guiders, str(name), None)
        is_guider = isinstance(guider_class, type) and issubclass(guider_class, BaseGuidance)
        if not is_guider:
            known = sorted([*UpdateGuidance._classes, "those of diffusers.guiders"])
            raise ValueError(f"the guider is of class {name!r}; known are {', '.join(known)}.")
        _check_options(guider_class, config)
        options = set(inspect.signature(guider_class).parameters)
        if unknown := sorted(set(kwargs) - options):
            raise ValueError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(sorted(options))}.")
        return guider_class.from_config(config, **kwargs)


def _check_options(guider_class: type[BaseGuidance], config: Any) -> None:
    """Refuse a saved option that our guider does not have: diffusers would leave it out, with a line in the log."""
    if not issubclass(guider_class, UpdateGuidance):
        return
    known = set(inspect.signature(guider_class).parameters)
    unknown = sorted(name for name in config if not name.startswith("_") and name not in known)
    if unknown:
        raise ValueError(
            f"{guider_class.__name__} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}. "
            "If it was saved by a newer hfnoise: pip install -U hfnoise."
        )
    inner = config.get("inner")
    inner_class = UpdateGuidance._classes.get(str(inner.get("_class_name"))) if isinstance(inner, dict) else None
    if inner_class is not None:
        _check_options(inner_class, inner)
