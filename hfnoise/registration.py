"""What is registered where in transformers and diffusers: done when those are imported, never earlier.

A hook imports one module of ours, which registers itself at its bottom; a hook that imported names would meet a
half-initialised module. A hook never raises, since it would break the user's own import: its error is kept, warned of
once, and raised at the first use of the class that could not be registered.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType


@dataclass(frozen=True)
class Hook:
    """When `trigger` is imported, import `target`."""

    trigger: str
    target: str


HOOKS: tuple[Hook, ...] = (
    Hook("transformers.quantizers.auto", "hfnoise.quantization.hf_transformers"),
    Hook("diffusers.quantizers.auto", "hfnoise.quantization.hf_diffusers"),
    Hook("peft.tuners.lora.model", "hfnoise.quantization.hf_peft"),
    Hook("diffusers", "hfnoise.hf_pipeline_names"),
    Hook("diffusers.pipelines.pipeline_loading_utils", "hfnoise.hf_loadable_classes"),
)

_failures: dict[str, Exception] = {}


def install_hooks(hooks: tuple[Hook, ...] = HOOKS) -> None:
    """Arrange that the target of each hook is imported when its trigger is, at once if it is already there."""
    if not hooks:
        return
    from wrapt import register_post_import_hook

    for hook in hooks:
        register_post_import_hook(_importer(hook), hook.trigger)


def raise_if_failed(target: str) -> None:
    """Raise the error that a hook met when it imported `target`, if any.

    Raises:
        ImportError: with the original error as its cause.
    """
    if target in _failures:
        raise ImportError(f"{target} could not be registered: {_failures[target]}") from _failures[target]


def _importer(hook: Hook) -> Callable[[ModuleType], None]:
    def import_target(_: ModuleType) -> None:
        try:
            import_module(hook.target)
        except Exception as error:  # whatever it is, the user's own import goes on
            _failures[hook.target] = error
            warnings.warn(f"hfnoise could not register {hook.target} in {hook.trigger}: {error}", stacklevel=2)

    return import_target
