"""A federation over a network, on Flower (extra `flower`): strategy, ClientApp and ServerApp.

Flower moves the messages and averages; rotation, refresh, caps and ledgers are those of [`FedSVDServer`] and
[`FedSVDClient`], as in [`simulate_federation`]. Importing this module does not import Flower.
"""

from __future__ import annotations

from hfnoise.trainers.federated_flower_client import client_name, fedsvd_client_app
from hfnoise.trainers.federated_flower_records import run_config_settings
from hfnoise.trainers.federated_flower_server import federation_table, fedsvd_server_app
from hfnoise.trainers.federated_flower_strategy import fedsvd_strategy

__all__ = [
    "client_name",
    "federation_table",
    "fedsvd_client_app",
    "fedsvd_server_app",
    "fedsvd_strategy",
    "run_config_settings",
]
