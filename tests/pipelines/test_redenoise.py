"""Re-denoising and noise-level guidance in real pipelines: against the model by hand, costs, batches, refusals."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline

import hfnoise
from hfnoise.latents import ddim_step, noise_level_step, start_prediction
from hfnoise.pipelines import BrightnessOffset, InitialNoise, NoiseLevelGuidance, ReDenoise, StartState, guide
from hfnoise.pipelines.start_branches import StartBranches
from hfnoise.worlds.tiny_pipelines import FAMILIES, STOCK_WARNINGS, images_of
from hfnoise.worlds.tiny_pipelines.unets import new_scheduler, new_unet

pytestmark = [pytest.mark.filterwarnings(warning) for warning in STOCK_WARNINGS]

MEMBERS = (ReDenoise(), NoiseLevelGuidance(2, max_relative_step=0.1))
SLOW = ("sdxl", "sd-controlnet", "sd-inpaint-9", "sd3", "pixart-alpha", "lumina2", "wan-2.1", "animatediff", "ltx")


def fast_and_slow(*fast):
    return [*fast, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def run(pipe, call, initial_noise, guider=None):
    with guide(pipe, guider, initial_noise=initial_noise):
        return images_of(pipe(**call))


def denoiser(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


class Counted:
    """Counts the rows that a model is given, within a block, and keeps what it puts out first."""

    def __init__(self, module):
        self.module, self.rows, self.outputs = module, [], []

    def __enter__(self):
        self.hook = self.module.register_forward_hook(self.count, with_kwargs=True)
        return self

    def count(self, module, args, kwargs, output):
        output = output[0] if isinstance(output, tuple) else output.sample
        self.rows.append(len(output))
        self.outputs.append(output)

    def __exit__(self, *error):
        self.hook.remove()


class Look(InitialNoise):
    """Keeps the predictions of the pipeline's own noise."""

    def refine(self, unit_noise, context):
        self.noise, self.branches = unit_noise, StartBranches(context)
        before = torch.get_rng_state(), [one.get_state() for one in context.generator]
        self.found = self.branches.predict(unit_noise)
        assert torch.equal(before[0], torch.get_rng_state())
        assert all(map(torch.equal, before[1], (one.get_state() for one in context.generator)))
        return StartState(unit_noise)


@pytest.mark.parametrize("name", fast_and_slow("sd-euler", "flux"))
def test_predictions_are_those_of_the_first_step(name):
    """Whether the call is guided or not, and nothing of it is changed."""
    family = FAMILIES[name]
    pipe = family.build()
    with Counted(denoiser(pipe)) as counted:
        stock = images_of(pipe(**family.call(2)))
    first = counted.outputs[: 1 if counted.rows[0] == 4 else 2]
    outputs = first[0].chunk(2)[::-1] if len(first) == 1 else first
    for call in (family.call, family.conditional_call):
        look, expected = Look(), images_of(pipe(**call(2)))
        assert torch.equal(run(pipe, call(2), look), expected)
        for found, output in zip((look.found.cond, look.found.uncond), outputs, strict=True):
            output = output[:, : look.noise.shape[1]] if name == "pixart-alpha" else output
            truth = start_prediction(look.branches.point, look.noise, -output if name == "lumina2" else output)
            torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)
        assert look.branches.evaluations == 2
    assert torch.equal(images_of(pipe(**family.call(2))), stock)
    assert not {"prepare_latents", "encode_prompt"} & set(pipe.__dict__)


def by_hand(pipe, x, t, scale):
    states = {"encoder_hidden_states": pipe.encode_prompt(["the digit one"], "cpu", 1, False)[0]}
    nothing = {"encoder_hidden_states": pipe.encode_prompt([""], "cpu", 1, False)[0]}
    with torch.no_grad():
        cond, uncond = (pipe.unet(x, t, **words).sample for words in (states, nothing))
    return uncond + scale * (cond - uncond)


def test_redenoising_by_hand(sd):
    """Two steps of DDIM, by the model itself: 4 steps of the run, and the step of a schedule of 10."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    call = {"prompt": "the digit one", "num_inference_steps": 4, "guidance_scale": 1.0, "latents": noise}
    golden = ReDenoise().latents(sd, **call)
    powers = [float(sd.scheduler.alphas_cumprod[t]) for t in (751, 651, 551)]
    moved = ddim_step(noise, by_hand(sd, noise, 751, 5.5), powers[0], powers[1])
    back = by_hand(sd, moved, 751, 1.0)
    torch.testing.assert_close(golden, ddim_step(moved, back, powers[1], powers[0]), rtol=1e-4, atol=1e-5)
    official = ReDenoise(compat="official").latents(sd, **call)
    torch.testing.assert_close(official, ddim_step(moved, back, powers[2], powers[1]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(golden, noise, atol=1e-2)
    size = (1 - powers[0]) ** 0.5 - (powers[0] * (1 - powers[1]) / powers[1]) ** 0.5
    strength = ReDenoise(strength=size * 4.5).latents(sd, **call)
    torch.testing.assert_close(strength, golden, rtol=1e-4, atol=1e-5)
    norm = ReDenoise(normalize=True).latents(sd, **call).norm()
    assert float(norm) == pytest.approx(float(noise.norm()), rel=1e-5)


def test_noise_level_guidance_by_hand(sd):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    call = {"prompt": "the digit one", "num_inference_steps": 4, "guidance_scale": 1.0, "latents": noise}
    moved = NoiseLevelGuidance(3, max_relative_step=0.05, step_size=0.5).latents(sd, **call)
    truth = noise
    for _ in range(3):
        direction = by_hand(sd, truth, 751, 1.0) - by_hand(sd, truth, 751, 0.0)
        truth = noise_level_step(truth, direction, 0.5, 0.05 * 16)
    torch.testing.assert_close(moved, truth, rtol=1e-4, atol=1e-5)
    assert float(moved.norm()) == pytest.approx(16.0, rel=1e-5)
    guided = NoiseLevelGuidance(1, max_relative_step=None, direction_scale=3.0, normalize=False)
    truth = noise - by_hand(sd, noise, 751, 3.0)
    torch.testing.assert_close(guided.latents(sd, **call), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_fresh_noise_of_each_step(sd):
    """Of the call's generator; the official code adds the same noise at every step."""
    call = {"prompt": "the digit one", "num_inference_steps": 4}
    options = {"max_relative_step": 1e-9, "noise_variance": 0.25, "normalize": False}
    for compat, spread in ((None, 0.5 * 4**0.5), ("official", 0.5 * 4)):
        member = NoiseLevelGuidance(4, **options, compat=compat)
        seeds = (torch.Generator().manual_seed(3) for _ in range(2))
        first, again = (member.latents(sd, **call, generator=seed) for seed in seeds)
        assert torch.equal(first, again)
        plain = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        # Standard deviation of a standard deviation of 256 numbers: 4.4 %.
        assert float((first - plain).std()) == pytest.approx(spread, rel=0.2)


@pytest.mark.parametrize("member", MEMBERS, ids=repr)
def test_cost_is_what_is_said(sd, member):
    call = FAMILIES["sd-ddim"].call(2)
    with Counted(sd.unet) as plain:
        images_of(sd(**call))
    with Counted(sd.unet) as counted:
        run(sd, FAMILIES["sd-ddim"].call(2), member)
    assert sum(counted.rows) - sum(plain.rows) == 2 * member.report.evaluations
    assert member.report.evaluations == (3 if isinstance(member, ReDenoise) else 4)


def test_text_is_encoded_once_more(sd):
    counts = []
    hook = sd.text_encoder.register_forward_hook(lambda *_: counts.append(1))
    call = {"prompt": "the digit one", "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    run(sd, call, NoiseLevelGuidance(4))
    hook.remove()
    # The prompt for the call; prompt and nothing for the predictions.
    assert len(counts) == 3


@pytest.mark.slow
def test_scales_of_other_costs(sd):
    for scales, evaluations in (((5.5, 1.0), 3), ((5.5, 0.5), 4), ((1.0, 0.0), 3)):
        member = ReDenoise(guidance_scales=scales, iterations=2)
        member.latents(sd, **FAMILIES["sd-ddim"].call(1))
        assert member.report.evaluations == 2 * evaluations


@pytest.mark.parametrize(
    "member",
    [
        ReDenoise(strength=0.0),
        pytest.param(ReDenoise(guidance_scales=(2.0, 2.0)), marks=pytest.mark.slow),
        NoiseLevelGuidance(0),
    ],
    ids=repr,
)
def test_off_is_stock_to_the_bit(sd, member):
    call = FAMILIES["sd-ddim"].call
    with Counted(sd.unet) as plain:
        stock = images_of(sd(**call(2)))
    with Counted(sd.unet) as counted:
        assert torch.equal(run(sd, call(2), member), stock)
    assert counted.rows == plain.rows and member.report.evaluations == 0


@pytest.mark.parametrize("name", [*fast_and_slow("flux"), pytest.param("sd-ddim", marks=pytest.mark.slow)])
def test_a_sample_does_not_depend_on_its_batch(name):
    family = FAMILIES[name]
    pipe = family.build()
    for member in map(copy.copy, MEMBERS):
        together = run(pipe, family.call(2), member)
        alone = torch.cat([run(pipe, family.call(1, sample), member) for sample in range(2)])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))
        assert torch.equal(together, run(pipe, family.call(2), member))
        assert not torch.allclose(together, images_of(pipe(**family.call(2))), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", [*fast_and_slow("flux"), pytest.param("sd-euler", marks=pytest.mark.slow)])
def test_latents_from_outside(name):
    """With the same generators: inpainting draws from them for its image too."""
    family = FAMILIES[name]
    pipe = family.build()
    for member in map(copy.copy, MEMBERS):
        slot = run(pipe, family.call(2), member)
        call = family.call(2)
        latents = member.latents(pipe, **call)
        assert torch.equal(images_of(pipe(**{**call, "latents": latents})), slot)


@pytest.mark.slow
def test_generator_goes_on_behind_its_noise(sd):
    """Stochastic samplers draw on from where the plain run would."""
    call = {"prompt": "the digit one", "num_inference_steps": 3, "eta": 1.0, "output_type": "latent"}
    slot = run(sd, {**call, "generator": torch.Generator().manual_seed(0)}, ReDenoise())
    generator = torch.Generator().manual_seed(0)
    latents = ReDenoise().latents(sd, **call, generator=generator)
    assert torch.equal(images_of(sd(**call, generator=generator, latents=latents)), slot)


def test_under_a_guider_and_before_an_estimate(sd):
    call = FAMILIES["sd-ddim"].call
    latents = ReDenoise().latents(sd, **call(2))
    guider = hfnoise.AdaptiveGuidance(threshold=0.5, min_steps=1)
    both = run(sd, call(2), ReDenoise(), guider)
    assert torch.equal(both, run(sd, {**call(2), "latents": latents}, None, guider))
    bright = BrightnessOffset(0.5, (0.5, -1.0, 2.0, 0.0))
    chained = run(sd, call(2), [ReDenoise(), bright])
    assert torch.equal(chained, run(sd, {**call(2), "latents": latents}, bright))


@pytest.mark.slow
def test_stopping_early(sd):
    call = FAMILIES["sd-ddim"].call
    member = NoiseLevelGuidance(6, max_relative_step=None, step_size=3.0, stop_early=True)
    together = member.latents(sd, **call(2))
    counts = [member.report.evaluations]
    alone = []
    for sample in range(2):
        alone.append(member.latents(sd, **call(1, sample)))
        counts.append(member.report.evaluations)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert counts[0] == max(counts[1:]) < 12


def test_half_precision():
    family = FAMILIES["sd-ddim"]
    pipe = family.build().to(torch.bfloat16)
    call = {"prompt": "the digit one", "num_inference_steps": 2, "output_type": "latent"}
    for member in map(copy.copy, MEMBERS):
        latents = member.latents(pipe, **call, generator=torch.Generator().manual_seed(0))
        assert latents.dtype == torch.bfloat16 and latents.isfinite().all()
        assert torch.isfinite(pipe(**call, latents=latents).images).all()


@pytest.mark.parametrize("name", ["lcm", pytest.param("sd-euler", marks=pytest.mark.slow)])
def test_a_weak_model_in_the_place_of_no_prompt(name):
    family = FAMILIES[name]
    pipe = family.build()
    weak = copy.deepcopy(pipe.unet)
    weak.load_state_dict({key: 0.9 * value for key, value in weak.state_dict().items()})
    member = NoiseLevelGuidance(2, max_relative_step=0.1, weak_model=weak)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    call = {**family.conditional_call(2), "latents": latents}
    with Counted(weak) as weaker, Counted(pipe.unet) as counted:
        moved = member.latents(pipe, **call)
    assert weaker.rows == counted.rows == [2, 2] and member.report.evaluations == 4
    one = NoiseLevelGuidance(1, max_relative_step=None, normalize=False, weak_model=weak)
    with Counted(weak) as weaker, Counted(pipe.unet) as counted:
        first = one.latents(pipe, **call)
    torch.testing.assert_close(first, call["latents"] - (counted.outputs[0] - weaker.outputs[0]), rtol=1e-4, atol=1e-4)
    same = NoiseLevelGuidance(1, weak_model=pipe.unet, normalize=False)
    torch.testing.assert_close(same.latents(pipe, **call), call["latents"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(moved, call["latents"], atol=1e-3)


@pytest.mark.parametrize("name", ["DDIMScheduler", pytest.param("EulerDiscreteScheduler", marks=pytest.mark.slow)])
def test_zero_terminal_snr(sd, name):
    before, call = sd.scheduler, {**FAMILIES["sd-ddim"].call(2), "num_inference_steps": 3}
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    sd.scheduler = new_scheduler(name, prediction_type="v_prediction", **zero)
    try:
        golden, plain = (member.latents(sd, **call) for member in (ReDenoise(), ReDenoise(strength=0.0)))
        assert golden.isfinite().all() and not torch.allclose(golden, plain, atol=1e-2)
        with pytest.raises(ValueError, match="give num_steps instead of strength"):
            ReDenoise(strength=1.0).latents(sd, **call)
        with pytest.raises(ValueError, match="compat='official' is of models with noise"):
            ReDenoise(compat="official").latents(sd, **call)
        sd.scheduler = new_scheduler(name, **zero)
        for member in MEMBERS:
            with pytest.raises(ValueError, match="predicted noise says nothing of the image"):
                member.latents(sd, **call)
    finally:
        sd.scheduler = before


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ReDenoise(1), ValueError, "num_steps must be at least 2, got 1"),
        (lambda: ReDenoise(10.0), TypeError, "num_steps must be a whole number, got 10.0"),
        (lambda: ReDenoise(10, strength=1.0), ValueError, "give one, got 10 and 1.0"),
        (lambda: ReDenoise(strength=-1.0), ValueError, "strength must be at least 0"),
        (lambda: ReDenoise(strength="1"), TypeError, "strength must be a number, got '1'"),
        (lambda: ReDenoise(guidance_scales=(1.0,)), ValueError, "are two, down and up"),
        (lambda: ReDenoise(guidance_scales=(-1.0, 1.0)), ValueError, "guidance_scales must be at least 0"),
        (lambda: ReDenoise(strength=1.0, guidance_scales=(1.0, 2.0)), ValueError, "is not above 0"),
        (lambda: ReDenoise(iterations=0), ValueError, "iterations must be at least 1"),
        (lambda: ReDenoise(compat="paper"), ValueError, "compat must be one of"),
        (lambda: ReDenoise(strength=1.0, compat="official"), ValueError, "give num_steps, and no strength"),
        (lambda: NoiseLevelGuidance(-1), ValueError, "num_steps must be at least 0"),
        (lambda: NoiseLevelGuidance(step_size=0.0), ValueError, "step_size must be above 0"),
        (lambda: NoiseLevelGuidance(max_relative_step=0.0), ValueError, "max_relative_step must be above 0"),
        (lambda: NoiseLevelGuidance(noise_variance=-1.0), ValueError, "noise_variance must be at least 0"),
        (lambda: NoiseLevelGuidance(boundary=0.0), ValueError, "boundary must be above 0"),
        (lambda: NoiseLevelGuidance(step_size="1"), TypeError, "step_size must be a number"),
        (lambda: NoiseLevelGuidance(weak_model="weak"), TypeError, "weak_model must be a torch module, got str"),
        (lambda: NoiseLevelGuidance(compat="paper"), ValueError, "compat must be one of"),
    ],
)
def test_errors_of_options(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("member", MEMBERS, ids=repr)
def test_errors_without_a_second_prediction(sd, member):
    for name, message in (
        ("LatentConsistencyModelPipeline", "has none without: its guidance is distilled"),
        ("StableDiffusionInstructPix2PixPipeline", "has three, of text and image"),
        ("HunyuanImagePipeline", "leaves them to a guider of its own"),
        ("MochiPipeline", "preconditions them"),
        ("ZImagePipeline", "cannot be followed: "),
    ):
        pipeline_class = hfnoise.guided_class(getattr(__import__("diffusers"), name))
        with pytest.raises(ValueError, match=f"{type(member).__name__} needs .* {name} {message}"):
            object.__new__(pipeline_class).initial_noise = member

    class Unknown(StableDiffusionPipeline.__base__):
        def prepare_latents(self):
            """As in a pipeline of somebody's own."""

    with pytest.raises(ValueError, match="not known how Unknown calls its denoiser"):
        object.__new__(hfnoise.guided_class(Unknown)).initial_noise = member
    # Distilled, in the clothes of a pipeline with guidance.
    unet = new_unet(time_cond_proj_dim=8)
    distilled = StableDiffusionPipeline(**{**sd.components, "unet": unet}, requires_safety_checker=False)
    distilled.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="StableDiffusionPipeline makes no prediction without the prompt"):
        member.latents(distilled, "the digit one", num_inference_steps=2)


@pytest.mark.parametrize(
    "member", [ReDenoise(), pytest.param(NoiseLevelGuidance(1), marks=pytest.mark.slow)], ids=repr
)
def test_errors_of_a_call(member):
    family = FAMILIES["flux-distilled"]
    pipe = family.build()
    with pytest.raises(ValueError, match="FluxPipeline makes no prediction .* Give the call a negative_prompt="):
        run(pipe, family.call(1), member)
    assert "prepare_latents" not in pipe.__dict__
    family = FAMILIES["sd-ip-adapter"]
    with pytest.raises(ValueError, match="cannot be made with guidance .* embeddings of negative prompts"):
        run(family.build(), family.conditional_call(1), member)


def test_states_of_the_scheduler_are_no_latents(sd):
    with pytest.raises(ValueError, match="BrightnessOffset makes a state of the scheduler"):
        BrightnessOffset(0.5).latents(sd, "the digit one")
    with pytest.raises(TypeError, match="must be an InitialNoise"):
        from hfnoise.pipelines.call_latents import call_latents

        call_latents(sd, 3, (), {})


@pytest.mark.parametrize("given, own", [(torch.float16, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("member", [ReDenoise(), ReDenoise(strength=0.0)], ids=["on", "off"])
def test_given_latents_of_another_dtype(given, own, member):
    pipe = FAMILIES["sd-ddim"].build().to(own)
    call = {**FAMILIES["sd-ddim"].call(1), "output_type": "latent"}
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)).to(given)
    # The stock pipeline hands them on as they are, and its network fails.
    with pytest.raises(RuntimeError, match="dtype|type"):
        pipe(**call, latents=noise)
    refined = member.latents(pipe, **call, latents=noise)
    assert refined.dtype == own
    with guide(pipe, initial_noise=member):
        found = pipe(**call, latents=noise).images
    assert torch.equal(found, pipe(**call, latents=refined).images)
