"""`diffusers.GuidedStableDiffusionPipeline` and the like: for repositories that name a class of ours.

Imported by a hook (`hfnoise.registration`) at the end of the import of diffusers; no pipeline is imported here, nor
ours before somebody asks for one.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import diffusers  # noqa: F401  (what is changed is its lazy module, in sys.modules)


def resolve_guided_names(module: ModuleType) -> None:
    """Let a module that has stock pipelines find `Guided` + their names too, when they are asked for.

    Its class is replaced: a plain setattr is lost on the lazy module of diffusers, and classes cannot be imported yet.

    Args:
        module: `sys.modules["diffusers"]`.
    """
    lazy = type(module)
    if getattr(lazy, "_resolves_guided", False):
        return

    class WithGuidedNames(lazy):  # type: ignore[misc, valid-type]
        _resolves_guided = True

        def __getattr__(self, name: str) -> Any:
            try:
                # ModuleType has none: with DIFFUSERS_SLOW_IMPORT nothing is lazy.
                return super().__getattr__(name) if hasattr(lazy, "__getattr__") else super().__getattribute__(name)
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


resolve_guided_names(sys.modules["diffusers"])
