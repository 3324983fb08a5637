"""Several initial noises, one after the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from hfnoise.pipelines.initial_noise import InitialNoise, StartState, refined_state
from hfnoise.pipelines.start_context import StartContext
from hfnoise.pipelines.start_estimate import StartEstimate, start_from


class InitialNoiseChain(InitialNoise):
    """Refines the noise by each of its members; a list in the slot `initial_noise` becomes one.

    Members that return unit noise come first. Estimates of the image ([`OneMoreStep`], [`BrightnessOffset`],
    [`TerminalPrior`]) come last and add up to one, to which the noise is added once.

    Args:
        members (iterable of [`InitialNoise`]): chains among them are taken apart.

    Raises:
        TypeError: if a member is none.
        ValueError: if there is no member, or one that makes a state of the scheduler is followed by one that needs
            noise.

    Example:
        >>> from hfnoise.pipelines import BrightnessOffset
        >>> from hfnoise.pipelines.noise_chain import InitialNoiseChain
        >>> len(InitialNoiseChain([BrightnessOffset(0.5), BrightnessOffset(-0.2)]).members)
        2
    """

    def __init__(self, members: Iterable[InitialNoise]) -> None:
        flat: list[InitialNoise] = []
        for member in members:
            if not isinstance(member, InitialNoise):
                raise TypeError(f"a chain is made of members of InitialNoise, got {type(member).__name__}.")
            flat.extend(members_of(member))
        if not flat:
            raise ValueError("a chain needs a member; for the pipeline's own noise, set initial_noise = None.")
        for first, second in zip(flat, flat[1:], strict=False):
            both = isinstance(first, StartEstimate) and isinstance(second, StartEstimate)
            if first.space == "scheduler" and not both:
                raise ValueError(
                    f"{type(first).__name__} makes the start itself, so {type(second).__name__} after it has no noise "
                    "to refine. Put it last."
                )
        self.members = tuple(flat)

    @property
    def space(self) -> str:  # type: ignore[override]
        """Of the last member."""
        return self.members[-1].space

    def check_pipeline(self, pipeline_class: type) -> None:
        """Raise ValueError if a member cannot serve in a pipeline class."""
        for member in self.members:
            member.check_pipeline(pipeline_class)

    def check_parts(self, pipe: Any) -> None:
        """Raise ValueError if a member does not fit the networks of a pipeline."""
        for member in self.members:
            member.check_parts(pipe)

    def condition(self, context: StartContext) -> tuple[Any, ...]:
        """Return what the members make of the encoded prompt, one after the other."""
        for member in self.members:
            context = replace(context, encoded=member.condition(context))
        assert context.encoded is not None
        return context.encoded

    def refine(self, unit_noise: torch.Tensor, context: StartContext) -> StartState:
        """Return what the members make of the noise, and what all of them cost."""
        estimates = [member for member in self.members if isinstance(member, StartEstimate)]
        state = StartState(unit_noise)
        evaluations = 0
        for number, member in enumerate(self.members[: len(self.members) - len(estimates)], 1):
            following = (*self.members[number:], *context.following)
            state = refined_state(member, state.latents, replace(context, following=following))
            if state.space != member.space:
                raise ValueError(
                    f"{type(member).__name__} returned a start in the space {state.space!r} and says space = "
                    f"{member.space!r}."
                )
            evaluations += state.evaluations
        if estimates:
            state = start_from(estimates, state.latents, context)
            evaluations += state.evaluations
        return StartState(state.latents, state.space, evaluations)

    def __repr__(self) -> str:
        return f"InitialNoiseChain({list(self.members)})"

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, InitialNoiseChain) and self.members == other.members

    __hash__ = None  # type: ignore[assignment]


def members_of(initial_noise: InitialNoise | None) -> tuple[InitialNoise, ...]:
    """Return what is in a slot, one by one.

    Example:
        >>> from hfnoise.pipelines import BrightnessOffset
        >>> from hfnoise.pipelines.noise_chain import members_of
        >>> members_of(BrightnessOffset(0.5)), members_of(None)
        ((BrightnessOffset(0.5, direction=None),), ())
    """
    if initial_noise is None:
        return ()
    return initial_noise.members if isinstance(initial_noise, InitialNoiseChain) else (initial_noise,)
