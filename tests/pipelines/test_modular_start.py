"""Initial noises in modular pipelines: off is stock, on is the classic pipeline, as a component they are saved."""

import json
from contextlib import contextmanager

import pytest
import torch
from diffusers import ClassifierFreeGuidance, ModularPipeline, StableDiffusionXLAutoBlocks

import hfnoise
from hfnoise.latents import ResidualStatistics
from hfnoise.pipelines import (
    AdaptiveGuidance,
    BrightnessOffset,
    InitialNoiseBlock,
    InitialNoiseChain,
    OneMoreStep,
    TerminalPrior,
    guide,
    with_initial_noise,
)
from hfnoise.worlds.tiny_pipelines import STOCK_WARNINGS
from hfnoise.worlds.tiny_pipelines.unets import new_scheduler
from tests.pipelines.modular_sdxl import call, classic_sdxl, modular_sdxl
from tests.pipelines.tiny_starts import Mirrored, Told, new_module

pytestmark = [pytest.mark.filterwarnings(warning) for warning in STOCK_WARNINGS]

PRIOR = TerminalPrior(ResidualStatistics([0.1, 0.0, 0.0, 0.0], (0.04 * torch.eye(4)).tolist()))
TWO = ["the digit one", "the digit two"]


@pytest.fixture(scope="module")
def classic():
    return classic_sdxl()


@pytest.fixture(scope="module")
def modular(classic):
    return modular_sdxl(classic)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def run(pipe, initial_noise=None, prompt="the digit one", **more):
    """Return the latents of a call of either pipeline."""
    with guide(pipe, initial_noise=initial_noise):
        if isinstance(pipe, ModularPipeline):
            return pipe(**call(prompt, **{"generator": generator(), **more}), output="latents")
        return pipe(**call(prompt, **{"generator": generator(), **more}), output_type="latent").images


@contextmanager
def inputs_of(unet):
    """Yield a list of what the UNet is given; the first of it is the start, as the scheduler scales it."""
    inputs = []
    hook = unet.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    yield inputs
    hook.remove()


def assert_equal(found, expected):
    # Both add up the same guidance in another order.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_off_is_stock_to_the_bit(modular):
    stock = modular(**call("the digit one", generator=generator()), output="latents")
    told, blocks = Told(), modular._blocks
    off = [told, BrightnessOffset(0.0), TerminalPrior(PRIOR.statistics, scale=0.0)]
    for noise in (None, [], off):
        assert torch.equal(run(modular, noise), stock)
    assert told.noise.std().item() == pytest.approx(1.0, abs=0.2)
    assert modular._blocks is blocks and not hasattr(modular, "initial_noise")
    assert torch.equal(modular(**call("the digit one", generator=generator()), output="latents"), stock)


@pytest.mark.parametrize(
    ("make", "more"),
    [
        (lambda: OneMoreStep(new_module()), {"prompt": TWO}),
        pytest.param(lambda: OneMoreStep(new_module()), {"images": 3}, marks=pytest.mark.slow),
        pytest.param(
            lambda: OneMoreStep(new_module(), guidance_scale=1.5, terminal_prior=PRIOR, eta=0.5),
            {"prompt": TWO, "negative_prompt": ["seven", "nine"], "generator": [0, 1]},
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda: OneMoreStep(new_module(), guidance_scale=None), {}, marks=pytest.mark.slow),
        pytest.param(lambda: OneMoreStep(new_module(), prompt="the digit seven"), {}, marks=pytest.mark.slow),
        pytest.param(lambda: [Mirrored(), BrightnessOffset(0.5), PRIOR], {"generator": [3]}, marks=pytest.mark.slow),
        pytest.param(lambda: PRIOR, {"latents": torch.full((1, 4, 8, 8), 7.0)}, marks=pytest.mark.slow),
    ],
    ids=["prompts", "images", "generators", "scale-of-the-call", "own-prompt", "chain", "latents"],
)
def test_it_is_the_classic_pipeline(classic, modular, make, more):
    seeds = more.get("generator")
    latents, starts = [], []
    for pipe in (classic, modular):
        again = {} if seeds is None else {"generator": [generator(seed) for seed in seeds]}
        with inputs_of(pipe.unet) as inputs:
            latents.append(run(pipe, make(), **{**more, **again}))
        starts.append(inputs[0][: len(latents[-1])])
    assert torch.equal(*starts)
    assert_equal(latents[1], latents[0])
    assert not torch.allclose(latents[1], run(modular, **{**more, **again}), rtol=0.01)


@pytest.mark.slow
def test_the_start_of_several_images_of_several_prompts(classic, modular):
    """Of the start only: stock diffusers 0.42.1 gives the modular UNet the pooled states in another order then."""
    starts = []
    for pipe in (classic, modular):
        with inputs_of(pipe.unet) as inputs:
            generators = [generator(seed) for seed in range(4)]
            run(pipe, OneMoreStep(new_module(), terminal_prior=PRIOR), TWO, images=2, steps=1, generator=generators)
        starts.append(inputs[0][:4])
    assert torch.equal(*starts)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_other_schedulers(scheduler):
    classic, step = classic_sdxl(), OneMoreStep(new_module())
    classic.scheduler = new_scheduler(scheduler)
    assert_equal(run(modular_sdxl(classic), step), run(classic, step))


@pytest.mark.slow
def test_what_a_member_is_told(classic, modular):
    contexts = []
    for pipe in (classic, modular):
        told = Told()
        run(pipe, told, TWO, images=2, negative_prompt=["seven", "nine"])
        contexts.append(told.context)
    expected, found = contexts
    for name in ("prompts", "negative_prompts", "guidance_scale", "batch", "device", "dtype"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("prompt_embeds", "negative_prompt_embeds", "timesteps"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert torch.equal(found.encode_prompts(["", "seven"]), expected.encode_prompts(["", "seven"]))
    assert found.name == "StableDiffusionXLModularPipeline"


@pytest.mark.slow
def test_with_a_guider(modular):
    before = modular.guider
    stock, step = run(modular), OneMoreStep(new_module())
    guider = AdaptiveGuidance(5.0, min_steps=1.0)
    with guide(modular, guider, initial_noise=step):
        both = modular(**call("the digit one", generator=generator()), output="latents")
    assert modular.guider is before and not torch.allclose(both, stock)
    assert torch.equal(both, run(modular, step))
    with pytest.raises(ZeroDivisionError), guide(modular, guider, initial_noise=step):
        raise ZeroDivisionError
    assert modular.guider is before and torch.equal(run(modular), stock)


def test_images_beneath_the_noise_are_refused(modular):
    parts = {"image_latents": torch.zeros(1, 4, 8, 8)}
    with pytest.raises(ValueError, match="StableDiffusionXLModularPipeline starts from an image with noise on it"):
        run(modular, PRIOR, **parts)
    parts["mask"] = torch.ones(1, 1, 16, 16)
    with pytest.raises(ValueError, match=r"Use strength=1.0, or no initial_noise"):
        run(modular, PRIOR, **parts, strength=0.5)


@pytest.mark.slow
def test_inpainting_keeps_the_refined_noise(modular):
    half = torch.ones(1, 1, 16, 16)
    half[..., 8:] = 0.0
    noise = torch.randn(1, 4, 8, 8, generator=generator(5))
    more = {"image_latents": torch.zeros(1, 4, 8, 8), "mask": half, "strength": 1.0}
    mirrored = run(modular, Mirrored(), **more, latents=noise)
    assert_equal(mirrored, run(modular, **more, latents=noise.flip(-1)))
    assert torch.equal(run(modular, Told(), **more), run(modular, **more))
    assert not torch.equal(run(modular, PRIOR, **more), run(modular, **more))


@pytest.mark.slow
def test_saved_as_a_component(classic, tmp_path):
    """A module is a part as others are; stock blocks read the folder and leave it aside."""
    blocks = StableDiffusionXLAutoBlocks()
    pipe = modular_sdxl(classic, with_initial_noise(blocks))
    stock = run(pipe)
    step = OneMoreStep(new_module(), eta=0.5, terminal_prior=PRIOR)
    pipe.update_components(initial_noise=step)
    expected = pipe(**call("the digit one", generator=generator()), output="latents")
    assert torch.equal(expected, run(modular_sdxl(classic), step)) and not torch.allclose(expected, stock)
    folder = str(tmp_path / "pipeline")
    pipe.save_pretrained(folder, overwrite_modular_index=True)
    library, name, spec = json.loads((tmp_path / "pipeline" / "modular_model_index.json").read_text())["initial_noise"]
    assert [library, name] == spec["type_hint"] == ["hfnoise", "OneMoreStep"]
    for made, latents in ((with_initial_noise(blocks), expected), (blocks, stock)):
        again = made.init_pipeline(folder)
        again.load_components()
        again.update_components(guider=ClassifierFreeGuidance(guidance_scale=5.0))
        assert torch.equal(again(**call("the digit one", generator=generator()), output="latents"), latents)
    # A guide within its block comes first, and a pipeline of these blocks is not given another.
    assert torch.equal(run(pipe, PRIOR), run(modular_sdxl(classic), PRIOR))
    assert pipe.initial_noise is step
    pipe.update_components(initial_noise=InitialNoiseChain([step, BrightnessOffset(0.5)]))
    assert not torch.allclose(run(pipe), expected)
    pipe.update_components(initial_noise=None)
    assert torch.equal(run(pipe), stock)


@pytest.mark.slow
def test_what_cannot_be_saved_is_warned_of(classic, tmp_path, caplog):
    from diffusers.utils import logging

    pipe = modular_sdxl(classic, with_initial_noise(StableDiffusionXLAutoBlocks()))
    pipe.update_components(initial_noise=PRIOR)
    logging.enable_propagation()
    try:
        pipe.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    finally:
        logging.disable_propagation()
    assert "self.initial_noise=TerminalPrior" in caplog.text and "cannot be saved" in caplog.text


def test_blocks_are_copied():
    blocks = StableDiffusionXLAutoBlocks()
    made = with_initial_noise(blocks)
    assert "initial_noise" not in blocks.component_names and with_initial_noise(made) is made
    workflow = made.get_workflow("text2image")
    assert "initial_noise" in workflow.component_names
    assert [param.name for param in made.inputs] == [param.name for param in blocks.inputs]
    assert made.output_names == blocks.output_names


def test_flow_matching_starts_from_noise():
    """The start of a video pipeline by itself: estimates find no gap there; noise can be refined."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.modular_pipelines.wan.before_denoise import WanPrepareLatentsStep

    pipe = WanPrepareLatentsStep().init_pipeline()
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe.scheduler = scheduler
    given = {"height": 64, "width": 64, "num_frames": 1, "batch_size": 1, "dtype": torch.float32}
    stock = pipe(**given, generator=generator(), output="latents")
    with guide(pipe, initial_noise=Mirrored()):
        assert torch.equal(pipe(**given, generator=generator(), output="latents"), stock.flip(-1))
    with guide(pipe, initial_noise=PRIOR), pytest.warns(UserWarning, match="does nothing in this run: FlowMatch"):
        assert torch.equal(pipe(**given, generator=generator(), output="latents"), stock)


def test_errors(modular):
    from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLDenoiseStep
    from diffusers.modular_pipelines.wan.before_denoise import WanPrepareLatentsStep

    with pytest.raises(TypeError, match="A tensor is given to the call, as latents="):
        run(modular, torch.zeros(1))
    with pytest.raises(ValueError, match="StableDiffusionXLDenoiseStep has no block that prepares latents"):
        with_initial_noise(StableDiffusionXLDenoiseStep())
    with pytest.raises(TypeError, match="StableDiffusionXLDenoiseStep is no block that prepares the latents"):
        InitialNoiseBlock(StableDiffusionXLDenoiseStep())
    pipe = WanPrepareLatentsStep().init_pipeline()
    with pytest.raises(ValueError, match="does not take a guider"), guide(pipe, AdaptiveGuidance()):
        pass
    with pytest.raises(ValueError, match=r"text states 24 wide .* StableDiffusionXLModularPipeline are 16"):
        run(modular, OneMoreStep(new_module(width=24)))
    assert hfnoise.InitialNoiseBlock is InitialNoiseBlock and hfnoise.with_initial_noise is with_initial_noise
