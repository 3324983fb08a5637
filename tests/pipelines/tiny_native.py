"""A tiny pipeline that takes a guider itself (MotifVideo), called with embeddings: it has no text encoder."""

from __future__ import annotations

from typing import Any

import torch

from hfnoise.worlds.tiny_pipelines.family import seeded, spread_out

# Components that the saved pipeline has not, for `from_pretrained`.
NO_TEXT = {"text_encoder": None, "tokenizer": None}


@seeded
def native_pipeline() -> Any:
    """Return the pipeline with stock classifier-free guidance at scale 4."""
    from diffusers import (
        AutoencoderKLWan,
        ClassifierFreeGuidance,
        FlowMatchEulerDiscreteScheduler,
        MotifVideoPipeline,
        MotifVideoTransformer3DModel,
    )

    vae = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False] * 3
    )
    transformer = MotifVideoTransformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        mlp_ratio=1.0, text_embed_dim=8, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return MotifVideoPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae,
        transformer=spread_out(transformer), guider=ClassifierFreeGuidance(guidance_scale=4.0), **NO_TEXT,
    )  # fmt: skip


def native_call(count: int = 2, steps: int = 4) -> dict[str, Any]:
    """Return the arguments of a call for so many samples."""
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(2, count, 6, 8, generator=generator)
    mask = torch.ones(count, 6, dtype=torch.bool)
    return {
        "prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1], "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask, "height": 32, "width": 32, "num_frames": 1, "output_type": "latent",
        "num_inference_steps": steps, "generator": [torch.Generator().manual_seed(n) for n in range(count)],
    }  # fmt: skip
