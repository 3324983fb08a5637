"""The golden NPNet: its arrays, its weights, and a network of its size."""

import json
from functools import cache

import numpy
import torch
from safetensors.torch import load_file

from tests.conftest import VECTORS

FOLDER = VECTORS / "golden_noise"
SIZES = {
    "sample_size": 8, "num_tokens": 5, "encoder_hid_dim": 16, "swin_embed_dim": 8, "swin_depths": [2, 2, 2, 2],
    "swin_num_heads": [1, 2, 4, 8],
}  # fmt: skip
# A tiny one: a Swin of two stages on 16 x 16 pixels.
TINY = {
    "sample_size": 8, "num_tokens": 8, "svd_value_dim": 32, "swin_image_size": 16, "swin_patch_size": 2,
    "swin_window_size": 2, "swin_embed_dim": 8, "swin_depths": [2, 1], "swin_num_heads": [1, 2],
}  # fmt: skip


@cache
def vectors():
    return {name: torch.as_tensor(array) for name, array in numpy.load(FOLDER / "dev_npnet.npz").items()}


@cache
def official_state():
    """Return the weights with the batch norm that is in the official files and has no part."""
    return load_file(FOLDER / "dev_npnet_state.safetensors")


def own_state():
    return {name: value for name, value in official_state().items() if ".bn." not in name}


def official_shapes():
    """Return the names and shapes of the released SDXL checkpoint, by part."""
    return json.loads((FOLDER / "upstream_checkpoint_shapes_sdxl.json").read_text())


def perturbed(net, size=0.1, seed=0):
    """Return a network in which no weight is zero: as initialised, parts of it are off."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return net.eval()


def count(net):
    return sum(parameter.numel() for parameter in net.parameters())
