"""x0 as guiders see it, and APG on it, against the scheduler's own sample and timestep in float64: every family."""

import pytest

from hfnoise.pipelines.pipeline_layouts import layout_of
from hfnoise.worlds.tiny_pipelines import FAMILIES, STOCK_WARNINGS
from hfnoise.worlds.tiny_pipelines.unets import new_scheduler
from tests.pipelines.watched_runs import WatchedAdaptive, WatchedProjected, projected_in_float64, watched_run

FAST = ("sd-ddim", "wan-2.1")
pytestmark = [
    *(pytest.mark.filterwarnings(warning) for warning in STOCK_WARNINGS),
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),
]
# No x0 from their schedulers; two scales; the scheduler steps a doubled batch.
OTHERS = ("cosmos", "mochi", "sd-instruct-pix2pix", "dit")
TWICE = ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler")


def cases():
    for name, family in FAMILIES.items():
        if family.guided and name not in OTHERS:
            yield pytest.param(name, "", {}, id=name, marks=[] if name in FAST else pytest.mark.slow)
    for name in ("sd-ddim", "sd-img2img"):
        for scheduler, settings in (
            ("DDIMScheduler", {"prediction_type": "v_prediction"}),
            ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
            ("EulerAncestralDiscreteScheduler", {}),
            ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
            ("DPMSolverSinglestepScheduler", {}),
            ("DEISMultistepScheduler", {}),
            ("UniPCMultistepScheduler", {}),
            ("PNDMScheduler", {"skip_prk_steps": True}),
            ("HeunDiscreteScheduler", {}),
            ("KDPM2DiscreteScheduler", {}),
            ("LMSDiscreteScheduler", {}),
            ("DDPMScheduler", {}),
            ("LCMScheduler", {}),
        ):
            # The others begin in mid-schedule in the same way.
            if name == "sd-img2img" and not scheduler.startswith(("DDIM", "DPMSolverM", "PNDM", "Heun")):
                continue
            label = f"{name}-{scheduler}-{settings.get('prediction_type', '')}"
            yield pytest.param(name, scheduler, settings, id=label, marks=pytest.mark.slow)


def built(name, scheduler, settings):
    import diffusers

    pipe = FAMILIES[name].build()
    if scheduler in TWICE or scheduler == "LMSDiscreteScheduler":
        settings = {**settings, "timestep_spacing": "linspace"}
    if scheduler == "DPMSolverSinglestepScheduler":
        pipe.scheduler = getattr(diffusers, scheduler)()
    elif scheduler:
        pipe.scheduler = new_scheduler(scheduler, **settings)
    return pipe


@pytest.mark.parametrize(("name", "scheduler", "settings"), list(cases()))
def test_x0_is_the_schedulers(name, scheduler, settings):
    """The guided x0 follows from both of the guider's, since all are affine in the prediction."""
    family = FAMILIES[name]
    pipe = built(name, scheduler, settings)
    seen, _ = watched_run(pipe, family.call(2), WatchedAdaptive(threshold=1.0, min_steps=1.0))
    assert len(seen) >= 4
    for number, one in enumerate(seen):
        cond, uncond = (x.double() for x in one.x0)
        for mine, output in ((cond, one.cond), (uncond, one.uncond)):
            truth = one.truth(output)
            assert (mine - truth).abs().max() <= 2e-5 * truth.abs().max(), number


PARAMETERS = {"eta": 0.25, "norm_threshold": 3.0, "momentum": -0.5}


@pytest.mark.parametrize(("name", "scheduler", "settings"), list(cases()))
def test_projected_guidance_is_the_formula_in_float64(name, scheduler, settings):
    """Momentum runs across steps, advances once where a step has two evaluations, ends with a model of Wan 2.2."""
    family = FAMILIES[name]
    pipe = built(name, scheduler, settings)
    if layout_of(type(pipe)).rescaled:
        pytest.skip("the pipeline rescales what was guided")
    guider = WatchedProjected(eta=0.25, norm_threshold=3.0, momentum=-0.5)
    seen, _ = watched_run(pipe, family.call(2), guider)
    scale = family.call(2)[family.scale_name]
    before = running = None
    for number, one in enumerate(seen):
        cond, uncond = one.truth(one.cond), one.truth(one.uncond)
        first = not (scheduler in TWICE or name == "sd-heun") or number % 2 == 0
        if name == "wan-2.2" and number == 2:
            running, scale = None, family.call(2)["guidance_scale_2"]
        before = running if first else before
        update, average = projected_in_float64(cond, uncond, 0.25, 3.0, (-0.5, before))
        running = average if first else running
        truth = cond + (scale - 1) * update
        assert (one.truth(one.guided) - truth).abs().max() <= 4e-6 * truth.abs().max(), number
