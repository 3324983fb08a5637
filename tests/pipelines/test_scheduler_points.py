"""The noise level that a scheduler is at: our x0 is the one that the scheduler itself works with, at every step."""

import diffusers
import pytest
import torch

from hfnoise.pipelines.scheduler_points import denoising_point, is_first_evaluation, prediction_type, schedule_levels

# diffusers hands tensors to numpy in ways that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
# What a step returns as pred_original_sample, or what convert_model_output makes of the output.
SCHEDULERS = [
    ("DDIMScheduler", {"clip_sample": False}),
    ("DDIMScheduler", {"clip_sample": False, "prediction_type": "v_prediction"}),
    ("DDIMScheduler", {"clip_sample": False, "prediction_type": "sample"}),
    ("DDPMScheduler", {"clip_sample": False}),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "prediction_type": "v_prediction"}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {}),
    ("LMSDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "prediction_type": "v_prediction"}),
    ("DPMSolverMultistepScheduler", FLOW),
    ("DPMSolverSinglestepScheduler", {}),
    ("UniPCMultistepScheduler", {}),
    ("UniPCMultistepScheduler", FLOW),
]


@pytest.mark.parametrize(("name", "options"), SCHEDULERS)
def test_x0_is_that_of_the_scheduler(name, options):
    generator = torch.Generator().manual_seed(0)
    scheduler = getattr(diffusers, name)(**STABLE_DIFFUSION, **options)
    scheduler.set_timesteps(5)
    latents = torch.randn(1, 4, 4, 4, generator=generator) * scheduler.init_noise_sigma
    second_evaluations = 0
    for timestep in scheduler.timesteps:
        model_input = scheduler.scale_model_input(latents, timestep)
        output = torch.randn(1, 4, 4, 4, generator=generator)
        point = denoising_point(scheduler, timestep)
        second_evaluations += not is_first_evaluation(scheduler)
        converts = hasattr(scheduler, "convert_model_output")
        if converts:
            if scheduler.step_index is None:
                scheduler._init_step_index(timestep)
            theirs = scheduler.convert_model_output(output, sample=latents)
        result = scheduler.step(output, timestep, latents)
        theirs = theirs if converts else result.pred_original_sample
        if point.prediction_type != "sample" or not converts:
            ours = point.denoised(model_input, output)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
        latents = result.prev_sample
    assert (second_evaluations > 0) == (name in ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler"))


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_flow_matching_walks_straight_lines(name):
    """A step moves along the velocity by the difference of two sigmas: x0 = x - sigma v is where it would end."""
    scheduler = getattr(diffusers, name)(shift=3.0)
    scheduler.set_timesteps(4)
    image, noise = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0))
    latents = noise
    for timestep in scheduler.timesteps:
        point = denoising_point(scheduler, timestep)
        assert point.prediction_type == "flow_prediction"
        if name == "FlowMatchEulerDiscreteScheduler":
            assert float(timestep) / 1000 == pytest.approx(point.sigma)
        torch.testing.assert_close(point.denoised(latents, noise - image), image, rtol=1e-4, atol=1e-4)
        latents = scheduler.step(noise - image, timestep, latents).prev_sample


def test_refused():
    for name in (
        "EDMEulerScheduler",
        "CosineDPMSolverMultistepScheduler",
        "IPNDMScheduler",
        "CMStochasticIterativeScheduler",
    ):
        scheduler = getattr(diffusers, name)
        try:
            scheduler = scheduler()
        except ImportError:  # torchsde
            continue
        with pytest.raises(ValueError, match="space='model'"):
            prediction_type(scheduler)
    with pytest.raises(ValueError, match="use_flow_sigmas"):
        prediction_type(diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True))
    with pytest.raises(ValueError, match="noise levels"):
        denoising_point(diffusers.DDIMScheduler(), torch.tensor([1, 2]))
    finished = diffusers.FlowMatchEulerDiscreteScheduler()
    finished.set_timesteps(2)
    finished._step_index = 7
    with pytest.raises(ValueError, match="set_timesteps before every run"):
        denoising_point(finished, 1)


def test_levels_tell_schedules_apart():
    schedulers = [diffusers.FlowMatchEulerDiscreteScheduler(shift=shift) for shift in (1.0, 3.0)]
    schedulers.append(diffusers.DDIMScheduler())
    for scheduler in schedulers:
        scheduler.set_timesteps(4)
    levels = [schedule_levels(scheduler) for scheduler in schedulers]
    assert levels[0] != levels[1] and levels[2] == [750.0, 500.0, 250.0, 0.0]
