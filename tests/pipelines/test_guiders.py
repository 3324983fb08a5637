"""Our guiders, driven by hand: golden vectors on x0, composition, configuration, warnings, refusals."""

import json
import warnings

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
from diffusers.guiders import BaseGuidance, ClassifierFreeGuidance

from hfnoise.guidance import EstimateKey, LinearCoefficients
from hfnoise.pipelines import (
    AdaptiveGuidance,
    AutoGuider,
    GuidanceRecorder,
    LinearGuidance,
    ProjectedGuidance,
)
from tests.guidance.conftest import FOLDER

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

KEY = EstimateKey("model", "DDIMScheduler", 2, 7.5, "00")
COEFFICIENTS = LinearCoefficients(KEY, ((0.0, 0.0), (0.9, 0.0)), ridge=1e-3)


class Replay(torch.nn.Module):
    """A denoiser that returns what it is told, for the rows that it is given."""

    def forward(self, hidden_states, output):
        return output


DENOISER = Replay()


def step(guider, number, count, timestep, model_input, cond, uncond):
    """One step as the modular pipelines make it; return the guided prediction."""
    denoiser = DENOISER
    guider.set_state(step=number, num_inference_steps=count, timestep=timestep)
    batches = guider.prepare_inputs({"output": (cond, uncond)})
    for batch in batches:
        guider.prepare_models(denoiser)
        batch.noise_pred = denoiser(model_input, output=batch.output)
        guider.cleanup_models(denoiser)
    assert not denoiser._forward_pre_hooks
    return guider(batches)[0]


@pytest.fixture(scope="module")
def apg_x0():
    import numpy

    return dict(numpy.load(FOLDER / "dev_apg_x0.npz"))


@pytest.mark.parametrize("parameters", ["p0", "p1", "p2", "p3"])
@pytest.mark.parametrize("name", ["eps", "v", "flow"])
def test_projected_guidance_equals_the_golden_vectors(apg_x0, name, parameters):
    """The noise level comes from the scheduler that is bound, step by step."""
    scale, eta, norm_threshold, momentum = (float(number) for number in apg_x0[parameters])
    momentum = None if momentum != momentum else momentum
    guider = ProjectedGuidance(scale, eta=eta, norm_threshold=norm_threshold, momentum=momentum)
    if name == "flow":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        scheduler.set_timesteps(sigmas=apg_x0["sigma_flow"].tolist())
    else:
        kind = {"eps": "epsilon", "v": "v_prediction"}[name]
        scheduler = EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind
        )
        scheduler.set_timesteps(sigmas=[*apg_x0["sigma_ve"].tolist(), 0.0])
    guider.bind(scheduler)
    for number, timestep in enumerate(scheduler.timesteps):
        cond, uncond, model_input = (
            torch.as_tensor(apg_x0[key][number]).float() for key in ("cond", "uncond", "x_model_input")
        )
        guided = step(guider, number, 5, timestep, model_input, cond, uncond)
        truth = torch.as_tensor(apg_x0[f"{parameters}_{name}"][number])
        assert (guided - truth).abs().max() <= 2e-6 * truth.abs().max()
        scheduler.step(guided, timestep, model_input)


@pytest.mark.parametrize(
    "options", [{}, {"guidance_rescale": 0.7}, {"use_original_formulation": True}, {"start": 0.5}]
)
def test_neutral_settings_are_stock_to_the_bit(options):
    """In real pipelines: test_guiders_modular.py."""
    x, cond, uncond = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    stock = ClassifierFreeGuidance(guidance_scale=5.0, **options)
    for guider in (
        AdaptiveGuidance(5.0, space="model", min_steps=1.0, **options),
        AdaptiveGuidance(5.0, space="model", min_steps=1.0, inner=ProjectedGuidance(eta=1.0), **options),
        ProjectedGuidance(5.0, eta=1.0, momentum=0.0, norm_threshold=0.0, **options),
    ):
        for number in range(4):
            expected = step(stock, number, 4, 0, x, cond, uncond)
            assert torch.equal(step(guider, number, 4, 0, x, cond, uncond), expected)


def test_sixteen_bits_in_and_out(apg_x0):
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(5)
    guider = ProjectedGuidance(7.5, norm_threshold=5.0).bind(scheduler)
    inputs = [torch.as_tensor(apg_x0[key][0]).bfloat16() for key in ("x_model_input", "cond", "uncond")]
    low = step(guider, 0, 5, scheduler.timesteps[0], *inputs)
    full = step(guider, 0, 5, scheduler.timesteps[0], *(tensor.float() for tensor in inputs))
    assert low.dtype == torch.bfloat16 and full.dtype == torch.float32
    assert torch.equal(low, full.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(step(guider, 0, 5, scheduler.timesteps[0], *inputs), low)


def test_more_channels_in_than_out(apg_x0):
    """Inpainting: the mask and the image after the latents do not enter x0."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(5)
    x, cond, uncond = (torch.as_tensor(apg_x0[key][0]).float() for key in ("x_model_input", "cond", "uncond"))
    more = torch.cat([x, torch.full_like(x, 7.0)], dim=1)
    guider = ProjectedGuidance().bind(scheduler)
    timestep = scheduler.timesteps[0]
    assert torch.equal(step(guider, 0, 5, timestep, more, cond, uncond), step(guider, 0, 5, timestep, x, cond, uncond))
    with pytest.raises(ValueError, match="x0 does not follow"):
        step(guider, 0, 5, timestep, x[:, :3], cond, uncond)


def test_momentum_advances_once_per_step_of_heun():
    """A second evaluation sees the momentum of the step before: repeating it changes nothing."""
    scheduler = HeunDiscreteScheduler()
    scheduler.set_timesteps(3)
    guider = ProjectedGuidance(5.0, momentum=-0.75, norm_threshold=0.0).bind(scheduler)
    x, cond, uncond = torch.randn(3, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    averages = []
    for number, timestep in enumerate(scheduler.timesteps):
        x_in = scheduler.scale_model_input(x, timestep)
        first = scheduler.state_in_first_order
        guided = step(guider, number, len(scheduler.timesteps), timestep, x_in, cond, uncond)
        averages.append((first, guider._momentum_state._average.clone()))
        x = scheduler.step(guided, timestep, x).prev_sample
    for (_, before), (first, after) in zip(averages, averages[1:], strict=False):
        assert torch.equal(before, after) is not first


def test_nan_never_converges():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(4)
    guider = AdaptiveGuidance(3.0, threshold=1e-6, min_steps=0.0).bind(scheduler)
    x, cond = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    broken = cond.clone()
    broken[1, 0, 0] = float("nan")
    for number, timestep in enumerate(scheduler.timesteps[:2]):
        step(guider, number, 4, timestep, x, broken, broken)
    assert guider.report.stop_steps == (1, None)


def test_at_zero_terminal_snr_the_first_step_is_not_measured():
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    adaptive = AdaptiveGuidance(3.0, threshold=1e-6, min_steps=0.0, inner=ProjectedGuidance(norm_threshold=1.0))
    adaptive.bind(scheduler)
    x, cond, uncond = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    guided = step(adaptive, 0, 4, scheduler.timesteps[0], x, cond, uncond)
    torch.testing.assert_close(guided, uncond + 3.0 * (cond - uncond))
    assert adaptive.report.similarity.isnan().all()


GUIDERS = [
    AdaptiveGuidance(5.0, threshold=0.99, space="v", min_steps=0.2, patience=2, per_sample=False, stop=0.8),
    AdaptiveGuidance(inner=LinearGuidance(policy="full_then_estimate", inner=ProjectedGuidance(4.0, eta=0.5))),
    ProjectedGuidance(15.0, norm_threshold=15.0, momentum=-0.5, norm_dims=(-1, -2), guidance_rescale=0.3),
    LinearGuidance(7.5, coefficients=COEFFICIENTS),
]


@pytest.mark.parametrize("guider", GUIDERS, ids=lambda guider: type(guider).__name__)
def test_saved_and_loaded(guider, tmp_path):
    guider.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "guider_config.json").read_text())
    assert stored["_class_name"] == type(guider).__name__
    for loaded in (AutoGuider.from_pretrained(tmp_path), type(guider).from_pretrained(tmp_path), guider.new()):
        assert type(loaded) is type(guider) and len(loaded.stages) == len(guider.stages)
        for ours, theirs in zip(guider.stages, loaded.stages, strict=True):
            options = [name for name in vars(ours) if not name.startswith("_") and name not in ("inner", "config")]
            assert "guidance_scale" in options
            for name in [*options, "_start", "_stop", "_enabled"]:
                assert vars(theirs)[name] == vars(ours)[name], name
    assert AutoGuider.from_pretrained(tmp_path, guidance_scale=3.0).guidance_scale == 3.0


def test_auto_guider_and_stock_guiders(tmp_path):
    ClassifierFreeGuidance(guidance_scale=2.0).save_pretrained(tmp_path)
    loaded = AutoGuider.from_pretrained(tmp_path)
    assert type(loaded) is ClassifierFreeGuidance and loaded.guidance_scale == 2.0
    (tmp_path / "guider_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    with pytest.raises(ValueError, match="of class 'DDIMScheduler'; known are AdaptiveGuidance"):
        AutoGuider.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="from_pretrained"):
        AutoGuider()


def test_one_scale_per_run():
    assert AdaptiveGuidance().guidance_scale == 7.5
    assert AdaptiveGuidance(inner=ProjectedGuidance(4.0)).guidance_scale == 4.0
    assert AdaptiveGuidance(4.0, inner=ProjectedGuidance()).guidance_scale == 4.0
    with pytest.raises(ValueError, match="a run has one"):
        AdaptiveGuidance(5.0, inner=ProjectedGuidance(4.0))


@pytest.mark.parametrize("threshold", [0.99, 0.991, 0.994, 0.996])
def test_a_threshold_of_the_paper_on_eps_is_warned_of(threshold):
    with pytest.warns(UserWarning, match="2312.12487.* is of its own models, and the 0.99 of ComfyUI"):
        AdaptiveGuidance(threshold=threshold, space="eps")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdaptiveGuidance(threshold=threshold, space="model")
        AdaptiveGuidance(threshold=0.99999, space="eps")


@pytest.mark.parametrize("threshold", [0.991, 0.994, 0.996])
def test_a_threshold_of_the_paper_on_x0_is_warned_of(threshold):
    with pytest.warns(UserWarning, match=f"threshold={threshold} is of the paper .*default 0.999") as found:
        AdaptiveGuidance(threshold=threshold)
    assert [warning.filename for warning in found] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdaptiveGuidance(threshold=0.99)  # of x0 as here, by whole batches, in ComfyUI's node


def test_the_raw_output_of_an_eps_model_is_warned_of_once():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(3)
    guider = AdaptiveGuidance(threshold=0.991, space="model").bind(scheduler)
    x, cond, uncond = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="on noise predictions") as found:
        for number, timestep in enumerate(scheduler.timesteps):
            step(guider, number, 3, timestep, x, cond, uncond)
    assert len(found) == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AdaptiveGuidance(threshold=0.0), r"\(0, 1\]"),
        (lambda: AdaptiveGuidance(threshold=1.1), r"\(0, 1\]"),
        (lambda: AdaptiveGuidance(threshold=float("nan")), r"\(0, 1\]"),
        (lambda: AdaptiveGuidance(space="latent"), "space must be one of"),
        (lambda: AdaptiveGuidance(min_steps=2), "share of the steps"),
        (lambda: AdaptiveGuidance(patience=0), "patience"),
        (lambda: AdaptiveGuidance(patience=1.5), "whole number"),
        (lambda: AdaptiveGuidance(at_detection="stop"), "at_detection"),
        (lambda: AdaptiveGuidance(float("inf")), "finite"),
        (lambda: AdaptiveGuidance(start=1.5), "start"),
        (lambda: ProjectedGuidance(eta=float("nan")), "eta"),
        (lambda: ProjectedGuidance(norm_threshold=-1.0), "norm_threshold"),
        (lambda: ProjectedGuidance(momentum=1.0), "momentum"),
        (lambda: ProjectedGuidance(space="eps"), "space must be one of"),
        (lambda: LinearGuidance(policy="never"), "policy"),
        (lambda: LinearGuidance(coefficients={"format": 9}), "format 9"),
        (lambda: AdaptiveGuidance(inner=AdaptiveGuidance()), "The order is"),
        (lambda: LinearGuidance(inner=AdaptiveGuidance()), "The order is"),
        (lambda: AdaptiveGuidance(inner=ClassifierFreeGuidance()), "The order is"),
        (lambda: AdaptiveGuidance(inner={"_class_name": "Unknown"}), "'Unknown'"),
        (lambda: AdaptiveGuidance(inner=ProjectedGuidance(stop=0.5)), "give these to AdaptiveGuidance"),
        (lambda: GuidanceRecorder().coefficients(), "no run was recorded"),
        (lambda: AdaptiveGuidance().report, "not seen a run"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdaptiveGuidance(threshold="0.99"),
        lambda: AdaptiveGuidance(threshold=None),
        lambda: AdaptiveGuidance(threshold=True),
        lambda: AdaptiveGuidance("7.5"),
        lambda: AdaptiveGuidance(guidance_rescale=None),
        lambda: AdaptiveGuidance(min_steps="0.1"),
        lambda: AdaptiveGuidance(patience=None),
        lambda: ProjectedGuidance(eta="0"),
        lambda: ProjectedGuidance(momentum="-0.5"),
    ],
)
def test_numbers_that_are_none(make):
    with pytest.raises(TypeError, match="must be a number, got"):
        make()


def test_bad_bind_and_bad_runs():
    with pytest.raises(TypeError, match="a pipeline or a scheduler"):
        AdaptiveGuidance().bind(torch.nn.Linear(2, 2))
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(3)
    x, cond, uncond = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    guider = AdaptiveGuidance().bind(scheduler)
    step(guider, 0, 3, scheduler.timesteps[0], x, cond, uncond)
    with pytest.raises(ValueError, match="the batch changed in mid-run, from 2 samples to 1"):
        step(guider, 1, 3, scheduler.timesteps[1], x[:1], cond[:1], uncond[:1])
    with pytest.raises(TypeError, match="space='model'"):
        step(guider, 0, 3, scheduler.timesteps[0], [x], cond, uncond)
    unseen = ProjectedGuidance().bind(scheduler)
    unseen.set_state(0, 3, scheduler.timesteps[0])
    with pytest.raises(ValueError, match="prepare_models"):
        unseen.forward(cond, uncond)
    heun = HeunDiscreteScheduler()
    heun.set_timesteps(3)
    linear = LinearGuidance().bind(heun)
    step(linear, 0, 3, heun.timesteps[0], x, cond, uncond)
    heun.step(cond, heun.timesteps[0], x)
    with pytest.raises(ValueError, match="one evaluation per step"):
        step(linear, 1, 3, heun.timesteps[1], x, cond, uncond)
    fitted = LinearGuidance(coefficients=COEFFICIENTS)
    with pytest.raises(ValueError, match="guider.bind"):
        step(fitted, 0, 2, scheduler.timesteps[0], x, cond, uncond)


def test_they_are_guiders_of_diffusers():
    for guider in GUIDERS:
        assert isinstance(guider, BaseGuidance) and "guidance_scale" in repr(guider)


def test_automatic_norm_threshold_grows_with_the_latents():
    """SDXL's latents have its threshold, and those of a quarter of the width a quarter of it."""
    for width, threshold in ((128, 15.0), (32, 3.75)):
        latents = torch.randn(3, 1, 4, width, width, generator=torch.Generator().manual_seed(0))
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(5)
        found, expected = (
            step(ProjectedGuidance(norm_threshold=r).bind(scheduler), 0, 5, scheduler.timesteps[0], *latents)
            for r in ("auto", threshold)
        )
        assert torch.equal(found, expected)
        free = step(ProjectedGuidance().bind(scheduler), 0, 5, scheduler.timesteps[0], *latents)
        assert not torch.allclose(found, free)


@pytest.mark.parametrize("options", [{"norm_threshold": "big"}, {"norm_threshold": "auto", "norm_dims": (2, 3)}])
def test_automatic_norm_threshold_refused(options):
    with pytest.raises(ValueError, match="norm_threshold"):
        ProjectedGuidance(**options)


def test_a_subclass_with_its_own_arguments():
    """It need not repeat the options of its base."""

    class Cautious(AdaptiveGuidance):
        def __init__(self):
            super().__init__(threshold=0.9999)

    assert Cautious().threshold == Cautious().config["threshold"] == 0.9999
