"""Whole runs of candidates for the noise of a call, beside the call, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from hfnoise.latents import EvaluationBudget
from hfnoise.pipelines.block_caches import has_block_cache, reset_block_cache
from hfnoise.pipelines.guider_checks import call_parameters
from hfnoise.pipelines.initial_noise import InitialNoise, StartState
from hfnoise.pipelines.interceptor import beside
from hfnoise.pipelines.module_calls import intercepted
from hfnoise.pipelines.pipeline_layouts import layout_of
from hfnoise.pipelines.random_state import kept_random_state
from hfnoise.pipelines.side_run import SideRunStopped, guided_side_pipeline
from hfnoise.pipelines.start_branches import call_arguments
from hfnoise.pipelines.start_context import StartContext, copied_generators

_COUNT = "num_images_per_prompt"
# What the images are made of where a pipeline has no layout.
_DENOISERS = ("unet", "transformer")


class CandidateRuns:
    """Makes the images that a running call would make of other noise.

    The same call is made on the side, with the same guider, the members of the chain that come after, and the random
    numbers that the sampler of the call will draw: a candidate is judged by the image that the call will return.
    Several candidates of a sample run as more images of its prompt. Where a sampler draws numbers, and the samples
    share one generator or none, candidates run one by one: in a batch each would have other numbers than the call.
    So do those of embeddings in the place of prompts, and of several prompts with pictures of their own.

    Evaluations are counted at the model, and stop where the budget ends. Callbacks that are functions of the user are
    left out; those of diffusers change what is drawn, and are not.

    Args:
        context ([`StartContext`]): of the call.
        budget ([`~hfnoise.latents.EvaluationBudget`]): is spent.
        num_inference_steps (`int`, *optional*): of previews; those of the call by default.

    Raises:
        ValueError: if previews are asked for, and the call has no number of steps.

    Example:
        >>> from hfnoise.latents import EvaluationBudget
        >>> from hfnoise.pipelines import InitialNoise, StartState, guide
        >>> from hfnoise.pipelines.candidate_runs import CandidateRuns
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> class Look(InitialNoise):
        ...     def refine(self, unit_noise, context):
        ...         runs = CandidateRuns(context, EvaluationBudget(8))
        ...         print(tuple(runs.images(unit_noise[:, None]).shape), runs.budget.spent)
        ...         return StartState(unit_noise)
        >>> with guide(new_digits_pipeline(width=8), initial_noise=Look()) as pipe:
        ...     _ = pipe("the digit seven", num_inference_steps=4)
        (1, 1, 1, 16, 16) 8
    """

    def __init__(
        self, context: StartContext, budget: EvaluationBudget, num_inference_steps: int | None = None
    ) -> None:
        self.context, self.budget = context, budget
        self._parameters = call_parameters(type(context.pipe))
        self._arguments = call_arguments(context)
        self._arguments.update({name: value for name, value in _OF_A_SIDE_RUN.items() if name in self._parameters})
        callback = self._arguments.get("callback_on_step_end")
        if not isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            self._arguments.pop("callback_on_step_end", None)
        self._arguments.pop("callback", None)
        if num_inference_steps is not None:
            self._shorten(num_inference_steps)
        # As the sampler of the call will find them.
        self._generators = copied_generators(context.generator)
        self._state = _random_state(context.device)
        self._draws: bool | None = None
        self._encoded: dict[tuple[int, int], Any] = {}

    def together(self, asked: int) -> int:
        """Return how many candidates of each sample may run in one batch; known when one has run.

        Args:
            asked (`int`): at most so many.
        """
        several = self.context.batch > (self._arguments.get(_COUNT) or 1)
        # Given embeddings are repeated in part (Flux), masks of several prompts in another order than the prompts.
        if _COUNT not in self._parameters or self._has("embeds") or (several and self._has("image")):
            return 1
        alike = isinstance(self._generators, list) or (self._generators is not None and self.context.batch == 1)
        return asked if alike or self._draws is False else 1

    def images(self, noise: Tensor) -> Tensor | None:
        """Return the images of candidates; `None` if the budget ended before.

        Args:
            noise (`torch.Tensor` of shape `(batch, candidates, ...)`): of unit variance.

        Returns:
            `torch.Tensor` of shape `(batch, candidates, channels, height, width)`, in [0, 1], float32.

        Raises:
            ValueError: if the pipeline makes no images, such as one for videos.
        """
        made: Tensor | None = beside(self._images)(noise)
        return made

    def _images(self, noise: Tensor) -> Tensor | None:
        batch, count = noise.shape[:2]
        rows = noise.flatten(0, 1)
        arguments, generators = self._arguments_of(count)
        if self.context.arguments.get("latents") is not None:
            # They may be of another size than the call would draw.
            arguments["latents"] = rows.to(self.context.dtype)
        member = _Candidate(rows, self.context.following, self._begin_sampling(generators))
        side = guided_side_pipeline(self.context.pipe, member)
        with ExitStack() as stack:
            stack.enter_context(kept_random_state(self.context.device))
            self._count(stack, side, member)
            self._encode_once(side, count)
            try:
                output = side(**arguments)
            except SideRunStopped:
                return None
            if self._draws is None:
                self._draws = not self._is_untouched(generators)
        images = getattr(output, "images", None)
        if not isinstance(images, Tensor) or images.dim() != 4 or len(images) != batch * count:
            found = f"a tensor of shape {tuple(images.shape)}" if isinstance(images, Tensor) else "none"
            raise ValueError(
                f"a search compares images, (batch, channels, height, width), and {self.context.name} made {found}. "
                "Videos, and pipelines without output_type='pt', cannot be searched."
            )
        return images.detach().float().unflatten(0, (batch, count))

    # Arguments. -----------------------------------------------------------------------------------------------------

    def _shorten(self, steps: int) -> None:
        given = [name for name in ("timesteps", "sigmas") if self._arguments.get(name) is not None]
        if "num_inference_steps" not in self._parameters or given:
            what = f"the call gives {given[0]}" if given else f"{self.context.name} has no num_inference_steps"
            raise ValueError(f"preview_steps cannot be set, since {what}. Leave preview_steps out.")
        self._arguments["num_inference_steps"] = steps

    def _arguments_of(self, count: int) -> tuple[dict[str, Any], Any]:
        arguments = dict(self._arguments)
        if count > 1:
            arguments[_COUNT] = (arguments.get(_COUNT) or 1) * count
        generators: Any = self._generators
        if isinstance(generators, list):
            generators = [one for one in generators for _ in range(count)]
        elif generators is not None and count > 1 and self.context.batch == 1:
            generators = [generators] * count  # a row of each is what one draws for one sample
        generators = copied_generators(generators)
        if "generator" in arguments:
            arguments["generator"] = generators
        return arguments, generators

    def _has(self, kind: str) -> bool:
        return any(kind in name and name != _COUNT and one is not None for name, one in self._arguments.items())

    def _encode_once(self, side: Any, count: int) -> None:
        encode: Any = getattr(side, "encode_prompt", None)
        if encode is None:
            return
        number = iter(range(2**31))

        def remembered(*args: Any, **kwargs: Any) -> Any:
            key = count, next(number)
            if key not in self._encoded:
                self._encoded[key] = self._as_in_the_call(encode(*args, **kwargs), count, key[1])
            return self._encoded[key]

        side.__dict__["encode_prompt"] = remembered

    def _as_in_the_call(self, encoded: Any, count: int, index: int) -> Any:
        """Return text states with those of the prompt as the call has them: a member may have put noise on them."""
        states = self.context.prompt_embeds
        first = encoded[0] if isinstance(encoded, tuple) else encoded
        if index or states is None or not isinstance(first, Tensor):
            return encoded
        repeated = states.repeat_interleave(count, 0) if len(first) == len(states) * count else states
        if repeated.shape != first.shape:
            return encoded
        return (repeated, *encoded[1:]) if isinstance(encoded, tuple) else repeated

    # Random numbers. ------------------------------------------------------------------------------------------------

    def _begin_sampling(self, generators: Any) -> Callable[[], None]:
        """Return what brings the random numbers of a side run, when it has drawn its noise, to those of the call."""
        copies = _as_list(generators)
        states = [one.get_state() for one in copies]

        def begin() -> None:
            for one, state in zip(copies, states, strict=True):
                one.set_state(state)
            _set_random_state(self.context.device, self._state)

        return begin

    def _is_untouched(self, generators: Any) -> bool:
        state = _random_state(self.context.device)
        if not all(torch.equal(one, other) for one, other in zip(state, self._state, strict=True)):
            return False
        pairs = zip(_as_list(generators), _as_list(self._generators), strict=True)
        return all(torch.equal(one.get_state(), other.get_state()) for one, other in pairs)

    # Costs. ---------------------------------------------------------------------------------------------------------

    def _count(self, stack: ExitStack, side: Any, member: _Candidate) -> None:
        layout = layout_of(type(side))
        names = layout.denoisers if layout is not None and layout.denoisers else _DENOISERS
        modules = [module for name in names if (module := getattr(side, name, None)) is not None]
        if not any(isinstance(module, torch.nn.Module) for module in modules):
            raise ValueError(
                f"the evaluations of {self.context.name} cannot be counted: it has no {' or '.join(names)} that is a "
                "torch module."
            )

        def spend(rows: int) -> None:
            if not self.budget.spend(rows):
                raise SideRunStopped

        def handle(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            spend(_rows(args, kwargs))
            return call(*args, **kwargs)

        for module in modules:
            if has_block_cache(module):
                # What is in them is of another noise.
                stack.callback(reset_block_cache, module)
            stack.enter_context(intercepted(module, handle, nested=True))
        member.spend, member.spent = spend, lambda: self.budget.spent


class _Candidate(InitialNoise):
    """Starts a side run from a candidate, by way of the members of the chain that come after the search."""

    spend: Callable[[int], None]
    spent: Callable[[], int]

    def __init__(self, noise: Tensor, following: tuple[Any, ...], begin: Callable[[], None]) -> None:
        self.noise, self.following, self.begin = noise, following, begin

    def refine(self, unit_noise: Tensor, context: StartContext) -> StartState:
        from hfnoise.pipelines.noise_chain import InitialNoiseChain

        self.begin()
        if not self.following:
            return StartState(self.noise)
        before = self.spent()
        state = InitialNoiseChain(self.following).refine(self.noise, context)
        # Evaluations of the model itself are counted there; One More Step has a network of its own.
        self.spend(max(state.evaluations * len(self.noise) - (self.spent() - before), 0))
        return state


_OF_A_SIDE_RUN = {"latents": None, "output_type": "pt", "return_dict": True}


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    # The first argument of diffusers' denoisers; that of Z-Image is a list.
    return len(args[0] if args else next(kwargs[name] for name in ("sample", "hidden_states", "x") if name in kwargs))


def _as_list(generators: Any) -> list[torch.Generator]:
    return generators if isinstance(generators, list) else [] if generators is None else [generators]


def _random_state(device: torch.device) -> list[Tensor]:
    if device.type == "cpu":
        return [torch.get_rng_state()]
    module = torch.get_device_module(device.type)
    # That of Apple's has one state for all its devices.
    own = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return [torch.get_rng_state(), own]


def _set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "mps":
        torch.mps.set_rng_state(states[1])
    elif device.type != "cpu":
        torch.get_device_module(device.type).set_rng_state(states[1], device)
