"""Our names where diffusers looks for names: what repositories may say of ours, and `diffusers.Guided...Pipeline`.

Imported by a hook (`hfnoise.registration`) in the middle of the import of diffusers: nothing of it is imported here,
and what is registered are strings: the classes behind them are imported when a repository names them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_LOADING = "diffusers.pipelines.pipeline_loading_utils"
# Public names of hfnoise that are bases of parts of a pipeline, and how diffusers saves and loads those.
_BASES = {"UpdateGuidance": ["save_pretrained", "from_pretrained"]}


def register_names() -> None:
    """Let diffusers load parts that are `["hfnoise", <class>]` in an index, and pipelines that are `Guided` + its own.

    Not documented by diffusers: two dictionaries, of which the second is a copy of the first, and a module class that
    is replaced. Whatever is missing in another version raises here, which the hook turns into a warning.

    Raises:
        AttributeError: if this version of diffusers keeps them elsewhere.
    """
    loading = sys.modules[_LOADING]
    loading.LOADABLE_CLASSES["hfnoise"] = dict(_BASES)
    loading.ALL_IMPORTABLE_CLASSES.update(_BASES)
    _resolve_guided_names(sys.modules["diffusers"])


def _resolve_guided_names(module: ModuleType) -> None:
    # A plain setattr is lost on the lazy module of diffusers, and the classes cannot be imported yet.
    lazy = type(module)
    if getattr(lazy, "_resolves_guided", False):
        return

    class WithGuidedNames(lazy):  # type: ignore[misc, valid-type]
        _resolves_guided = True

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)  # type: ignore[misc]
            except AttributeError as error:
                if not (name.startswith("Guided") and name.endswith("Pipeline")):
                    raise
                try:
                    return getattr(import_module("hfnoise.pipelines.guided"), name)
                except AttributeError:
                    raise error from None

        def __reduce__(self) -> Any:
            return import_module, (self.__name__,)

    module.__class__ = WithGuidedNames


if _LOADING in sys.modules:
    register_names()
