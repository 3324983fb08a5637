"""The claims in miniature: white noise makes samples mid-bright, One More Step repairs it, the prior the spread."""

import json

import pytest
import torch

from hfnoise.benchmarks import one_more_step as benchmark
from hfnoise.benchmarks import one_more_step_starts as places
from hfnoise.pipelines import BrightnessOffset, OneMoreStep, TerminalPrior, guide
from hfnoise.worlds.brightness import (
    MEANS,
    ExactMean,
    brightness_error,
    draw_latents,
    draw_prompts,
    empty_states,
    new_brightness_pipeline,
    ramp,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def errors(module, *names, images=200):
    generator = torch.Generator().manual_seed(0)
    prompts = draw_prompts(images, generator)
    reference, other = (draw_latents(prompts, 32, generator) for _ in range(2))
    pipe, every = new_brightness_pipeline(), places.starts(module, other)
    draws = (benchmark.draw(pipe, prompts, 32, 20, every[name]) for name in names)
    return [brightness_error(drawn, reference, prompts) for drawn in draws]


def test_with_the_exact_mean():
    names = (places.WHITE, places.EXACT, places.EXACT_MATCHED)
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
def test_the_benchmark(tmp_path, monkeypatch):
    """With a module that has hardly been trained it runs, and says that the claims are missed."""
    size = {"images": 60, "steps": 4, "size": 16, "train_steps": 10}
    monkeypatch.setitem(benchmark.PRESETS, "small", size)
    options = ["--preset", "small", "--seeds", "0", "--schedulers", "DDIM", "Euler", "--output_dir", str(tmp_path)]
    assert benchmark.main(options) == 1
    found = json.loads((tmp_path / "one_more_step.json").read_text())
    assert not all(passed for _, passed in found["acceptance"])
    ddim, euler = (found["runs"][0][name] for name in ("DDIM", "Euler"))
    # Official code differs by the factor init_noise_sigma, which is 1 with DDIM.
    for theirs, ours in ((places.OFFICIAL, places.ARITHMETIC), (places.SING, places.OMS)):
        assert ddim[theirs] == pytest.approx(ddim[ours], rel=1e-5)
        assert euler[ours]["mean_bright"] == pytest.approx(ddim[ours]["mean_bright"], abs=0.01)
        assert abs(euler[theirs]["mean_bright"] - ddim[theirs]["mean_bright"]) > 0.02
    assert (tmp_path / "one_more_step.png").stat().st_size > 10_000


def slope_spreads(*frequencies, images=400, spread=0.4, size=32):
    """Return the spread of the light from one side in images from priors of these frequencies; the truth is `spread`.

    The priors are fitted on real images of half the size, 0 is none, and the mean of a prompt is exact.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = draw_prompts(images, generator)
    small = draw_latents(prompts, size // 2, generator, spread)
    residuals = small - torch.tensor(MEANS)[prompts][:, None, None, None]
    pipe = new_brightness_pipeline(size=size, slope=spread)
    priors = [TerminalPrior.fit(residuals, frequencies=one) if one else False for one in frequencies]
    drawn = [
        benchmark.draw(pipe, prompts, size, 20, OneMoreStep(ExactMean(), terminal_prior=prior)) for prior in priors
    ]
    return [float((each * ramp(size)).mean((1, 2, 3)).std()) for each in drawn]


@pytest.mark.slow
def test_light_from_one_side_needs_frequencies_above_the_mean():
    none, means, waves = slope_spreads(0, 1, 2, spread=0.4)
    # Standard error of a spread of 400: 3.5 %. A flat start leaves less than half, whether it scatters or not.
    assert means == pytest.approx(none, rel=0.05) and means < 0.5 * 0.4
    assert waves == pytest.approx(0.4, rel=0.1)
