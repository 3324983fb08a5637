"""One More Step in real pipelines: arithmetic, text, guidance, saving, refusals."""

import json
import warnings

import diffusers
import numpy
import pytest
import torch
from diffusers import UNet2DConditionModel

import hfnoise
from hfnoise.latents import ResidualStatistics
from hfnoise.latents.hf_time_free_unet import TimeFreeUNet2DConditionModel, set_module_residuals
from hfnoise.pipelines import BrightnessOffset, OneMoreStep, TerminalPrior, guide
from hfnoise.pipelines.initial_noise import refined_start
from hfnoise.worlds.tiny_pipelines import FAMILIES, STOCK_WARNINGS, images_of
from hfnoise.worlds.tiny_pipelines.unets import WIDTH, new_scheduler, new_text_parts
from tests.conftest import VECTORS
from tests.pipelines.tiny_starts import SHAPE, new_module, run, sd_call

pytestmark = [pytest.mark.filterwarnings(warning) for warning in STOCK_WARNINGS]

STATISTICS = ResidualStatistics([0.1, 0.0, 0.0, 0.0], (0.04 * torch.eye(4)).tolist())


class Watched(torch.nn.Module):
    """Keeps what the network is given."""

    def __init__(self, module):
        super().__init__()
        self.module, self.config, self.calls = module, module.config, []

    def forward(self, sample, encoder_hidden_states, return_dict=True):
        self.calls.append((sample, encoder_hidden_states))
        return self.module(sample, encoder_hidden_states, return_dict=return_dict)


def worded(prompt):
    generator = torch.Generator().manual_seed(0)
    return {"prompt": prompt, "num_inference_steps": 2, "generator": generator, "output_type": "latent"}


FAST = ("sdxl",)


@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in (
            *FAST,
            "lcm",
            "sd-ddim",
            "sd-euler",
            "sd-heun",
            "sd-controlnet",
            "sdxl-controlnet",
            "sd-inpaint-4",
        )
        + ("sd-inpaint-9", "sd-multicontrolnet", "sd-ip-adapter")
    ],
)
def test_pipelines(name):
    """Off is stock to the bit, on is not, a sample is the same alone, and the network sees unit noise."""
    family = FAMILIES[name]
    pipe, module = family.build(), Watched(new_module())
    stock = images_of(pipe(**family.call(2)))
    assert torch.equal(run(pipe, family.call(2), OneMoreStep(module, scale=0.0)), stock)
    assert module.calls == []
    step = OneMoreStep(module, eta=0.5, terminal_prior=TerminalPrior(STATISTICS))
    together = run(pipe, family.call(2), step)
    assert not torch.allclose(together, stock)
    ((sample, states),) = module.calls
    assert sample.std().item() == pytest.approx(1.0, abs=0.15) and states.shape == (2, 8, WIDTH)
    alone = torch.cat([run(pipe, family.call(1, number), step) for number in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


@pytest.mark.slow
def test_pipelines_that_do_not_encode_by_the_public_name():
    family = FAMILIES["sd-instruct-pix2pix"]
    pipe, module = family.build(), Watched(new_module())
    with pytest.raises(
        ValueError, match="InstructPix2PixPipeline has no encode_prompt.* Give OneMoreStep text_encoder="
    ):
        run(pipe, family.call(1), OneMoreStep(module))
    run(pipe, family.call(2), OneMoreStep(module, prompt_embeds=torch.zeros(1, 8, WIDTH)))
    assert [states.shape[0] for _, states in module.calls] == [2]


def chain(number):
    arrays = numpy.load(VECTORS / "one_more_step" / "dev_chain.npz")
    prefix = f"case{number}_"
    return {key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)}


class Replay(torch.nn.Module):
    """Puts out what it is told, as the stub networks did that the vectors were made with."""

    def __init__(self, output):
        super().__init__()
        self.output = torch.nn.Parameter(torch.as_tensor(output), requires_grad=False)

    def forward(self, sample, encoder_hidden_states, return_dict=True):
        return (self.output,)


@pytest.mark.parametrize("number", range(3))
def test_official_chain(sd, number):
    """The official start in the scheduler's scale, and the steps after it."""
    case = chain(number)
    name = {"ddim": "DDIMScheduler", "dpmpp": "DPMSolverMultistepScheduler", "euler": "EulerDiscreteScheduler"}
    options = {"timestep_spacing": "leading", "prediction_type": str(case["prediction_type"])}
    before, sd.scheduler = sd.scheduler, new_scheduler(name[str(case["scheduler"])], **options)
    sd.scheduler.set_timesteps(int(case["num_steps"]))
    truth = torch.as_tensor(case["x_scheduler_in"])
    batch, channels, height, width = truth.shape
    step = OneMoreStep(Replay(case["v_pred"]), compat="official", prompt_embeds=torch.zeros(1, 1, 1))
    # The vectors' fresh noise is given: whatever is drawn from this generator.
    generator = torch.Generator().manual_seed(0)
    with refined_start(sd, step, (), {"generator": generator}):
        settings = (batch, channels, 2 * height, 2 * width, torch.float32, torch.device("cpu"))
        start = sd.prepare_latents(*settings, generator, latents=torch.as_tensor(case["x_T_S"]))
    drawn = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    size = float(truth.abs().max())
    noise = truth - start  # what is left: the noise, with the official factor
    z = torch.as_tensor(case["z"])
    factor = float(((start - truth) * (drawn - z)).sum() / (drawn - z).square().sum())
    assert (start - truth - factor * (drawn - z)).abs().max() <= 2e-6 * size, noise
    power = float(case["alpha_bar"])
    expected = 1 - power if name[str(case["scheduler"])] != "EulerDiscreteScheduler" else (1 - power) / power**0.5
    assert factor == pytest.approx(expected, rel=2e-6)
    sample = truth
    for timestep, base, after in zip(sd.scheduler.timesteps, case["base_outputs"], case["trajectory"], strict=True):
        sample = sd.scheduler.step(torch.as_tensor(base), timestep, sample, return_dict=False)[0]
        torch.testing.assert_close(sample, torch.as_tensor(after), rtol=1e-4, atol=1e-4)
    sd.scheduler = before


def test_guidance_is_one_batch_of_both(sd):
    module = Watched(new_module())
    plain = run(sd, sd_call(), OneMoreStep(module))
    assert [len(sample) for sample, _ in module.calls] == [1]
    module.calls.clear()
    guided = run(sd, sd_call(), OneMoreStep(module, guidance_scale=2.0))
    ((sample, states),) = module.calls
    assert torch.equal(*sample.chunk(2)) and not torch.allclose(guided, plain)
    with refined_start(sd, OneMoreStep(module)):
        empty = sd.encode_prompt([""], torch.device("cpu"), 1, False)[0]
    assert torch.equal(states[:1], empty)
    module.calls.clear()
    # The scale of the call, which is 5.
    torch.testing.assert_close(
        run(sd, sd_call(), OneMoreStep(module, guidance_scale=None)),
        run(sd, sd_call(), OneMoreStep(module, guidance_scale=5.0)),
    )
    assert not torch.allclose(
        run(sd, sd_call(), OneMoreStep(module, guidance_scale=2.0, negative_prompt="seven")), guided
    )
    normalized = OneMoreStep(module, guidance_scale=2.0, guidance_mode="normalized")
    assert not torch.allclose(run(sd, sd_call(), normalized), guided)


def test_with_a_guider(sd):
    step = OneMoreStep(new_module(), guidance_scale=1.5)
    alone = run(sd, sd_call(2), step)
    with guide(sd, hfnoise.AdaptiveGuidance(threshold=1.0), initial_noise=step):
        assert torch.equal(images_of(sd(**sd_call(2))), alone)


@pytest.mark.slow
def test_without_text_encoder_the_negative_states_of_the_call_serve():
    family = FAMILIES["sdxl"]
    pipe, module = family.build(), Watched(new_module())
    call = family.call(1)
    run(pipe, call, OneMoreStep(module, guidance_scale=2.0))
    states = module.calls[0][1]
    assert torch.equal(states, torch.cat([call["negative_prompt_embeds"], call["prompt_embeds"]]))
    with pytest.raises(ValueError, match="no text encoder for the negative prompt"):
        run(pipe, call, OneMoreStep(module, guidance_scale=2.0, negative_prompt="seven"))


def test_prompts_of_its_own(sd):
    module = Watched(new_module())
    own = run(sd, worded("the digit one"), OneMoreStep(module, prompt="the digit seven"))
    assert not torch.allclose(own, run(sd, worded("the digit one"), OneMoreStep(module)))
    with refined_start(sd, OneMoreStep(module)):
        states = sd.encode_prompt(["the digit seven"], torch.device("cpu"), 1, False)[0]
    assert torch.equal(module.calls[0][1], states)
    given = OneMoreStep(module, prompt_embeds=states)
    assert torch.equal(run(sd, worded("the digit one"), given), own)


def test_text_encoder_of_its_own(sd):
    parts = new_text_parts()
    module = Watched(new_module())
    step = OneMoreStep(module, guidance_scale=1.5, **parts)
    run(sd, worded("the digit one"), step)
    tokens = parts["tokenizer"](["", "the digit one"], padding="max_length", max_length=8, return_tensors="pt")
    assert torch.allclose(module.calls[0][1], parts["text_encoder"](tokens.input_ids)[0], atol=1e-6)
    states = {name: torch.zeros(1, 8, WIDTH) for name in ("prompt_embeds", "negative_prompt_embeds")}
    call = {**states, "num_inference_steps": 2, "output_type": "latent"}
    with pytest.raises(
        ValueError, match="embeddings and no words. Give the call oms_prompt=... or oms_prompt_embeds=..."
    ):
        run(sd, call, step)
    step.prompt = "the digit one"
    run(sd, call, step)


def test_what_the_module_puts_out(sd):
    """SingDiffusion's is the image, One More Step's minus it; a stock UNet is given timestep 0."""
    v = run(sd, sd_call(), OneMoreStep(new_module()))
    assert not torch.allclose(run(sd, sd_call(), OneMoreStep(new_module(), prediction_type="sample")), v)
    stock = new_module(unet_class=UNet2DConditionModel)
    first = run(sd, sd_call(), OneMoreStep(stock))
    assert torch.equal(run(sd, sd_call(), OneMoreStep(stock)), first) and not torch.allclose(first, v)


def test_terminal_prior_of_the_module(sd):
    module = new_module()
    plain = run(sd, sd_call(), OneMoreStep(module))
    given = run(sd, sd_call(), OneMoreStep(module, terminal_prior=TerminalPrior(STATISTICS)))
    set_module_residuals(module, STATISTICS)
    assert torch.equal(run(sd, sd_call(), OneMoreStep(module)), given) and not torch.allclose(given, plain)
    without = OneMoreStep(module, terminal_prior=False)
    assert torch.equal(run(sd, sd_call(), without), plain)
    # One of the chain is in the place of the module's, not on top of it.
    for step in (without, OneMoreStep(module)):
        torch.testing.assert_close(run(sd, sd_call(), [step, TerminalPrior(STATISTICS)]), given)
    assert torch.equal(run(sd, sd_call(), [OneMoreStep(module), TerminalPrior(STATISTICS, scale=0.0)]), plain)
    assert not torch.allclose(run(sd, sd_call(), [without, BrightnessOffset(0.5)]), plain)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_half_precision_module(sd, dtype):
    module = new_module()
    start = run(sd, sd_call(), OneMoreStep(module))
    # Rounding of the network, a twentieth of which reaches the start.
    torch.testing.assert_close(run(sd, sd_call(), OneMoreStep(module.to(dtype))), start, rtol=0.05, atol=0.05)


def test_save_and_load(sd, tmp_path):
    module = new_module()
    set_module_residuals(module, STATISTICS)
    prior = TerminalPrior(STATISTICS, scale=0.5)
    step = OneMoreStep(module, eta=0.25, guidance_scale=1.5, negative_prompt="seven", terminal_prior=prior)
    step.text_encoder, step.tokenizer = new_text_parts().values()
    step.save_pretrained(tmp_path / "pipeline" / OneMoreStep.subfolder)
    before = run(sd, worded("the digit one"), step)
    for path, options in ((tmp_path / "pipeline", {}), (tmp_path / "pipeline", {"subfolder": "oms_module"})):
        again = OneMoreStep.from_pretrained(path, **options)
        assert torch.equal(run(sd, worded("the digit one"), again), before)
    assert again.eta == 0.25 and again.prior.scale == 0.5 and again.negative_prompt == "seven"
    assert OneMoreStep.from_pretrained(tmp_path / "pipeline", eta=0.0).eta == 0.0
    for options in ({"dtype": torch.float16}, {"torch_dtype": torch.float16}):
        half = OneMoreStep.from_pretrained(tmp_path / "pipeline", **options)
        assert half.module.dtype == half.text_encoder.dtype == torch.float16
    file = tmp_path / "pipeline" / "oms_module" / "one_more_step.json"
    file.write_text(json.dumps({"other": 1}))
    with pytest.raises(ValueError, match="oms_module/one_more_step.json has the options other"):
        OneMoreStep.from_pretrained(tmp_path / "pipeline")
    file.unlink()
    assert OneMoreStep.from_pretrained(tmp_path / "pipeline" / "oms_module").eta == 0.0


@pytest.mark.slow
def test_a_pipeline_is_saved_with_it(tmp_path):
    base = FAMILIES["sd-ddim"].build()
    pipe = hfnoise.OneMoreStepPipeline.from_pipe(base, initial_noise=OneMoreStep(new_module(), eta=0.5))
    pipe.save_pretrained(tmp_path)
    again = hfnoise.OneMoreStepPipeline.from_pretrained(tmp_path)
    assert torch.equal(images_of(again(**sd_call())), images_of(pipe(**sd_call())))
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(images_of(stock(**sd_call())), images_of(base(**sd_call())))
    with pytest.raises(ValueError, match="StableDiffusionPipeline has no oms_module. Give oms_module="):
        hfnoise.OneMoreStepPipeline.from_pipe(base)
    with pytest.raises(TypeError, match="takes a OneMoreStep, alone or in a list with others, got BrightnessOffset"):
        hfnoise.OneMoreStepPipeline.from_pipe(base, initial_noise=BrightnessOffset(0.5))
    for module in (tmp_path, tmp_path / "oms_module", pipe.initial_noise):
        other = hfnoise.OneMoreStepPipeline.from_pipe(base, oms_module=module)
        assert torch.equal(images_of(other(**sd_call())), images_of(pipe(**sd_call())))
    loaded = hfnoise.OneMoreStepPipeline.from_pretrained(tmp_path, oms_module=new_module())
    assert loaded.initial_noise.eta == 0.0
    for dtype in (torch.bfloat16, {"default": torch.bfloat16, "vae": torch.float32}):
        loaded = hfnoise.OneMoreStepPipeline.from_pretrained(tmp_path, oms_module=tmp_path, dtype=dtype)
        assert loaded.unet.dtype == loaded.initial_noise.module.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="give initial_noise or oms_module"):
        hfnoise.OneMoreStepPipeline.from_pipe(base, oms_module=module, initial_noise=pipe.initial_noise)


def test_embeddings_are_saved(tmp_path):
    states = torch.arange(8.0 * WIDTH).reshape(1, WIDTH, 8).transpose(1, 2)  # not contiguous
    step = OneMoreStep(new_module(), prompt_embeds=states, negative_prompt_embeds=states.half())
    step.save_pretrained(tmp_path)
    again = OneMoreStep.from_pretrained(tmp_path)
    assert torch.equal(again.prompt_embeds, states) and again.negative_prompt_embeds.dtype == torch.float16
    given = OneMoreStep.from_pretrained(tmp_path, prompt_embeds=2 * states)
    assert torch.equal(given.prompt_embeds, 2 * states)
    (tmp_path / "prompt_embeds.safetensors").unlink()
    with pytest.raises(ValueError, match="prompt_embeds.safetensors must hold negative_prompt_embeds"):
        OneMoreStep.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one_more_step.json is neither a folder nor the name of a repository"):
        OneMoreStep.from_pretrained(tmp_path / "one_more_step.json")
    FAMILIES["sd-ddim"].build().vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="holds no module of One More Step: there is no vae/config.json of a UNet"):
        OneMoreStep.from_pretrained(tmp_path, subfolder="vae")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="holds no module of One More Step: there is no oms_module/config.json"):
        OneMoreStep.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"module": 3}, TypeError, "network of One More Step, got int"),
        ({"eta": 1.5}, ValueError, r"eta must be in \[0, 1\]"),
        ({"guidance_scale": -1.0}, ValueError, "at least 0, got -1"),
        ({"guidance_mode": "other"}, ValueError, "guidance_mode must be"),
        ({"prediction_type": "epsilon"}, ValueError, "prediction_type must be"),
        ({"compat": "v1"}, ValueError, "compat must be"),
        ({"compat": "official", "eta": 0.5}, ValueError, "eta=0.5 has no part in it"),
        ({"scale": -1.0}, ValueError, "scale must be at least 0"),
        ({"text_encoder": 1}, ValueError, "go together"),
        ({"eta": "0.5"}, ValueError, r"eta must be in \[0, 1\], got '0.5'"),
        ({"prompt": 3}, TypeError, "prompt must be a string or a list of strings, got 3"),
        ({"negative_prompt": ["a", None]}, TypeError, r"negative_prompt must be .* got \['a', None\]"),
        ({"prompt_embeds": [1.0]}, ValueError, r"prompt_embeds must be a tensor of shape .* got \[1.0\]"),
        ({"prompt_embeds": torch.zeros(8, 16)}, ValueError, r"got a tensor of shape \(8, 16\)"),
        ({"terminal_prior": 3}, TypeError, "must be a TerminalPrior, False or None, got 3"),
    ],
)
def test_errors_of_options(options, error, message):
    with pytest.raises(error, match=message):
        OneMoreStep(**{"module": torch.nn.Identity(), **options})


def test_errors_of_a_call(sd):
    with pytest.raises(
        ValueError,
        match=r"text states 24 wide \(cross_attention_dim\), and the text states of StableDiffusionPipeline are 16",
    ):
        run(sd, sd_call(), OneMoreStep(new_module(width=24)))
    with pytest.raises(ValueError, match=r"text states 24 wide .* and its text encoder CLIPTextModel are 16"):
        run(sd, worded("seven"), OneMoreStep(new_module(width=24), **new_text_parts()))
    broken = new_module()
    torch.nn.init.constant_(broken.conv_out.bias, float("nan"))
    with pytest.raises(ValueError, match="put out NaN or infinity in torch.float32"):
        run(sd, sd_call(), OneMoreStep(broken))
    other = TimeFreeUNet2DConditionModel(cross_attention_dim=WIDTH, **{**SHAPE, "in_channels": 16})
    with pytest.raises(
        ValueError, match=r"takes latents of 16 channels of images, and .* shape \(1, 4, 8, 8\): it was made for"
    ):
        run(sd, sd_call(), OneMoreStep(other))
    with pytest.raises(ValueError, match=r"prompt has 3 entries, and there are 2 samples"):
        run(sd, sd_call(2), OneMoreStep(new_module(), prompt=["one"] * 3))
    with pytest.raises(ValueError, match="DiTPipeline prepares no latents"):
        object.__new__(hfnoise.guided_class(diffusers.DiTPipeline)).initial_noise = OneMoreStep(new_module())


def test_schedules_without_a_gap(sd):
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    before, sd.scheduler = sd.scheduler, new_scheduler("DDIMScheduler", **options)
    stock, module = images_of(sd(**sd_call())), Watched(new_module())
    with pytest.warns(UserWarning, match="OneMoreStep does nothing in this run: DDIMScheduler starts at"):
        assert torch.equal(run(sd, sd_call(), OneMoreStep(module)), stock)
    assert module.calls == []
    sd.scheduler = before
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(sd, sd_call(), OneMoreStep(module))
