"""Where a run of `hfnoise generate` starts: what is asked for, what the repository holds, and what it cost."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from hfnoise.errors import UsageError
from hfnoise.latents_options import INITIAL_NOISE_OPTIONS
from hfnoise.pipelines.brightness_offset import BrightnessOffset
from hfnoise.pipelines.guided import guided_class
from hfnoise.pipelines.initial_noise import InitialNoise, StartState, check_initial_noise
from hfnoise.pipelines.noise_chain import InitialNoiseChain
from hfnoise.pipelines.one_more_step import OneMoreStep
from hfnoise.pipelines.saved_parts import PipelineRepository
from hfnoise.pipelines.start_context import StartContext

if TYPE_CHECKING:
    from hfnoise.pipelines.generate_config import GenerateConfig

NO_NOISE = "none"
SAVED_NOISE = "saved"


def make_initial_noise(
    pipeline_class: type, name: str, config: GenerateConfig, dtype: torch.dtype
) -> CountedStart | None:
    """Return what a run starts from: the members that are asked for and the saved one, as one; `None` without any.

    Args:
        pipeline_class (`type`): of the pipeline, to be refused before it is loaded.
        name (`str`): what `from_pretrained` takes.
        config ([`GenerateConfig`]): its options of `INITIAL_NOISE_OPTIONS`.
        dtype (`torch.dtype`): of networks.

    Raises:
        UsageError: if a member cannot be loaded, or not serve in the pipeline, or `initial_noise` is `"saved"` and
            nothing is, or an option is for a member that is not there.
    """
    found = {key: _MAKERS[key][1](config, dtype) for key in INITIAL_NOISE_OPTIONS if getattr(config, key) is not None}
    if config.initial_noise != NO_NOISE:
        found |= _saved(name, config, dtype, taken=list(found))
    for key, options in INITIAL_NOISE_OPTIONS.items():
        given = {option.name: getattr(config, option.name) for option in options[1:]}
        given = {option: value for option, value in given.items() if value is not None}
        if given and key not in found:
            raise UsageError(
                f"--{next(iter(given))} is of --{key}, which is not given, and {name!r} has none of its own."
            )
    # What makes a state of the scheduler comes after what makes noise.
    members = sorted(found.values(), key=lambda member: member.space != "unit")
    if not members:
        return None
    try:
        noise = members[0] if len(members) == 1 else InitialNoiseChain(members)
        check_initial_noise(guided_class(pipeline_class), noise)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    return CountedStart(noise)


class CountedStart(InitialNoise):
    """An initial noise that remembers what it cost.

    Args:
        noise ([`InitialNoise`]): that does the work.

    Example:
        >>> from hfnoise.pipelines import BrightnessOffset
        >>> from hfnoise.pipelines.generate_noise import CountedStart
        >>> CountedStart(BrightnessOffset(0.5)).evaluations is None
        True
    """

    def __init__(self, noise: InitialNoise) -> None:
        self.noise = noise
        self.evaluations: int | None = None

    @property
    def space(self) -> str:  # type: ignore[override]
        """Of the noise."""
        return self.noise.space

    def check_pipeline(self, pipeline_class: type) -> None:
        """Raise ValueError if the noise cannot serve in a pipeline class."""
        self.noise.check_pipeline(pipeline_class)

    def condition(self, context: StartContext) -> tuple[Any, ...]:
        """Return the text states that the noise wants."""
        return self.noise.condition(context)

    def refine(self, unit_noise: torch.Tensor, context: StartContext) -> StartState:
        """Return what the noise returns; `evaluations` says what it cost per sample."""
        state = self.noise.refine(unit_noise, context)
        self.evaluations = state.evaluations
        return state

    @property
    def names(self) -> str:
        """The members, joined by +."""
        members = self.noise.members if isinstance(self.noise, InitialNoiseChain) else [self.noise]
        return " + ".join(type(member).__name__ for member in members)

    def __str__(self) -> str:
        count = self.evaluations
        cost = "no evaluation" if not count else f"{count} evaluation{'' if count == 1 else 's'} of a network"
        return f"start: {self.names}, {cost} per sample"


def _one_more_step(config: GenerateConfig, dtype: torch.dtype) -> OneMoreStep:
    options: dict[str, Any] = {} if config.oms_variant is None else {"variant": config.oms_variant}
    try:
        return OneMoreStep.from_pretrained(
            str(config.oms_module), torch_dtype=dtype, **options, **_one_more_step_options(config)
        )
    except (OSError, ValueError, TypeError) as error:
        message = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = "" if options or not isinstance(error, OSError) else " The published modules need --oms_variant fp16."
        raise UsageError(f"--oms_module {config.oms_module}: {message}{hint}") from error


def _one_more_step_options(config: GenerateConfig) -> dict[str, Any]:
    """Return the options of [`OneMoreStep`] that are given."""
    given = {"eta": config.oms_eta, "guidance_scale": config.oms_guidance_scale, "scale": config.oms_scale}
    return {name: value for name, value in given.items() if value is not None}


def _brightness(config: GenerateConfig, dtype: torch.dtype) -> BrightnessOffset:
    assert config.brightness is not None
    return BrightnessOffset(config.brightness)


# What makes the member of an option, and of which class that is.
_MAKERS: dict[str, tuple[type[InitialNoise], Callable[[Any, torch.dtype], InitialNoise]]] = {
    "oms_module": (OneMoreStep, _one_more_step),
    "brightness": (BrightnessOffset, _brightness),
}
# Which options change a member that a repository holds.
_CHANGES: dict[str, Callable[[Any], dict[str, Any]]] = {"oms_module": _one_more_step_options}


def _saved(name: str, config: GenerateConfig, dtype: torch.dtype, taken: list[str]) -> dict[str, InitialNoise]:
    """Return the members of the initial noise of a repository, unless their places are taken."""
    given = {} if config.revision is None else {"revision": config.revision}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument is deprecated")
        repository, _ = PipelineRepository.open(name, {**given, "dtype": dtype})
    try:
        noise = repository.initial_noise()
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"the initial noise of {name!r} cannot be used: {error} --initial_noise none leaves it out."
        ) from error
    if noise is None and config.initial_noise == SAVED_NOISE:
        raise UsageError(f"--initial_noise saved: {name!r} has no initial noise saved with it.")
    members = noise.members if isinstance(noise, InitialNoiseChain) else () if noise is None else (noise,)
    found: dict[str, InitialNoise] = {}
    for place, member in enumerate(members):
        key = next((key for key, (kind, _) in _MAKERS.items() if isinstance(member, kind)), f"member {place}")
        if key not in taken:
            found[key if key not in found else f"{key} {place}"] = member
    for key in _CHANGES.keys() & found.keys():
        for option, value in _CHANGES[key](config).items():
            setattr(found[key], option, value)
    return found
