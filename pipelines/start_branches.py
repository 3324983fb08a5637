"""What a model predicts at the start of a run, with and without the prompt, for any noise."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModularPipeline
from torch import Tensor

from hfnoise.guidance import DenoisingPoint
from hfnoise.latents import start_form, start_prediction
from hfnoise.pipelines.first_step import FirstStep
from hfnoise.pipelines.guider_checks import call_parameters
from hfnoise.pipelines.initial_noise import InitialNoise, StartState, refined_start
from hfnoise.pipelines.interceptor import outside
from hfnoise.pipelines.model_inputs import predicted_part
from hfnoise.pipelines.pipeline_layouts import PipelineLayout, layout_of
from hfnoise.pipelines.random_state import kept_random_state
from hfnoise.pipelines.run_schedule import RunSchedule
from hfnoise.pipelines.scheduler_points import denoising_point
from hfnoise.pipelines.side_run import SideRunStopped, side_pipeline
from hfnoise.pipelines.start_context import StartContext, copied_generators

# A scale at which a pipeline makes both predictions, where the call has none above 1; they do not depend on it.
_SCALE_WITH_BOTH = 2.0


@dataclass(frozen=True)
class Branches:
    """Predictions of one noise, in the form of [`hfnoise.latents.start_prediction`], in float32.

    Args:
        cond (`torch.Tensor` of the shape of the noise): for the prompt.
        uncond (`torch.Tensor` of that shape, *optional*): for the negative prompt, or nothing; `None` if it was not
            asked for.
    """

    cond: Tensor
    uncond: Tensor | None = None

    @property
    def difference(self) -> Tensor:
        """The direction of guidance, cond - uncond."""
        assert self.uncond is not None
        return self.cond - self.uncond

    def guided(self, scale: float) -> Tensor:
        """Return uncond + scale (cond - uncond)."""
        return self.cond if self.uncond is None else self.uncond + scale * self.difference


class StartBranches:
    """Evaluates the denoiser of a running call at its first step, as often as need be.

    The same call is begun again on the side, with other noise and guidance on, and stopped at its first step. So every
    condition is the pipeline's own (pooled states, sizes, ControlNets, image prompts), and no pipeline's code is
    copied. Text is encoded once. Scheduler, generators, progress bar and callbacks of the call are not touched.

    Args:
        context ([`StartContext`]): of the call.
        weak_model (`torch.nn.Module`, *optional*): a worse model of the kind of the denoiser, whose prediction for the
            same prompt takes the place of the one without prompt, as in AutoGuidance (arXiv 2406.02507): for models
            whose guidance is distilled too.

    Raises:
        ValueError: if the pipeline makes no prediction without prompt.

    Example:
        >>> from hfnoise.pipelines import InitialNoise, StartState, guide
        >>> from hfnoise.pipelines.start_branches import StartBranches
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> class Look(InitialNoise):
        ...     def refine(self, unit_noise, context):
        ...         branches = StartBranches(context)
        ...         print(tuple(branches.predict(unit_noise).difference.shape), branches.evaluations)
        ...         return StartState(unit_noise)
        >>> pipe = new_digits_pipeline(width=8)
        >>> with guide(pipe, initial_noise=Look()):
        ...     _ = pipe("the digit seven", num_inference_steps=4, guidance_scale=1.0)
        (1, 4, 8, 8) 2
    """

    def __init__(self, context: StartContext, weak_model: torch.nn.Module | None = None) -> None:
        check_branches(type(context.pipe), "a refined start", uncond=weak_model is None)
        layout = layout_of(type(context.pipe))
        assert layout is not None  # check_branches
        self.context, self.layout, self.weak_model = context, layout, weak_model
        # Of the first step, known after the first prediction: point, and the run's own scheduler set for it.
        self.point: DenoisingPoint | None = None
        self.scheduler: Any = None
        # Per sample: a prediction with or without prompt is one.
        self.evaluations = 0
        self._encoded: list[Any] = []

    def predict(self, noise: Tensor, uncond: bool = True) -> Branches:
        """Return the predictions of a noise.

        Args:
            noise (`torch.Tensor` of the shape of the latents): of unit variance.
            uncond (`bool`, defaults to `True`): whether the one without prompt is needed.

        Raises:
            ValueError: if the noise holds NaN, the model has no branch without prompt after all, or its prediction is
                in another space than its noise.
        """
        if not bool(torch.isfinite(noise).all()):
            raise ValueError(
                f"the noise to be refined of {self.context.name} holds NaN or infinity: the latents that were given "
                "do, or the model predicts such, as some do in float16."
            )
        # Another guided run of this call may be around the denoiser: these evaluations are none of its steps.
        run = outside(self._run)
        step: FirstStep = run(noise, uncond and self.weak_model is None)
        cond, other = self._prediction(step, step.cond, noise), self._prediction(step, step.uncond, noise)
        if uncond and self.weak_model is not None:
            step = run(noise, False, self.weak_model)
            other = self._prediction(step, step.cond, noise)
        assert cond is not None
        return Branches(cond, other)

    def _prediction(self, step: FirstStep, found: Tensor | None, noise: Tensor) -> Tensor | None:
        if found is None:
            return None
        return start_prediction(self._point_of(step), noise, self._denoised_part(step.seen, found, noise))

    def _run(self, noise: Tensor, uncond: bool, denoiser: torch.nn.Module | None = None) -> FirstStep:
        context, layout = self.context, self.layout
        side = side_pipeline(context.pipe)
        if denoiser is not None:
            side.__dict__.update(
                {name: denoiser for name in layout.denoisers if getattr(side, name, None) is not None}
            )
        arguments = call_arguments(context)
        scale = arguments.get(layout.scale_name)
        unguided = scale is None or (isinstance(scale, (int, float)) and scale + layout.scale_offset <= 1)
        unguided = unguided and self.weak_model is None
        if unguided:
            arguments[layout.scale_name] = _SCALE_WITH_BOTH - layout.scale_offset
        step = FirstStep(side, layout, context.batch, uncond)
        with ExitStack() as stack:
            stack.enter_context(kept_random_state(context.device))
            stack.enter_context(step.installed())
            self._encode_once(side)
            stack.enter_context(refined_start(side, _Given(noise), (), arguments))
            try:
                side(**arguments)
            except SideRunStopped:
                if _finished(step, uncond):
                    self.evaluations += step.evaluations
                    return step
            except (TypeError, ValueError) as error:
                if not unguided:
                    raise
                raise ValueError(
                    f"the prediction without prompt is needed, and this call of {context.name} cannot be made with "
                    f"guidance ({error}). Give it what a guided call takes, such as embeddings of negative prompts, "
                    "or use an initial noise that needs no predictions."
                ) from error
            raise ValueError(_no_branch(context.name, layout))

    def _encode_once(self, side: Any) -> None:
        encode: Any = getattr(side, "encode_prompt", None)
        if encode is None:
            return
        number = iter(range(2**31))

        def remembered(*args: Any, **kwargs: Any) -> Any:
            index = next(number)
            if index == len(self._encoded):
                self._encoded.append(self._as_in_the_call(encode(*args, **kwargs), index))
            return self._encoded[index]

        side.__dict__["encode_prompt"] = remembered

    def _as_in_the_call(self, encoded: Any, index: int) -> Any:
        """Return text states with those of the prompt as the call has them: a member may have put noise on them."""
        states = self.context.prompt_embeds
        first = encoded[0] if isinstance(encoded, tuple) else encoded
        if index or states is None or not isinstance(first, Tensor) or first.shape != states.shape:
            return encoded
        return (states, *encoded[1:]) if isinstance(encoded, tuple) else states

    def _point_of(self, step: FirstStep) -> DenoisingPoint:
        if self.point is None:
            scheduler = step.side.scheduler
            try:
                run = RunSchedule(scheduler, getattr(step.side, "_num_timesteps", None), step.timestep)
                point = denoising_point(scheduler, run.timestep(0))
            except ValueError as error:
                raise ValueError(
                    f"the start of {self.context.name} cannot be refined by predictions of its model: it is not known "
                    "what they are of. Use an initial noise that needs none, such as a learnt net or a search."
                ) from error
            start_form(point)  # refuses
            self.point, self.scheduler = point, scheduler
        return self.point

    def _denoised_part(self, seen: Tensor, prediction: Tensor, noise: Tensor) -> Tensor:
        found = prediction[predicted_part(seen, prediction, noise.shape)]
        if found.shape != noise.shape:
            raise ValueError(
                f"{self.context.name} has latents of shape {tuple(noise.shape)} and its model predicts "
                f"{tuple(prediction.shape)}: what it says of the noise is not known."
            )
        # Some pipelines turn the sign of what they predicted when they are done with it.
        return -found if self.layout.negated else found


class _Given(InitialNoise):
    """The noise that a side run starts from."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def refine(self, unit_noise: Tensor, context: StartContext) -> StartState:
        return StartState(self.noise)


def check_branches(pipeline_class: type, name: str, uncond: bool = True) -> None:
    """Raise ValueError if a pipeline class makes no prediction without prompt, or says too little of its model.

    Args:
        pipeline_class (`type`): of diffusers, guided or not.
        name (`str`): what needs it, for the message.
        uncond (`bool`, defaults to `True`): whether the prediction without prompt is needed.

    Example:
        >>> from diffusers import LatentConsistencyModelPipeline
        >>> from hfnoise.pipelines.start_branches import check_branches
        >>> check_branches(LatentConsistencyModelPipeline, "ReDenoise")
        Traceback (most recent call last):
        ...
        ValueError: ReDenoise needs predictions with and without the prompt, and LatentConsistencyModelPipeline...
    """
    layout = layout_of(pipeline_class)
    pipeline = pipeline_class.__name__.removeprefix("Guided")
    if issubclass(pipeline_class, ModularPipeline):
        raise ValueError(
            f"{name} needs predictions of the model at the start, and {pipeline} is modular, where they are not made. "
            f"Take {name}(...).latents(pipe, prompt, ...) of a classic pipeline of the same parts, and give them as "
            "latents=."
        )
    if layout is None:
        raise ValueError(
            f"it is not known how {pipeline} calls its denoiser, and {name} needs its predictions. Say so: from "
            "hfnoise.pipelines.pipeline_layouts import LAYOUTS, PipelineLayout; "
            f"LAYOUTS[{pipeline!r}] = PipelineLayout('batched')."
        )
    kinds = ("batched", "two_calls") if uncond else ("batched", "two_calls", "unguided")
    if layout.kind in kinds and layout.x0_from_scheduler:
        return
    reason = {
        "unguided": "has none without: its guidance is distilled, or it has none",
        "three_branches": "has three, of text and image",
        "native": "leaves them to a guider of its own",
        "refused": f"cannot be followed: {layout.reason}",
    }.get(layout.kind, "preconditions them, or its tokens stand at several noise levels")
    raise ValueError(
        f"{name} needs predictions with and without the prompt, and {pipeline} {reason}. Use an initial noise that "
        "needs none, such as SeedVariation, a learnt net or a search."
    )


def _finished(step: FirstStep, uncond: bool) -> bool:
    return step.cond is not None and (step.uncond is not None or not uncond)


def _no_branch(name: str, layout: PipelineLayout) -> str:
    needs = "negative_prompt" if layout.scale_name == "true_cfg_scale" else ""
    remedy = f"Give the call a {needs}=..., or use" if needs else "Use"
    return (
        f"this call of {name} makes no prediction without the prompt: the guidance of its model is distilled, or it "
        f"was given no negative prompt. {remedy} an initial noise that needs none, such as SeedVariation, a learnt "
        "net or a search."
    )


def call_arguments(context: StartContext) -> dict[str, Any]:
    """Return the arguments of the call, by name, with generators as they were when it began.

    Example:
        >>> import torch
        >>> from diffusers import StableDiffusionPipeline
        >>> from hfnoise.pipelines.start_branches import call_arguments
        >>> from hfnoise.pipelines.start_context import StartContext
        >>> pipe = object.__new__(StableDiffusionPipeline)
        >>> call_arguments(StartContext(pipe, {"self": pipe, "prompt": "a"}, 1, torch.device("cpu")))
        {'prompt': 'a'}
    """
    parameters = call_parameters(type(context.pipe))
    variable = {name for name, parameter in parameters.items() if parameter.kind in _VARIABLE}
    arguments = {name: value for name, value in context.arguments.items() if name not in {"self", *variable}}
    if "generator" in arguments:
        arguments["generator"] = copied_generators(context.first_generators)
    return arguments


_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
