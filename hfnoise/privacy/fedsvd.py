"""FedSVD-LoRA without a transport: rotation, aggregation, state of server and client, refresh, start of A."""

from __future__ import annotations

from hfnoise.privacy.lora_aggregation import AGGREGATIONS, AggregatedLora, aggregate_lora
from hfnoise.privacy.lora_factors import LoraFactors
from hfnoise.privacy.lora_rotation import RotatedLora, rotate_lora

__all__ = ["AGGREGATIONS", "AggregatedLora", "LoraFactors", "RotatedLora", "aggregate_lora", "rotate_lora"]
