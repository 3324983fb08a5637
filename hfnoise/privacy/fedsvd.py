"""FedSVD-LoRA without a transport: rotation, aggregation, state of server and client, refresh, start of A.

The method is arXiv 2505.12805; what it can and cannot do is in docs/fedsvd.md. Every layer is a pair of factors, the
update of its weight scaling x B A. The parts stand in files of their own and are gathered here.
"""

from __future__ import annotations

from hfnoise.privacy.lora_aggregation import AGGREGATIONS, AggregatedLora, aggregate_lora, average_lora_B
from hfnoise.privacy.lora_export import export_factors
from hfnoise.privacy.lora_factors import LoraFactors
from hfnoise.privacy.lora_message import RotationMessage, StaleRotationError, rotation_digest, verify_rotation
from hfnoise.privacy.lora_refresh import RefreshedLora, refresh_lora
from hfnoise.privacy.lora_rotation import RotatedLora, rotate_lora
from hfnoise.privacy.lora_state import LoraRotation
from hfnoise.privacy.lora_subspace import INIT_A, initial_lora_A, right_singular_rows

__all__ = [
    "AGGREGATIONS",
    "AggregatedLora",
    "INIT_A",
    "LoraFactors",
    "LoraRotation",
    "RefreshedLora",
    "RotatedLora",
    "RotationMessage",
    "StaleRotationError",
    "aggregate_lora",
    "average_lora_B",
    "export_factors",
    "initial_lora_A",
    "refresh_lora",
    "right_singular_rows",
    "rotate_lora",
    "rotation_digest",
    "verify_rotation",
]
