"""The first step of a side run: what goes into the denoiser, and what comes out, with and without the prompt."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from hfnoise.pipelines.block_caches import has_block_cache, reset_block_cache
from hfnoise.pipelines.model_inputs import noisy_input, select_rows
from hfnoise.pipelines.model_outputs import prediction_of
from hfnoise.pipelines.module_calls import intercepted, is_compiled
from hfnoise.pipelines.pipeline_layouts import PipelineLayout
from hfnoise.pipelines.run_schedule import given_timestep
from hfnoise.pipelines.side_run import SideRunStopped

# The side run of this thread: another one that shares the model is none of its business.
_ACTIVE: ContextVar[FirstStep | None] = ContextVar("hfnoise_first_step", default=None)


class FirstStep:
    """The predictions of the first step of a side run, which ends with them.

    Args:
        side: the pipeline of the side run.
        layout ([`PipelineLayout`]): how it calls its denoiser: all predictions in one call, or in two.
        batch (`int`): samples.
        wants_uncond (`bool`): whether the prediction without prompt is needed.
    """

    def __init__(self, side: Any, layout: PipelineLayout, batch: int, wants_uncond: bool) -> None:
        self.side, self.layout, self.batch, self.wants_uncond = side, layout, batch, wants_uncond
        self.cond: Tensor | None = None
        self.uncond: Tensor | None = None
        self.timestep: Any = None
        self.evaluations = 0
        self._given: Tensor | None = None
        self._context: str | None = None

    @property
    def seen(self) -> Tensor:
        """What the denoiser was given for the prompt."""
        assert self._given is not None
        return self._given

    def installed(self) -> ExitStack:
        """Return a block within which the denoisers report to this step, and the scheduler ends it."""
        with ExitStack() as stack:
            token = _ACTIVE.set(self)
            stack.callback(_ACTIVE.reset, token)
            modules = (getattr(self.side, name, None) for name in self.layout.denoisers)
            for module in (module for module in modules if module is not None):
                if has_block_cache(module):
                    # What is in them is of another noise.
                    stack.callback(reset_block_cache, module)
                stack.enter_context(intercepted(module, self._handler(module), self._enter_context, nested=True))
            # Of the side run's own scheduler.
            self.side.scheduler.step = self._stop
            return stack.pop_all()

    def _handler(self, module: Any) -> Callable[..., Any]:
        evaluate = self._second if self.layout.kind == "two_calls" else self._batched

        def handle(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if _ACTIVE.get() is not self:
                return call(*args, **kwargs)
            self.timestep = given_timestep(args, kwargs)
            return evaluate(module, call, args, kwargs)

        return handle

    def _enter_context(self, name: str) -> None:
        if _ACTIVE.get() is self:
            self._context = name

    def _stop(self, *args: Any, **kwargs: Any) -> Any:
        raise SideRunStopped

    def _batched(self, module: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen = noisy_input(args, kwargs)
        if len(seen) == self.batch and not self.wants_uncond:
            self._given, self.cond, self.evaluations = seen, prediction_of(call(*args, **kwargs)), 1
        if len(seen) != 2 * self.batch:
            self._stop()  # one prediction only
        layout, first, second = self.layout, slice(None, self.batch), slice(self.batch, None)
        cond, uncond = (first, second) if layout.cond_first else (second, first)
        self._given = seen[cond]
        # Another number of rows would compile a model anew, and not fit into the caches between its blocks.
        if self.wants_uncond or is_compiled(module) or has_block_cache(module):
            predicted = prediction_of(call(*args, **kwargs))
            self.cond, self.uncond, self.evaluations = predicted[cond], predicted[uncond], 2
        else:
            rows = torch.arange(len(seen))[cond]
            options = layout.not_batched, layout.repeated, layout.rows_second
            chosen = (select_rows(part, rows, len(seen), *options) for part in (args, kwargs))
            self.cond, self.evaluations = prediction_of(call(*next(chosen), **next(chosen))), 1
        self._stop()

    def _second(self, module: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen = noisy_input(args, kwargs)
        if not self._is_uncond(seen):
            output = call(*args, **kwargs)
            # The last one before the other: GLM-Image encodes images by its transformer first.
            self.cond, self._given, self.evaluations = prediction_of(output), seen, 1
            return output
        if self.wants_uncond:
            self.uncond, self.evaluations = prediction_of(call(*args, **kwargs)), 2
        return self._stop()

    def _is_uncond(self, seen: Tensor) -> bool:
        if self._context is not None:
            return self._context.startswith("uncond")
        if self.layout.uncond_call == "same_input":
            return seen is self._given
        return self._given is not None
