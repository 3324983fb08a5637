"""Whether a pipeline has the gap that One More Step closes, in numbers of its run."""

from __future__ import annotations

import diffusers
import pytest

from hfnoise.pipelines import start_gap
from hfnoise.worlds.digits_pipeline import new_digits_pipeline
from hfnoise.worlds.tiny_pipelines import FAMILIES

# diffusers 0.42 makes NumPy arrays of tensors in set_timesteps.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


@pytest.fixture(scope="module")
def pipe():
    return new_digits_pipeline(width=8)


# The table of the specification: "leading" starts before the last timestep, and the earlier the fewer the steps.
@pytest.mark.parametrize(
    ("steps", "timestep", "ratio"), [(4, 751, 242), (10, 901, 58.2), (20, 951, 33.7), (50, 981, 23.8)]
)
def test_ratio_of_stable_diffusion_at_512_pixels(pipe, steps, timestep, ratio):
    gap = start_gap(pipe, steps, height=64 * pipe.vae_scale_factor, width=64 * pipe.vae_scale_factor)
    assert (gap.timestep, gap.size) == (timestep, (64, 64))
    assert gap.brightness_snr == pytest.approx(ratio, rel=5e-3)
    assert "something to repair" in gap.verdict


def test_scales_do_not_depend_on_the_state_space_of_the_scheduler(pipe, monkeypatch):
    ddim = start_gap(pipe, 20)
    euler = diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="leading")
    monkeypatch.setattr(pipe, "scheduler", euler)
    assert start_gap(pipe, 20).brightness_snr == pytest.approx(ddim.brightness_snr, rel=1e-3)


def test_the_schedule_of_the_pipeline_is_left_alone(pipe):
    before = pipe.scheduler.timesteps.clone()
    start_gap(pipe, 7)
    assert pipe.scheduler.timesteps.equal(before)


def test_no_gap_needs_no_size():
    flux = FAMILIES["flux"].build()
    gap = start_gap(flux)
    assert "flow matching" in gap.verdict
    assert str(gap).endswith(gap.verdict)


def test_zero_terminal_snr_has_no_gap(pipe, monkeypatch):
    scheduler = diffusers.DDIMScheduler(**SD, timestep_spacing="trailing", rescale_betas_zero_snr=True)
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    assert "signal-to-noise ratio of 0" in start_gap(pipe, 20).reason


def test_a_linear_schedule_at_small_latents_has_next_to_none():
    gap = start_gap(FAMILIES["dit"].build(), 20)
    assert gap.verdict.startswith("next to nothing")


def test_a_pipeline_without_scheduler_or_size_says_so(pipe, monkeypatch):
    with pytest.raises(ValueError, match="has no scheduler"):
        start_gap(object())
    unsized = diffusers.UNet2DConditionModel.from_config({**pipe.unet.config, "sample_size": None})
    monkeypatch.setattr(pipe, "unet", unsized)
    with pytest.raises(ValueError, match="give height and width"):
        start_gap(pipe, 20)
