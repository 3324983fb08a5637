"""Randomness that is a function of (secret, label, step): the same on every process, and again after a resume.

A generator of torch is no source for privacy noise: the Trainer seeds it with a public number, checkpoints hold its
state, and MT19937 can be run backwards. Here every draw is SHAKE-256 of a key that never leaves the secret's file.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

# Numbers per call of the hash. A draw depends on its position in its block only, so blocks can be made one by one.
_BLOCK = 1 << 17
_BITS = 53  # the precision of float64
_WORD = 8


class KeyedRandom:
    """Draws that depend on nothing but the key, a label, a step and a position.

    Departure from torch's generators: there is no state, so nothing has to be saved, broadcast or advanced. Two calls
    with the same arguments return the same bits on any machine.

    Formal guarantee: none of its own; the privacy proofs take these draws for truly random, which holds up to the
    security of SHAKE-256 as a pseudo-random function of a secret key of 256 bits.

    Args:
        key (`bytes`): 32 bytes, see [`~hfnoise.privacy.secret_file.run_key`].

    Raises:
        ValueError: if the key is not 32 bytes.

    Example:
        >>> from hfnoise.privacy.keyed_random import KeyedRandom
        >>> random = KeyedRandom(bytes(32))
        >>> bool((random.normals("noise", 7, 5) == random.normals("noise", 7, 5)).all())
        True
    """

    def __init__(self, key: bytes) -> None:
        if not isinstance(key, bytes) or len(key) != 32:
            raise ValueError("key must be 32 bytes; hfnoise.privacy.secret_file.run_key makes one.")
        self._key = key

    def uniforms(self, label: str, step: int, count: int) -> Tensor:
        """Return draws from the open interval (0, 1), each a multiple of 2^-54, equally likely.

        With 53 bits a comparison with a sample rate is right to 2^-53; float32 would turn a rate of 1e-7 into 1.19e-7.

        Args:
            label (`str`): what the draws are for; other labels give independent draws.
            step (`int`): of the run, at least 0.
            count (`int`): at least 0.

        Returns:
            `Tensor[count]`, float64, on the CPU.

        Raises:
            ValueError: if step or count is negative.
        """
        if step < 0 or count < 0:
            raise ValueError(f"step and count must be at least 0, got {step} and {count}.")
        result = torch.empty(count, dtype=torch.float64)
        for block in range(math.ceil(count / _BLOCK)):
            part = result[block * _BLOCK : (block + 1) * _BLOCK]
            part.copy_(self._words(label, step, block, part.numel()))
        # Half a unit above the lower end: neither 0 nor 1 is ever drawn, whose normals would be infinite.
        return result.add_(0.5).mul_(2.0**-_BITS)

    def normals(self, label: str, step: int, count: int) -> Tensor:
        """Return draws from N(0, 1) by the inverse distribution function, in float64; arguments as in `uniforms`.

        The largest number that can come out is 8.2; a normal exceeds it with probability 2^-53.
        """
        normals: Tensor = torch.special.ndtri(self.uniforms(label, step, count))
        return normals

    def seeds(self, label: str, step: int, count: int) -> list[int]:
        """Return whole numbers below 2^62 to seed other generators with; arguments as in `uniforms`."""
        if step < 0 or count < 0:
            raise ValueError(f"step and count must be at least 0, got {step} and {count}.")
        raw = self._bytes(label, step, 0, count)
        return [int.from_bytes(raw[at : at + _WORD], "big") >> 2 for at in range(0, len(raw), _WORD)]

    def _words(self, label: str, step: int, block: int, count: int) -> Tensor:
        """Return `count` integers of 53 bits."""
        raw = bytearray(self._bytes(label, step, block, count))
        # The shift of a signed integer copies its sign: the mask cuts that off.
        return (torch.frombuffer(raw, dtype=torch.int64) >> (64 - _BITS)) & ((1 << _BITS) - 1)

    def _bytes(self, label: str, step: int, block: int, count: int) -> bytes:
        name = label.encode()
        # Lengths first, so that no two different inputs are the same string of bytes.
        header = len(name).to_bytes(4, "big") + name + step.to_bytes(8, "big") + block.to_bytes(8, "big")
        return hashlib.shake_256(self._key + header).digest(count * _WORD)
