"""Federated LoRA: server, clients, simulation, and a Trainer that runs the whole federation in one process."""

from __future__ import annotations

from hfnoise.trainers.federated_client import FedSVDClient, ParticipationError
from hfnoise.trainers.federated_config import FedSVDConfig
from hfnoise.trainers.federated_layers import freeze_lora_A
from hfnoise.trainers.federated_message import ClientUpdate, FederationMessage
from hfnoise.trainers.federated_server import FedSVDServer
from hfnoise.trainers.federated_simulation import ClientDropout, RoundRecord, simulate_federation
from hfnoise.trainers.federated_trainer import FedSVDTrainer

__all__ = [
    "ClientDropout",
    "ClientUpdate",
    "FedSVDClient",
    "FedSVDConfig",
    "FedSVDServer",
    "FedSVDTrainer",
    "FederationMessage",
    "ParticipationError",
    "RoundRecord",
    "freeze_lora_A",
    "simulate_federation",
]
