"""The draws of training: their distribution, what they depend on, and the schedules they are used at."""

from pathlib import Path

import numpy
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.training_utils import compute_density_for_timestep_sampling

from hfnoise.trainers.diffusion_noise import draw_levels, draw_training_noise, offset_noise
from hfnoise.trainers.diffusion_schedule import NoiseSchedule

SHAPE = (4, 8, 8)


def test_rows_are_standard_normal_and_independent():
    draws = draw_training_noise(0, 3, list(range(400)), SHAPE, perturbation=True)
    for part in (draws.noise, draws.perturbation):
        assert part.mean().abs() < 0.02 and (part.std() - 1).abs() < 0.02  # 102400 numbers: 0.003 is one deviation
    assert draws.offset.shape == (400, 4, 1, 1) and (draws.offset.std() - 1).abs() < 0.1
    flat = draws.noise.flatten(1)
    correlation = (flat @ flat.T / flat.shape[1]).fill_diagonal_(0).abs().max()
    assert correlation < 0.35  # of 80000 pairs the largest is near 4.5 deviations of 1 / sqrt(256)
    assert (draws.level.mean() - 0.5).abs() < 0.06 and draws.level.min() >= 0 and draws.level.max() < 1
    assert abs(float(torch.corrcoef(torch.stack([draws.level, draws.dropout]))[0, 1])) < 0.2


def test_a_row_depends_on_seed_step_place_and_stream_only():
    one = draw_training_noise(0, 3, [5], SHAPE)
    among = draw_training_noise(0, 3, [4, 5, 6], SHAPE, perturbation=True)
    assert torch.equal(among.noise[1], one.noise[0]) and torch.equal(among.level[1], one.level[0])
    others = [
        draw_training_noise(1, 3, [5], SHAPE), draw_training_noise(0, 4, [5], SHAPE),
        draw_training_noise(0, 3, [6], SHAPE), draw_training_noise(0, 3, [5], SHAPE, stream="eval"),
    ]  # fmt: skip
    assert len({float(draws.noise[0, 0, 0, 0]) for draws in (one, *others)}) == 5


def test_the_state_of_torch_is_left_alone():
    state = torch.get_rng_state()
    draw_training_noise(0, 0, [0, 1], SHAPE)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_offset_is_that_of_kohya_and_diffusers():
    vectors = dict(numpy.load(Path(__file__).parent.parent / "vectors" / "one_more_step" / "dev_weights.npz"))
    noise, draw, out = (torch.as_tensor(vectors[f"offset_{name}"]) for name in ("noise_in", "draw", "out"))
    torch.testing.assert_close(offset_noise(noise, draw, float(vectors["offset_strength"])), out, rtol=0, atol=1e-6)


def test_logit_normal_levels_have_the_distribution_of_diffusers():
    uniform = draw_training_noise(0, 0, list(range(4000)), (1,)).level
    ours = draw_levels(uniform, 1000, 0.5, 0.7).double().sort().values
    stock = compute_density_for_timestep_sampling(
        "logit_normal", 4000, 0.5, 0.7, generator=torch.Generator().manual_seed(0)
    )
    difference = (ours - (stock * 1000).long().double().sort().values).abs()
    assert difference.mean() < 8  # of 1000 levels; uniform ones are 110 off
    assert (draw_levels(uniform, 1000).double().sort().values - ours).abs().mean() > 80
    assert draw_levels(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 10, 0.0).tolist() == [0, 9]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_schedules_equal_stock_add_noise_and_velocity(kind):
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=kind)
    schedule = NoiseSchedule.of(scheduler)
    draws = draw_training_noise(0, 0, list(range(6)), SHAPE)
    latents, levels = draws.noise.flip(0), draw_levels(draws.level, 1000)
    assert torch.equal(
        schedule.noised(latents, draws.noise, levels), scheduler.add_noise(latents, draws.noise, levels)
    )
    velocity = scheduler.get_velocity(latents, draws.noise, levels)
    expected = {"epsilon": draws.noise, "sample": latents, "v_prediction": velocity}[kind]
    assert torch.equal(schedule.target(latents, draws.noise, levels), expected)


# Inside diffusers, where Euler makes an array of a tensor.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_what_set_timesteps_left_behind_is_not_read():
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    ddim = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    before = NoiseSchedule.of(flow)
    flow.set_timesteps(4)
    euler.set_timesteps(4)
    for name in ("signal", "noise", "timesteps"):
        assert torch.equal(getattr(NoiseSchedule.of(flow), name), getattr(before, name))
        assert torch.equal(getattr(NoiseSchedule.of(euler), name), getattr(NoiseSchedule.of(ddim), name))
    noise, latents = torch.randn(2, 1000, 1, generator=torch.Generator().manual_seed(0))
    levels = torch.arange(1000)
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    expected = stock.scale_noise(latents, stock.timesteps, noise)
    torch.testing.assert_close(before.noised(latents, noise, levels), expected, rtol=0, atol=1e-6)
    assert before.snr[0] == 0 and before.signal[0] == 0 and before.timesteps[0] == 1000


@pytest.mark.parametrize(
    ("scheduler", "error", "message"),
    [
        ("ddpm", TypeError, "scheduler is 'ddpm'; give a scheduler of diffusers"),
        (DDIMScheduler, TypeError, "scheduler is <class .*DDIMScheduler'>; give a scheduler of diffusers"),
        (EDMEulerScheduler(), TypeError, "EDMEulerScheduler has no alphas_cumprod"),
        (
            DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), ValueError,
            "prediction_type 'flow_prediction'.*give a FlowMatchEulerDiscreteScheduler",
        ),
    ],
)  # fmt: skip
def test_schedulers_that_say_nothing_about_training(scheduler, error, message):
    with pytest.raises(error, match=message):
        NoiseSchedule.of(scheduler)
