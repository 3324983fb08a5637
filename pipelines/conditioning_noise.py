"""Noise on the text states, in the slot of the initial noise."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from hfnoise.guidance.number_check import check_number
from hfnoise.latents import noised_condition
from hfnoise.pipelines.initial_noise import InitialNoise, StartState
from hfnoise.pipelines.random_state import kept_random_state
from hfnoise.pipelines.start_context import StartContext, copied_generators, parameter_names
from hfnoise.pipelines.start_report import StartReport

# What pipelines call the number of samples of a prompt.
_COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


class ConditioningNoise(InitialNoise):
    """Gives every image a prompt that is a little off, for models that draw nearly the same whatever the seed.

    Distilled models of few steps, and strong guidance, leave little to the noise of the latents. Noise on the states
    of the prompt brings diversity back, and some of the prompt is lost; `report` says how much of the states. The
    noise of the latents is that of the plain run with the same generator, and passes through unchanged.

    After CADS (arXiv 2310.17347), see [`hfnoise.latents.noised_condition`]. Departures: CADS fades the noise out over
    the run, which needs every step; here it is the same at all steps, as a start is, and thus smaller: 0.1 to 0.3. It
    is put on the states of all tokens of the prompt, not on pooled states, nor on the negative prompt.

    Args:
        strength (`float`): in [0, 1], share of noise; 0 is off.
        rescale (`float`, defaults to `1.0`): in [0, 1], how far mean and spread of the states are restored.

    Raises:
        TypeError, ValueError: if an option is out of its range.

    Example:
        >>> from hfnoise.pipelines import ConditioningNoise, guide
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> pipe, noise = new_digits_pipeline(width=8), ConditioningNoise(0.3)
        >>> with guide(pipe, initial_noise=noise):
        ...     images = pipe(["the digit seven"] * 2, num_inference_steps=4).images
        >>> noise.report.diversity_gained > 0 and noise.report.alignment_lost > 0
        True
    """

    def __init__(self, strength: float, rescale: float = 1.0) -> None:
        self.strength, self.rescale = strength, rescale
        self.report: StartReport | None = None
        self._check()

    def _check(self) -> None:
        for name in ("strength", "rescale"):
            check_number(name, getattr(self, name))
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}.")

    @property
    def is_off(self) -> bool:
        """Whether it changes nothing."""
        return self.strength == 0.0

    def check_pipeline(self, pipeline_class: type) -> None:
        """Raise ValueError if a pipeline encodes no prompt."""
        if not hasattr(pipeline_class, "encode_prompt"):
            raise _no_states(pipeline_class.__name__.removeprefix("Guided"))

    def condition(self, context: StartContext) -> tuple[Any, ...]:
        """Return the encoded prompt with noise on its states."""
        self._check()
        assert context.encoded is not None
        states = context.prompt_embeds
        if states is None:
            raise _no_states(context.name)
        if self.is_off:
            self.report = StartReport.of(states, states)
            return context.encoded
        states = _one_a_sample(states, context)
        noised = noised_condition(states, _noise_beside(context, states), self.strength, self.rescale)
        self.report = StartReport.of(states, noised)
        return (noised, *context.encoded[1:])

    def refine(self, unit_noise: Tensor, context: StartContext) -> StartState:
        """Return the noise as it is.

        Raises:
            ValueError: if no prompt was encoded in this call.
        """
        if context.encoded is None and not self.is_off:
            raise _no_states(context.name)
        return StartState(unit_noise)

    def to_config(self) -> dict[str, Any]:
        """Return the options."""
        return {"strength": self.strength, "rescale": self.rescale}

    def __repr__(self) -> str:
        return f"ConditioningNoise({self.strength}, rescale={self.rescale})"


def _no_states(name: str) -> ValueError:
    return ValueError(
        f"{name} encodes no prompt to states of shape (batch, tokens, width), and ConditioningNoise has nothing to "
        "put noise on. Use SeedVariation."
    )


def _one_a_sample(states: Tensor, context: StartContext) -> Tensor:
    """Return the states with a row for every image, of which each has its own noise.

    Flux takes embeddings of one prompt as they are given, for as many images as are asked; the transformer broadcasts.
    """
    known = parameter_names(type(context.pipe), "encode_prompt")
    # A pipeline that does not tell its encode_prompt how many repeats the states itself, afterwards.
    asked = [context.arguments.get(name) or 1 for name in _COUNTS if name in known]
    return states.expand(max(asked, default=1), -1, -1) if len(states) == 1 else states


def _noise_beside(context: StartContext, states: Tensor) -> Tensor:
    """Return unit noise that depends on the generators of the call, and leaves them as they are.

    The noise of the latents is drawn from them later, and must neither change nor be the same numbers: so a seed is
    drawn from a copy, and the noise from that.
    """
    generators = copied_generators(context.generator)
    if isinstance(generators, list) and len(generators) != len(states):
        raise ValueError(f"there are {len(generators)} generators, and {len(states)} samples: give one a sample.")
    # Without generators the noise of the latents is drawn where they are, and moves on from call to call there only.
    with kept_random_state(states.device):
        if isinstance(generators, list):
            own: Any = [_seeded_by(generator) for generator in generators]
        else:
            own = _seeded_by(generators, states.device)
    return randn_tensor(tuple(states.shape), own, device=states.device, dtype=torch.float32)


def _seeded_by(generator: torch.Generator | None, default: torch.device | None = None) -> torch.Generator:
    device = default if generator is None else generator.device
    seed = torch.randint(2**62, (1,), generator=generator, device=device)
    return torch.Generator().manual_seed(int(seed))
