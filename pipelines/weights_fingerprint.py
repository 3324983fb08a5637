"""A short text that differs between models of other weights."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

# Numbers of each parameter that are read: training changes all of them, and billions would take minutes.
_NUMBERS = 8


def weights_fingerprint(model: Any) -> str:
    """Return a hash of the names, the shapes and the first numbers of all parameters.

    Parameters that are elsewhere for now (sequential offloading) count by name and shape. Dtype and device have no
    part, but what rounding to 16 bits changes has.

    Args:
        model (`torch.nn.Module` or `DiffusionPipeline`): whose parameters, or whose components', are read.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.weights_fingerprint import weights_fingerprint
        >>> first, second = (torch.nn.Linear(2, 2) for _ in range(2))
        >>> weights_fingerprint(first) == weights_fingerprint(second)
        False
    """
    parts = {"": model} if isinstance(model, torch.nn.Module) else model.components
    digest = hashlib.blake2b(digest_size=16)
    for part, module in sorted(parts.items()):
        if isinstance(module, torch.nn.Module):
            for name, parameter in sorted(module.named_parameters()):
                digest.update(f"{part}/{name}/{tuple(parameter.shape)}".encode())
                if not parameter.is_meta:
                    numbers = parameter.detach().flatten()[:_NUMBERS].float().cpu()
                    digest.update(numbers.numpy().tobytes())
    return digest.hexdigest()
