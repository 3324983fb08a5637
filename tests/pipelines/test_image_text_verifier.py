"""CLIP and its kin as verifiers: against the model and the image processor of transformers themselves."""

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    SiglipImageProcessorPil,
)

from hfnoise.pipelines import RandomSearch, clip_verifier
from hfnoise.pipelines.image_text_verifier import prepared_pixels
from hfnoise.worlds.digits_pipeline import new_digits_tokenizer
from tests.pipelines.digits_calls import PROMPTS

SIZE = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def processor():
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return CLIPProcessor(pictures, new_digits_tokenizer())


@pytest.fixture(scope="module")
def model(processor):
    tokens = {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0, "vocab_size": len(processor.tokenizer)}
    text, vision = {**SIZE, **tokens, "max_position_embeddings": 16}, {**SIZE, "image_size": 32, "patch_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()


def smooth_images(count, height, width):
    # Away from black and white, at which PIL cuts off after each of two passes.
    noise = 0.2 + 0.6 * torch.rand(count, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)
    return (255 * images).round() / 255


@pytest.mark.parametrize("shape", [(48, 70), (70, 48), (24, 24)])
def test_pixels_are_those_of_the_image_processor(shape):
    """To a level of 8 bits, to which PIL rounds, over the standard deviation of a channel."""
    images = smooth_images(2, *shape)
    for made in (
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 32, "width": 32}),
        SiglipImageProcessorPil(size={"height": 40, "width": 32}),
    ):
        expected = made(images=list((255 * images).round().byte()), return_tensors="pt").pixel_values
        level = 1.01 / 255 / min(made.image_std)
        inside = prepared_pixels(images, made)[..., 4:-4, 4:-4], expected[..., 4:-4, 4:-4]
        torch.testing.assert_close(*inside, rtol=0, atol=level)


def test_scores_are_the_logits_of_each_pair(model, processor):
    images = smooth_images(2, 40, 40)
    verifier = clip_verifier(model, processor)
    with torch.no_grad():
        found = verifier(images, PROMPTS)
        words = processor.tokenizer(PROMPTS, padding=True, return_tensors="pt")
        pixels = prepared_pixels(images, processor.image_processor)
        every = model(words.input_ids, pixels, words.attention_mask).logits_per_image
        torch.testing.assert_close(found, every.diagonal(), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(verifier(images, PROMPTS[::-1]), found)
        torch.testing.assert_close(verifier(images[1:], PROMPTS[1:]), found[1:])


def test_it_searches_and_can_be_differentiated(model, processor, pipe):
    verifier = clip_verifier(model, processor)
    search = RandomSearch({"clip": verifier}, 12)
    generator = torch.Generator().manual_seed(0)
    search.latents(pipe, PROMPTS, num_inference_steps=2, guidance_scale=1.0, generator=generator)
    assert search.trace.candidates == 6 and max(search.trace.values[0]) > search.trace.values[0][0]
    images = torch.rand(1, 1, 16, 16, requires_grad=True)
    verifier(images, PROMPTS[:1]).sum().backward()
    assert images.grad.abs().sum() > 0


def test_other_models_are_refused(model, processor):
    with pytest.raises(TypeError, match="model must be one of images and text"):
        clip_verifier(torch.nn.Identity(), processor)
    with pytest.raises(TypeError, match="must have an image_processor and a tokenizer"):
        clip_verifier(model, processor.tokenizer)
    nearest = CLIPImageProcessorPil(resample=0)
    with pytest.raises(ValueError, match="by method 0 of PIL"):
        prepared_pixels(torch.zeros(1, 3, 8, 8), nearest)
