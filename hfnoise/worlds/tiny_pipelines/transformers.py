"""Families of images with a transformer: SD3, PixArt, DiT, Flux, Chroma, Qwen-Image, Lumina2, Sana, AuraFlow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hfnoise.worlds.tiny_pipelines.family import (
    SCALE,
    STEPS,
    TinyFamily,
    calls,
    pictures,
    prompts,
    seeded,
    spread_out,
)

WIDTH = 16
POOLED = 16
TOKENS = 6
# Without a VAE the pipelines take its factor for 8 (Sana: 32), and need one only for pixels.
SIZE = 32


def new_flow_scheduler() -> Any:
    """Return the Euler scheduler of flow matching."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


def transformer_pipeline(pipeline: str, transformer: str, shape: dict[str, Any], **parts: Any) -> Callable[[], Any]:
    """Return a function that builds a pipeline from the class and the shape of its transformer.

    Args:
        pipeline (`str`): the class of diffusers.
        transformer (`str`): the class of its transformer.
        shape (`dict`): settings of the transformer.
        parts: other components; functions are called. Text encoders and tokenizers are `None` unless given.
    """

    @seeded
    def build():
        import inspect

        import diffusers

        cls = getattr(diffusers, pipeline)
        components = {"scheduler": new_flow_scheduler, **parts}
        components = {name: part() if callable(part) else part for name, part in components.items()}
        components["transformer"] = spread_out(getattr(diffusers, transformer)(**shape))
        for name, parameter in inspect.signature(cls.__init__).parameters.items():
            if name != "self" and parameter.default is inspect.Parameter.empty:
                components.setdefault(name, None)
        return cls(**components)

    return build


def new_vae(**settings: Any) -> torch.nn.Module:
    """Return a VAE that keeps the size."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(4,), layers_per_block=1,
        norm_num_groups=1, mid_block_add_attention=False, **settings,
    )  # fmt: skip


def new_flux_vae() -> torch.nn.Module:
    """Return a VAE in the manner of Flux: shifted latents and no convolutions around them."""
    return new_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035)


def new_ddim() -> Any:
    """Return a DDIM scheduler."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(clip_sample=False)


def new_dpm() -> Any:
    """Return a DPM++ scheduler."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler()


_SD3 = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 2, "caption_projection_dim": 16, "joint_attention_dim": WIDTH,
    "pooled_projection_dim": POOLED, "pos_embed_max_size": 8,
}  # fmt: skip
_PIXART = {
    "sample_size": 4, "num_layers": 1, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 2,
    "in_channels": 4, "out_channels": 8, "cross_attention_dim": 16, "caption_channels": WIDTH,
}  # fmt: skip
_DIT = {
    "sample_size": 4, "num_layers": 1, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 2,
    "in_channels": 4, "out_channels": 8,
}  # fmt: skip
# The pipelines pack 2 x 2 latents of 4 channels into a token.
_CHROMA = {
    "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip
_FLUX = {**_CHROMA, "pooled_projection_dim": POOLED, "guidance_embeds": True}
_APPROXIMATOR = {"approximator_hidden_dim": 16, "approximator_layers": 1, "approximator_num_channels": 16}
_QWEN = {
    "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": WIDTH, "axes_dims_rope": (8, 4, 4),
}  # fmt: skip
_LUMINA = {
    "sample_size": 4, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "num_layers": 1,
    "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": (4, 2, 2), "axes_lens": (32,) * 3,
    "cap_feat_dim": WIDTH,
}  # fmt: skip
_SANA = {
    "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2,
    "attention_head_dim": 8, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16,
    "caption_channels": WIDTH, "sample_size": 4,
}  # fmt: skip
_AURA = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_mmdit_layers": 1,
    "num_single_dit_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16,
    "joint_attention_dim": WIDTH, "pos_embed_max_size": 16,
}  # fmt: skip


def classes(count: int, first: int) -> dict[str, Any]:
    """Return classes instead of prompts."""
    return {"class_labels": [10 + 7 * sample for sample in range(first, first + count)], "output_type": "np"}


def image(count: int, first: int) -> dict[str, Any]:
    """Return one picture a sample."""
    return {"image": pictures(5, count, first, 3, 8, 8)}


def without_negative(embed: Callable[[int, int], dict[str, Any]]) -> Callable[[int, int], dict[str, Any]]:
    """Return `embed` without what it makes for the branch without the condition."""
    return lambda count, first: {name: v for name, v in embed(count, first).items() if not name.startswith("negative")}


_SIDES = {"height": SIZE, "width": SIZE}
_CFG = {"guidance_scale": SCALE, **_SIDES}
_TRUE_CFG = {"true_cfg_scale": SCALE, **_SIDES}
_OFF = {"true_cfg_scale": 1.0}
_MASKED = prompts(TOKENS, WIDTH, mask="prompt_attention_mask")
_POOLED = prompts(TOKENS, WIDTH, POOLED)
# Caption cleaning wants ftfy and bs4; the bins are of 512 pixels and more.
_PLAIN = {"clean_caption": False, "use_resolution_binning": False, **_CFG}
# With embeddings given, the default negative prompt "" would be one prompt too many.
_EMPTY = {"negative_prompt": None}
_FLUX_MODEL = ("FluxTransformer2DModel", _FLUX)

TRANSFORMERS = [
    TinyFamily(
        "sd3", transformer_pipeline("StableDiffusion3Pipeline", "SD3Transformer2DModel", _SD3),
        calls(_POOLED, **_CFG),
    ),
    TinyFamily(
        "pixart-alpha",
        transformer_pipeline("PixArtAlphaPipeline", "PixArtTransformer2DModel", _PIXART, scheduler=new_dpm),
        calls(_MASKED, **_PLAIN, **_EMPTY),
    ),
    TinyFamily(
        "pixart-sigma",
        transformer_pipeline("PixArtSigmaPipeline", "PixArtTransformer2DModel", _PIXART, scheduler=new_dpm),
        calls(_MASKED, **_PLAIN, **_EMPTY),
    ),
    TinyFamily(
        "dit",
        transformer_pipeline("DiTPipeline", "DiTTransformer2DModel", _DIT, vae=new_vae, scheduler=new_ddim),
        calls(classes, guidance_scale=SCALE),
    ),
    TinyFamily(
        "flux", transformer_pipeline("FluxPipeline", *_FLUX_MODEL), calls(_POOLED, **_TRUE_CFG), _OFF,
        "true_cfg_scale",
    ),
    TinyFamily(
        "flux-img2img", transformer_pipeline("FluxImg2ImgPipeline", *_FLUX_MODEL, vae=new_flux_vae),
        calls(_POOLED, image, true_cfg_scale=SCALE, height=8, width=8, strength=0.5, num_inference_steps=2 * STEPS),
        _OFF, "true_cfg_scale",
    ),
    TinyFamily(
        "chroma",
        transformer_pipeline("ChromaPipeline", "ChromaTransformer2DModel", {**_CHROMA, **_APPROXIMATOR}),
        # Its text encoder's masks are of the type of the embeddings.
        calls(prompts(TOKENS, WIDTH, mask="prompt_attention_mask", mask_dtype=torch.float32), **_CFG),
    ),
    TinyFamily(
        "qwen-image", transformer_pipeline("QwenImagePipeline", "QwenImageTransformer2DModel", _QWEN),
        calls(prompts(TOKENS, WIDTH, mask="prompt_embeds_mask"), **_TRUE_CFG), _OFF, "true_cfg_scale",
    ),
    TinyFamily(
        "lumina2", transformer_pipeline("Lumina2Pipeline", "Lumina2Transformer2DModel", _LUMINA),
        calls(_MASKED, **_CFG),
    ),
    TinyFamily(
        "sana", transformer_pipeline("SanaPipeline", "SanaTransformer2DModel", _SANA),
        calls(_MASKED, **{**_PLAIN, "height": 128, "width": 128}, **_EMPTY),
    ),
    TinyFamily(
        "auraflow", transformer_pipeline("AuraFlowPipeline", "AuraFlowTransformer2DModel", _AURA),
        calls(_MASKED, **_CFG),
    ),
    TinyFamily(
        "flux-distilled", transformer_pipeline("FluxPipeline", *_FLUX_MODEL),
        calls(without_negative(_POOLED), guidance_scale=SCALE, **_SIDES), {}, guided=False,
    ),
]  # fmt: skip
