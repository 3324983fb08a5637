"""Quantisation noise: grids, Hadamard rotation, gradient estimators (QuEST, STE, LSQ), codes and their packing.

Everything here is arithmetic on torch tensors; layers and loading are in its `hf_*` files, Trainers in
`hfnoise.trainers`. Names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = {
    "Encoded": "codes",
    "Grid": "grids",
    "LinearQuantization": "linear",
    "QuantizationReport": "report",
    "QuestLinear": "linear",
    "QuestPackedLinear": "packed_linear",
    "cached_weights": "weight_cache",
    "decode": "codes",
    "effective_hadamard_group": "hadamard",
    "encode": "codes",
    "forget_quantized_weights": "weight_cache",
    "grid_for": "grids",
    "hadamard_matrix": "hadamard",
    "hadamard_rotate": "hadamard",
    "lsq_initial_step": "lsq",
    "lsq_quantize": "lsq",
    "pack": "packing",
    "pack_weight": "packed_linear",
    "packed_length": "packing",
    "quantization_report": "report",
    "quantize": "estimators",
    "quantize_with_mask": "estimators",
    "unpack": "packing",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'hfnoise.quantization' has no attribute {name!r}; it has {', '.join(_MODULES)}")
    value = getattr(import_module(f"hfnoise.quantization.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
