"""Dropout, masked tokens, augmentation: random, of a secret seed for each micro-batch, and the same after a resume."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: str = "cpu") -> Iterator[None]:
    """Run the generators of torch, numpy and Python from a seed inside, and from where they were afterwards.

    The Trainer seeds them with a public number, equally on every process. Then who knows that number knows the dropout
    mask of every place in a batch, and one more unit moves the others to other places: their clipped gradients change
    too, by more than `clip_norm` bounds. And a resume that consumes other draws before a step (another number of
    processes or workers) repeats its noise under other gradients, so that the noise cancels in the difference.

    Formal guarantee: with masks that are secret, and independent for the rows of a batch, the distribution of a unit's
    clipped gradient is the same in whatever place it stands, so a step is a mixture of Gaussian mechanisms of
    sensitivity `clip_norm`, and the accounting holds. Departure: the generators are pseudo-random (torch's on a CPU
    has 32 bits of seed), so this part holds against those who do not try all seeds; the noise itself has 256 bits.

    Args:
        seed (`int`): of [`~hfnoise.privacy.keyed_random.KeyedRandom.seeds`].
        device (`str`, defaults to `"cpu"`): type of the device that the model is on.
    """
    import numpy

    devices = list(range(torch.cuda.device_count())) if device == "cuda" else []
    python, numbers = random.getstate(), numpy.random.get_state()
    # What is restored is also what a checkpoint saves: no state that came from the secret.
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        for number in devices:
            torch.cuda.default_generators[number].manual_seed(seed + number)
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(numbers)
