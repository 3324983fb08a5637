"""Counts what networks evaluate, in the same way for every column, guided by hfnoise or not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from hfnoise.pipelines.pipeline_layouts import layout_of

# Of pipelines that hfnoise does not know, which are drawn without a guider.
_USUAL = ("unet", "transformer", "transformer_2")
# What denoisers call the latents that they are given.
_LATENTS = ("sample", "hidden_states", "x")


@dataclass
class Evaluations:
    """Rows that networks were given: a prediction of one picture, with or without prompt, is one.

    Args:
        denoiser (`int`): of the model that draws.
        start (`int`): of small networks that make the noise to start from.
    """

    denoiser: int = 0
    start: int = 0


def denoisers_of(pipe: Any) -> list[torch.nn.Module]:
    """Return the networks of a pipeline that are evaluated at every step."""
    layout = layout_of(type(pipe))
    parts = (getattr(pipe, name, None) for name in (_USUAL if layout is None else layout.denoisers))
    return [part for part in parts if isinstance(part, torch.nn.Module)]


@contextmanager
def counted(denoisers: Iterable[torch.nn.Module], start: Iterable[torch.nn.Module] = ()) -> Iterator[Evaluations]:
    """Yield what networks evaluate within the block, as it grows.

    Hooks of modules see what is really evaluated: a guider of hfnoise decides before them which rows run.
    """
    count = Evaluations()
    with ExitStack() as stack:
        for name, modules in (("denoiser", denoisers), ("start", start)):
            for module in modules:
                handle = module.register_forward_pre_hook(_counter(count, name), with_kwargs=True)
                stack.callback(handle.remove)
        yield count


def _counter(count: Evaluations, name: str) -> Any:
    def add(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        setattr(count, name, getattr(count, name) + rows_of(args, kwargs))

    return add


def rows_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return how many pictures a call of a denoiser is of; some are given a list of latents."""
    named = [kwargs[name] for name in _LATENTS if kwargs.get(name) is not None]
    latents = (named or list(args))[0]
    return len(latents)
