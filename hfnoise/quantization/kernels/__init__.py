"""Exact integer products of packed weights: compiled bit-plane kernels on CPUs, `torch._int_mm`, and plain torch.

`python -m hfnoise.quantization.kernels build` compiles the kernels beforehand; otherwise that happens at first use,
once. `HFNOISE_KERNELS=0` does without them. `status()` says which route is taken and why. All routes return the same
integers.
"""

from __future__ import annotations

from hfnoise.quantization.kernels.products import (
    PreparedWeight,
    integer_product,
    is_exact_in_float32,
    kernel_for,
    level_sums,
    prepare_weight,
    route_for,
)  # fmt: skip
from hfnoise.quantization.kernels.selection import KernelStatus, status

__all__ = [
    "KernelStatus",
    "PreparedWeight",
    "integer_product",
    "is_exact_in_float32",
    "kernel_for",
    "level_sums",
    "prepare_weight",
    "route_for",
    "status",
]
