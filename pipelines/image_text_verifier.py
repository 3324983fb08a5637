"""Models of images and text of transformers as verifiers: CLIP, PickScore, SigLIP and their kin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hfnoise.pipelines.verifiers import Verifier

# Numbers of PIL, which image processors keep.
_RESAMPLING = {2: "bilinear", 3: "bicubic"}


def clip_verifier(model: Any, processor: Any) -> Verifier:
    """Return a verifier that scores how well images fit their prompts: the model's own logit of each pair.

    For CLIP and PickScore it is the scaled cosine (100 times it, in the published weights), the figure that papers
    give. Images are prepared by the settings of the processor, in torch, so that no other package is needed and a
    reward can be differentiated. Prompts beyond the length of the model's text are cut off, as in those figures.

    Args:
        model (`CLIPModel`, `SiglipModel`, ...): returns `logits_per_image` of `pixel_values` and `input_ids`;
            PickScore is a `CLIPModel`. Put it into evaluation mode on the device of your choice.
        processor (`CLIPProcessor`, `SiglipProcessor`, ...): with an `image_processor` and a `tokenizer`.

    Raises:
        TypeError: if they have not what is said above.

    Example:
        >>> import torch
        >>> from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor
        >>> from hfnoise.pipelines import clip_verifier
        >>> from hfnoise.worlds.digits_pipeline import new_digits_tokenizer
        >>> size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> text = {**size, "vocab_size": 40, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 3}
        >>> config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 32, "patch_size": 16})
        >>> pictures = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        >>> processor = CLIPProcessor(pictures, new_digits_tokenizer())
        >>> verifier = clip_verifier(CLIPModel(config).eval(), processor)
        >>> verifier(torch.rand(2, 1, 16, 16), ["the digit seven", "the digit two"]).shape
        torch.Size([2])
    """
    images_of, tokenizer = (getattr(processor, name, None) for name in ("image_processor", "tokenizer"))
    if not isinstance(model, torch.nn.Module) or not hasattr(getattr(model, "config", None), "text_config"):
        raise TypeError(
            f"model must be one of images and text of transformers, such as CLIPModel, got {type(model).__name__}."
        )
    if images_of is None or tokenizer is None:
        raise TypeError(
            "processor must have an image_processor and a tokenizer, such as CLIPProcessor, got "
            f"{type(processor).__name__}."
        )
    scorer: Any = model
    length = min(tokenizer.model_max_length, scorer.config.text_config.max_position_embeddings)

    def image_text_similarity(images: Tensor, prompts: Sequence[str]) -> Tensor:
        # Padded to the full length, as SigLIP was trained; CLIP is told what is padding.
        words = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        known = {name: words[name].to(scorer.device) for name in ("input_ids", "attention_mask") if name in words}
        pixels = prepared_pixels(images, images_of).to(scorer.device, scorer.dtype)
        logits: Tensor = scorer(pixel_values=pixels, **known).logits_per_image
        return logits.diagonal()

    return image_text_similarity


def prepared_pixels(images: Tensor, image_processor: Any) -> Tensor:
    """Return images as a model's image processor makes them: resized, cropped, normalized.

    Args:
        images (`torch.Tensor` of shape `(batch, channels, height, width)`): in [0, 1]; one channel is taken for grey.
        image_processor: of transformers.

    Example:
        >>> import torch
        >>> from transformers import CLIPImageProcessorPil
        >>> from hfnoise.pipelines.image_text_verifier import prepared_pixels
        >>> prepared_pixels(torch.zeros(1, 1, 32, 64), CLIPImageProcessorPil()).shape
        torch.Size([1, 3, 224, 224])
    """
    pixels = images.float().expand(-1, 3, -1, -1) if images.shape[1] == 1 else images.float()
    settings = image_processor
    if settings.do_resize:
        shape = _resized(pixels.shape[-2:], settings.size)
        mode = _RESAMPLING.get(int(settings.resample))
        if mode is None:
            raise ValueError(
                f"the image processor resizes by method {settings.resample} of PIL; known are bilinear (2) and "
                "bicubic (3)."
            )
        pixels = F.interpolate(pixels, shape, mode=mode, antialias=True, align_corners=False).clamp(0.0, 1.0)
    if getattr(settings, "do_center_crop", False):
        crop = settings.crop_size
        pixels = _centre(pixels, int(crop["height"]), int(crop["width"]))
    if settings.do_normalize:
        mean, std = (pixels.new_tensor(part)[:, None, None] for part in (settings.image_mean, settings.image_std))
        pixels = (pixels - mean) / std
    return pixels


def _resized(shape: Sequence[int], size: Any) -> tuple[int, int]:
    short = size.get("shortest_edge")
    if short is None:
        return int(size["height"]), int(size["width"])
    height, width = shape
    # As transformers rounds: towards zero.
    return (short, int(short * width / height)) if height <= width else (int(short * height / width), short)


def _centre(pixels: Tensor, height: int, width: int) -> Tensor:
    missing = max(height - pixels.shape[-2], 0), max(width - pixels.shape[-1], 0)
    if any(missing):
        rows, columns = missing
        pixels = F.pad(pixels, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]
