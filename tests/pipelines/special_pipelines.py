"""Tiny pipelines whose denoisers are given, or predict, more than what is denoised; or that write down their scale."""

from __future__ import annotations

from typing import Any

import torch

from hfnoise.worlds.tiny_pipelines import transformers, videos
from hfnoise.worlds.tiny_pipelines.family import TinyFamily, calls, pictures, rows, seeded, shared_settings, spread_out
from hfnoise.worlds.tiny_pipelines.transformers import transformer_pipeline
from hfnoise.worlds.tiny_pipelines.unets import UNETS, new_scheduler

WIDTH = 32


def new_vision_tower() -> torch.nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=8, projection_dim=16, num_hidden_layers=1, num_attention_heads=2, image_size=32,
            intermediate_size=8, patch_size=16,
        )
    )  # fmt: skip


@seeded
def build_svd():
    """Frames before channels, and the image beside the latents; two preconditionings of v."""
    from diffusers import AutoencoderKLTemporalDecoder, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
    from transformers import CLIPImageProcessorPil

    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, in_channels=8, out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=16,
        num_attention_heads=2, projection_class_embeddings_input_dim=96, addition_time_embed_dim=32,
    )  # fmt: skip
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",), latent_channels=4
    )
    scheduler = new_scheduler(
        "EulerDiscreteScheduler", prediction_type="v_prediction", sigma_max=700.0, sigma_min=0.002,
        timestep_spacing="leading", timestep_type="continuous", use_karras_sigmas=True,
    )  # fmt: skip
    return StableVideoDiffusionPipeline(
        vae=vae, image_encoder=new_vision_tower(), unet=spread_out(unet), scheduler=scheduler,
        feature_extractor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32),
    )  # fmt: skip


def new_cogvideox_vae():
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4,
    )  # fmt: skip


@seeded
def build_upscaler():
    """DeepFloyd IF: three channels of six that go in, and of six that come out."""
    from diffusers import DDPMScheduler, IFSuperResolutionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), in_channels=6, out_channels=6,
        cross_attention_dim=WIDTH, encoder_hid_dim=WIDTH, attention_head_dim=4, addition_embed_type="text",
        addition_embed_type_num_heads=2, cross_attention_norm="group_norm", resnet_time_scale_shift="scale_shift",
        act_fn="gelu", class_embed_type="timestep", mid_block_scale_factor=1.414, time_embedding_act_fn="gelu",
    )  # fmt: skip
    schedule = {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range", "clip_sample": False}
    return IFSuperResolutionPipeline(
        text_encoder=None, tokenizer=None, unet=spread_out(unet), scheduler=DDPMScheduler(**schedule),
        image_noising_scheduler=DDPMScheduler(**schedule), safety_checker=None, feature_extractor=None,
        watermarker=None, requires_safety_checker=False,
    )  # fmt: skip


def upscaler_call(count: int, first: int = 0) -> dict[str, Any]:
    embeds = {
        f"{prefix}prompt_embeds": rows(seed, count, first, 6, WIDTH)
        for seed, prefix in enumerate(("", "negative_"), start=1)
    }
    settings = {**shared_settings(count, first), "output_type": "pt"}
    return {**settings, **embeds, "image": pictures(5, count, first, 3, 4, 4), "height": 8, "width": 8}


@seeded
def build_prior():
    """Kandinsky: vectors, and an output that is not called `sample`."""
    from diffusers import KandinskyV22PriorPipeline, PriorTransformer, UnCLIPScheduler
    from transformers import CLIPImageProcessorPil, CLIPTextConfig, CLIPTextModelWithProjection

    from hfnoise.worlds.digits_pipeline import new_digits_tokenizer

    tokenizer = new_digits_tokenizer()
    text_encoder = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=8, projection_dim=16, pad_token_id=0, bos_token_id=1,
            eos_token_id=3,
        )
    )  # fmt: skip
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=16, num_layers=1, num_embeddings=8,
        additional_embeddings=4, clip_embed_dim=16,
    )  # fmt: skip
    scheduler = UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0)
    return KandinskyV22PriorPipeline(
        prior=spread_out(prior), image_encoder=new_vision_tower(), text_encoder=text_encoder, tokenizer=tokenizer,
        scheduler=scheduler, image_processor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32),
    )  # fmt: skip


def frames(count: int, first: int) -> dict[str, Any]:
    return {"image": pictures(5, count, first, 3, 32, 32)}


def tokens(count: int, first: int) -> dict[str, Any]:
    return {"image": pictures(5, count, first, 3, 8, 8), "max_area": 64, "_auto_resize": False}


_COGVIDEOX = {"scheduler": videos.new_cogvideox_scheduler}
_XL = next(family for family in UNETS if family.name == "sdxl")
_HALF = {"denoising_end": 0.5, "num_inference_steps": 8}

SPECIAL = {
    "svd": TinyFamily(
        "svd", build_svd,
        calls(frames, num_frames=3, height=8, width=8, max_guidance_scale=2.5, decode_chunk_size=1),
        scale_name="max_guidance_scale",
    ),
    "cogvideox-i2v": TinyFamily(
        "cogvideox-i2v",
        transformer_pipeline(
            "CogVideoXImageToVideoPipeline", "CogVideoXTransformer3DModel", {**videos._COGVIDEOX, "in_channels": 8},
            vae=new_cogvideox_vae, **_COGVIDEOX,
        ),
        calls(videos._TEXT, frames, **videos._CFG),
    ),
    "cogvideox-dynamic": TinyFamily(
        "cogvideox-dynamic",
        transformer_pipeline("CogVideoXPipeline", "CogVideoXTransformer3DModel", videos._COGVIDEOX, **_COGVIDEOX),
        calls(videos._TEXT, use_dynamic_cfg=True, **videos._CFG),
    ),
    "flux-kontext": TinyFamily(
        "flux-kontext",
        transformer_pipeline(
            "FluxKontextPipeline", "FluxTransformer2DModel", transformers._FLUX, vae=transformers.new_flux_vae
        ),
        calls(transformers._POOLED, tokens, true_cfg_scale=5.0, height=8, width=8), scale_name="true_cfg_scale",
    ),
    "if-upscaler": TinyFamily("if-upscaler", build_upscaler, upscaler_call),
    "sdxl-base": TinyFamily(
        "sdxl-base", _XL.build, lambda count, first=0: {**_XL.call(count, first), **_HALF}
    ),
}  # fmt: skip
