"""What a Flower client remembers between two messages: in `Context.state`, and on the disk if it has a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hfnoise.privacy.lora_factors import LoraFactors
from hfnoise.privacy.lora_message import StaleRotationError
from hfnoise.privacy.lora_state import LoraRotation
from hfnoise.strict_json import parse_json
from hfnoise.trainers.federated_client import FedSVDClient
from hfnoise.trainers.federated_flower_records import (
    ARRAYS,
    CONFIG,
    METRICS,
    array_record,
    require_flower,
    tensors_of,
)

STATE_FILE = "federated_flower_client.safetensors"
_KEY = "hfnoise-client"  # in Context.state, beside whatever the app keeps there
_ANSWER = "answer|"


@dataclass
class ClientState:
    """What the last message left behind.

    Args:
        record (`dict`): of [`FedSVDClient`]: rounds and noise multiplier.
        ledger (`list[dict]`): entries of the client's ledger, as far as known.
        round (`int`): of the last message that was trained on; -1 before the first.
        basis (`dict[str, int]`): how often the rows of a layer were refreshed.
        folded (`dict[str, int]`): how many updates were folded.
        digest (`str`): of the server's factors that `answer` answers; empty if the round broke off.
        answer_metrics (`dict`), answer_config (`dict`), answer_keys (`list[str]`): of the answer, in its order.
        tensors (`dict[str, Tensor]`): rows, folded factors, factors of the answer.
    """

    record: dict[str, Any] = field(default_factory=dict)
    ledger: list[dict[str, Any]] = field(default_factory=list)
    round: int = -1
    basis: dict[str, int] = field(default_factory=dict)
    folded: dict[str, int] = field(default_factory=dict)
    digest: str = ""
    answer_metrics: dict[str, float] = field(default_factory=dict)
    answer_config: dict[str, Any] = field(default_factory=dict)
    answer_keys: list[str] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def answers(self, round: int, digest: str) -> bool:
        """Return whether the message of this round and these factors has been answered."""
        return bool(self.digest) and (self.round, self.digest) == (round, digest)

    @property
    def answer(self) -> Any:
        """The last answer, as a RecordDict."""
        app = require_flower()
        arrays = {key: self.tensors[_ANSWER + key] for key in self.answer_keys}
        return app.RecordDict(
            {
                ARRAYS: array_record(arrays),
                METRICS: app.MetricRecord(self.answer_metrics),
                CONFIG: app.ConfigRecord(self.answer_config),
            }
        )

    def refuse_other(self, name: str, round: int) -> None:
        """Raise StaleRotationError for a message of an earlier round than the last, or other factors for that one."""
        if round < self.round or (round == self.round and self.digest):
            raise StaleRotationError(
                f"client {name!r} has answered round {self.round}, and got another message of round {round}: it is "
                "stale, or of another federation. A second answer would be released and charged in addition. Ask the "
                "server for its current message; give a new federation another state-dir (the ledger stays)."
            )

    def restore(self, client: FedSVDClient) -> None:
        """Give a client its rows and folded updates back; R and B come with the next message."""
        for key, value in self.tensors.items():
            kind, _, name = key.partition("|")
            if kind == "lora_A":
                client._lora_A[name] = value
            elif kind == "rows":
                rotation = LoraRotation(name, value, torch.zeros(client.layers[name].shape[0], len(value)))
                rotation.basis, rotation.round = self.basis[name], max(self.round, 0)
                rotation.folded = [
                    LoraFactors(self.tensors[f"folded_A|{name}|{number}"], self.tensors[f"folded_B|{name}|{number}"])
                    for number in range(self.folded[name])
                ]
                client._rotations[name] = rotation
                if rotation.folded:
                    client._folded[name] = list(rotation.folded)  # scaled when a message comes, which says by what


def remember(client: FedSVDClient, context: Any, digest: str, answer: Any) -> None:
    """Keep what a client knows after a round; `answer` is None if it broke off."""
    tensors = {f"rows|{name}": one.basis_rows for name, one in client._rotations.items()}
    tensors |= {f"lora_A|{name}": value for name, value in client._lora_A.items()}
    for name, rotation in client._rotations.items():
        for number, part in enumerate(rotation.folded):
            tensors[f"folded_A|{name}|{number}"], tensors[f"folded_B|{name}|{number}"] = part
    private = client._training.is_private
    state = ClientState(
        record=asdict(client.record),
        ledger=[vars(entry) for entry in client.trainer._ledger().entries()] if private else [],
        round=-1 if client.last_round is None else client.last_round,
        basis={name: one.basis for name, one in client._rotations.items()},
        folded={name: len(one.folded) for name, one in client._rotations.items()},
    )
    if answer is not None:
        state.digest = digest
        state.answer_metrics, state.answer_config = dict(answer[METRICS]), dict(answer[CONFIG])
        state.answer_keys = list(answer[ARRAYS])
        tensors |= {f"{_ANSWER}{key}": value for key, value in tensors_of(answer[ARRAYS], "the answer").items()}
    described = json.dumps({key: value for key, value in vars(state).items() if key != "tensors"})
    tensors["json"] = torch.frombuffer(bytearray(described.encode()), dtype=torch.uint8)
    content = save({name: value.contiguous() for name, value in tensors.items()})
    context.state[_KEY] = require_flower().ConfigRecord({"content": content})
    folder = context.node_config.get("state-dir")
    if folder is not None:
        _write(Path(str(folder)) / STATE_FILE, content)


def read_state(context: Any, folder: Any) -> ClientState:
    """Return what a client knows: of Flower's state and the file, the one that has spent more.

    Raises:
        ValueError: for a damaged file.
    """
    held = _parsed(context.state[_KEY]["content"]) if _KEY in context.state else ClientState()
    file = None if folder is None else Path(str(folder)) / STATE_FILE
    if file is None or not file.exists():
        return held
    try:
        found = _parsed(file.read_bytes())
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{str(file)!r} is damaged ({error}): how often this client took part, and what it has sent, is unknown. "
            "Restore it, or remove it: rounds are then counted by the file beside it and by the ledger."
        ) from None
    return max(held, found, key=_spent)


def _spent(state: ClientState) -> tuple[int, int, int]:
    steps = sum(int(entry["steps"]) for entry in state.ledger)
    return len(state.record.get("rounds", [])), steps, state.round


def _parsed(content: bytes) -> ClientState:
    tensors = load(content)
    # The metrics of an answer without privacy hold an infinite epsilon.
    described: Mapping[str, Any] = parse_json(tensors.pop("json").numpy().tobytes(), finite=False)
    return ClientState(**described, tensors=tensors)


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with temporary.open("wb") as output:
        output.write(content)
        output.flush()
        os.fsync(output.fileno())
    temporary.replace(file)
