"""The common part of our guiders: a step of classifier-free guidance whose update is measured, estimated or shaped."""

from __future__ import annotations

import inspect
import math
from typing import Any, ClassVar

import torch
from diffusers.guiders import BaseGuidance, ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GuiderOutput, rescale_noise_cfg

from hfnoise.hf_sharing import ExplainedPush
from hfnoise.pipelines.guidance_report import GuidanceReport
from hfnoise.pipelines.guidance_step import GuidanceStep
from hfnoise.pipelines.guider_options import check_flags, check_numbers, described, without_notice
from hfnoise.pipelines.model_inputs import noisy_input, select_rows

# As every text-to-image guider of diffusers.
_DEFAULT_GUIDANCE_SCALE = 7.5
_NEUTRAL = {"guidance_rescale": 0.0, "use_original_formulation": False, "start": 0.0, "stop": 1.0, "enabled": True}


class UpdateGuidance(ExplainedPush, ClassifierFreeGuidance):
    """Base of our guiders: stock classifier-free guidance until a part of it changes which rows run, or the update.

    A guider may hold another one as `inner`; the order of work is always the same: evaluate, measure, estimate,
    shape. Subclasses override what they need of `_reset`, `_wants_uncond`, `_guided`, `_observe` and `_shape`.

    Two departures from stock guiders, both since the state of a run outlives it: `num_conditions` says what a run may
    need, not what the last step of the last run did (diffusers asks it before a run, whether to encode the negative
    prompt at all; with a stock guider and `stop` below 1 the second run of a pipeline fails on the missing prompt);
    and a run begins when the step number does not grow, so that one which was cut off leaves nothing behind.
    """

    _accepts_inner: ClassVar[tuple[str, ...]] = ()
    _classes: ClassVar[dict[str, type[UpdateGuidance]]] = {}
    # Whether the update is another than the difference of two predictions.
    _changes_update: ClassVar[bool] = False
    # To a ModularPipeline: loaded from nowhere yet. Without it, one that is given by `update_components` is taken for
    # the default of the blocks, and `save_pretrained` leaves it out without a word.
    _diffusers_load_id = "null|null|null|null"
    # Per sample the first step without guidance, -1 if it never came.
    _stop_steps: torch.Tensor | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        UpdateGuidance._classes[cls.__name__] = cls

    def _set_up(
        self,
        guidance_scale: float | None,
        guidance_rescale: float,
        use_original_formulation: bool,
        start: float,
        stop: float,
        enabled: bool,
        inner: UpdateGuidance | dict[str, Any] | None = None,
    ) -> None:
        check_numbers(start=start, stop=stop)
        check_flags(use_original_formulation=use_original_formulation, enabled=enabled)
        # Not through ClassifierFreeGuidance: it would register its own default as the guidance_scale that was asked.
        with without_notice():
            BaseGuidance.__init__(self, start, stop, enabled)
        self.inner = self._checked_inner(inner)
        inner_scale = None if self.inner is None else self.inner.config["guidance_scale"]
        if guidance_scale is not None and inner_scale not in (None, guidance_scale):
            raise ValueError(
                f"{type(self).__name__} has guidance_scale={guidance_scale} and its inner guider {inner_scale}; a run "
                "has one. Give it to the outer guider only."
            )
        scale = guidance_scale if guidance_scale is not None else inner_scale
        scale = _DEFAULT_GUIDANCE_SCALE if scale is None else scale
        check_numbers(guidance_scale=scale, guidance_rescale=guidance_rescale)
        if not (math.isfinite(scale) and math.isfinite(guidance_rescale)):
            raise ValueError(
                f"guidance_scale and guidance_rescale must be finite, got {scale} and {guidance_rescale}."
            )
        self.guidance_scale = scale
        self.guidance_rescale = guidance_rescale
        self.use_original_formulation = use_original_formulation
        self._source: Any = None
        self._hook: Any = None
        self._denoiser: Any = None
        self._model_input: torch.Tensor | None = None
        self._branches = 0
        # As decided before the evaluation.
        self._any_guided = True
        self._rows: torch.Tensor | None = None
        self._sliced = False
        self._trace: list[torch.Tensor] = []
        self._rows_per_step: list[int] = []
        # Unconditional predictions per step: pix2pix has two.
        self._unconditional = 1
        self._has_guided = False
        if self.inner is not None:
            self.register_to_config(inner=guider_entry(self.inner))
        # diffusers takes positional arguments for defaults, and `new()` would go back to those.
        defaults = inspect.signature(type(self).__init__).parameters
        unset = self.config.get("_use_default_values", [])
        self.register_to_config(
            _use_default_values=[n for n in unset if n in defaults and self.config[n] == defaults[n].default]
        )

    def _checked_inner(self, inner: UpdateGuidance | dict[str, Any] | None) -> UpdateGuidance | None:
        if inner is None:
            return None
        if isinstance(inner, dict):
            name = inner.get("_class_name")
            if name not in self._accepts_inner:
                raise ValueError(f"inner is a configuration of {name!r}; {self._inner_rule()}")
            inner = self._classes[name].from_config({k: v for k, v in inner.items() if k != "_class_name"})
        if type(inner).__name__ not in self._accepts_inner or not isinstance(inner, UpdateGuidance):
            raise ValueError(f"inner is {described(inner)}; {self._inner_rule()}")
        own = {name: inner.config[name] for name, value in _NEUTRAL.items() if inner.config[name] != value}
        if own:
            raise ValueError(f"the inner {type(inner).__name__} has {own}; give these to {type(self).__name__}.")
        return inner

    def _inner_rule(self) -> str:
        allowed = " or ".join(self._accepts_inner) or "no inner guider"
        return (
            f"{type(self).__name__} takes {allowed}. The order is AdaptiveGuidance(inner=LinearGuidance("
            "inner=ProjectedGuidance())), each of them optional."
        )

    # What subclasses say. -------------------------------------------------------------------------------------------

    @property
    def _needs_input(self) -> bool:
        """Whether the model's input and the scheduler are needed."""
        return False

    def _reset(self) -> None:
        """Forget the last run."""

    def _forget_updates(self) -> None:
        """Another denoiser takes over in mid-run: what is remembered of updates is of the old one."""

    def _wants_uncond(self, number: int, num_inference_steps: int) -> bool:
        """Return whether this step evaluates the unconditional prediction, if there is a sample to guide."""
        return True

    def _guided(self) -> torch.Tensor | None:
        """Return which samples are guided, as far as known; `None` is all."""
        return None

    def _observe(self, step: GuidanceStep) -> None:
        """Look at the raw predictions; may change `step.guided`."""

    def _shape(self, update: torch.Tensor | None, step: GuidanceStep) -> torch.Tensor | None:
        """Return the changed update in float32, or what was given: `None` is the plain difference."""
        return update

    # The protocol of diffusers. -------------------------------------------------------------------------------------

    def bind(self, pipe: Any) -> UpdateGuidance:
        """Tell the guider which scheduler runs, and return it; rules on x0 need to know the noise level.

        Args:
            pipe: a pipeline, whose scheduler of the moment is used, or a scheduler.

        Raises:
            TypeError: if it is neither.

        Example:
            >>> from diffusers import DDIMScheduler
            >>> from hfnoise.pipelines import AdaptiveGuidance
            >>> guider = AdaptiveGuidance().bind(DDIMScheduler())
        """
        if not hasattr(pipe, "scheduler") and not hasattr(pipe, "set_timesteps"):
            raise TypeError(f"bind takes a pipeline or a scheduler of diffusers, got {type(pipe).__name__}.")
        self._source = pipe
        return self

    @property
    def asks_for_scale(self) -> bool:
        """Whether this guider was given a guidance scale, so that its own is meant and not the pipeline's default."""
        return self.guidance_scale != _DEFAULT_GUIDANCE_SCALE or any(
            stage.config["guidance_scale"] is not None for stage in self.stages
        )

    @property
    def stages(self) -> list[UpdateGuidance]:
        """This guider and its inner ones, in the order of their work."""
        return [self, *([] if self.inner is None else self.inner.stages)]

    @property
    def num_conditions(self) -> int:
        """How many predictions a step of a run may need, 1 or 2."""
        neutral = 0.0 if self.use_original_formulation else 1.0
        return 1 if not self._enabled or math.isclose(self.guidance_scale, neutral) else 2

    def set_state(self, step: int, num_inference_steps: int, timestep: torch.LongTensor) -> None:
        """Begin a step; a run begins with the first, and whenever the number does not grow."""
        begins = self._step is None or step <= self._step
        super().set_state(step, num_inference_steps, timestep)
        self._remove_hook()
        self._model_input, self._rows, self._sliced = None, None, False
        if begins:
            self._begin_run()

    def _begin_run(self) -> None:
        self._denoiser, self._trace, self._rows_per_step, self._has_guided = None, [], [], False
        for stage in self.stages:
            stage._reset()

    def prepare_inputs(self, data: Any) -> Any:
        """Return the inputs of the predictions that this step needs: conditional, and perhaps unconditional."""
        names = self._input_predictions[: self._decide_branches()]
        return [self._prepare_batch(data, index, name) for index, name in enumerate(names)]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> Any:
        """As [`prepare_inputs`], from a block state."""
        names = self._input_predictions[: self._decide_branches()]
        return [
            self._prepare_batch_from_block_state(input_fields, data, index, name) for index, name in enumerate(names)
        ]

    def _decide_branches(self) -> int:
        wanted = self._is_cfg_enabled() and all(
            stage._wants_uncond(self._step, self._num_inference_steps) for stage in self.stages
        )
        guided = next((mask for mask in (stage._guided() for stage in self.stages) if mask is not None), None)
        self._any_guided = True
        if guided is not None and self._is_cfg_enabled():
            # The one transfer from the device per step.
            rows = guided.nonzero().flatten()
            self._any_guided = len(rows) > 0
            if wanted and len(rows) < len(guided):
                self._rows = rows
            wanted = wanted and self._any_guided
        self._branches = 2 if wanted else 1
        return self._branches

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        """Before an evaluation: watch what the model is given; leave out rows that need no unconditional one."""
        super().prepare_models(denoiser)
        self._note_denoiser(denoiser)
        partial = self._rows is not None
        # Caches between blocks hold the rows of the step before.
        slices = self._count_prepared == 2 and partial and not getattr(denoiser, "is_cache_enabled", False)
        needed = partial or any(stage._needs_input for stage in self.stages)
        watches = self._count_prepared == 1 and needed and self._is_cfg_enabled()
        if slices or watches:
            self._remove_hook()
            handle = self._slice_rows if slices else self._watch
            self._hook = denoiser.register_forward_pre_hook(handle, with_kwargs=True)

    def _note_denoiser(self, denoiser: torch.nn.Module) -> None:
        if self._denoiser is not None and self._denoiser is not denoiser:
            for stage in self.stages:
                stage._forget_updates()
        self._denoiser = denoiser

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        """After an evaluation."""
        self._remove_hook()

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _watch(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._remove_hook()  # at once: an error in the model leaves nothing on it
        self._model_input = noisy_input(args, kwargs)

    def _slice_rows(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        self._remove_hook()
        assert self._model_input is not None and self._rows is not None
        batch = len(self._model_input)
        self._sliced = True
        return select_rows(args, self._rows, batch), select_rows(kwargs, self._rows, batch)

    def __call__(self, data: Any) -> Any:
        """Return the guided prediction of a step."""
        if len(data) != max(self._branches, 1):
            raise ValueError(f"expected the {self._branches} inputs that prepare_inputs returned, got {len(data)}.")
        if not all(hasattr(entry, "noise_pred") for entry in data):
            raise ValueError("every input needs its prediction as `noise_pred`.")
        return self.forward(**{getattr(entry, self._identifier_key): entry.noise_pred for entry in data})

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> GuiderOutput:
        """Return the guided prediction, in the dtype of the model.

        Args:
            pred_cond (`torch.Tensor` of shape `(batch, ...)`): conditional output.
            pred_uncond (`torch.Tensor`, *optional*): unconditional output, of the rows that were evaluated.
        """
        if not self._is_cfg_enabled():
            self._pass_over(pred_cond)
            return super().forward(pred_cond, pred_uncond)
        step = self._make_step(pred_cond, pred_uncond)
        update = self._update_of(step)
        # Samples that are not guided keep their prediction to the bit.
        mask = step.guided.reshape(-1, *[1] * (pred_cond.dim() - 1))
        if update is not None:
            # c + (w - 1) update: with u = c - update the stock line, without its rounding in the model's dtype.
            weight = self.guidance_scale - (0.0 if self.use_original_formulation else 1.0)
            guided = pred_cond.to(update.dtype) + weight * update
            pred = torch.where(mask, guided.to(pred_cond.dtype), pred_cond)
        elif step.uncond is not None:
            # To the bit what ClassifierFreeGuidance computes.
            base = pred_cond if self.use_original_formulation else step.uncond
            pred = base + self.guidance_scale * (pred_cond - step.uncond)
            pred = torch.where(mask, pred, pred_cond)
        else:
            pred = pred_cond
        if self.guidance_rescale > 0.0:
            pred = rescale_noise_cfg(pred, pred_cond, self.guidance_rescale)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=step.uncond)

    def _update_of(self, step: GuidanceStep) -> torch.Tensor | None:
        """Return what w - 1 multiplies, in float32; `None` is the plain difference, if anything is guided at all."""
        self._has_guided = True
        for stage in self.stages:
            stage._observe(step)
        update: torch.Tensor | None = None
        if step.uncond is not None or self._any_guided:
            for stage in self.stages:
                update = stage._shape(update, step)
        unknown = torch.full((len(step.cond),), float("nan"), device=step.cond.device)
        self._trace.append(unknown if step.similarity is None else step.similarity)
        self._rows_per_step.append(len(step.cond) + step.uncond_rows)
        return update

    def _pass_over(self, cond: torch.Tensor) -> None:
        """Take note of a step that is not guided: before `start`, after `stop`, at scale 1."""
        self._trace.append(torch.full((len(cond),), float("nan"), device=cond.device))
        self._rows_per_step.append(len(cond))

    @property
    def report(self) -> GuidanceReport:
        """The last run, or the one that is going on.

        Raises:
            ValueError: if there was none.
        """
        if not self._trace:
            raise ValueError(
                "this guider has not seen a run yet: call the pipeline first. If you did, the log says why nothing "
                "was guided."
            )
        batch = len(self._trace[0])
        found = next((steps for steps in (stage._stop_steps for stage in self.stages) if steps is not None), None)
        stops = [-1] * batch if found is None else found.tolist()
        # What is found at the last step ends nothing.
        last = self._num_inference_steps or len(self._trace)
        return GuidanceReport(
            similarity=torch.stack(self._trace).cpu(), stop_steps=tuple(n if 0 <= n < last else None for n in stops),
            rows=tuple(self._rows_per_step), batch=batch,
            predictions=1 + self._unconditional if self._has_guided else 1,
        )  # fmt: skip

    def _make_step(
        self, cond: torch.Tensor, uncond: torch.Tensor | None, uncond_rows: int | None = None
    ) -> GuidanceStep:
        guided = next((mask for mask in (stage._guided() for stage in self.stages) if mask is not None), None)
        if guided is None:
            guided = torch.ones(len(cond), dtype=torch.bool, device=cond.device)
        if len(guided) != len(cond):
            raise ValueError(f"the batch changed in mid-run, from {len(guided)} samples to {len(cond)}.")
        if uncond_rows is None:
            uncond_rows = 0 if uncond is None else len(uncond)
        if self._sliced and uncond is not None:
            evaluated, uncond = uncond, cond.clone()
            uncond[self._rows] = evaluated
        scheduler = getattr(self._source, "scheduler", self._source)
        if any(stage._needs_input for stage in self.stages):
            if scheduler is None:
                raise ValueError(
                    f"{type(self).__name__} works on x0, for which it needs the noise level: call guider.bind(pipe) "
                    "once, or choose space='model'."
                )
            if self._model_input is None:
                raise ValueError(
                    f"{type(self).__name__} works on x0 and did not see the model's input: the pipeline does not call "
                    "guider.prepare_models(denoiser). Use space='model'."
                )
        return GuidanceStep(
            number=self._step or 0, num_inference_steps=self._num_inference_steps or 1,
            guidance_scale=self.guidance_scale, cond=cond, uncond=uncond, guided=guided,
            model_input=self._model_input, scheduler=scheduler, denoiser=self._denoiser, timestep=self._timestep,
            uncond_rows=uncond_rows,
        )  # fmt: skip


def guider_entry(guider: UpdateGuidance) -> dict[str, Any]:
    """Return class and options of a guider as what JSON can hold.

    Example:
        >>> from hfnoise.pipelines import AdaptiveGuidance
        >>> from hfnoise.pipelines.guider_base import guider_entry
        >>> guider_entry(AdaptiveGuidance(threshold=0.99))["threshold"]
        0.99
    """
    entries = {name: value for name, value in guider.config.items() if not name.startswith("_")}
    return {"_class_name": type(guider).__name__, **entries}
