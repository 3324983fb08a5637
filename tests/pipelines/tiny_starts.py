"""Calls of tiny pipelines from another start, and a tiny module of One More Step."""

from __future__ import annotations

import torch

from hfnoise import TimeFreeUNet2DConditionModel
from hfnoise.pipelines import InitialNoise, StartState, guide
from hfnoise.worlds.tiny_pipelines import FAMILIES, images_of
from hfnoise.worlds.tiny_pipelines.unets import WIDTH

SHAPE = {
    "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 8),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4, "norm_num_groups": 4,
}  # fmt: skip


class Told(InitialNoise):
    """Keeps what it is told and changes nothing."""

    def refine(self, unit_noise, context):
        self.noise, self.context = unit_noise, context
        return StartState(unit_noise)


class Mirrored(InitialNoise):
    def refine(self, unit_noise, context):
        return StartState(unit_noise.flip(-1), evaluations=1)


def new_module(width=WIDTH, unet_class=TimeFreeUNet2DConditionModel, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return unet_class(cross_attention_dim=width, **SHAPE).eval().requires_grad_(False)


def run(pipe, call, initial_noise):
    with guide(pipe, initial_noise=initial_noise):
        return images_of(pipe(**call))


def sd_call(count=1, first=0):
    return {**FAMILIES["sd-ddim"].call(count, first), "num_inference_steps": 2}
