"""A server's state on the disk: one safetensors file, replaced as a whole, so a crash leaves the old or the new."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hfnoise.privacy.lora_factors import LoraFactors
from hfnoise.strict_json import parse_json

if TYPE_CHECKING:
    from hfnoise.trainers.federated_server import FedSVDServer

STATE_FILE = "federation.safetensors"
_FORMAT = "hfnoise federation 1"
_MESSAGE_TENSORS = ("lora_B", "rotation")


def save_server(server: FedSVDServer, folder: Path) -> None:
    """Write the state of a server into a folder; on the disk when this returns.

    Args:
        server ([`FedSVDServer`]): between two rounds.
        folder (`Path`): made if it is not there.
    """
    tensors: dict[str, Tensor] = {}
    rotations: dict[str, Any] = {}
    for name, rotation in server.rotations.items():
        state = rotation.state_dict()
        for part in ("rows", "lora_B", "rotation"):
            tensors[f"{part}|{name}"] = state[part]
        for number, (lora_A, lora_B) in enumerate(state["folded"]):
            tensors[f"folded_A|{name}|{number}"], tensors[f"folded_B|{name}|{number}"] = lora_A, lora_B
        message = state["message"]
        for part in _MESSAGE_TENSORS if message is not None else ():
            tensors[f"message_{part}|{name}"] = message[part]
        plain = None if message is None else {k: v for k, v in message.items() if k not in _MESSAGE_TENSORS}
        rotations[name] = {
            "round": state["round"], "basis": state["basis"], "folded": len(state["folded"]), "message": plain,
        }  # fmt: skip
    if not server.rotations:
        for name in server.names:
            tensors[f"lora_A|{name}"], tensors[f"lora_B|{name}"] = server._lora_A[name], server._lora_B[name]
        for number, residual in enumerate(server._residuals):
            for name, factors in residual.items():
                tensors[f"residual_A|{number}|{name}"], tensors[f"residual_B|{number}|{name}"] = factors
    for name, value in (server._average or {}).items():
        tensors[f"average|{name}"] = value
    content = {
        "round": server.round, "base": server.base, "config": asdict(server.config), "rotations": rotations,
        "refreshes": server._refreshes, "residuals": len(server._residuals),
        "participants": {name: asdict(one) for name, one in server.participants.items()},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{STATE_FILE}.{os.getpid()}"
    save_file(
        {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()},
        temporary,
        metadata={"format": _FORMAT, "state": json.dumps(content)},
    )
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(folder / STATE_FILE)


def load_server(server: FedSVDServer, folder: Path) -> None:
    """Put a state that was written by [`save_server`] into a server of the same federation.

    Raises:
        ValueError: if there is none, it is damaged, or of another federation; the server stays as it was.
    """
    content, tensors = _read(folder)
    made = copy.copy(server)
    made.rotations = copy.deepcopy(server.rotations)
    try:
        _check_same(server, content, folder)
        _fill(made, content, tensors)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{str(folder / STATE_FILE)!r} is damaged ({type(error).__name__}: {error}): the rotations of the clients "
            "would be unknown. Restore it, or start the federation anew from its last exported adapter with "
            "init_lora_A='keep'."
        ) from None
    # Only now, and all at once.
    vars(server).update(vars(made))


def _check_same(server: FedSVDServer, content: dict[str, Any], folder: Path) -> None:
    here = asdict(server.config)
    # A restart may go on for longer, and change nothing else.
    differing = [name for name, value in here.items() if content["config"].get(name) != value and name != "rounds"]
    if differing or content["base"] != server.base:
        listed = ", ".join(f"{name}: {content['config'].get(name)!r} there, {here[name]!r} here" for name in differing)
        raise ValueError(
            f"{str(folder)!r} holds another federation ({listed or 'of another base or other layers'}). Resume with "
            "its settings, or start in another folder."
        )


def _fill(server: FedSVDServer, content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    from hfnoise.trainers.federated_server import Participation

    for name, state in content["rotations"].items():
        message = state["message"]
        if message is not None:
            message = {**message, **{part: tensors[f"message_{part}|{name}"] for part in _MESSAGE_TENSORS}}
        folded = [(tensors[f"folded_A|{name}|{n}"], tensors[f"folded_B|{name}|{n}"]) for n in range(state["folded"])]
        server.rotations[name].load_state_dict(
            {
                "layer": name, "round": state["round"], "basis": state["basis"], "folded": folded, "message": message,
                **{part: tensors[f"{part}|{name}"] for part in ("rows", "lora_B", "rotation")},
            }
        )  # fmt: skip
    if not server.rotations:
        server._lora_A = {name: tensors[f"lora_A|{name}"] for name in server.names}
        server._lora_B = {name: tensors[f"lora_B|{name}"] for name in server.names}
        server._residuals = [
            {
                name: LoraFactors(tensors[f"residual_A|{n}|{name}"], tensors[f"residual_B|{n}|{name}"])
                for name in server.names
            }
            for n in range(content["residuals"])
        ]
    average = {name: tensors[f"average|{name}"] for name in server.names if f"average|{name}" in tensors}
    server._average = average or None
    server.round, server._refreshes = content["round"], content["refreshes"]
    server.participants = {name: Participation(**one) for name, one in content["participants"].items()}


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    file = folder / STATE_FILE
    if not file.exists():
        raise ValueError(f"there is no {STATE_FILE} in {str(folder)!r}: no federation was saved there.")
    try:
        with safe_open(file, framework="pt") as archive:
            metadata = archive.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, and this hfnoise reads {_FORMAT!r}")
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
            # Without noise the epsilon of a client is infinite.
            return parse_json(metadata["state"], finite=False), tensors
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{str(file)!r} cannot be read ({error}): the rotations of the clients would be unknown. Restore it, or "
            "start the federation anew from its last exported adapter with init_lora_A='keep'."
        ) from None
