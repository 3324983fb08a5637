"""A tiny Stable Diffusion XL with both of its text encoders, as a classic and as a modular pipeline."""

from hfnoise.worlds.tiny_pipelines.family import seeded, spread_out
from hfnoise.worlds.tiny_pipelines.unets import PIXELS, TOKENS, WIDTH, new_scheduler, new_unet, new_vae

# Of the second encoder; with it the time ids, six numbers 8 wide each, are embedded.
_POOLED = 16
_XL = {
    "attention_head_dim": (2, 4), "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + _POOLED,
}  # fmt: skip


@seeded
def classic_sdxl():
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from hfnoise.worlds.digits_pipeline import new_digits_tokenizer

    tokenizer = new_digits_tokenizer()
    # Two layers: SDXL reads the last but one. Both widths together are what the UNet reads.
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH // 2, intermediate_size=WIDTH, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=TOKENS, projection_dim=_POOLED, pad_token_id=0, bos_token_id=1,
        eos_token_id=3,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=new_vae(), unet=new_unet(**_XL), scheduler=new_scheduler("EulerDiscreteScheduler"),
        text_encoder=spread_out(CLIPTextModel(config)), text_encoder_2=spread_out(CLIPTextModelWithProjection(config)),
        tokenizer=tokenizer, tokenizer_2=tokenizer, add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def modular_sdxl(classic, blocks=None):
    """Return the modular pipeline of the components of a classic one."""
    from diffusers import ClassifierFreeGuidance, StableDiffusionXLAutoBlocks

    pipe = (blocks or StableDiffusionXLAutoBlocks()).init_pipeline()
    parts = ("vae", "unet", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pipe.update_components(**{name: getattr(classic, name) for name in parts})
    # The scale that the classic pipeline has by default.
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=5.0))
    for block in pipe._blocks.sub_blocks["denoise"].sub_blocks["denoise"].sub_blocks.values():
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)
    return pipe


def call(prompt, steps=3, images=1, **more):
    """Return the arguments of a call of either."""
    return {
        "prompt": prompt, "num_inference_steps": steps, "num_images_per_prompt": images, "height": PIXELS,
        "width": PIXELS, **more,
    }  # fmt: skip
