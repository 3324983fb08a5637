"""What FedSVD's server sends for a layer, B and r x r numbers, and the check that it is this round's."""

from __future__ import annotations

import hashlib
import struct
from typing import NamedTuple

from torch import Tensor

from hfnoise.privacy.lora_factors import LoraB


class StaleRotationError(ValueError):
    """A rotation that is not the one of this layer and round: training on it would train another model."""


class RotationMessage(NamedTuple):
    """What the server sends for a layer and round: `outputs * rank + rank ** 2` floats, and a few numbers.

    Args:
        layer (`str`): name of the layer.
        round (`int`): of the federation.
        basis (`int`): which Q the rotation belongs to: how often [`LoraRotation.refresh`] had replaced rows before.
        lora_B (`torch.Tensor` of shape `(outputs, rank)`): of the server, rotated.
        rotation (`torch.Tensor` of shape `(rank, rank)`): R, in the dtype of `lora_B`.
        digest (`str`): [`rotation_digest`] of all fields but `lora_B`.
        replaced (`int`): of a refresh in this round: how many of the last directions are folded and replaced, else 0.
        seed (`int`): of the new rows of a refresh.
    """

    layer: str
    round: int
    basis: int
    lora_B: LoraB
    rotation: Tensor
    digest: str
    replaced: int = 0
    seed: int = 0

    @property
    def floats(self) -> int:
        """The numbers that are sent."""
        return self.lora_B.numel() + self.rotation.numel()


def rotation_digest(
    layer: str, round: int, rotation: Tensor, *, basis: int = 0, replaced: int = 0, seed: int = 0
) -> str:
    """Return the SHA-256 over a rotation's bytes, dtype and shape, its layer, round, basis and refresh, as hex digits.

    It binds a rotation to where it belongs: one of last round, of another layer, with a flipped bit or rounded on its
    way gives another digest. It is no signature: whoever can change both can make a new one. `lora_B` is not covered;
    that is the transport's matter.

    Example:
        >>> import torch
        >>> from hfnoise.privacy import rotation_digest
        >>> rotation_digest("q_proj", 1, torch.eye(2)) == rotation_digest("q_proj", 2, torch.eye(2))
        False
    """
    name = layer.encode()
    flat = rotation.detach().cpu().contiguous()
    header = struct.pack("<5q", round, basis, replaced, seed, len(name)) + name
    header += struct.pack(f"<{1 + flat.dim()}q", flat.dim(), *flat.shape) + str(flat.dtype).encode()
    # Little-endian on every platform that torch runs on.
    return hashlib.sha256(header + flat.numpy().tobytes()).hexdigest()


def verify_rotation(message: RotationMessage, layer: str, round: int | None = None) -> None:
    """Raise StaleRotationError unless a rotation is the one of this layer and round, unchanged since it was made.

    Args:
        message ([`RotationMessage`]): as received.
        layer (`str`): for which it is to be used.
        round (`int`, *optional*): in which it is to be used.

    Example:
        >>> import torch
        >>> from hfnoise.privacy import LoraRotation, verify_rotation
        >>> message = LoraRotation("q_proj", torch.eye(2, 3), torch.zeros(4, 2)).message()
        >>> verify_rotation(message, "q_proj", 0)
        >>> verify_rotation(message, "q_proj", 1)
        Traceback (most recent call last):
        ...
        hfnoise.privacy.lora_message.StaleRotationError: layer 'q_proj' got the rotation of round 0 in round 1...
    """
    digest = rotation_digest(
        message.layer, message.round, message.rotation, basis=message.basis, replaced=message.replaced,
        seed=message.seed,
    )  # fmt: skip
    if message.layer != layer:
        raise StaleRotationError(f"layer {layer!r} got the rotation of layer {message.layer!r}.")
    if round is not None and message.round != round:
        raise StaleRotationError(
            f"layer {layer!r} got the rotation of round {message.round} in round {round}: it is stale, and B would be "
            "trained for rows that the server no longer has. Ask the server for its current message."
        )
    if digest != message.digest:
        raise StaleRotationError(
            f"the rotation of layer {layer!r}, round {message.round}, has the SHA-256 {digest[:12]}... instead of "
            f"{message.digest[:12]}...: it is of another round, or was changed on its way (rounded to 16 bits, cut "
            "off, bits flipped). Ask the server for it again."
        )
