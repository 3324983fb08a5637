"""Poisson sampling: which units are in the batch of a step, as every process computes it for itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hfnoise.privacy.keyed_random import KeyedRandom


@dataclass(frozen=True)
class PoissonSampler:
    """Puts every unit into the batch of a step independently, with one probability.

    With `bands` = 1 each unit is in each batch with probability `sample_rate`. With more, units are split once into
    `bands` groups, each unit into a group of its own choice, and step t samples from group t mod `bands` with
    probability `sample_rate * bands` (BandMF, arXiv 2306.08153, Algorithm 2): the same expected batch, and a unit that
    takes part at most once in `bands` steps.

    Formal guarantee: inclusions are independent over units and steps, which the accounting of
    [`~hfnoise.privacy.accounting.compute_epsilon`] assumes. A shuffled epoch is no such sample.

    Args:
        units (`int`): number N of units in the dataset, at least 1.
        sample_rate (`float`): expected batch / N, in (0, 1]; times `bands` at most 1.
        bands (`int`, defaults to `1`): number of groups.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> from hfnoise.privacy.keyed_random import KeyedRandom
        >>> from hfnoise.privacy.sampling import PoissonSampler
        >>> PoissonSampler(units=3, sample_rate=1.0).batch(KeyedRandom(bytes(32)), step=0).tolist()
        [0, 1, 2]
    """

    units: int
    sample_rate: float
    bands: int = 1

    def __post_init__(self) -> None:
        if self.units < 1 or self.bands < 1:
            raise ValueError(f"units and bands must be at least 1, got {self.units} and {self.bands}.")
        if not 0.0 < self.sample_rate <= 1.0:
            raise ValueError(f"sample_rate must be in (0, 1], got {self.sample_rate}.")
        if self.sample_rate * self.bands > 1.0 + 1e-12:
            raise ValueError(
                f"sample_rate * bands must be at most 1, got {self.sample_rate} * {self.bands}: a group is smaller "
                "than the expected batch. Use fewer bands or a smaller batch."
            )

    def batch(self, random: KeyedRandom, step: int) -> Tensor:
        """Return the units of a step in ascending order; it may be none.

        Args:
            random ([`KeyedRandom`]): of the run.
            step (`int`): at least 0.

        Returns:
            `Tensor[count]`, int64, count ~ Binomial.
        """
        chosen = random.uniforms("sample", step, self.units) < min(1.0, self.sample_rate * self.bands)
        if self.bands > 1:
            chosen &= self.groups(random) == step % self.bands
        return chosen.nonzero().flatten()

    def groups(self, random: KeyedRandom) -> Tensor:
        """Return the group of every unit, `Tensor[units]` of int64, the same at every step of a run."""
        drawn = (random.uniforms("group", 0, self.units) * self.bands).long()
        return drawn.clamp_(max=self.bands - 1)  # the product may round up to `bands`


def micro_batches(chosen: Tensor, size: int, rank: int = 0, world_size: int = 1) -> Tensor:
    """Return the micro-batches of one process: rows of `size` units, -1 where a place stays empty.

    The batch is cut first and dealt afterwards, whole micro-batches in turn, so that the same units meet in a
    micro-batch for every number of processes. All processes get the same number, at least 1: losses of TRL gather
    tensors over processes, and an empty batch must still run.

    Args:
        chosen (`Tensor[count]`): the units of the step.
        size (`int`): units in a micro-batch, at least 1.
        rank (`int`, defaults to `0`): of this process.
        world_size (`int`, defaults to `1`): number of processes.

    Returns:
        `Tensor[number, size]`, int64.

    Example:
        >>> import torch
        >>> from hfnoise.privacy.sampling import micro_batches
        >>> micro_batches(torch.tensor([3, 5, 8]), size=2).tolist()
        [[3, 5], [8, -1]]
    """
    needed = max(1, math.ceil(chosen.numel() / size))
    number = math.ceil(needed / world_size) * world_size
    padded = torch.full((number * size,), -1, dtype=torch.int64)
    padded[: chosen.numel()] = chosen
    return padded.view(number, size)[rank::world_size]
