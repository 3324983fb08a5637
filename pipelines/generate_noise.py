"""Where a run of `hfnoise generate` starts: what is asked for, what the repository holds, and what it cost."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from hfnoise.errors import UsageError
from hfnoise.latents_options import INITIAL_NOISE_OPTIONS
from hfnoise.pipelines.generate_members import MEMBERS
from hfnoise.pipelines.guided import guided_class
from hfnoise.pipelines.initial_noise import InitialNoise, StartState, check_initial_noise
from hfnoise.pipelines.noise_chain import InitialNoiseChain, members_of
from hfnoise.pipelines.saved_parts import PipelineRepository
from hfnoise.pipelines.start_context import StartContext

if TYPE_CHECKING:
    from hfnoise.pipelines.generate_config import GenerateConfig

NO_NOISE = "none"
SAVED_NOISE = "saved"


def make_initial_noise(
    pipeline_class: type, name: str, config: GenerateConfig, dtype: torch.dtype
) -> CountedStart | None:
    """Return what a run starts from: the members that are saved and those that are asked for, as one.

    One that is asked for takes the place of a saved one of its class; options that belong to it change a saved one.

    Args:
        pipeline_class (`type`): of the pipeline, to be refused before it is loaded.
        name (`str`): what `from_pretrained` takes.
        config ([`GenerateConfig`]): its options of `INITIAL_NOISE_OPTIONS`.
        dtype (`torch.dtype`): of networks.

    Returns:
        [`CountedStart`]; `None` without any member.

    Raises:
        UsageError: if a member cannot be loaded, or not serve in the pipeline, or `initial_noise` is `"saved"` and
            nothing is, or an option is for a member that is not there.
    """
    members = [] if config.initial_noise == NO_NOISE else _saved(name, config, dtype)
    for key, options in INITIAL_NOISE_OPTIONS.items():
        classes, make, change = MEMBERS[key]
        own = next((place for place, member in enumerate(members) if type(member) in classes), None)
        if getattr(config, key) is not None:
            made = make(config, dtype)
            if own is None:
                members.append(made)
            else:
                members[own] = made
            continue
        given = [option.name for option in options[1:] if getattr(config, option.name) is not None]
        if given and own is None:
            raise UsageError(f"--{given[0]} is of --{key}, which is not given, and {name!r} has none of its own.")
        if own is not None:
            for option, value in change(config).items():
                setattr(members[own], option, value)
    if not members:
        return None
    try:
        # What makes the start itself comes after what makes noise.
        members.sort(key=lambda member: member.space == "scheduler")
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
        return " + ".join(type(member).__name__ for member in members_of(self.noise))

    def __str__(self) -> str:
        count = self.evaluations
        cost = "no evaluation" if not count else f"{count} evaluation{'' if count == 1 else 's'} of a network"
        return f"start: {self.names}, {cost} per sample"


def _saved(name: str, config: GenerateConfig, dtype: torch.dtype) -> list[InitialNoise]:
    """Return the members of the initial noise of a repository.

    Raises:
        UsageError: if it cannot be used, or is asked for and not there.
    """
    given: dict[str, Any] = {"dtype": dtype} | ({} if config.revision is None else {"revision": config.revision})
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument is deprecated")
            noise = PipelineRepository.open(name, given)[0].initial_noise()
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{error} (--initial_noise none: without it)") from error
    if noise is None and config.initial_noise == SAVED_NOISE:
        raise UsageError(f"--initial_noise saved: {name!r} has no initial noise saved with it.")
    return list(members_of(noise))
