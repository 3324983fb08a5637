"""Caches between the blocks of a denoiser, which hold the rows of the evaluation before."""

from __future__ import annotations

from typing import Any

import torch

# FasterCache leaves out unconditional rows by itself, at steps of its own.
_OWN_GUIDANCE = "faster_cache_denoiser"


def has_block_cache(module: torch.nn.Module) -> bool:
    """Return whether a denoiser has a cache of diffusers, by `enable_cache` or by a function of `diffusers.hooks`.

    Raises:
        ValueError: if the cache skips unconditional rows itself, as FasterCache does.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.block_caches import has_block_cache
        >>> has_block_cache(torch.nn.Identity())
        False
    """
    found = False
    for part in module.modules():
        hooks = getattr(part.__dict__.get("_diffusers_hook"), "hooks", {})
        if _OWN_GUIDANCE in hooks and not _is_distilled(hooks[_OWN_GUIDANCE]):
            raise ValueError(
                f"{type(module).__name__} has FasterCache, which leaves out unconditional rows by itself: choose one, "
                "pipe.transformer.disable_cache() or no guider. FirstBlockCache works with a guider."
            )
        found = found or any(hook._is_stateful for hook in hooks.values())
    return found


def _is_distilled(hook: Any) -> bool:
    return bool(getattr(hook, "is_guidance_distilled", False))


def reset_block_cache(module: torch.nn.Module) -> None:
    """Empty the caches, as a pipeline does at the end of each call, but in the middle of one of its contexts."""
    from diffusers.hooks.hooks import HookRegistry, StateManager

    module = getattr(module, "_orig_mod", module)  # compiled
    managers = [
        value
        for part in module.modules()
        for hook in getattr(part.__dict__.get("_diffusers_hook"), "hooks", {}).values()
        for value in vars(hook).values()
        if isinstance(value, StateManager)
    ]
    contexts = [manager._context for manager in managers]
    HookRegistry.check_if_exists_or_initialize(module).reset_stateful_hooks()
    # Emptied, they also forget which call they are in.
    for manager, context in zip(managers, contexts, strict=True):
        if context is not None:
            manager.set_context(context)
