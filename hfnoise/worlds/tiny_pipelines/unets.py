"""Families with a UNet: Stable Diffusion 1.5 and XL, image to image, inpainting, ControlNet, IP-Adapter, video."""

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
    rows,
    seeded,
    spread_out,
)

WIDTH = 16
POOLED = 16
TOKENS = 8
LATENTS = 8
# The VAE halves once.
PIXELS = 2 * LATENTS
# Six numbers of size and crop, 8 wide each, and the pooled embedding.
_XL_UNET = {
    "attention_head_dim": (2, 4), "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + POOLED,
}  # fmt: skip
# The noise schedule of Stable Diffusion.
_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def new_scheduler(name: str = "DDIMScheduler", **settings: Any) -> Any:
    """Return a scheduler with the noise schedule of Stable Diffusion."""
    import diffusers

    if name == "DDIMScheduler":
        settings = {"clip_sample": False, "set_alpha_to_one": False, **settings}
    return getattr(diffusers, name)(**_SCHEDULE, **settings)


def new_unet(**settings: Any) -> torch.nn.Module:
    """Return a UNet of two levels, with text in the second."""
    from diffusers import UNet2DConditionModel

    shape = {
        "sample_size": LATENTS, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
        "block_out_channels": (8, 16), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": WIDTH,
        "attention_head_dim": 4, "norm_num_groups": 4,
    }  # fmt: skip
    return spread_out(UNet2DConditionModel(**{**shape, **settings}))


def new_vae(**settings: Any) -> torch.nn.Module:
    """Return a VAE that halves the size."""
    from diffusers import AutoencoderKL

    shape = {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": PIXELS,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 4), "layers_per_block": 1, "norm_num_groups": 2, "mid_block_add_attention": False,
    }  # fmt: skip
    return AutoencoderKL(**{**shape, **settings})


def new_controlnet(**settings: Any) -> torch.nn.Module:
    """Return a ControlNet for [`new_unet`]."""
    from diffusers import ControlNetModel

    shape = {
        "in_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": WIDTH,
        "attention_head_dim": 4, "norm_num_groups": 4, "conditioning_embedding_out_channels": (4, 8),
    }  # fmt: skip
    return spread_out(ControlNetModel(**{**shape, **settings}))


def new_text_parts() -> dict[str, Any]:
    """Return a CLIP text encoder with a word-level tokenizer of the prompts "the digit seven" and the like."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from hfnoise.worlds.digits_pipeline import new_digits_tokenizer

    tokenizer = new_digits_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=TOKENS, projection_dim=WIDTH, pad_token_id=0, bos_token_id=1,
        eos_token_id=3,
    )  # fmt: skip
    return {"text_encoder": CLIPTextModel(config), "tokenizer": tokenizer}


def sd(pipeline: str, scheduler: str = "DDIMScheduler", unet: Any = None, **parts: Any) -> Callable[[], Any]:
    """Return a function that builds a pipeline of Stable Diffusion 1.5; parts that are functions are called."""

    @seeded
    def build():
        import diffusers

        more = {name: part() if callable(part) else part for name, part in parts.items()}
        return getattr(diffusers, pipeline)(
            vae=new_vae(), unet=new_unet(**(unet or {})), scheduler=new_scheduler(scheduler), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False, **new_text_parts(), **more,
        )  # fmt: skip

    return build


def sdxl(pipeline: str, **parts: Any) -> Callable[[], Any]:
    """Return a function that builds a pipeline of Stable Diffusion XL without its text encoders."""

    @seeded
    def build():
        import diffusers

        more = {name: part() for name, part in parts.items()}
        return getattr(diffusers, pipeline)(
            vae=new_vae(), unet=new_unet(**_XL_UNET), scheduler=new_scheduler("EulerDiscreteScheduler"),
            text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, add_watermarker=False, **more,
        )  # fmt: skip

    return build


@seeded
def build_ip_adapter():
    """Build Stable Diffusion with an IP-Adapter of four image tokens; the images come as embeddings."""
    pipe = sd("StableDiffusionPipeline")()
    tokens, unet = 4, pipe.unet
    projection = {
        "proj.weight": torch.randn(tokens * WIDTH, WIDTH), "proj.bias": torch.zeros(tokens * WIDTH),
        "norm.weight": torch.ones(WIDTH), "norm.bias": torch.zeros(WIDTH),
    }  # fmt: skip
    attention, number = {}, 1
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            width = module.to_k.weight.shape[0]
            for part in ("to_k_ip", "to_v_ip"):
                attention[f"{number}.{part}.weight"] = torch.randn(width, WIDTH) / WIDTH**0.5
            number += 2
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": attention}])
    return pipe


@seeded
def build_animatediff():
    """Build Stable Diffusion with a motion adapter for videos of a few frames."""
    from diffusers import AnimateDiffPipeline, MotionAdapter

    adapter = MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2,
        motion_max_seq_length=4,
    )  # fmt: skip
    return AnimateDiffPipeline(
        vae=new_vae(), unet=new_unet(), motion_adapter=spread_out(adapter), scheduler=new_scheduler(),
        **new_text_parts(),
    )  # fmt: skip


@seeded
def build_kolors():
    """Build a UNet of SDXL behind a projection of the text; the ChatGLM text encoder is left out."""
    # diffusers hides the class where sentencepiece is missing, which only the tokenizer needs.
    from diffusers.pipelines.kolors.pipeline_kolors import KolorsPipeline

    return KolorsPipeline(
        vae=new_vae(), unet=new_unet(**_XL_UNET, encoder_hid_dim=WIDTH, encoder_hid_dim_type="text_proj"),
        scheduler=new_scheduler("EulerDiscreteScheduler"), text_encoder=None, tokenizer=None,
    )  # fmt: skip


@seeded
def build_lcm():
    """Build a latent consistency model, whose guidance is distilled."""
    from diffusers import LatentConsistencyModelPipeline

    return LatentConsistencyModelPipeline(
        vae=new_vae(), unet=new_unet(time_cond_proj_dim=8), scheduler=new_scheduler("LCMScheduler"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, **new_text_parts(),
    )  # fmt: skip


def texts(count: int, first: int) -> dict[str, Any]:
    """Return prompts, and negative prompts that differ too: a branch that took another row's would be seen."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    chosen = range(first, first + count)
    return {
        "prompt": [f"the digit {words[i % 10]}" for i in chosen],
        "negative_prompt": [f"{words[-1 - i % 10]}" for i in chosen],
    }


def image(count: int, first: int) -> dict[str, Any]:
    """Return one picture a sample."""
    return {"image": pictures(5, count, first, 3, PIXELS, PIXELS)}


def mask(count: int, first: int) -> dict[str, Any]:
    """Return masks of squares, another one for each sample."""
    masks = torch.zeros(count, 1, PIXELS, PIXELS)
    for row in range(count):
        masks[row, :, 4 : 10 + 2 * ((first + row) % 3), 2:12] = 1
    return {"mask_image": masks}


def two_images(count: int, first: int) -> dict[str, Any]:
    """Return the pictures of two ControlNets."""
    return {"image": [pictures(seed, count, first, 3, PIXELS, PIXELS) for seed in (5, 6)]}


def image_embeddings(*seeds: int) -> dict[str, Any]:
    """Return the embedding of the one image a call can have, for one IP-Adapter; first that of the negative image."""
    return {"ip_adapter_image_embeds": [torch.cat([rows(seed, 1, 0, 1, WIDTH) for seed in seeds])]}


_TEXT = {"guidance_scale": SCALE}
_XL = prompts(TOKENS, WIDTH, POOLED)
# Half of the steps are left out: the image is half noised.
_HALF = {"strength": 0.5, "num_inference_steps": 2 * STEPS}
_CONTROLNET = "StableDiffusionControlNetPipeline"
_INPAINT = "StableDiffusionInpaintPipeline"

UNETS = [
    TinyFamily("sd-ddim", sd("StableDiffusionPipeline"), calls(texts, **_TEXT)),
    TinyFamily("sd-euler", sd("StableDiffusionPipeline", "EulerDiscreteScheduler"), calls(texts, **_TEXT)),
    TinyFamily("sd-dpm++", sd("StableDiffusionPipeline", "DPMSolverMultistepScheduler"), calls(texts, **_TEXT)),
    TinyFamily("sd-heun", sd("StableDiffusionPipeline", "HeunDiscreteScheduler"), calls(texts, **_TEXT)),
    TinyFamily("sdxl", sdxl("StableDiffusionXLPipeline"), calls(_XL, **_TEXT)),
    TinyFamily("sd-img2img", sd("StableDiffusionImg2ImgPipeline"), calls(texts, image, **_TEXT, **_HALF)),
    TinyFamily("sd-inpaint-4", sd(_INPAINT), calls(texts, image, mask, **_TEXT)),
    TinyFamily("sd-inpaint-9", sd(_INPAINT, unet={"in_channels": 9}), calls(texts, image, mask, **_TEXT)),
    TinyFamily("sd-controlnet", sd(_CONTROLNET, controlnet=new_controlnet), calls(texts, image, **_TEXT)),
    TinyFamily(
        "sd-controlnet-guess", sd(_CONTROLNET, controlnet=new_controlnet),
        calls(texts, image, guess_mode=True, **_TEXT),
    ),
    TinyFamily(
        "sd-multicontrolnet", sd(_CONTROLNET, controlnet=lambda: [new_controlnet(), new_controlnet()]),
        calls(texts, two_images, controlnet_conditioning_scale=[1.0, 0.5], **_TEXT),
    ),
    TinyFamily(
        "sdxl-controlnet",
        sdxl("StableDiffusionXLControlNetPipeline", controlnet=lambda: new_controlnet(**_XL_UNET)),
        calls(_XL, image, **_TEXT),
    ),
    TinyFamily(
        "sd-ip-adapter", build_ip_adapter,
        calls(texts, **image_embeddings(8, 7), **_TEXT), {"guidance_scale": 1.0, **image_embeddings(7)},
    ),
    TinyFamily(
        "sd-instruct-pix2pix", sd("StableDiffusionInstructPix2PixPipeline", unet={"in_channels": 8}),
        calls(texts, image, image_guidance_scale=1.5, **_TEXT),
    ),
    TinyFamily("animatediff", build_animatediff, calls(texts, num_frames=3, **_TEXT)),
    TinyFamily("kolors", build_kolors, calls(_XL, **_TEXT)),
    TinyFamily(
        "lcm", build_lcm,
        calls(lambda count, first: {"prompt": texts(count, first)["prompt"]}, guidance_scale=SCALE), {}, guided=False,
    ),
]  # fmt: skip
