"""The rows that a federation starts from: the same on every side, from a public seed or from the base weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from hfnoise.privacy.lora_subspace import initial_lora_A
from hfnoise.trainers.federated_config import FedSVDConfig
from hfnoise.trainers.federated_layers import LoraLayers


def start_rows(layers: LoraLayers, config: FedSVDConfig, lora_B: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return A of every layer before the first round, `(rank, inputs)`, float32.

    Args:
        layers ([`LoraLayers`]): of the model, for the shapes and, with `"w0_svd"`, the base weights.
        config ([`FedSVDConfig`]): `init_lora_A` and `federation_seed`.
        lora_B (`dict[str, Tensor]`): of the server, whose ranks count.

    Raises:
        ValueError: for `"keep"`, which only the server knows; for `"w0_svd"` on a quantised base.
    """
    if config.init_lora_A == "keep":
        raise ValueError(
            "init_lora_A='keep': the first rows are those of the server's adapter, and this message does not hold "
            "them. Ask the server for message(since=None)."
        )
    rows = {}
    for layer in layers:
        rank = lora_B[layer.name].shape[1]
        if config.init_lora_A == "w0_svd":
            rows[layer.name] = initial_lora_A("w0_svd", rank, base_weight=layers.base_weight(layer.name))
        else:
            generator = torch.Generator().manual_seed(layer_seed(config.federation_seed, layer.name))
            rows[layer.name] = initial_lora_A(config.init_lora_A, rank, layer.shape[1], generator=generator)
    return rows


def layer_seed(seed: int, *parts: str | int) -> int:
    """Return a seed for a layer (and round): the same on every machine, and unrelated for any two.

    Example:
        >>> from hfnoise.trainers.federated_start import layer_seed
        >>> layer_seed(0, "q_proj") == layer_seed(0, "k_proj")
        False
    """
    text = "\0".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
