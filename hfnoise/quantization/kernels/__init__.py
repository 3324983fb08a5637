"""Exact integer products of packed weights: compiled bit-plane kernels on CPUs, `torch._int_mm`, and plain torch.

`python -m hfnoise.quantization.kernels build` compiles the kernels beforehand; otherwise that happens at first use,
once. `HFNOISE_KERNELS=0` does without them. `status()` says which route is taken and why. All routes return the same
integers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Lazily, as in the other packages: `rows` is below the core that `layer` is above of.
_MODULES = {
    "KernelStatus": "selection",
    "PreparedWeight": "products",
    "integer_product": "products",
    "is_exact_in_float32": "products",
    "kernel_for": "products",
    "kernel_linear": "layer",
    "level_sums": "products",
    "prepare_weight": "products",
    "route_for": "products",
    "status": "selection",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_MODULES)}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
