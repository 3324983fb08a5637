"""Variations of an image: its noise, mixed with that of another seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from hfnoise.guidance.number_check import check_number
from hfnoise.latents import mixed_noise
from hfnoise.pipelines.initial_noise import InitialNoise, StartState
from hfnoise.pipelines.latent_space import LatentSpace
from hfnoise.pipelines.start_context import StartContext
from hfnoise.pipelines.start_report import StartReport


class SeedVariation(InitialNoise):
    """Mixes the noise with that of another seed, at unit variance: sqrt(1 - s^2) noise + s other.

    Small strengths vary an image, and cost nothing; at 1 it is the run of the other seed: to the bit, for float32
    latents, in classic pipelines, with samplers that draw nothing. User interfaces call it a variation seed. Mixing
    linearly, as some do, loses variance: images of s = 0.5 would start with half of it.

    Args:
        strength (`float`): s, in [0, 1], share of the other seed; 0 is off. The cosine of old and new noise is
            sqrt(1 - s^2).
        seed (`int` or sequence of `int`, *optional*): of the other noise: the same for all samples, or one a sample.
            By default it is drawn from the generators of the call, behind their noise.

    Raises:
        TypeError, ValueError: if a strength or a seed is none.

    Example:
        >>> from hfnoise.pipelines import SeedVariation, guide
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> pipe, variation = new_digits_pipeline(width=8), SeedVariation(0.6, seed=7)
        >>> with guide(pipe, initial_noise=variation):
        ...     image = pipe("the digit seven", num_inference_steps=4).images[0]
        >>> 0.7 < variation.report.similarity[0] < 0.9
        True
    """

    def __init__(self, strength: float, seed: int | Sequence[int] | None = None) -> None:
        self.strength = strength
        # Of any type until it is checked; text and bytes would be sequences.
        self.seed: Any = list(seed) if isinstance(seed, Sequence) and not isinstance(seed, (str, bytes)) else seed
        self.report: StartReport | None = None
        self._check()

    def _check(self) -> None:
        check_number("strength", self.strength)
        if not 0.0 <= self.strength <= 1.0:
            raise ValueError(f"strength must be in [0, 1], where 0 is off; got {self.strength}.")
        for seed in [] if self.seed is None else self.seed if isinstance(self.seed, list) else [self.seed]:
            if isinstance(seed, bool) or not isinstance(seed, int):
                raise TypeError(f"a seed is a whole number, got {seed!r} of type {type(seed).__name__}.")
            # What torch.Generator.manual_seed takes.
            if not -(2**63) <= seed < 2**64:
                raise ValueError(f"a seed is a number of 64 bits, got {seed}.")

    @property
    def is_off(self) -> bool:
        """Whether it changes nothing."""
        return self.strength == 0.0

    def refine(self, unit_noise: Tensor, context: StartContext) -> StartState:
        """Return the mixed noise."""
        self._check()
        mixed = unit_noise if self.is_off else mixed_noise(unit_noise, self.strength, self._other(unit_noise, context))
        self.report = StartReport.of(unit_noise, mixed)
        return StartState(mixed)

    def _other(self, noise: Tensor, context: StartContext) -> Tensor:
        # As the pipeline draws it: of an image, in its dtype.
        space = LatentSpace.of(context, noise)
        if self.seed is None:
            return space.pack(context.normal(*space.shape))
        seeds = self.seed if isinstance(self.seed, list) else [self.seed] * len(noise)
        if len(seeds) != len(noise):
            raise ValueError(f"there are {len(seeds)} seeds, and {len(noise)} samples: give one, or one a sample.")
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        drawn = randn_tensor((len(seeds), *space.shape), generators, device=noise.device, dtype=context.dtype)
        return space.pack(drawn.float())

    def to_config(self) -> dict[str, Any]:
        """Return the options."""
        return {"strength": self.strength, "seed": self.seed}

    def __repr__(self) -> str:
        return f"SeedVariation({self.strength}, seed={self.seed})"
