"""The start of a run as a slot: unit noise in, a better start out, and what that cost."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hfnoise.pipelines.given_latents import check_given_latents
from hfnoise.pipelines.start_context import StartContext, copied_generators, parameter_names

SPACES = ("unit", "scheduler")
# Arguments of `prepare_latents` that say from where in the run it starts: there is an image beneath the noise.
STARTS_FROM_DATA = {"timestep", "timesteps", "latent_timestep"}


@dataclass(frozen=True)
class StartState:
    """What a run starts from.

    Args:
        latents (`torch.Tensor`): of the shape of the noise.
        space (`str`, defaults to `"unit"`): `"unit"`: noise of unit variance, which can be refined again; or
            `"scheduler"`: already scaled as the scheduler's first step wants it.
        evaluations (`int`, defaults to `0`): of a network, per sample, that it cost.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.initial_noise import StartState
        >>> StartState(torch.zeros(1, 4, 8, 8)).space
        'unit'
    """

    latents: torch.Tensor
    space: str = "unit"
    evaluations: int = 0

    def __post_init__(self) -> None:
        if self.space not in SPACES:
            raise ValueError(f"space must be one of {SPACES}, got {self.space!r}.")


class InitialNoise(ABC):
    """Base of what goes into the slot `initial_noise` of a guided pipeline.

    `space` says what `refine` returns: `"unit"` noise, which the next member of a chain refines again, or a state of
    the `"scheduler"`, after which nothing comes. A member that changes nothing returns the very tensor that it was
    given, and the run is the stock one to the bit.

    Members of hfnoise are saved with their pipeline: those in `hfnoise.pipelines.initial_noise_files.INITIAL_NOISES`,
    by public name. `to_config` returns their options. One with weights has a `subfolder` of the repository for itself,
    in which `save_pretrained(folder, ...)` writes a `config.json`, and the class method
    `from_pretrained(repository, subfolder=..., ...)`; both take the options of the pipeline that they name (`variant`,
    `dtype`, ...), or any. A member of your own is not saved, which saving says; nothing but the table is ever loaded.

    Example:
        >>> from hfnoise.pipelines import InitialNoise, StartState
        >>> class Mirrored(InitialNoise):
        ...     def refine(self, unit_noise, context):
        ...         return StartState(unit_noise.flip(-1))
        >>> Mirrored().space
        'unit'
    """

    space: ClassVar[str] = "unit"
    subfolder: ClassVar[str | None] = None

    @abstractmethod
    def refine(self, unit_noise: torch.Tensor, context: StartContext) -> StartState:
        """Return what to start from.

        Args:
            unit_noise (`torch.Tensor`): the pipeline's own, of unit variance; the user's `latents` where given.
            context ([`StartContext`]): prompts, their states, generators, timesteps, the pipeline.
        """

    def to_config(self) -> dict[str, Any] | None:
        """Return the options, as JSON has them; `None` if it cannot be saved."""
        return None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> InitialNoise:
        """Return the member of the options that `to_config` returned.

        Raises:
            ValueError: if an option is unknown or missing.
        """
        known = inspect.signature(cls).parameters
        if unknown := sorted(set(config) - set(known)):
            raise ValueError(f"{cls.__name__} has no option {', '.join(unknown)}; it has {', '.join(known)}.")
        missing = [name for name, option in known.items() if option.default is option.empty and name not in config]
        if missing:
            raise ValueError(f"{cls.__name__} needs the option {', '.join(missing)}.")
        return cls(**config)

    def check_pipeline(self, pipeline_class: type) -> None:  # noqa: B027
        """Raise ValueError if it cannot serve in a pipeline class; told when it is put into the slot."""

    def check_parts(self, pipe: Any) -> None:  # noqa: B027
        """Raise ValueError if it does not fit the networks of a pipeline; told when it is put into its slot."""

    def condition(self, context: StartContext) -> tuple[Any, ...]:
        """Return what takes the place of what `encode_prompt` returned, `context.encoded`; by default the same.

        Args:
            context ([`StartContext`]): of the call, as far as it is known before there are latents.
        """
        assert context.encoded is not None
        return context.encoded

    def latents(self, pipe: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the refined noise of a call, for `latents=` of the same call of this pipeline or another one.

        The generator is left as the call would leave it when it has drawn its noise.

        Args:
            pipe: of diffusers; what it has in the slot `initial_noise` is left out.
            args, kwargs: of its call.

        Raises:
            ValueError: if it makes a state of the scheduler, which `latents=` does not take.
        """
        from hfnoise.pipelines.call_latents import call_latents

        return call_latents(pipe, self, args, kwargs)


def check_initial_noise(pipeline: Any, initial_noise: Any) -> InitialNoise | None:
    """Return what goes into the slot: a chain of what is given as a list.

    Args:
        pipeline: of diffusers, or its class where it is not loaded yet: then its networks are not looked at.
        initial_noise ([`InitialNoise`], or a list of such): what was given; `None` and `[]` are none.

    Raises:
        TypeError: if it is no [`InitialNoise`].
        ValueError: if the pipeline prepares no latents, or starts from an image, or its networks are not those that
            the initial noise was made for. Inpainting is not refused here: at `strength=1` it starts from noise.

    Example:
        >>> from diffusers import StableDiffusionImg2ImgPipeline
        >>> from hfnoise.pipelines import BrightnessOffset
        >>> from hfnoise.pipelines.initial_noise import check_initial_noise
        >>> check_initial_noise(StableDiffusionImg2ImgPipeline, BrightnessOffset(0.5))
        Traceback (most recent call last):
        ...
        ValueError: StableDiffusionImg2ImgPipeline starts from an image with noise on it...
    """
    initial_noise = as_initial_noise(initial_noise)
    if initial_noise is None:
        return None
    pipeline_class = pipeline if isinstance(pipeline, type) else type(pipeline)
    name = pipeline_class.__name__.removeprefix("Guided")
    known = parameter_names(pipeline_class, "prepare_latents")
    if not known:
        raise ValueError(f"{name} prepares no latents: there is no start to refine.")
    if known & STARTS_FROM_DATA and "is_strength_max" not in known:
        raise ValueError(
            f"{name} starts from an image with noise on it, not from noise: there is nothing to repair. Use it "
            "without (initial_noise=[]); text-to-image and inpainting at strength=1 take it."
        )
    initial_noise.check_pipeline(pipeline_class)
    if pipeline is not pipeline_class:
        initial_noise.check_parts(pipeline)
    return initial_noise


def as_initial_noise(initial_noise: Any) -> InitialNoise | None:
    """Return what is given, a list as a chain; `None` for an empty one.

    Raises:
        TypeError: if it is no [`InitialNoise`].

    Example:
        >>> from hfnoise.pipelines import BrightnessOffset
        >>> from hfnoise.pipelines.initial_noise import as_initial_noise
        >>> as_initial_noise([BrightnessOffset(0.5, direction=[1.0])])
        InitialNoiseChain([BrightnessOffset(0.5, direction=(1.0,))])
    """
    if isinstance(initial_noise, (list, tuple)):
        from hfnoise.pipelines.noise_chain import InitialNoiseChain

        return InitialNoiseChain(initial_noise) if initial_noise else None
    if not (initial_noise is None or isinstance(initial_noise, InitialNoise)):
        raise TypeError(
            f"initial_noise must be an InitialNoise of hfnoise or a list of such, got {type(initial_noise).__name__}. "
            "A tensor is given to the call, as latents=."
        )
    return initial_noise


@contextmanager
def refined_start(
    pipe: Any, initial_noise: InitialNoise, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Within the block `pipe.prepare_latents` returns what `initial_noise` makes of the pipeline's own noise.

    Args:
        pipe: of diffusers.
        initial_noise ([`InitialNoise`]): of the slot.
        args, kwargs: of the call that the block makes.
    """
    arguments = _arguments(pipe, "__call__", args, kwargs or {})
    own = {name: pipe.__dict__[name] for name in ("encode_prompt", "prepare_latents") if name in pipe.__dict__}
    prepare: Any = pipe.prepare_latents
    encode: Any = getattr(pipe, "encode_prompt", None)
    encoded: list[tuple[Any, ...]] = []
    generators = copied_generators(arguments.get("generator"))

    def remembered(*args: Any, **kwargs: Any) -> Any:
        result = encode(*args, **kwargs)
        if encoded:
            # In some pipelines the first encoding is the prompt's, and later ones are of other things.
            return result
        parts = result if isinstance(result, tuple) else (result,)
        states = next((part for part in parts if isinstance(part, torch.Tensor)), torch.empty(0))
        context = StartContext(pipe, arguments, len(states), states.device, states.dtype, parts, encode, generators)
        changed = initial_noise.condition(context)
        encoded.append(changed)
        if changed is parts:
            return result
        return changed if isinstance(result, tuple) else changed[0]

    def refined(*args: Any, **kwargs: Any) -> Any:
        given = _arguments(pipe, "prepare_latents", args, kwargs)
        name = type(pipe).__name__.removeprefix("Guided")
        check_given_latents(name, arguments.get("latents"), prepare, given)
        prepared = prepare(*args, **kwargs)
        latents = prepared[0] if isinstance(prepared, tuple) else prepared
        if not isinstance(latents, torch.Tensor):
            raise TypeError(f"{name} prepares {type(latents).__name__}, and no tensor of latents.")
        check_starts_from_noise(pipe, given)
        states = encoded[0] if encoded else None
        dtype = _own_dtype(arguments, given, latents)
        context = StartContext(pipe, arguments, len(latents), latents.device, dtype, states, encode, generators, given)
        return replaced_latents(prepared, latents, initial_noise, context)

    pipe.__dict__["prepare_latents"] = refined
    if encode is not None:
        pipe.__dict__["encode_prompt"] = remembered
    try:
        yield
    finally:
        # Somebody else may have put one there: the guider's run does.
        for name in ("encode_prompt", "prepare_latents"):
            pipe.__dict__.pop(name, None)
        pipe.__dict__.update(own)


def replaced_latents(prepared: Any, latents: torch.Tensor, initial_noise: InitialNoise, context: StartContext) -> Any:
    """Return what a pipeline prepared, refined, in its dtype; the very same object if nothing is changed.

    Args:
        prepared (`torch.Tensor` or `tuple`): latents in the scheduler's scale, alone or first of a tuple, in which the
            unit noise that they were made of may come again.
        latents (`torch.Tensor`): those of `prepared`.
        initial_noise ([`InitialNoise`]): of the slot.
        context ([`StartContext`]): of the call.

    Raises:
        ValueError: if the start has another shape, or the latents are in another scale than the scheduler's.
    """
    sigma = getattr(context.scheduler, "init_noise_sigma", 1.0)
    # float32: half of a large sigma's digits would be lost on the way there and back.
    own = latents.float() / sigma
    unit = own.clone()
    state = refined_state(initial_noise, unit, context)
    # A member may have written into what it was given.
    if state.latents is unit and torch.equal(unit, own) and latents.dtype == context.dtype:
        return prepared
    if context.arguments.get("latents") is None:
        _check_unit(own, context)
    start = state.latents if state.space == "scheduler" else state.latents * sigma
    start = cast_start(initial_noise, start, latents.shape, context.dtype)
    if not isinstance(prepared, tuple):
        return start
    if state.space == "unit":
        # Inpainting keeps its noise, and puts it on the known part of the image at every step.
        noise = state.latents.to(context.dtype)
        rest = [noise if _is_noise(part, latents, sigma) else part for part in prepared[1:]]
        return (start, *rest)
    return (start, *prepared[1:])


def cast_start(
    initial_noise: InitialNoise, start: torch.Tensor, shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    """Return a start in the dtype of the pipeline.

    Raises:
        ValueError: if it is of another shape than the noise, or there is NaN or infinity in it.
    """
    name = type(initial_noise).__name__
    if start.shape != shape:
        raise ValueError(f"{name} made a start of shape {tuple(start.shape)} of noise of shape {tuple(shape)}.")
    start = start.to(dtype)
    if not bool(torch.isfinite(start).all()):
        raise ValueError(f"{name} made a start with NaN or infinity in it, in {dtype}: the image would be black.")
    return start


def refined_state(member: InitialNoise, unit_noise: torch.Tensor, context: StartContext) -> StartState:
    """Return what a member makes of the noise.

    Raises:
        TypeError: if it is no [`StartState`].
    """
    state = member.refine(unit_noise, context)
    if not isinstance(state, StartState):
        raise TypeError(
            f"refine of {type(member).__name__} returned {type(state).__name__}; it returns "
            "hfnoise.pipelines.StartState(latents)."
        )
    return state


def _own_dtype(arguments: Mapping[str, Any], given: Mapping[str, Any], latents: torch.Tensor) -> torch.dtype:
    # What the pipeline would draw in: many hand on the user's latents as they are, on which the denoiser then fails.
    asked = given.get("dtype")
    return asked if arguments.get("latents") is not None and isinstance(asked, torch.dtype) else latents.dtype


def _check_unit(unit: torch.Tensor, context: StartContext) -> None:
    # Another convention is off by far more (sigma_max, 80), a user's own scaling of the noise by less.
    spread = float(unit.std()) if unit.numel() >= 64 else 1.0
    if not 0.25 <= spread <= 4.0:
        raise ValueError(
            f"{context.name} prepares noise of standard deviation {spread:.3g} times the init_noise_sigma of its "
            "scheduler. It scales it by something else, so that a refined start would be in the wrong scale."
        )


def _is_noise(part: Any, latents: torch.Tensor, sigma: Any) -> bool:
    alike = isinstance(part, torch.Tensor) and part.shape == latents.shape and part.dtype == latents.dtype
    return alike and torch.equal(part * sigma, latents)


def check_starts_from_noise(pipe: Any, given: Mapping[str, Any]) -> None:
    """Raise ValueError if arguments of `prepare_latents` say that there is an image beneath the noise.

    Example:
        >>> from hfnoise.pipelines.initial_noise import check_starts_from_noise
        >>> check_starts_from_noise(None, {"is_strength_max": True})
    """
    if given.get("is_strength_max") is False or given.get("add_noise") is False:
        raise ValueError(
            f"{type(pipe).__name__.removeprefix('Guided')} starts from an image with noise on it where strength is "
            "below 1, and from given latents where denoising_start is set. Use strength=1.0, or no initial_noise."
        )


def _arguments(pipe: Any, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a method's call by name, with defaults."""
    kind: Any = type(pipe)
    signature = _signature(kind, method)
    known = {name: value for name, value in kwargs.items() if name in signature.parameters}
    bound = signature.bind_partial(pipe, *args, **known)
    bound.apply_defaults()
    return {**bound.arguments, **kwargs}


# Bounded: diffusers makes the class of a custom pipeline anew whenever it loads one.
@functools.lru_cache(maxsize=32)
def _signature(pipeline_class: type, method: str) -> inspect.Signature:
    methods = (base.__dict__[method] for base in pipeline_class.__mro__ if method in base.__dict__)
    signatures = [inspect.signature(function) for function in methods]
    # A subclass may hand on whatever it is given as *args: the names are those of its base.
    named = (signature for signature in signatures if not _has(signature, inspect.Parameter.VAR_POSITIONAL))
    return next(named, signatures[0])


def _has(signature: inspect.Signature, kind: Any) -> bool:
    return any(parameter.kind is kind for parameter in signature.parameters.values())
