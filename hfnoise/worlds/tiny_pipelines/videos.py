"""Families of videos with a transformer: Wan 2.1 and 2.2, LTX, CogVideoX, HunyuanVideo, Mochi, Cosmos."""

from __future__ import annotations

from typing import Any

import torch

from hfnoise.worlds.tiny_pipelines.family import SCALE, TinyFamily, calls, pictures, prompts, spread_out
from hfnoise.worlds.tiny_pipelines.transformers import transformer_pipeline

WIDTH = 16
TOKENS = 6


class AllowAll(torch.nn.Module):
    """The safety checker of Cosmos is a model of several gigabytes, and the pipeline insists on one."""

    device = torch.device("cpu")
    dtype = torch.float32

    def check_text_safety(self, text: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def new_wan_vae() -> torch.nn.Module:
    """Return the VAE of Wan."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip


def new_image_encoder() -> torch.nn.Module:
    """Return a CLIP encoder of images."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )  # fmt: skip
    return CLIPVisionModel(config)


def new_image_processor() -> Any:
    """Return what makes pictures fit for [`new_image_encoder`]."""
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32, do_rescale=False)


def new_unipc() -> Any:
    """Return Wan's own scheduler."""
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def new_second_wan() -> torch.nn.Module:
    """Return the transformer that takes over in the second half of a run of Wan 2.2."""
    from diffusers import WanTransformer3DModel

    return spread_out(WanTransformer3DModel(**_WAN))


def new_cogvideox_scheduler() -> Any:
    """Return CogVideoX's own scheduler."""
    from diffusers import CogVideoXDDIMScheduler

    return CogVideoXDDIMScheduler()


def new_edm_scheduler() -> Any:
    """Return Cosmos' own scheduler."""
    from diffusers import EDMEulerScheduler

    return EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", prediction_type="epsilon", rho=7.0,
        final_sigmas_type="sigma_min",
    )  # fmt: skip


_WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": WIDTH, "freq_dim": 16, "ffn_dim": 32, "num_layers": 1, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
}  # fmt: skip
# The latents, a mask of four channels for the frames given, and the latents of those.
_WAN_IMAGE = {**_WAN, "in_channels": 4 + 4 + 4, "image_dim": 8}
_LTX = {
    "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1,
    "cross_attention_dim": 16, "caption_channels": WIDTH,
}  # fmt: skip
_COGVIDEOX = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": WIDTH, "num_layers": 1, "sample_width": 4, "sample_height": 4, "sample_frames": 5,
    "patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": TOKENS,
}  # fmt: skip
_HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
    "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1, "patch_size_t": 1, "guidance_embeds": True,
    "text_embed_dim": WIDTH, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
}  # fmt: skip
_MOCHI = {
    "patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "pooled_projection_dim": 16,
    "in_channels": 12, "text_embed_dim": WIDTH, "time_embed_dim": 4, "max_sequence_length": TOKENS,
}  # fmt: skip
_COSMOS = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
    "mlp_ratio": 2, "text_embed_dim": WIDTH, "adaln_lora_dim": 4, "max_size": (4, 8, 8), "patch_size": (1, 2, 2),
    # The padding mask needs torchvision.
    "rope_scale": (2.0, 1.0, 1.0), "concat_padding_mask": False, "extra_pos_embed_type": "learnable",
}  # fmt: skip


def first_frame(count: int, first: int) -> dict[str, Any]:
    """Return one picture for the whole batch: with a generator a sample, Wan encodes it once for each of them."""
    return {"image": pictures(5, 1, 0, 3, 32, 32)}


_SIDES = {"height": 32, "width": 32, "num_frames": 5}
_CFG = {"guidance_scale": SCALE, **_SIDES}
_TEXT = prompts(TOKENS, WIDTH)
_MASKED = prompts(TOKENS, WIDTH, mask="prompt_attention_mask")
_POOLED = prompts(TOKENS, WIDTH, 8, mask="prompt_attention_mask")
_WAN_MODEL = ("WanTransformer3DModel", _WAN)
_IMAGE_PARTS: dict[str, Any] = {
    "vae": new_wan_vae,
    "image_encoder": new_image_encoder,
    "image_processor": new_image_processor,
}
# Half of the steps with either transformer.
_TWO: dict[str, Any] = {"transformer_2": new_second_wan, "boundary_ratio": 0.8, "scheduler": new_unipc}

VIDEOS = [
    TinyFamily("wan-2.1", transformer_pipeline("WanPipeline", *_WAN_MODEL), calls(_TEXT, **_CFG)),
    TinyFamily(
        "wan-2.1-i2v",
        transformer_pipeline("WanImageToVideoPipeline", "WanTransformer3DModel", _WAN_IMAGE, **_IMAGE_PARTS),
        calls(_TEXT, first_frame, **_CFG),
    ),
    TinyFamily(
        "wan-2.2", transformer_pipeline("WanPipeline", *_WAN_MODEL, **_TWO),
        calls(_TEXT, guidance_scale_2=3.0, **_CFG), {"guidance_scale": 1.0, "guidance_scale_2": 1.0},
    ),
    TinyFamily(
        "ltx", transformer_pipeline("LTXPipeline", "LTXVideoTransformer3DModel", _LTX),
        calls(_MASKED, guidance_scale=SCALE, height=64, width=64, num_frames=9),
    ),
    TinyFamily(
        "cogvideox",
        transformer_pipeline(
            "CogVideoXPipeline", "CogVideoXTransformer3DModel", _COGVIDEOX, scheduler=new_cogvideox_scheduler
        ),
        calls(_TEXT, **_CFG),
    ),
    TinyFamily(
        "hunyuan-video", transformer_pipeline("HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel", _HUNYUAN),
        calls(_POOLED, true_cfg_scale=SCALE, **_SIDES), {"true_cfg_scale": 1.0}, "true_cfg_scale",
    ),
    TinyFamily(
        "mochi", transformer_pipeline("MochiPipeline", "MochiTransformer3DModel", _MOCHI),
        calls(_MASKED, guidance_scale=SCALE, height=32, width=32, num_frames=7),
    ),
    TinyFamily(
        "cosmos",
        transformer_pipeline(
            "CosmosTextToWorldPipeline", "CosmosTransformer3DModel", _COSMOS, scheduler=new_edm_scheduler,
            safety_checker=AllowAll,
        ),
        calls(_TEXT, **_CFG),
    ),
]  # fmt: skip
