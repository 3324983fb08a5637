"""Text states are those of the pipeline's call; what pairs hold is measured as the networks see them."""

from __future__ import annotations

import time

import datasets
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from hfnoise.latents import pack_latents
from hfnoise.latents.pair_diagnosis import diagnose_pairs
from hfnoise.latents.singular_values import noise_factors, tile_shape, tiled, untiled
from hfnoise.latents.text_mask import text_mask
from hfnoise.pipelines.few_step_reward import few_step_reward
from hfnoise.trainers.noise_prompt_rows import NoisePairRows, prompt_states
from hfnoise.worlds.digits_pipeline import new_digits_pipeline
from hfnoise.worlds.tiny_pipelines import FAMILIES, STOCK_WARNINGS
from tests.pipelines.modular_sdxl import classic_sdxl
from tests.trainers.noise_prompt_world import make_states

PROMPTS = ["the digit seven", "a photo of the digit two"]


class Instructed(StableDiffusionPipeline):
    """As Sana and Qwen-Image: the call tells `encode_prompt` what it does not assume itself, states are as long as the
    longest of their batch, and a mask that hides nothing is left out."""

    def encode_prompt(self, prompt, device=None, num_images_per_prompt=1, instruction="", max_sequence_length=2):
        words = [(instruction + one).split()[:max_sequence_length] for one in prompt]
        longest = max(map(len, words))
        states = torch.tensor([[[float(len(word))] for word in one] + [[0.0]] * (longest - len(one)) for one in words])
        mask = torch.tensor([[1.0] * len(one) + [0.0] * (longest - len(one)) for one in words])
        return states, None if bool(mask.all()) else mask

    def __call__(self, prompt=None, instruction="digits: ", max_sequence_length=9, num_inference_steps=1):
        raise AssertionError


@pytest.fixture(scope="module")
def instructed():
    return Instructed(**new_digits_pipeline(width=8).components, requires_safety_checker=False)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_states_are_those_of_the_call(instructed, batch_size):
    found = prompt_states(instructed, PROMPTS, batch_size)
    assert found[PROMPTS[0]]["prompt_embeds"].flatten().tolist() == [7.0, 3.0, 5.0, 5.0, 0.0, 0.0, 0.0]
    assert found[PROMPTS[0]]["attention_mask"].tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert found[PROMPTS[1]]["attention_mask"].tolist() == [1] * 7
    short = prompt_states(instructed, PROMPTS, batch_size, instruction="", max_sequence_length=3, guidance_scale=2.0)
    assert short[PROMPTS[1]]["prompt_embeds"].flatten().tolist() == [1.0, 5.0, 2.0]
    assert "attention_mask" not in short[PROMPTS[1]]


def test_pooled_states_are_no_mask():
    states = torch.zeros(2, 3, 8)
    assert text_mask((states, torch.randn(2, 3), None)) is None
    assert text_mask((states, torch.tensor([[1, 1, 1], [0, 0, 0]]))) is None  # a prompt of padding alone
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert text_mask((states, torch.randn(2, 3), mask)) is mask


@pytest.mark.slow
def test_states_of_both_encoders():
    pipe = classic_sdxl()
    found = prompt_states(pipe, PROMPTS)[PROMPTS[0]]
    assert set(found) == {"prompt_embeds"}
    assert torch.equal(found["prompt_embeds"], pipe.encode_prompt(PROMPTS[0], device="cpu")[0][0])


@pytest.mark.slow
@pytest.mark.filterwarnings(*STOCK_WARNINGS)
def test_reward_of_a_pipeline_that_packs():
    from hfnoise.worlds.tiny_pipelines.unets import new_vae

    pipe, call = FAMILIES["flux"].build(), FAMILIES["flux"].call(2)
    states, pooled = call["prompt_embeds"], call["pooled_prompt_embeds"]
    stock = type(pipe)

    class Encoding(stock):
        """Without text encoders, which the tiny pipeline has none of."""

        def encode_prompt(self, prompt, *args, **kwargs):
            return states, pooled, torch.zeros(states.shape[1], 3)

    pipe.__class__ = type(stock.__name__, (Encoding,), {"__module__": stock.__module__})
    pipe.vae = new_vae()
    pipe.vae.register_to_config(shift_factor=0.0)
    options = {"height": call["height"], "width": call["width"], "num_inference_steps": 1}
    reward = few_step_reward(pipe, lambda images, prompts: images.mean((1, 2, 3)), PROMPTS, **options)
    noise = torch.randn(2, 4, 4, 4, requires_grad=True)
    found = reward(noise, {"prompt_index": torch.tensor([0, 1])})
    images = pipe(PROMPTS, latents=pack_latents(noise.detach()), output_type="pt", **options).images
    torch.testing.assert_close(found.detach(), images.mean((1, 2, 3)))
    (gradient,) = torch.autograd.grad(found.sum(), noise)
    assert float(gradient.abs().min()) > 0


@pytest.mark.parametrize("channels", [4, 16])
def test_singular_values_are_those_of_the_tiles_of_npnet(channels):
    noise = torch.randn(4, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    rows, columns = tile_shape(channels)
    factors = noise_factors(tiled(noise, rows))
    delta = untiled((factors.u * factors.s[:, None].flip(-1)) @ factors.vh, rows, columns)
    assert diagnose_pairs(noise, delta, range(4)).singular_value_share == pytest.approx(1.0, abs=1e-5)


@pytest.mark.slow
def test_many_pairs_are_looked_at_by_columns():
    count = 50_000
    pairs = datasets.Dataset.from_dict(
        {"prompt": ["zero"] * count, "seed": range(count), "delta": np.zeros((count, 1, 2, 2), dtype=np.float16)}
        | {"score_noise": [0.0] * count, "score_golden": [1.0] * count}
    )
    begun = time.process_time()
    rows = NoisePairRows(pairs, make_states())
    # Row by row it takes more than ten seconds.
    assert time.process_time() - begun < 2.0
    assert torch.equal(rows.margins, torch.ones(count))
