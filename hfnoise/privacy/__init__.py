"""Differential privacy: accounting and calibration, per-unit gradients, clipping, keyed noise, audit, tuning,
federated adapters.

Everything here is arithmetic on torch tensors; the Trainers that use it are in `hfnoise.trainers`. Names are imported
when they are first used: the accounting of a command line needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = {
    "AggregatedLora": "lora_aggregation",
    "AuditEstimate": "audit",
    "ClippedSum": "clipping",
    "CorrelatedNoise": "correlated_noise",
    "KeyedRandom": "keyed_random",
    "LoraFactors": "lora_factors",
    "LoraRotation": "lora_state",
    "Mechanism": "accounting",
    "PoissonSampler": "sampling",
    "RefreshedLora": "lora_refresh",
    "RotatedLora": "lora_rotation",
    "RotationMessage": "lora_message",
    "StaleRotationError": "lora_message",
    "UncoveredParametersError": "gradient_recorder",
    "UnitGradientRecorder": "gradient_recorder",
    "aggregate_lora": "lora_aggregation",
    "audit_epsilon_lower_bound": "audit_bounds",
    "audit_p_value": "audit_bounds",
    "audit_scores": "audit",
    "average_lora_B": "lora_aggregation",
    "calibrate_noise_multiplier": "calibration",
    "choose_bands": "correlated_noise",
    "clip_per_unit": "clipping",
    "composed_epsilon": "accounting",
    "compute_epsilon": "accounting",
    "export_factors": "lora_export",
    "initial_lora_A": "lora_subspace",
    "largest_step_count": "calibration",
    "per_unit_gradients": "unit_gradients",
    "refresh_lora": "lora_refresh",
    "right_singular_rows": "lora_subspace",
    "rotate_lora": "lora_rotation",
    "rotation_digest": "lora_message",
    "save_lora_adapter": "hf_lora_export",
    "toeplitz_strategy": "toeplitz",
    "tuned_epsilon": "tuning",
    "verify_rotation": "lora_message",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'hfnoise.privacy' has no attribute {name!r}; it has {', '.join(_MODULES)}")
    value = getattr(import_module(f"hfnoise.privacy.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
