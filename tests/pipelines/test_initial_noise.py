"""The slot `initial_noise`: off is stock, chains, the scale of every scheduler, what a member is told, refusals."""

import copy
import warnings

import diffusers
import numpy
import pytest
import torch

import hfnoise
from hfnoise.latents import ResidualStatistics
from hfnoise.pipelines import BrightnessOffset, InitialNoise, InitialNoiseChain, StartState, TerminalPrior, guide
from hfnoise.pipelines.initial_noise import refined_start
from hfnoise.worlds.tiny_pipelines import FAMILIES, STOCK_WARNINGS, images_of
from hfnoise.worlds.tiny_pipelines.unets import new_scheduler
from tests.conftest import VECTORS
from tests.pipelines.tiny_starts import Mirrored, Told, run

pytestmark = [pytest.mark.filterwarnings(warning) for warning in STOCK_WARNINGS]

DIRECTION = (0.5, -1.0, 2.0, 0.0)
PRIOR = TerminalPrior(ResidualStatistics([0.1, 0.0, 0.0, 0.0], (0.04 * torch.eye(4)).tolist()))


def table():
    arrays = dict(numpy.load(VECTORS / "one_more_step" / "dev_terminal_table.npz"))
    return [dict(zip(arrays, row, strict=True)) for row in zip(*arrays.values(), strict=True)]


FAST = ("sd-euler",)


@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in (
            *FAST,
            "sdxl",
            "sd-ddim",
            "lcm",
            "sd-controlnet",
            "sd-inpaint-4",
            "sd-inpaint-9",
            "flux",
            "wan-2.1",
        )
    ],
)
def test_off_is_stock_to_the_bit(name):
    family = FAMILIES[name]
    pipe = family.build()
    stock = images_of(pipe(**family.call(2)))
    told = Told()
    off = [told, BrightnessOffset(0.0), TerminalPrior(PRIOR.statistics, scale=0.0)]
    assert torch.equal(run(pipe, family.call(2), off), stock)
    assert told.noise.std().item() == pytest.approx(1.0, abs=0.2)
    assert "prepare_latents" not in pipe.__dict__ and "encode_prompt" not in pipe.__dict__
    assert torch.equal(images_of(pipe(**family.call(2))), stock)


# KDPM2 makes numpy arrays of tensors in its own way.
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("DDIMScheduler", "EulerDiscreteScheduler") else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted({str(row["scheduler"]) for row in table()})
    ],
)
def test_state_is_in_the_scale_of_every_scheduler(sd, name):
    before = sd.scheduler
    for row in (row for row in table() if row["scheduler"] == name):
        options = {} if name in ("LCMScheduler", "TCDScheduler") else {"timestep_spacing": str(row["spacing"])}
        sd.scheduler = new_scheduler(name, **options)
        sd.scheduler.set_timesteps(int(row["num_steps"]))
        assert int(sd.scheduler.timesteps[0]) == int(row["t0"])
        settings = (2, 4, 16, 16, torch.float32, torch.device("cpu"))
        with refined_start(sd, BrightnessOffset(0.5, DIRECTION)):
            start = sd.prepare_latents(*settings, torch.Generator().manual_seed(0))
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        x0 = 0.5 * torch.tensor(DIRECTION).reshape(1, 4, 1, 1)
        truth = float(row["a"]) * x0 + float(row["s"]) * noise
        torch.testing.assert_close(start, truth, rtol=1e-5, atol=1e-5, msg=f"{name} {row}")
    sd.scheduler = before


def test_what_a_member_is_told(sd):
    told = Told()
    generator = torch.Generator().manual_seed(3)
    words = {"prompt": ["the digit one", "the digit two"], "negative_prompt": ["seven"] * 2}
    run(
        sd,
        {
            **words,
            "num_images_per_prompt": 2,
            "num_inference_steps": 3,
            "generator": generator,
            "output_type": "latent",
        },
        told,
    )
    context = told.context
    assert context.prompts == ["the digit one"] * 2 + ["the digit two"] * 2
    assert context.negative_prompts == ["seven"] * 4
    assert context.prompt_embeds.shape == context.negative_prompt_embeds.shape == (4, 8, 16)
    assert torch.equal(context.prompt_embeds, context.encode_prompts(context.prompts))
    assert torch.equal(context.negative_prompt_embeds, context.encode_prompts(context.negative_prompts))
    assert (context.guidance_scale, context.generator, context.batch) == (7.5, generator, 4)
    assert torch.equal(context.timesteps, sd.scheduler.timesteps) and context.name == "StableDiffusionPipeline"


@pytest.mark.slow
def test_positional_arguments_and_embeddings(sd):
    told = Told()
    with guide(sd, initial_noise=told):
        sd("the digit one", 16, 16, 3)
    assert told.context.prompts == ["the digit one"] and told.context.arguments["num_inference_steps"] == 3
    states = {name: torch.zeros(2, 8, 16) for name in ("prompt_embeds", "negative_prompt_embeds")}
    run(sd, {**states, "num_inference_steps": 3, "output_type": "latent"}, told)
    assert told.context.prompts is None and told.context.prompt_embeds.shape == (2, 8, 16)


def test_a_subclass_that_hands_its_arguments_on(sd):
    class Mine(diffusers.StableDiffusionPipeline):
        def __call__(self, *args, strength=1, **kwargs):
            return super().__call__(*args, **kwargs)

        def prepare_latents(self, *args, **kwargs):
            return super().prepare_latents(*args, **kwargs)

    pipe, told = Mine(**sd.components, requires_safety_checker=False), Told()
    pipe.set_progress_bar_config(disable=True)
    with guide(pipe, initial_noise=told):
        pipe("the digit one", 16, 16, num_inference_steps=2, strength=2, output_type="latent")
    assert told.context.prompts == ["the digit one"] and told.context.guidance_scale == 7.5
    assert told.context.arguments["strength"] == 2


def test_given_latents_are_unit_noise():
    family = FAMILIES["sd-euler"]
    pipe, told = family.build(), Told()
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    run(pipe, {**family.call(2), "latents": latents}, told)
    torch.testing.assert_close(told.noise, latents)


def test_packed_latents_of_a_tuple():
    family = FAMILIES["flux"]
    pipe = family.build()
    stock = images_of(pipe(**family.call(1)))
    told = Told()
    assert not torch.equal(run(pipe, family.call(1), [Mirrored(), told]), stock)
    assert told.noise.dim() == 3


@pytest.mark.slow
def test_inpainting_keeps_the_refined_noise():
    """Of four channels: the known part is noised by it at every step."""
    family = FAMILIES["sd-inpaint-4"]
    pipe = family.build()
    call = family.call(1)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mirrored = run(pipe, {**call, "latents": latents}, Mirrored())
    call = family.call(1)
    assert torch.equal(mirrored, images_of(pipe(**call, latents=latents.flip(-1))))


@pytest.mark.parametrize(
    "members", [pytest.param(BrightnessOffset(0.8, DIRECTION), marks=pytest.mark.slow), [Mirrored(), PRIOR]]
)
def test_a_sample_does_not_depend_on_its_batch(members):
    family = FAMILIES["sd-euler"]
    pipe = family.build()
    together = run(pipe, family.call(2), members)
    alone = torch.cat([run(pipe, family.call(1, sample), members) for sample in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.slow
def test_estimates_add_up(sd):
    call = FAMILIES["sd-ddim"].call
    both = run(sd, call(1), [BrightnessOffset(0.5, DIRECTION), BrightnessOffset(0.25, DIRECTION)])
    torch.testing.assert_close(both, run(sd, call(1), BrightnessOffset(0.75, DIRECTION)))
    assert not torch.allclose(both, images_of(sd(**call(1))))


@pytest.mark.slow
def test_brightness_is_measured_on_the_vae(sd):
    from hfnoise.pipelines.brightness_offset import brightness_direction

    call = FAMILIES["sd-ddim"].call
    direction = brightness_direction(sd.vae)
    measured = run(sd, call(1), BrightnessOffset(-0.7))
    assert torch.equal(measured, run(sd, call(1), BrightnessOffset(-0.7, direction.tolist())))
    assert not torch.equal(measured, run(sd, call(1), BrightnessOffset(0.7)))


@pytest.mark.parametrize("name", ["flux", pytest.param("wan-2.1", marks=pytest.mark.slow)])
def test_flow_matching_has_no_gap(name):
    family = FAMILIES[name]
    pipe = family.build()
    stock = images_of(pipe(**family.call(1)))
    with pytest.warns(UserWarning, match="BrightnessOffset does nothing in this run: .* is of flow matching"):
        assert torch.equal(run(pipe, family.call(1), BrightnessOffset(0.5)), stock)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_zero_terminal_snr_has_no_gap(sd, scheduler):
    before = sd.scheduler
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    sd.scheduler = new_scheduler(scheduler, **options)
    call = {**FAMILIES["sd-ddim"].call(1), "num_inference_steps": 2}
    with pytest.warns(UserWarning, match="signal-to-noise ratio of 0"):
        run(sd, call, BrightnessOffset(0.5, DIRECTION))
    sd.scheduler = before


def test_half_precision_is_summed_in_float32(sd):
    with refined_start(sd, BrightnessOffset(0.5, DIRECTION)):
        sd.scheduler.set_timesteps(4)
        settings = (1, 4, 16, 16, torch.float16, torch.device("cpu"))
        start = sd.prepare_latents(*settings, torch.Generator().manual_seed(0))
        noise = torch.randn(1, 4, 8, 8, dtype=torch.float16, generator=torch.Generator().manual_seed(0))
    assert start.dtype == torch.float16
    power = sd.scheduler.alphas_cumprod[int(sd.scheduler.timesteps[0])]
    truth = power.sqrt() * 0.5 * torch.tensor(DIRECTION).reshape(1, 4, 1, 1) + (1 - power).sqrt() * noise.float()
    assert torch.equal(start, truth.half())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: InitialNoiseChain([]), ValueError, "a chain needs a member"),
        (lambda: InitialNoiseChain([torch.zeros(1)]), TypeError, "members of InitialNoise, got Tensor"),
        (lambda: InitialNoiseChain([PRIOR, Mirrored()]), ValueError, "Mirrored after it has no noise"),
        (lambda: BrightnessOffset(1.5), ValueError, r"\[-1, 1\]"),
        (lambda: BrightnessOffset(0.5, 1.0), ValueError, "one finite number a channel of the latents, got 1.0"),
        (lambda: BrightnessOffset(0.5, [float("nan")]), ValueError, r"one finite number .* got \[nan\]"),
        (lambda: TerminalPrior(PRIOR.statistics, "1"), ValueError, "at least 0, where 0 is off; got '1'"),
        (lambda: TerminalPrior([0.0]), TypeError, "must be ResidualStatistics, got list"),
        (lambda: TerminalPrior(PRIOR.statistics, -1.0), ValueError, "scale must be at least 0"),
    ],
)
def test_errors_of_members(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_errors_of_the_slot(sd):
    for noise, error, message in (
        (torch.zeros(1), TypeError, "A tensor is given to the call, as latents="),
        ([Mirrored(), 3], TypeError, "members of InitialNoise, got int"),
    ):
        with pytest.raises(error, match=message), guide(sd, initial_noise=noise):
            pass
    with guide(sd, initial_noise=[]):
        assert sd.initial_noise is None
    for name in ("StableDiffusionImg2ImgPipeline", "StableDiffusionDepth2ImgPipeline", "FluxImg2ImgPipeline"):
        pipeline_class = hfnoise.guided_class(getattr(diffusers, name))
        with pytest.raises(ValueError, match=f"^{name} starts from an image"):
            object.__new__(pipeline_class).initial_noise = Mirrored()
    with pytest.raises(ValueError, match="prepares no latents"):
        object.__new__(hfnoise.guided_class(diffusers.DDPMPipeline)).initial_noise = Mirrored()


@pytest.mark.slow
def test_inpainting_of_sdxl():
    """Its strength is 0.9999 by default: that starts from the image."""
    from hfnoise.worlds.tiny_pipelines.family import calls, prompts
    from hfnoise.worlds.tiny_pipelines.unets import PIXELS, POOLED, TOKENS, WIDTH, image, mask, sdxl

    pipe = sdxl("StableDiffusionXLInpaintPipeline")()
    call = calls(prompts(TOKENS, WIDTH, POOLED), image, mask, height=PIXELS, width=PIXELS)
    with pytest.raises(ValueError, match="StableDiffusionXLInpaintPipeline starts from an image .* strength=1.0"):
        run(pipe, call(1), PRIOR)
    stock = images_of(pipe(**call(1), strength=1.0))
    assert torch.equal(run(pipe, {**call(1), "strength": 1.0}, Told()), stock)
    assert not torch.equal(run(pipe, {**call(1), "strength": 1.0}, PRIOR), stock)


def test_errors_of_a_call(sd):
    family = FAMILIES["sd-inpaint-4"]
    pipe = family.build()
    with pytest.raises(ValueError, match="StableDiffusionInpaintPipeline starts from an image .* strength=1.0"):
        run(pipe, {**family.call(1), "strength": 0.5}, Mirrored())
    assert "prepare_latents" not in pipe.__dict__
    call = FAMILIES["sd-ddim"].call
    with pytest.raises(ValueError, match="direction has 2 numbers, and the latents 4 channels"):
        run(sd, call(1), BrightnessOffset(0.5, (1.0, 2.0)))
    with pytest.raises(ValueError, match="statistics are of 1 channels"):
        run(sd, call(1), TerminalPrior(ResidualStatistics([0.0], [[1.0]])))

    class Smaller(InitialNoise):
        def refine(self, unit_noise, context):
            return StartState(unit_noise[..., :4])

    class Liar(Smaller):
        def refine(self, unit_noise, context):
            return StartState(unit_noise, "scheduler")

    with pytest.raises(ValueError, match=r"Smaller made a start of shape \(1, 4, 8, 4\)"):
        run(sd, call(1), Smaller())
    with pytest.raises(ValueError, match="Liar returned a start in the space 'scheduler' and says space = 'unit'"):
        run(sd, call(1), [Liar(), Mirrored()])


def test_what_refine_may_return(sd):
    call = {**FAMILIES["sd-ddim"].call(1), "num_inference_steps": 1}

    class Tensors(InitialNoise):
        def refine(self, unit_noise, context):
            return unit_noise.flip(-1)

    class Broken(InitialNoise):
        def refine(self, unit_noise, context):
            return StartState(unit_noise * float("nan"))

    class InPlace(InitialNoise):
        def refine(self, unit_noise, context):
            return StartState(unit_noise.copy_(unit_noise.flip(-1)))

    for members in (Tensors(), [Tensors(), Told()]):
        with pytest.raises(TypeError, match="refine of Tensors returned Tensor; it returns hfnoise.pipelines.StartSt"):
            run(sd, dict(call), members)
    with pytest.raises(ValueError, match="Broken made a start with NaN or infinity in it, in torch.float32"):
        run(sd, dict(call), Broken())
    generator = call.pop("generator")[0].get_state()

    def start(members):
        again = torch.Generator()
        again.set_state(generator)
        return run(sd, {**call, "generator": again}, members)

    assert torch.equal(start(InPlace()), start(Mirrored()))


def test_a_vae_that_overflows(sd):
    broken = copy.copy(sd)
    broken.vae = copy.deepcopy(sd.vae)
    torch.nn.init.constant_(broken.vae.encoder.conv_out.bias, float("nan"))
    with pytest.raises(ValueError, match="encodes white and grey to NaN or infinity in torch.float32. Load it in"):
        run(broken, FAMILIES["sd-ddim"].call(1), BrightnessOffset(0.5))


@pytest.mark.slow
def test_another_scale_than_the_scheduler_is_refused(sd):
    class Scaled(diffusers.StableDiffusionPipeline):
        def prepare_latents(self, *args, **kwargs):
            return 80 * super().prepare_latents(*args, **kwargs)

    pipe = Scaled(**sd.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    call = FAMILIES["sd-ddim"].call
    with pytest.raises(ValueError, match=r"Scaled prepares noise of standard deviation 7\d"):
        run(pipe, call(1), Mirrored())
    assert torch.equal(run(pipe, call(1), Told()), images_of(pipe(**call(1))))


def test_no_warning_where_there_is_a_gap(sd):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(sd, FAMILIES["sd-ddim"].call(1), PRIOR)
