"""A complete Stable Diffusion pipeline of stock classes, with 0.7 million parameters: a world of digits untrained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hfnoise.worlds.digit_world import IMAGE_SIZE, DigitWorld
from hfnoise.worlds.digits import DIGITS

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from transformers import PreTrainedTokenizerFast

_TEXT_WIDTH = 64


def new_digits_tokenizer(world: DigitWorld = DIGITS) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer of the world's prompts.

    Args:
        world ([`DigitWorld`], defaults to the plain digits): whose prompts.

    Example:
        >>> from hfnoise.worlds.digits_pipeline import new_digits_tokenizer
        >>> tokenizer = new_digits_tokenizer()
        >>> tokenizer.decode(tokenizer("the digit seven").input_ids)
        '<bos> the digit seven <eos>'
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word for template in world.templates for word in template.split() if not word.startswith("{")}
    words |= {word for values in world.attributes.values() for word in values}
    # <eos> must not be number 2: with that CLIPTextModel takes the largest id for the end of the text.
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<bos>", "<unk>", "<eos>", *sorted(words)])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(name, vocabulary[name]) for name in ("<bos>", "<eos>")]
    core.post_processor = processors.TemplateProcessing("<bos> $A <eos>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        model_max_length=world.max_tokens,
    )  # fmt: skip


def new_digits_pipeline(
    width: int = 24, seed: int = 0, world: DigitWorld = DIGITS, beta_end: float = 0.012
) -> StableDiffusionPipeline:
    """Return an untrained pipeline: the noise schedule and the format of Stable Diffusion, latents of 4 x 8 x 8.

    Args:
        width (`int`, defaults to `24`): channels of the UNet's first level, a multiple of 8; the second has twice.
        seed (`int`, defaults to `0`): of the weights.
        world ([`DigitWorld`], defaults to the plain digits): what it is to draw.
        beta_end (`float`, defaults to `0.012`): of the noise schedule, see [`DigitsRecipe`].

    Raises:
        ValueError: if the width is no multiple of 8.

    Example:
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> new_digits_pipeline(width=8).unet.config.in_channels
        4
    """
    if width < 8 or width % 8:
        raise ValueError(f"width must be a multiple of 8 (the groups of its norms), got {width}.")
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = new_digits_tokenizer(world)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_config = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=_TEXT_WIDTH, intermediate_size=2 * _TEXT_WIDTH,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=world.max_tokens,
            projection_dim=_TEXT_WIDTH, pad_token_id=0, bos_token_id=1, eos_token_id=3,
        )  # fmt: skip
        text_encoder = CLIPTextModel(text_config)
        vae = AutoencoderKL(
            in_channels=world.channels, out_channels=world.channels, latent_channels=4, sample_size=IMAGE_SIZE,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False,
        )  # fmt: skip
        # Attention at 4 x 4 only: at 8 x 8 too it doubles the time of a step and brings nothing.
        unet = UNet2DConditionModel(
            sample_size=IMAGE_SIZE // 2, in_channels=4, out_channels=4, layers_per_block=1,
            block_out_channels=(width, 2 * width), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DCrossAttn", up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=_TEXT_WIDTH, attention_head_dim=4, norm_num_groups=8,
        )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=beta_end, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type="epsilon",
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=text_encoder.eval(), tokenizer=tokenizer, unet=unet.eval(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe
