"""Guiders in pipelines that know of none: around the denoiser, for one call of the pipeline."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from hfnoise.pipelines.block_caches import has_block_cache, reset_block_cache
from hfnoise.pipelines.guider_base import UpdateGuidance
from hfnoise.pipelines.guider_runs import running
from hfnoise.pipelines.model_inputs import noisy_input, predicted_part, select_rows
from hfnoise.pipelines.model_outputs import prediction_of, scatter_rows, with_prediction
from hfnoise.pipelines.module_calls import intercepted, is_compiled, watched_method
from hfnoise.pipelines.pipeline_layouts import PipelineLayout
from hfnoise.pipelines.run_schedule import RunSchedule, given_timestep

logger = logging.getLogger(__name__)

# The run of this thread: a pipeline of another one that shares the model is none of its business.
_ACTIVE: ContextVar[GuidedRun | None] = ContextVar("hfnoise_guided_run", default=None)
# Within a side run, which uses the models of the run that waits for it.
_BESIDE: ContextVar[bool] = ContextVar("hfnoise_beside_a_run", default=False)
# What makes the start of a run: DeepFloyd IF has pixels, and its upscalers predict as many channels as they are given.
_STARTS = ("prepare_latents", "prepare_intermediate_images")


class GuidedRun:
    """One call of a classic pipeline under a guider.

    The pipeline computes `u + w (c - u)` of what its denoiser returns. In the place of u it is handed `c - update`, so
    that it computes what the guider wants, `c + (w - 1) update`, and for a sample that is not guided c itself, whose
    unconditional row is not evaluated. Where the guider changes nothing it is handed what the model returned.

    Args:
        pipe: the pipeline.
        guider ([`UpdateGuidance`]): works on the scheduler and the guidance scale of this call.
        layout ([`PipelineLayout`]): how the pipeline calls its denoiser.
        scale (`Callable[[], float]`): the guidance scale of the moment.
        asked (`bool`, defaults to `True`): whether the arguments of the call ask for guidance. It is what counts
            where the pipeline has no property `do_classifier_free_guidance`: such a pipeline decides once.
    """

    def __init__(
        self,
        pipe: Any,
        guider: UpdateGuidance,
        layout: PipelineLayout,
        scale: Callable[[], float],
        asked: bool = True,
    ) -> None:
        self.pipe, self.guider, self.layout, self._scale, self._asked = pipe, guider, layout, scale, asked
        self._batch: int | None = None
        self._number = -1
        # Whether the decision of the coming evaluation was made, for the ControlNet before it.
        self._decided = False
        self._latents: torch.Size | None = None
        self._schedule: RunSchedule | None = None
        self._given: Any = None
        self._context: str | None = None
        # What the conditional call of this step was given, and returned.
        self._cond: tuple[torch.Tensor, Any] | None = None
        self._whole_batches: set[int] = set()
        # Of each module with caches between its blocks, how many rows these hold.
        self._cached_rows: dict[torch.nn.Module, int | None] = {}

    @contextmanager
    def installed(self) -> Iterator[GuidedRun]:
        """Within the block the pipeline is guided.

        Raises:
            RuntimeError: if the guider, or the model, is in the middle of another run.
        """
        guider = self.guider
        with running(guider, self.pipe), ExitStack() as stack:
            guider._unconditional = 2 if self.layout.kind == "three_branches" else 1
            token = _ACTIVE.set(self)
            try:
                for name in self.layout.controlnets:
                    self._install(stack, name, self._control)
                for name in self.layout.denoisers:
                    self._install(stack, name, self._denoise)
                for name in _STARTS:
                    stack.enter_context(watched_method(self.pipe, name, self._see_latents))
                yield self
                self._end_step()
                self._warn_if_idle()
            except BaseException:
                # The pipeline empties them at the end of a call only.
                for module in self._cached_rows:
                    reset_block_cache(module)
                raise
            finally:
                _ACTIVE.reset(token)
                self._cond = None

    def _warn_if_idle(self) -> None:
        if self._number < 0:
            logger.warning(
                "%s did not ask for an unconditional prediction, so %s had nothing to do: it needs a %s above 1 "
                "and, where the model's own guidance is distilled, a negative prompt.",
                type(self.pipe).__name__, type(self.guider).__name__, self.layout.scale_name,
            )  # fmt: skip

    def _install(self, stack: ExitStack, name: str, handler: Callable[..., Any]) -> None:
        module = getattr(self.pipe, name, None)
        if module is None:
            return
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"a guider needs a torch module as {name}, and the pipeline has {type(module).__name__}.")
        if is_compiled(module):
            logger.info("%s is compiled: rows are left out of whole batches only.", type(module).__name__)
            self._whole_batches.add(id(module))
        if has_block_cache(module):
            self._whole_batches.add(id(module))
            self._cached_rows[module] = None

        def handle(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if _ACTIVE.get() is not self:
                return call(*args, **kwargs)
            self._given = given_timestep(args, kwargs)
            return handler(module, call, args, kwargs)

        stack.enter_context(intercepted(module, handle, self._enter_context, nested=_BESIDE.get()))

    def _enter_context(self, name: str) -> None:
        if _ACTIVE.get() is self:
            self._context = name

    def _see_latents(self, result: Any) -> None:
        # Editing models are given the tokens of other images behind these, upscalers their channels.
        latents = result[0] if isinstance(result, tuple) else result
        if isinstance(latents, torch.Tensor):
            self._latents = latents.shape

    # Steps. ---------------------------------------------------------------------------------------------------------

    def _has_guidance(self) -> bool:
        if hasattr(type(self.pipe), "do_classifier_free_guidance"):
            return bool(self.pipe.do_classifier_free_guidance)
        return self._asked

    def _begin_step(self, denoiser: torch.nn.Module | None = None) -> None:
        """Let the guider decide which samples need an unconditional prediction."""
        self._number += 1
        self._decided = True
        scheduler = self.pipe.scheduler
        if self._schedule is not None and self._number >= self._schedule.count:
            if not self.layout.restarts:
                raise ValueError(
                    f"this is evaluation {self._number + 1} of a run of {self._schedule.count}: "
                    f"{type(self.pipe).__name__} calls its denoiser in another way than is known. Run it without "
                    "guider."
                )
            self._number = 0  # the next segment of a video
        if self._number == 0:
            self._schedule = RunSchedule(scheduler, getattr(self.pipe, "_num_timesteps", None), self._given)
        assert self._schedule is not None
        if scheduler is not self._schedule.scheduler:
            self._schedule = RunSchedule(scheduler, self._schedule.count)
        self.guider.guidance_scale = self._scale()
        timestep: Any = self._schedule.timestep(self._number)
        self.guider.set_state(self._number, self._schedule.count, timestep)
        if denoiser is not None:
            # Before it decides: nothing can be estimated from the updates of another model.
            self.guider._note_denoiser(denoiser)
        self.guider._decide_branches()

    def _pass_over(self, cond: torch.Tensor) -> None:
        if not self._decided:
            self._begin_step()
        self._decided = False
        self.guider._pass_over(cond)

    def _rows(self, module: torch.nn.Module) -> torch.Tensor | None:
        """Return which samples are evaluated without condition; `None` is all of them."""
        if self.guider._branches == 1:
            return torch.empty(0, dtype=torch.int64)
        return None if id(module) in self._whole_batches else self.guider._rows

    def _rows_of_call(self, module: torch.nn.Module, branches: int) -> torch.Tensor | None:
        """Return the same of a call with all predictions in one batch."""
        rows = self._rows(module)
        if rows is None:
            return None
        assert self._batch is not None
        every = torch.arange(self._batch, device=rows.device)
        parts = [every, *[rows] * (branches - 1)]
        if self._uncond_first:
            parts.reverse()
        return torch.cat([part + number * self._batch for number, part in enumerate(parts)])

    @property
    def _uncond_first(self) -> bool:
        return self.layout.kind == "batched" and not self.layout.cond_first

    def _count_batch(self, rows: int, branches: int) -> None:
        batch, left = divmod(rows, branches)
        if left or self._batch not in (None, batch):
            expected = "a multiple" if self._batch is None else f"{self._batch} in each"
            raise ValueError(
                f"the denoiser is given {rows} rows, where {expected} of {branches} predictions are expected: did a "
                "callback change the batch in mid-run?"
            )
        self._batch = batch

    def _select(self, value: Any, rows: torch.Tensor, batch: int) -> Any:
        layout = self.layout
        return select_rows(value, rows, batch, layout.not_batched, layout.repeated, layout.rows_second)

    # One call for all predictions. ----------------------------------------------------------------------------------

    def _denoise(self, module: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.layout.kind == "two_calls":
            return self._denoise_twice(module, call, args, kwargs)
        rows = len(noisy_input(args, kwargs))
        if not self._has_guidance():
            self._count_batch(rows, 1)
            self._before_rows(module, rows)
            output = call(*args, **kwargs)
            self._pass_over(prediction_of(output))
            return output
        if kwargs.get("skip_layers") is not None:
            return call(*args, **kwargs)  # skip-layer guidance of SD3: a third prediction, of its own
        branches = 1 + self.guider._unconditional
        self._count_batch(rows, branches)
        if not self._decided:
            self._begin_step(module)
        self._decided = False
        chosen = self._rows_of_call(module, branches)
        self._before_rows(module, rows if chosen is None else len(chosen))
        if chosen is None:
            output = call(*args, **kwargs)
            parts = list(prediction_of(output).chunk(branches))
        else:
            output = call(*self._select(args, chosen, rows), **self._select(kwargs, chosen, rows))
            evaluated = prediction_of(output)
            assert self._batch is not None
            kept = (len(evaluated) - self._batch) // (branches - 1)
            sizes = [self._batch, *[kept] * (branches - 1)]
            parts = list(evaluated.split(sizes[::-1] if self._uncond_first else sizes))
        cond, *others = parts[::-1] if self._uncond_first else parts
        seen = noisy_input(args, kwargs)
        seen = seen[-len(cond) :] if self._uncond_first else seen[: len(cond)]
        parts = [cond, *self._replaced(module, seen, cond, others)]
        return with_prediction(output, torch.cat(parts[::-1] if self._uncond_first else parts))

    def _before_rows(self, module: Any, rows: int) -> None:
        # Where the number stays the same the caches keep their use.
        if module in self._cached_rows:
            if self._cached_rows[module] not in (None, rows):
                reset_block_cache(module)
            self._cached_rows[module] = rows

    def _control(self, module: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Evaluate a ControlNet for the rows that its denoiser will be."""
        rows = len(noisy_input(args, kwargs))
        branches = 1 + self.guider._unconditional
        # With guess_mode it sees the conditional rows only.
        if self.layout.kind == "two_calls" or kwargs.get("guess_mode") or not self._has_guidance():
            return call(*args, **kwargs)
        if not self._decided:
            self._count_batch(rows, branches)
            self._begin_step()
        chosen = self._rows_of_call(module, branches)
        if chosen is None:
            return call(*args, **kwargs)
        output = call(*self._select(args, chosen, rows), **self._select(kwargs, chosen, rows))
        return scatter_rows(output, chosen, rows)

    # Two calls. -----------------------------------------------------------------------------------------------------

    def _denoise_twice(
        self, module: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        seen = noisy_input(args, kwargs)
        if self._is_cond(seen):
            self._end_step()
            predicted = call(*args, **kwargs)
            self._count_batch(len(seen), 1)
            prediction_of(predicted)  # refuses several
            self._cond = seen, predicted
            return predicted
        if self._cond is None:
            raise ValueError("the pipeline asks for an unconditional prediction first, which a guider cannot judge.")
        output = self._cond[1]
        cond = prediction_of(output)
        self._cond = None
        self._count_batch(len(seen), 1)
        self._begin_step(module)
        self._decided = False
        chosen = self._rows(module)
        uncond = cond[:0]
        if chosen is None:
            output = call(*args, **kwargs)
            uncond = prediction_of(output)
        elif len(chosen):
            output = call(*self._select(args, chosen, len(seen)), **self._select(kwargs, chosen, len(seen)))
            uncond = prediction_of(output)
        return with_prediction(output, self._replaced(module, seen, cond, [uncond])[0])

    def _is_cond(self, seen: torch.Tensor) -> bool:
        if self._context is not None:  # the pipeline says it
            return not self._context.startswith("uncond")
        if self._cond is None:
            return True
        if self.layout.uncond_call == "order":
            return not self._has_guidance()
        return seen is not self._cond[0]

    def _end_step(self) -> None:
        """Note the step before, if no unconditional prediction was asked for."""
        if self._cond is None:
            return
        cond, self._cond = prediction_of(self._cond[1]), None
        # Under guidance it was no step before the first that was guided: GLM-Image encodes images by its transformer.
        # After that it was: Lumina 2 asks for no unconditional prediction at its last steps (`cfg_trunc_ratio`).
        if not self._has_guidance() or self._number >= 0:
            self._pass_over(cond)

    # What is handed to the pipeline. --------------------------------------------------------------------------------

    def _replaced(
        self, module: torch.nn.Module, seen: torch.Tensor, cond: torch.Tensor, others: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Return what takes the place of the unconditional predictions, of all samples."""
        guider = self.guider
        if not guider._is_cfg_enabled():
            guider._pass_over(cond)
            return [cond.clone() for _ in others]
        evaluated = len(others[-1])
        rows = guider._rows
        if evaluated < len(cond):
            others = [_filled(cond, other, rows) for other in others]
        guider._note_denoiser(module)
        try:
            part = predicted_part(seen, cond, self._latents)
            guider._model_input = seen[part]
        except ValueError:
            if any(stage._needs_input for stage in guider.stages):
                raise
            part = (slice(None),)
        uncond = self._signed(others[-1][part]) if evaluated else None
        step = guider._make_step(self._signed(cond[part]), uncond, evaluated * len(others))
        update = guider._update_of(step)
        guided = step.guided.reshape(-1, *[1] * (cond.dim() - 1))
        if update is not None:
            others = [other.clone() for other in others]
            shaped = cond[part].to(update.dtype) - self._signed(update)
            for other in others:
                other[part] = shaped.to(cond.dtype)
        # For a sample that is not guided no difference is left, and w of nothing is nothing.
        return [torch.where(guided, other, cond) for other in others]

    def _signed(self, prediction: torch.Tensor) -> torch.Tensor:
        # Some pipelines turn the sign of what they predicted when they are done with it.
        return -prediction if self.layout.negated else prediction


def outside(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Return a callback of a pipeline whose own calls of the model, in a stock pipeline, are not of the guided run."""

    @functools.wraps(callback)
    def called(*args: Any, **kwargs: Any) -> Any:
        token = _ACTIVE.set(None)
        try:
            return callback(*args, **kwargs)
        finally:
            _ACTIVE.reset(token)

    return called


def beside(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose guided runs may use the models of the run of this thread, which waits for it."""
    apart = outside(function)

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        token = _BESIDE.set(True)
        try:
            return apart(*args, **kwargs)
        finally:
            _BESIDE.reset(token)

    return called


def _filled(cond: torch.Tensor, evaluated: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Return predictions of all samples: those that were evaluated, and `cond` for the others."""
    full = cond.clone()
    if len(evaluated):
        full[rows] = evaluated
    return full
