"""Messages of a federation as Flower's records, and back. Flower is imported inside functions: it is an extra."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from hfnoise.strict_json import parse_json
from hfnoise.trainers.federated_config import FedSVDConfig
from hfnoise.trainers.federated_message import ClientUpdate, FederationMessage

ARRAYS, CONFIG, METRICS, START = "arrays", "config", "metrics", "start"  # FedAvg's own keys, and one more
WEIGHT = "num-examples"
# What a message is made of beside its arrays, in the ConfigRecord.
_DESCRIPTION, _ROTATIONS, _UPDATE = "hfnoise-message", "hfnoise-rotations", "hfnoise-update"
FACTORS = "hfnoise-factors"  # digest of the server's factors: the same however much of them a client is sent
_UPDATE_FIELDS = ("client", "round", "scalings", "base", "examples", "participations", "epsilon", "delta")


def require_flower() -> ModuleType:
    """Return `flwr.app`.

    Raises:
        ImportError: if Flower is not installed, or too old for its Message API; names the extra.
    """
    try:
        import flwr.app
        import flwr.clientapp
        import flwr.serverapp.strategy
    except ImportError as error:
        raise ImportError(
            f"a federation over Flower needs Flower 1.41 or later, on Python 3.11 or later ({error}): "
            "pip install 'hfnoise[flower]'. Without it, hfnoise.simulate_federation runs the same federation in one "
            "process."
        ) from error
    return flwr.app


def run_config_settings(run_config: Mapping[str, Any]) -> FedSVDConfig:
    """Return the federation that a Flower run configuration describes.

    Args:
        run_config (`dict`): of `Context.run_config`. Keys are the fields of [`FedSVDConfig`], with dashes or
            underscores (`local-steps = 4`); others are the app's own and are left alone.

    Example:
        >>> from hfnoise.trainers.federated_flower import run_config_settings
        >>> run_config_settings({"local-steps": 4, "learning-rate": 0.1}).local_steps
        4
    """
    known = {field.name for field in fields(FedSVDConfig)}
    named = {key.replace("-", "_"): value for key, value in run_config.items()}
    # Names of fields, such as init_lora_A, have capitals; TOML keeps them.
    return FedSVDConfig(**{key: value for key, value in named.items() if key in known})


def array_record(tensors: Mapping[str, Tensor]) -> Any:
    """Return tensors as an ArrayRecord.

    Raises:
        TypeError: for a dtype that is not float32. bfloat16 has no counterpart in NumPy, which Flower averages in;
            and a rotation that was rounded to 16 bits is none.
    """
    app = require_flower()
    for name, value in tensors.items():
        if value.dtype != torch.float32:
            raise TypeError(
                f"{name} is {value.dtype}: Flower averages NumPy arrays, and factors rounded to 16 bits leave the "
                "subspace. Send float32: load the adapter in float32 (autocast_adapter_dtype=True)."
            )
    return app.ArrayRecord({name: app.Array(value.detach().cpu().numpy()) for name, value in tensors.items()})


def tensors_of(record: Any, what: str) -> dict[str, Tensor]:
    """Return the tensors of an ArrayRecord.

    Raises:
        TypeError: for arrays that are not float32.
    """
    found = {}
    for name, array in record.items():
        if array.dtype != "float32":
            raise TypeError(
                f"{what}: {name} is {array.dtype}, and factors travel in float32 (16 bits leave the subspace)."
            )
        found[name] = torch.from_numpy(array.numpy().copy())
    return found


def trained_arrays(message: FederationMessage) -> dict[str, Tensor]:
    """Return what clients train and send back, under the same names: B, and with `"fedavg"` A."""
    tensors = message.tensors()
    kinds = ("lora_A|", "lora_B|") if message.method == "fedavg" else ("lora_B|",)
    return {name: value for kind in kinds for name, value in tensors.items() if name.startswith(kind)}


def message_to_records(message: FederationMessage, config: Mapping[str, Any]) -> Any:
    """Return the RecordDict of a server's message.

    The factors that clients train are the one ArrayRecord, with the keys of the answer, as Flower's modifiers want
    it; rotations are bytes in the ConfigRecord. Only a client that joins late, or missed a refresh, gets a second
    ArrayRecord.

    Args:
        message ([`FederationMessage`]): for one client.
        config (`ConfigRecord`): Flower's, such as the number of its round.
    """
    app = require_flower()
    trained = trained_arrays(message)
    rest = {name: value for name, value in message.tensors().items() if name not in trained}
    rotations = {name: value.contiguous() for name, value in rest.items() if name.startswith("rotation|")}
    start = {name: value for name, value in rest.items() if name not in rotations}
    described = {**config, _DESCRIPTION: message.description(), _ROTATIONS: save(rotations) if rotations else b""}
    records = {ARRAYS: array_record(trained), CONFIG: app.ConfigRecord(described)}
    if start:
        records[START] = array_record(start)
    return app.RecordDict(records)


def message_from_records(content: Any) -> FederationMessage:
    """Return the server's message that a RecordDict holds.

    Raises:
        TypeError: for arrays that are not float32.
        ValueError: if it is no message of a federation, or was cut.
    """
    if not {CONFIG, ARRAYS} <= set(content) or not {_DESCRIPTION, FACTORS} <= set(content[CONFIG]):
        raise ValueError("this is no message of a hfnoise federation: start one by fedsvd_server_app.")
    config = content[CONFIG]
    tensors = tensors_of(content[ARRAYS], "the server's message")
    if START in content:
        tensors |= tensors_of(content[START], "the server's message")
    if config[_ROTATIONS]:
        tensors |= load(config[_ROTATIONS])
    return FederationMessage.assemble(config[_DESCRIPTION], tensors)


def update_to_records(update: ClientUpdate) -> Any:
    """Return the RecordDict of a client's answer: factors, metrics (epsilon from its ledger), and what describes it.

    Every client sends the same metrics, or FedAvg refuses all: epsilon is inf without privacy, and the weight is 1
    where the number of examples is hidden.
    """
    app = require_flower()
    arrays = {f"lora_B|{name}": value for name, value in update.lora_B.items()}
    arrays = {**{f"lora_A|{name}": value for name, value in update.lora_A.items()}, **arrays}
    described = {name: getattr(update, name) for name in _UPDATE_FIELDS}
    return app.RecordDict(
        {
            ARRAYS: array_record(arrays),
            METRICS: app.MetricRecord(_metrics(update)),
            CONFIG: app.ConfigRecord({_UPDATE: json.dumps(described)}),
        }
    )


def update_from_records(content: Any) -> ClientUpdate:
    """Return the answer of a client that a RecordDict holds.

    Raises:
        TypeError: for arrays that are not float32.
        ValueError: if it is none, or its metrics, such as the weight that FedAvg would use, are not what it states.
    """
    try:
        described = parse_json(content[CONFIG][_UPDATE], finite=False)
        arrays, metrics = tensors_of(content[ARRAYS], "an answer"), content[METRICS]
        factors: dict[str, dict[str, Tensor]] = {"lora_A": {}, "lora_B": {}}
        for key, value in arrays.items():
            kind, _, name = key.partition("|")
            factors[kind][name] = value
        update = ClientUpdate(
            **{name: described[name] for name in _UPDATE_FIELDS}, lora_A=factors["lora_A"], lora_B=factors["lora_B"]
        )
    except (KeyError, ValueError) as error:
        raise ValueError(f"this is no answer of a client ({error!r}): start it by fedsvd_client_app.") from None
    if set(content) != {ARRAYS, METRICS, CONFIG} or dict(metrics) != _metrics(update):
        raise ValueError(
            f"client {update.client!r} states {_metrics(update)}, and sent the metrics {dict(metrics)}, in "
            f"{sorted(content)}: the average would not be what the report says, or FedAvg would refuse all answers."
        )
    return update


def _metrics(update: ClientUpdate) -> dict[str, float]:
    return {
        WEIGHT: 1 if update.examples is None else update.examples,
        "epsilon": math.inf if update.epsilon is None else update.epsilon,
        "delta": 0.0 if update.delta is None else update.delta,
        "participations": update.participations,
        "round": update.round,
    }
