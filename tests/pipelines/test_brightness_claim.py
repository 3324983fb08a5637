"""The claims in miniature: white noise makes samples mid-bright, One More Step repairs it, the prior the spread."""

import pytest
import torch

from hfnoise.benchmarks import one_more_step as benchmark
from hfnoise.pipelines import BrightnessOffset, guide
from hfnoise.worlds.brightness import (
    brightness_error,
    draw_latents,
    draw_prompts,
    empty_states,
    new_brightness_pipeline,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def errors(module, *names, images=200):
    generator = torch.Generator().manual_seed(0)
    prompts = draw_prompts(images, generator)
    reference, other = (draw_latents(prompts, 32, generator) for _ in range(2))
    pipe, every = new_brightness_pipeline(), benchmark.starts(module, other)
    draws = (benchmark.draw(pipe, prompts, 32, 20, every[name]) for name in names)
    return [brightness_error(drawn, reference, prompts) for drawn in draws]


def test_with_the_exact_mean():
    names = (benchmark.WHITE, benchmark.EXACT, benchmark.EXACT_MATCHED)
    white, oms, matched = errors(torch.nn.Identity(), *names, images=100)
    assert oms < benchmark.OMS_SHARE * white and matched < oms


@pytest.mark.slow
def test_brightness_offset():
    """Without any prompt: images about as bright as asked for."""
    pipe = new_brightness_pipeline()
    call = {"prompt_embeds": empty_states(100), "guidance_scale": 1.0, "num_inference_steps": 20}
    call |= {"output_type": "latent", "height": 256, "width": 256}
    for value in (-0.7, 0.7):
        with guide(pipe, initial_noise=BrightnessOffset(value, direction=[1.0] * 4)):
            images = pipe(**call, generator=torch.Generator().manual_seed(0)).images
        assert float(images.mean()) == pytest.approx(value, abs=0.1)


@pytest.mark.slow
def test_brightness_offset_of_a_trained_model():
    """The digits, whose background is black and whose strokes are not white: by the VAE's measure of brightness."""
    from hfnoise.worlds.digits_checkpoints import load_digits_pipeline

    pipe = load_digits_pipeline()
    pipe.set_progress_bar_config(disable=True)
    means = []
    for value in (-1.0, 0.0, 1.0):
        generator = torch.Generator().manual_seed(0)
        call = {"prompt": ["the digit seven", "the digit zero"] * 4, "num_inference_steps": 10, "output_type": "pt"}
        with guide(pipe, initial_noise=BrightnessOffset(value)):
            means.append(float(pipe(**call, generator=generator).images.mean()))
    assert means[0] + 0.02 < means[1] < means[2] - 0.02


@pytest.mark.slow
def test_with_a_trained_module():
    module = benchmark.train_module(120, seed=0)
    white, oms, matched = errors(module, benchmark.WHITE, benchmark.OMS, benchmark.MATCHED)
    assert oms < benchmark.OMS_SHARE * white and matched < benchmark.PRIOR_SHARE * oms
