"""Noise that is a function of a seed and a number, so that each candidate of a search can be drawn again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

# torch's generator on a CPU reads 32 bits of its seed.
_SEEDS = 2**32


def noise_seeds(noise: Tensor) -> list[int]:
    """Return a seed of 64 bits for each sample, made of the signs of its noise.

    Signs are what noise keeps in half precision and in the scale of any scheduler, so that one seed of a run gives one
    set of candidates in all of them; and a sample has the same in any batch.

    Args:
        noise (`torch.Tensor` of shape `(batch, ...)`): of any dtype and scale.

    Example:
        >>> import torch
        >>> from hfnoise.latents import noise_seeds
        >>> noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> noise_seeds(noise) == noise_seeds(14.6 * noise.half()) != noise_seeds(noise.flip(0))
        True
    """
    signs = (noise.detach().flatten(1) > 0).to(torch.uint8).cpu()
    return [_hashed(bytes(row.tolist())) for row in signs]


def candidate_noise(seed: int, index: int, shape: Sequence[int]) -> Tensor:
    """Return standard normal noise of a sample, in float32 on the CPU: a function of its seed and the number alone.

    Args:
        seed (`int`): of the sample, as [`noise_seeds`] returns it.
        index (`int`): of the candidate.
        shape (sequence of `int`): of the sample.

    Example:
        >>> import torch
        >>> from hfnoise.latents import candidate_noise
        >>> first, again, other = (candidate_noise(7, index, (4, 8, 8)) for index in (1, 1, 2))
        >>> torch.equal(first, again), torch.equal(first, other)
        (True, False)
    """
    # Hashed, so that the numbers of one seed are not the seeds of another.
    generator = torch.Generator().manual_seed(_hashed(f"candidate/{seed}/{index}".encode()))
    return torch.randn(tuple(shape), generator=generator)


def numbered_seed(stream: str, index: int) -> int:
    """Return a seed of 32 bits, all that torch's generator reads on a CPU: another one for each number of a stream.

    Args:
        stream (`str`): what is drawn, with the seed of the run in it; other names give independent numbers.
        index (`int`): two of a stream have the same seed only 2^32 apart.

    Example:
        >>> from hfnoise.latents import numbered_seed
        >>> (numbered_seed("noise/0", 3) - numbered_seed("noise/0", 2)) % 2**32
        1
    """
    # A sum, not a hash of the number too: that would give two of them the same now and then.
    return (_hashed(stream.encode()) + index) % _SEEDS


def _hashed(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
