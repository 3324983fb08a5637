"""What travels in a federation: the server's message of a round, and a client's answer. Tensors and plain values."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hfnoise.privacy.lora_factors import LoraFactors
from hfnoise.privacy.lora_message import RotationMessage
from hfnoise.strict_json import parse_json

_SEPARATOR = "|"
# Of a RotationMessage, beside its tensors.
_NUMBERS = ("round", "basis", "digest", "replaced", "seed")


@dataclass(frozen=True)
class FederationMessage:
    """What a client gets at the beginning of a round.

    Args:
        method (`str`): aggregation.
        round (`int`): of the federation, from 0.
        base (`str`): fingerprint of the layers, see [`LoraLayers`].
        scalings (`dict[str, float]`): alpha / r of the server's layers.
        lora_B (`dict[str, Tensor]`): `(outputs, rank)`, float32.
        rotations (`dict[str, RotationMessage]`): of `"fedsvd"`, by layer.
        lora_A (`dict[str, Tensor]`): of other methods, where the client does not hold it.
        start (`dict[str, Tensor]`): Q, `(rank, inputs)`, for a client that joins or missed a refresh.
        folded (`dict[str, list[LoraFactors]]`): what was added to the frozen weights since `folded_since`, in units of
            the weight (scaling included).
        folded_since (`int`): how many of these a client must hold already; 0 replaces all.
        init_lora_A (`str`), federation_seed (`int`): what the first rows follow from; a client with others refuses.
    """

    method: str
    round: int
    base: str
    scalings: dict[str, float]
    lora_B: dict[str, Tensor]
    rotations: dict[str, RotationMessage] = field(default_factory=dict)
    lora_A: dict[str, Tensor] = field(default_factory=dict)
    start: dict[str, Tensor] = field(default_factory=dict)
    folded: dict[str, list[LoraFactors]] = field(default_factory=dict)
    folded_since: int = 0
    init_lora_A: str = "orthonormal"
    federation_seed: int = 0

    @property
    def floats(self) -> int:
        """The numbers that are sent."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that are sent."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return all arrays under flat names, `kind|layer` and `folded_A|layer|number`."""
        found = {f"lora_B{_SEPARATOR}{name}": value for name, value in self.lora_B.items()}
        found |= {f"rotation{_SEPARATOR}{name}": one.rotation for name, one in self.rotations.items()}
        found |= {f"lora_A{_SEPARATOR}{name}": value for name, value in self.lora_A.items()}
        found |= {f"start{_SEPARATOR}{name}": value for name, value in self.start.items()}
        for name, parts in self.folded.items():
            for number, part in enumerate(parts):
                found[f"folded_A{_SEPARATOR}{name}{_SEPARATOR}{number}"] = part.lora_A
                found[f"folded_B{_SEPARATOR}{name}{_SEPARATOR}{number}"] = part.lora_B
        return found

    def description(self) -> str:
        """Return everything that is no tensor, as JSON."""
        rotations = {name: {key: getattr(one, key) for key in _NUMBERS} for name, one in self.rotations.items()}
        return json.dumps(
            {
                "method": self.method, "round": self.round, "base": self.base, "scalings": self.scalings,
                "folded_since": self.folded_since, "init_lora_A": self.init_lora_A,
                "federation_seed": self.federation_seed,
                "folded": {name: len(parts) for name, parts in self.folded.items()},
                "rotations": rotations,
            },
            sort_keys=True,
        )  # fmt: skip

    @staticmethod
    def assemble(description: str, tensors: Mapping[str, Tensor]) -> FederationMessage:
        """Return the message of which `description()` and `tensors()` were sent.

        Raises:
            ValueError: if a part is missing.
        """
        content = parse_json(description)
        try:
            by_kind: dict[str, dict[str, Tensor]] = {"lora_B": {}, "rotation": {}, "lora_A": {}, "start": {}}
            for key, value in tensors.items():
                kind, *rest = key.split(_SEPARATOR)
                if kind in by_kind:
                    by_kind[kind][rest[0]] = value
            rotations = {
                name: RotationMessage(
                    layer=name, lora_B=by_kind["lora_B"][name], rotation=by_kind["rotation"][name], **numbers
                )
                for name, numbers in content.pop("rotations").items()
            }
            folded = {
                name: [
                    LoraFactors(tensors[f"folded_A|{name}|{number}"], tensors[f"folded_B|{name}|{number}"])
                    for number in range(count)
                ]
                for name, count in content.pop("folded").items()
            }
        except KeyError as error:
            raise ValueError(f"the message of the server lacks {error}: it was cut. Ask for it again.") from None
        return FederationMessage(
            **content, lora_B=by_kind["lora_B"], lora_A=by_kind["lora_A"], start=by_kind["start"],
            rotations=rotations, folded=folded,
        )  # fmt: skip


@dataclass(frozen=True)
class ClientUpdate:
    """What a client sends back.

    Args:
        client (`str`): its name.
        round (`int`): of the message that it answers.
        lora_B (`dict[str, Tensor]`): trained, float32.
        lora_A (`dict[str, Tensor]`): trained too, of `"fedavg"`, `"flora"`, `"fedex"`.
        scalings (`dict[str, float]`): alpha / r of its layers.
        examples (`int`, *optional*): n_k; None where it is hidden (`weighting="uniform"`).
        participations (`int`): rounds in which it took part, this one included.
        epsilon (`float`, *optional*): from its ledger: of everything released of its data; None without privacy.
        delta (`float`, *optional*): of the same.
        base (`str`): fingerprint of its layers.
    """

    client: str
    round: int
    lora_B: dict[str, Tensor]
    scalings: dict[str, float]
    base: str
    lora_A: dict[str, Tensor] = field(default_factory=dict)
    examples: int | None = None
    participations: int = 1
    epsilon: float | None = None
    delta: float | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that are sent."""
        return sum(value.numel() * value.element_size() for value in (*self.lora_A.values(), *self.lora_B.values()))


def refuse_statements(update: ClientUpdate, layers: Sequence[str], weighting: str) -> None:
    """Raise ValueError for numbers beside the factors of an answer that no average or report could use.

    Args:
        update ([`ClientUpdate`]): of a client, who may have sent anything.
        layers (`Sequence[str]`): of the server.
        weighting (`str`): `"examples"` or `"uniform"`.
    """
    who = f"client {update.client!r}"
    if weighting == "examples" and not _positive(update.examples):
        raise ValueError(
            f"{who} gives {update.examples!r} as its number of examples, and weighting='examples' averages by it. "
            "Clients without examples stay out; if numbers are to stay hidden, use weighting='uniform' for all."
        )
    if weighting == "uniform" and update.examples is not None:
        raise ValueError(
            f"{who} gives its number of examples, and weighting='uniform' hides them: it was set up for another "
            "federation, and would be weighted by it where others are not. Give it the server's FedSVDConfig."
        )
    if set(update.scalings) != set(layers) or not all(map(_positive, update.scalings.values())):
        raise ValueError(f"{who} must give a scaling (alpha / r) above 0 for each layer, got {update.scalings}.")
    for what in ("epsilon", "delta"):
        value = getattr(update, what)
        if value is not None and value != 0 and not (_positive(value) or value == math.inf):
            raise ValueError(f"{who} gives {what}={value!r}: it is a number of at least 0, or None without privacy.")
    if not _positive(update.participations):
        raise ValueError(f"{who} gives {update.participations!r} as the number of rounds in which it took part.")


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of tensors, in the order of the names.

    Example:
        >>> import torch
        >>> from hfnoise.trainers.federated_message import tensors_digest
        >>> tensors_digest({"a": torch.zeros(2)}) == tensors_digest({"a": torch.zeros(1, 2)})
        False
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()
