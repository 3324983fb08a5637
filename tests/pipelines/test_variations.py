"""Seed variations and noise on text states: whose noise it is, what is reported, refusals; latents as images."""

import json
import math
import threading

import diffusers
import pytest
import torch

import hfnoise
from hfnoise.latents import noised_condition
from hfnoise.pipelines import (
    ConditioningNoise,
    LatentSpace,
    NoiseLevelGuidance,
    ReDenoise,
    SeedVariation,
    guide,
)
from hfnoise.pipelines.initial_noise_files import INITIAL_NOISES
from hfnoise.pipelines.module_calls import intercepted
from hfnoise.pipelines.start_context import StartContext
from hfnoise.pipelines.start_report import StartReport
from hfnoise.worlds.tiny_pipelines import FAMILIES, STOCK_WARNINGS, images_of
from tests.pipelines.tiny_starts import Told, run

pytestmark = [pytest.mark.filterwarnings(warning) for warning in STOCK_WARNINGS]


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


WORDS = {"prompt": ["the digit one"] * 2, "num_inference_steps": 2, "output_type": "latent"}


# Seeds. -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        name if name == "flux" else pytest.param(name, marks=pytest.mark.slow)
        for name in ("sd-euler", "flux", "sdxl", "sd3", "qwen-image", "wan-2.1", "sd-controlnet")
    ],
)
def test_all_of_another_seed_is_its_run(name):
    family = FAMILIES[name]
    pipe = family.build()
    other = images_of(pipe(**{**family.call(2), "generator": seeds(8, 9)}))
    assert torch.equal(run(pipe, family.call(2), SeedVariation(1.0, [8, 9])), other)
    stock = images_of(pipe(**family.call(2)))
    assert torch.equal(run(pipe, family.call(2), SeedVariation(0.0, [8, 9])), stock)
    varied = run(pipe, family.call(2), SeedVariation(0.4, [8, 9]))
    assert not torch.allclose(varied, stock, rtol=1e-2) and not torch.allclose(varied, other, rtol=1e-2)
    alone = torch.cat([run(pipe, family.call(1, i), SeedVariation(0.4, 8 + i)) for i in range(2)])
    torch.testing.assert_close(varied, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


def test_variations_of_the_calls_generators(sd):
    """Drawn behind its noise, so that a row is that of its own generator."""
    member = SeedVariation(0.6)
    latents = member.latents(sd, **WORDS, generator=seeds(1, 2))
    first = torch.Generator().manual_seed(1)
    noise, fresh = (torch.randn(1, 4, 8, 8, generator=first) for _ in range(2))
    torch.testing.assert_close(latents[:1], 0.8 * noise + 0.6 * fresh)
    assert member.report.evaluations == 0
    assert member.report.alignment_lost == pytest.approx(0.2, abs=0.06)


def test_one_noise_shows_its_variations(sd):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    member = SeedVariation(0.6, [1, 2])
    member.latents(sd, **WORDS, latents=noise)
    # Two independent noises, 0.6 of each.
    assert member.report.diversity_before == 0.0
    assert member.report.diversity_gained == pytest.approx(0.6, abs=0.05)
    member = SeedVariation(0.6, 1)
    member.latents(sd, **WORDS, latents=noise)
    assert member.report.diversity_gained == 0.0


# Text states. -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        name if name == "flux" else pytest.param(name, marks=pytest.mark.slow)
        for name in ("sd-ddim", "sdxl", "flux", "sd3", "lcm", "wan-2.1")
    ],
)
def test_noise_is_on_the_states_alone(name):
    """The noise of the latents is that of the plain run, and a row that of its own generator."""
    family = FAMILIES[name]
    pipe = family.build()
    stock, told = images_of(pipe(**family.call(2))), [Told(), Told()]
    assert torch.equal(run(pipe, family.call(2), [ConditioningNoise(0.0), told[0]]), stock)
    noisy = run(pipe, family.call(2), [ConditioningNoise(0.5), told[1]])
    assert torch.equal(told[0].noise, told[1].noise)
    states = [one.context.prompt_embeds for one in told]
    assert torch.cosine_similarity(*(each.flatten(1) for each in states)).mean() < 0.97
    assert not torch.allclose(noisy, stock, rtol=1e-3, atol=1e-3)
    assert torch.equal(noisy, run(pipe, family.call(2), ConditioningNoise(0.5)))
    alone = torch.cat([run(pipe, family.call(1, i), ConditioningNoise(0.5)) for i in range(2)])
    torch.testing.assert_close(noisy, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


def test_images_of_given_embeddings_have_their_own_noise():
    """Flux broadcasts embeddings of one prompt to its images; before, there were more generators than states."""
    family = FAMILIES["flux"]
    pipe, call = family.build(), {**family.call(1), "num_images_per_prompt": 2}
    noisy = run(pipe, {**call, "generator": seeds(1, 2)}, ConditioningNoise(0.5))
    alone = [run(pipe, {**family.call(1), "generator": seeds(seed)}, ConditioningNoise(0.5)) for seed in (1, 2)]
    torch.testing.assert_close(noisy, torch.cat(alone), rtol=1e-4, atol=1e-4 * float(noisy.abs().max()))
    told = Told()
    run(pipe, {**call, "generator": seeds(1)[0]}, [ConditioningNoise(0.5), told])
    first, second = told.context.prompt_embeds
    assert not torch.allclose(first, second, rtol=1e-3)


def test_report_of_the_states(sd):
    member = ConditioningNoise(0.6, rescale=0.0)
    run(sd, {**WORDS, "generator": seeds(1, 2)}, member)
    assert len(member.report.similarity) == 2 and 0 < member.report.alignment_lost < 1
    assert member.report.diversity_before == 0.0 < member.report.diversity_gained
    # Without a generator too, and the next numbers of the program are those of the plain run.
    torch.manual_seed(0)
    stock = images_of(sd(**WORDS))
    torch.manual_seed(0)
    told = Told()
    run(sd, WORDS, [ConditioningNoise(0.6), told])
    torch.manual_seed(0)
    assert torch.equal(told.noise, torch.randn(2, 4, 8, 8)) and stock.shape == told.noise.shape


@pytest.mark.parametrize("scale", [1.0, pytest.param(5.0, marks=pytest.mark.slow)])
def test_predictions_are_those_of_the_noised_prompt(sd, scale):
    told = Told()
    call = {**WORDS, "guidance_scale": scale}
    golden = run(sd, {**call, "generator": seeds(1, 2)}, [ConditioningNoise(0.5), ReDenoise(), told])
    states = {"prompt_embeds": told.context.prompt_embeds, "prompt": None, "generator": seeds(1, 2)}
    torch.testing.assert_close(golden, run(sd, {**call, **states}, ReDenoise()))


# Latents as images. -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "packed"),
    [
        ("sd-ddim", (4, 12, 8), False),
        ("flux", (4, 6, 4), True),
        pytest.param("sdxl", (4, 12, 8), False, marks=pytest.mark.slow),
        pytest.param("sd3", (4, 6, 4), False, marks=pytest.mark.slow),
        pytest.param("qwen-image", (4, 6, 4), True, marks=pytest.mark.slow),
        pytest.param("chroma", (4, 6, 4), True, marks=pytest.mark.slow),
        pytest.param("wan-2.1", None, False, marks=pytest.mark.slow),
    ],
)
def test_latent_space(name, shape, packed):
    family = FAMILIES[name]
    pipe, told = family.build(), Told()
    sides = {"height": 24, "width": 16} if name.startswith("sd") and name != "sd3" else {"height": 48, "width": 32}
    with guide(pipe, initial_noise=told):
        pipe(**{**family.call(2), **sides})
    space = LatentSpace.of(told.context, told.noise)
    images = space.unpack(told.noise)
    assert space.packed == packed and images.shape == (2, *space.shape) and shape in (None, space.shape)
    assert torch.equal(space.pack(images), told.noise)
    if shape is not None:
        drawn = torch.randn(1, *shape, generator=torch.Generator().manual_seed(100))
        torch.testing.assert_close(images[:1], drawn)


def test_sizes_of_latent_spaces_and_their_errors():
    class Packed:
        _pack_latents = None

    def space(tokens, **prepared):
        context = StartContext(Packed(), {}, 1, torch.device("cpu"), prepared=prepared)
        return LatentSpace.of(context, torch.zeros(1, tokens, 16))

    with pytest.raises(ValueError, match="their height and width are not known"):
        space(6)
    with pytest.raises(ValueError, match="keeps 7 tokens for an image of 48 x 32"):
        space(7, height=48, width=32)
    # Sides that are no multiple of a token's are rounded down: 10 x 1 and 96 x 63 tokens of 16 pixels.
    assert space(10, height=160, width=31).shape == (4, 20, 2)
    assert space(96 * 63, height=1536, width=1023).shape == (4, 192, 126)
    video = space(6, height=48, width=32, num_frames=1)
    with pytest.raises(ValueError, match="no rows and columns"):
        video.unpack(torch.zeros(1, 6, 16))


# Options, reports, nesting. -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SeedVariation(1.5), ValueError, r"strength must be in \[0, 1\].* got 1.5"),
        (lambda: SeedVariation("1"), TypeError, "strength must be a number"),
        (lambda: SeedVariation(0.5, 1.5), TypeError, "a seed is a whole number, got 1.5"),
        (lambda: SeedVariation(0.5, [1, 2.5]), TypeError, "a seed is a whole number, got 2.5"),
        (lambda: SeedVariation(0.5, 2**64), ValueError, "64 bits"),
        (lambda: ConditioningNoise(-0.1), ValueError, r"strength must be in \[0, 1\], got -0.1"),
        (lambda: ConditioningNoise(0.1, rescale=2.0), ValueError, "rescale must be in"),
        (lambda: ConditioningNoise(None), TypeError, "strength must be a number"),
    ],
)
def test_errors_of_options(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_errors_of_a_call(sd):
    with pytest.raises(ValueError, match="there are 3 seeds, and 2 samples"):
        SeedVariation(0.5, [1, 2, 3]).latents(sd, **WORDS)
    with pytest.raises(ValueError, match="there are 1 generators, and 2 samples"):
        run(sd, {**WORDS, "generator": seeds(1)}, ConditioningNoise(0.5))
    with pytest.raises(ValueError, match="ConditioningNoise changes the text states .* Put it into the slot"):
        ConditioningNoise(0.5).latents(sd, **WORDS)
    pipeline_class = hfnoise.guided_class(diffusers.StableVideoDiffusionPipeline)
    with pytest.raises(ValueError, match="StableVideoDiffusionPipeline encodes no prompt"):
        object.__new__(pipeline_class).initial_noise = ConditioningNoise(0.5)
    context = StartContext(sd, {}, 1, torch.device("cpu"), encoded=(torch.zeros(1, 8),))
    with pytest.raises(ValueError, match="no prompt to states of shape"):
        ConditioningNoise(0.5).condition(context)
    with pytest.raises(ValueError, match="no prompt to states of shape"):
        ConditioningNoise(0.5).refine(torch.zeros(1, 4, 8, 8), StartContext(sd, {}, 1, torch.device("cpu")))


@pytest.mark.parametrize(
    "member",
    [
        ReDenoise(20, guidance_scales=(4.0, 1.0), iterations=2, normalize=True, compat="official"),
        ReDenoise(strength=0.5),
        NoiseLevelGuidance(
            3, step_size=0.5, max_relative_step=None, noise_variance=0.1, boundary=3.0, stop_early=True
        ),
        SeedVariation(0.5, [1, 2]),
        ConditioningNoise(0.2, rescale=0.5),
    ],
    ids=repr,
)
def test_options_are_saved(member):
    config = json.loads(json.dumps(member.to_config()))
    again = type(member).from_config(config)
    assert vars(again) == vars(member) and INITIAL_NOISES[type(member).__name__] is None


def test_a_weak_model_is_not_saved():
    assert NoiseLevelGuidance(weak_model=torch.nn.Identity()).to_config() is None


def test_modular_pipelines_make_no_predictions():
    with pytest.raises(ValueError, match=r"ReDenoise\(...\).latents\(pipe, prompt, ...\) of a classic pipeline"):
        ReDenoise().check_pipeline(diffusers.StableDiffusionXLModularPipeline)


def test_report_of_one_sample():
    report = StartReport.of(torch.ones(1, 4), -torch.ones(1, 4), 3)
    assert (report.evaluations, report.similarity, report.alignment_lost) == (3, (-1.0,), 2.0)
    assert math.isnan(report.diversity) and math.isnan(report.diversity_gained)


def test_states_keep_their_dtype():
    states = torch.ones(1, 2, 4, dtype=torch.bfloat16).cumsum(-1)
    assert noised_condition(states, torch.zeros(1, 2, 4), 0.5).dtype == torch.bfloat16


def test_nested_interceptions_are_of_one_thread():
    module = torch.nn.Identity()

    def doubled(call, args, kwargs):
        return 2 * call(*args, **kwargs)

    failures = []

    def elsewhere():
        try:
            with intercepted(module, doubled, nested=True):
                pass
        except RuntimeError as error:
            failures.append(str(error))

    with intercepted(module, doubled):
        with intercepted(module, doubled, nested=True):
            assert module(1) == 4
        assert module(1) == 2
        with pytest.raises(RuntimeError, match="in the middle of a guided call"), intercepted(module, doubled):
            pass
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert module(1) == 1 and "one run at a time" in failures[0]
