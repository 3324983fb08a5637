"""Calls of a guided pipeline on digits: whose scale counts, which steps run, bad predictions, callbacks."""

import pytest
import torch

from hfnoise.pipelines import (
    AdaptiveGuidance,
    GuidanceRecorder,
    InitialNoise,
    LinearGuidance,
    ProjectedGuidance,
    StartState,
    guide,
)
from hfnoise.worlds.tiny_pipelines import STOCK_WARNINGS
from tests.pipelines.digits_calls import PROMPTS, guided, never, run

pytestmark = [pytest.mark.filterwarnings(warning) for warning in STOCK_WARNINGS]
slow = pytest.mark.slow


# Scales. ----------------------------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_scales_up_to_one_are_the_stock_pipeline(pipe, scale):
    expected = run(pipe, guidance_scale=scale)
    for guider in (AdaptiveGuidance(), ProjectedGuidance(momentum=-0.5), LinearGuidance()):
        assert torch.equal(guided(pipe, guider, guidance_scale=scale), expected)
        assert guider.report.rows == (2,) * 4 and guider.report.saved == 0
    if scale == 1.0:
        assert torch.equal(guided(pipe, AdaptiveGuidance(1.0)), expected)


def test_the_call_beats_the_guider_which_beats_the_default(pipe):
    assert torch.equal(guided(pipe, never()), run(pipe))
    assert torch.equal(guided(pipe, never(guidance_scale=3.0)), run(pipe, guidance_scale=3.0))
    guider = never(guidance_scale=3.0)
    assert torch.equal(guided(pipe, guider, guidance_scale=5.0), run(pipe, guidance_scale=5.0))
    assert guider.guidance_scale == 3.0
    # Positional, too.
    with guide(pipe, guider):
        generator = [torch.Generator().manual_seed(i) for i in range(2)]
        found = pipe(PROMPTS, None, None, 4, None, None, 5.0, generator=generator, output_type="latent").images
    assert torch.equal(found, run(pipe, guidance_scale=5.0))
    # 7.5 that was asked for is no default.
    inner = never(inner=ProjectedGuidance(7.5, eta=1.0))
    assert torch.equal(guided(pipe, inner), run(pipe, guidance_scale=7.5))


@slow
def test_guidance_rescale_of_the_call_and_of_the_guider(pipe):
    rescaled = run(pipe, guidance_rescale=0.7)
    assert not torch.equal(rescaled, run(pipe))
    assert torch.equal(guided(pipe, never(guidance_rescale=0.7)), rescaled)
    assert torch.equal(guided(pipe, never(guidance_rescale=0.2), guidance_rescale=0.7), rescaled)


@slow
@pytest.mark.parametrize(
    "arguments",
    [
        {"negative_prompt": ["two", "seven"]},
        {"num_images_per_prompt": 2},
        {"guidance_rescale": 0.7},
        {"eta": 0.5},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_arguments_of_the_call_mean_what_they_mean(pipe, arguments):
    assert torch.equal(guided(pipe, never(), **arguments), run(pipe, **arguments))
    guider = AdaptiveGuidance(threshold=0.01, min_steps=0.0)
    guided(pipe, guider, **arguments)
    batch = guider.report.batch
    assert guider.report.rows == (2 * batch, batch, batch, batch)


@slow
def test_prompt_embeddings_only(pipe):
    embeds = [torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    call = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    generator = [torch.Generator().manual_seed(i) for i in range(2)]
    expected = run(pipe, None, **call, generator=generator)
    generator = [torch.Generator().manual_seed(i) for i in range(2)]
    assert torch.equal(guided(pipe, never(), None, **call, generator=generator), expected)


# Steps. -----------------------------------------------------------------------------------------------------------


@slow
def test_start_stop_and_enabled(pipe):
    """Outside of them a step is conditional, as with every guider of diffusers, and its rows are saved."""
    for options, rows in (
        ({"start": 0.5}, (2, 2, 4, 4)),
        ({"stop": 0.5}, (4, 4, 2, 2)),
        ({"enabled": False}, (2, 2, 2, 2)),
    ):
        for guider in (never(**options), ProjectedGuidance(**options)):
            images = guided(pipe, guider)
            assert guider.report.rows == rows
            if options == {"enabled": False}:
                assert torch.equal(images, run(pipe, guidance_scale=1.0))


@slow
def test_min_steps_and_patience(pipe):
    for options, stop in (({"min_steps": 0.0}, 1), ({"min_steps": 0.75}, 3), ({"min_steps": 0.0, "patience": 2}, 2)):
        guider = AdaptiveGuidance(threshold=0.01, **options)
        guided(pipe, guider)
        assert guider.report.stop_steps == (stop, stop)
        assert guider.report.rows == (4,) * stop + (2,) * (4 - stop)
    guider = AdaptiveGuidance(threshold=0.01, min_steps=0.0, at_detection="cond")
    assert torch.equal(guided(pipe, guider), run(pipe, guidance_scale=1.0))
    assert guider.report.stop_steps == (0, 0) and guider.report.rows == (4, 2, 2, 2)


@slow
def test_a_batch_that_stops_together(pipe):
    """per_sample=False: one cosine, every row or none."""
    guider = AdaptiveGuidance(threshold=0.01, min_steps=0.0, per_sample=False)
    guided(pipe, guider)
    similarity = guider.report.similarity
    assert torch.equal(similarity[0, 0], similarity[0, 1]) and guider.report.rows == (4, 2, 2, 2)


# Bad predictions. -------------------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("make", [AdaptiveGuidance, ProjectedGuidance, LinearGuidance], ids=lambda m: m.__name__)
def test_nan_in_one_sample_leaves_the_other_alone(pipe, make):
    options = {"threshold": 0.5, "min_steps": 0.0} if make is AdaptiveGuidance else {}
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    clean = guided(pipe, make(**options), latents=latents.clone())
    latents[0] = float("nan")
    guider = make(**options)
    images = guided(pipe, guider, latents=latents)
    assert images[0].isnan().all()
    torch.testing.assert_close(images[1], clean[1], rtol=1e-4, atol=1e-5)
    assert guider.report.stop_steps[0] is None
    if make is AdaptiveGuidance:  # the other one did converge
        assert guider.report.rows[-1] == 3


@slow
def test_predictions_of_zero(pipe):
    """They agree: a step of guidance, then none; APG has no direction to project on, and divides by nothing."""
    pipe.unet.register_forward_hook(lambda module, args, output: (torch.zeros_like(output[0]),))
    guider = AdaptiveGuidance(threshold=1.0, min_steps=0.0, space="model")
    assert guided(pipe, guider).isfinite().all() and guider.report.stop_steps == (1, 1)
    assert guided(pipe, ProjectedGuidance(norm_threshold=1.0, momentum=-0.5)).isfinite().all()


# Callbacks. -------------------------------------------------------------------------------------------------------


@slow
def test_the_stock_cut_off_composes(pipe):
    from diffusers.callbacks import SDCFGCutoffCallback

    def cut_off():
        return SDCFGCutoffCallback(cutoff_step_ratio=0.5)

    expected = run(pipe, PROMPTS[:1], callback_on_step_end=cut_off())
    guider = never()
    assert torch.equal(guided(pipe, guider, PROMPTS[:1], callback_on_step_end=cut_off()), expected)
    assert guider.report.rows == (2, 2, 2, 1)


@slow
def test_interrupted(pipe):
    def stop(pipe, number, timestep, values):
        pipe._interrupt = number == 1
        return values

    guider = never()
    assert torch.equal(guided(pipe, guider, callback_on_step_end=stop), run(pipe, callback_on_step_end=stop))
    assert guider.report.rows == (4, 4)


def test_a_changed_batch_is_told(pipe):
    def shrink(pipe, step, timestep, values):
        return {"latents": values["latents"][:1], "prompt_embeds": values["prompt_embeds"][1::2]}

    call = {"callback_on_step_end": shrink, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    with pytest.raises(ValueError, match="did a callback change the batch"):
        guided(pipe, never(), **call)
    assert torch.equal(guided(pipe, never()), run(pipe))


@slow
def test_a_scheduler_without_timesteps_in_mid_run_is_told(pipe):
    from diffusers import DDIMScheduler

    def swap(pipe, step, timestep, values):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.scheduler.set_timesteps(1)
        return values

    with pytest.raises(ValueError, match="takes over in mid-run"):
        guided(pipe, never(), callback_on_step_end=swap)


# Start and subclasses. --------------------------------------------------------------------------------------------


class Shifted(InitialNoise):
    def refine(self, unit_noise, context):
        return StartState(unit_noise + 1)


def test_a_prepare_latents_of_ones_own_is_put_back(pipe):
    stock = pipe.prepare_latents
    mine = lambda *args, **kwargs: stock(*args, **kwargs) * 0.5  # noqa: E731
    pipe.prepare_latents = mine
    expected = run(pipe)
    with guide(pipe, never(), initial_noise=Shifted()):
        run(pipe)
    assert pipe.__dict__["prepare_latents"] is mine
    assert torch.equal(guided(pipe, never()), expected)


@slow
def test_a_subclass_that_hands_its_arguments_on(pipe):
    class Mine(type(pipe)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    expected = run(pipe, guidance_scale=3.0)
    pipe.__class__ = Mine
    assert torch.equal(guided(pipe, never(guidance_scale=5.0), guidance_scale=3.0), expected)
    assert torch.equal(guided(pipe, never(guidance_scale=3.0)), expected)
    assert torch.equal(guided(pipe, never()), run(pipe)) and type(pipe) is Mine


# Linear estimates. ------------------------------------------------------------------------------------------------


@slow
def test_holding_and_fitted_estimates(pipe, tmp_path):
    """Fit, save, load; refused for another scale, number of steps, schedule and model."""
    holding = LinearGuidance()
    images = guided(pipe, holding)
    assert holding.report.rows == (4, 2, 4, 2)
    assert not torch.equal(images, run(pipe))
    recorder = GuidanceRecorder()
    for _ in range(2):
        assert torch.equal(guided(pipe, recorder), run(pipe))
    LinearGuidance(coefficients=recorder.coefficients()).save_pretrained(tmp_path)
    fitted = LinearGuidance.from_pretrained(tmp_path)
    assert fitted.order == 2
    # Fitted on the very run that it estimates, it is nearer than holding.
    error, held = ((one - run(pipe)).norm() for one in (guided(pipe, fitted), images))
    assert fitted.report.rows == (4, 2, 4, 2) and error < held
    for call in ({"guidance_scale": 5.0}, {"num_inference_steps": 5}):
        with pytest.raises(ValueError, match="coefficients"):
            guided(pipe, fitted, **call)
    config = pipe.scheduler.config
    pipe.scheduler = type(pipe.scheduler).from_config(config, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="coefficients"):
        guided(pipe, fitted)
    pipe.scheduler = type(pipe.scheduler).from_config(config)
    guided(pipe, fitted)
    with torch.no_grad():
        next(pipe.unet.parameters()).mul_(2)
    with pytest.raises(ValueError, match="coefficients"):
        guided(pipe, fitted)
