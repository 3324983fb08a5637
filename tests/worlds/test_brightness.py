"""The brightness world: its denoiser is the posterior mean, its samples are what the theory says."""

import pytest
import torch

from hfnoise.pipelines import OneMoreStep, guide
from hfnoise.worlds.brightness import (
    CHANNELS,
    MEANS,
    SPREAD,
    TEXTURE,
    BayesUNet,
    ExactMean,
    brightness_error,
    draw_latents,
    draw_prompts,
    empty_states,
    new_brightness_pipeline,
    prompt_states,
    ramp,
    theory,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def parts(images):
    """The brightness, by how much the first channel is brighter, and by how much a pixel is brighter than that."""
    whole, channels = images.mean((1, 2, 3)), images.mean((2, 3))
    return whole, channels[:, 0] - whole, images[:, 0, 0, 0] - channels[:, 0]


@pytest.mark.parametrize("timestep", [999, 600, 100])
@pytest.mark.parametrize(("prompted", "noise_offset"), [(True, 0.0), (False, 0.0), (True, 0.5)])
def test_the_denoiser_is_the_posterior_mean(timestep, prompted, noise_offset):
    """Its error is orthogonal to whatever it could have known: to 1, to the input, to the prompt."""
    generator = torch.Generator().manual_seed(0)
    prompts = draw_prompts(4000, generator)
    x0 = draw_latents(prompts, 4, generator)
    noise = torch.randn(x0.shape, generator=generator)
    noise += noise_offset * torch.randn(len(x0), CHANNELS, 1, 1, generator=generator)
    unet = BayesUNet(noise_offset=noise_offset)
    power = unet.alphas_cumprod[timestep].float()
    noisy = power.sqrt() * x0 + (1 - power).sqrt() * noise
    states = prompt_states(prompts) if prompted else empty_states(len(prompts))
    estimate = (noisy - (1 - power).sqrt() * unet(noisy, timestep, states).sample) / power.sqrt()
    errors, (brightness, channel, pixel) = parts(x0 - estimate), parts(noisy)
    known = [torch.ones_like(brightness), brightness, brightness**3, channel, pixel]
    known += [(prompts == number).float() for number in range(3)] if prompted else []
    for error in errors:
        for feature in known:
            # Four standard errors.
            bound = 4 * float((error * feature).std()) / len(error) ** 0.5
            assert abs(float((error * feature).mean())) <= bound
    v = BayesUNet(prediction_type="v_prediction", noise_offset=noise_offset)(noisy, timestep, states).sample
    torch.testing.assert_close(v, power.sqrt() * (noisy - power.sqrt() * estimate) / (1 - power).sqrt()
                               - (1 - power).sqrt() * estimate, rtol=1e-3, atol=1e-4)  # fmt: skip


@pytest.mark.slow
def test_samples_are_what_the_theory_says():
    """From white noise and with the exact mean: mean and spread of the bright prompt, of an exact solver."""
    prompts = torch.full((300,), 2)
    pipe = new_brightness_pipeline()
    call = {"prompt_embeds": prompt_states(prompts), "guidance_scale": 1.0, "num_inference_steps": 50}
    call |= {"output_type": "latent", "height": 256, "width": 256}
    for name, start in (("white", None), ("oms", OneMoreStep(ExactMean()))):
        with guide(pipe, initial_noise=start):
            images = pipe(**call, generator=torch.Generator().manual_seed(0)).images
        brightness = images.mean((1, 2, 3))
        power = float(pipe.scheduler.alphas_cumprod[int(pipe.scheduler.timesteps[0])])
        truth = theory(power, 32)
        # Four standard errors, and 50 steps are no exact solver: 0.01.
        bound = 4 * SPREAD / 300**0.5 + 0.01
        assert float(brightness.mean()) == pytest.approx(MEANS[2] * truth[f"{name}_mean"], abs=bound)
        assert float(brightness.std()) == pytest.approx(truth[f"{name}_spread"], rel=0.15)


def test_the_error_is_a_wasserstein_distance():
    from scipy.stats import wasserstein_distance

    generator = torch.Generator().manual_seed(0)
    prompts = draw_prompts(60, generator)
    first, second = (draw_latents(prompts, 2, generator) for _ in range(2))
    a, b = (images.mean((1, 2, 3)).numpy() for images in (first, second))
    parts = [(prompts == number).numpy() for number in prompts.unique()]
    truth = sum(part.mean() * wasserstein_distance(a[part], b[part]) for part in parts)
    assert brightness_error(first, second, prompts) == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("timestep", [999, 300])
def test_the_denoiser_knows_of_light_from_one_side(timestep):
    """Against the posterior of the whole Gaussian, by its covariance."""
    size, slope = 2, 0.4
    numbers = CHANNELS * size * size
    ones = torch.ones(numbers, dtype=torch.float64)
    line = ramp(size).double().expand(CHANNELS, size, size).flatten()
    texture = TEXTURE**2 * (torch.eye(numbers, dtype=torch.float64) - torch.outer(ones, ones) / numbers)
    covariance = SPREAD**2 * torch.outer(ones, ones) + slope**2 * torch.outer(line, line) + texture
    unet = BayesUNet(slope=slope)
    power = float(unet.alphas_cumprod[timestep])
    sample = torch.randn(3, CHANNELS, size, size, generator=torch.Generator().manual_seed(0))
    noisy = power * covariance + (1.0 - power) * torch.eye(numbers, dtype=torch.float64)
    # The grey prompt, whose mean is 0.
    truth = power**0.5 * sample.double().flatten(1) @ torch.linalg.solve(noisy, covariance)
    eps = unet(sample, timestep, prompt_states(torch.ones(3, dtype=torch.long))).sample
    x0 = (sample - (1.0 - power) ** 0.5 * eps) / power**0.5
    torch.testing.assert_close(x0.flatten(1), truth.float(), rtol=1e-4, atol=1e-4)


def test_the_slope_is_drawn():
    prompts = torch.ones(2000, dtype=torch.long)
    flat, lit = (draw_latents(prompts, 8, torch.Generator().manual_seed(0), slope) for slope in (0.0, 0.4))
    slopes = ((lit - flat) * ramp(8)).mean((1, 2, 3))
    # Four standard errors of a spread of 2000.
    assert float(slopes.std()) == pytest.approx(0.4, rel=4 / (2 * 2000) ** 0.5)
    torch.testing.assert_close(lit - flat, (slopes[:, None, None, None] * ramp(8)).expand_as(lit))
