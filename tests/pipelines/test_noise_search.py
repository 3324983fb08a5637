"""Noise search in real pipelines: exact budgets, the same images again, batches, guiders, chains, refusals."""

import json

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLAutoBlocks,
)

import hfnoise
from hfnoise.pipelines import (
    AdaptiveGuidance,
    BrightnessOffset,
    ConditioningNoise,
    OneMoreStep,
    PathSearch,
    RandomSearch,
    ReDenoise,
    SearchTrace,
    ZeroOrderSearch,
    guide,
)
from hfnoise.pipelines.noise_search import NoiseSearch
from hfnoise.worlds.tiny_pipelines import FAMILIES, STOCK_WARNINGS, images_of
from tests.pipelines.digits_calls import PROMPTS
from tests.pipelines.test_one_more_step import new_module

pytestmark = [pytest.mark.filterwarnings(warning) for warning in STOCK_WARNINGS]

SEARCHES = [
    pytest.param(RandomSearch, marks=pytest.mark.slow),
    ZeroOrderSearch,
    pytest.param(PathSearch, marks=pytest.mark.slow),
]


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def contrast(images, prompts):
    return images.std((1, 2, 3))


def call_of(count=2, first=0, **options):
    generators = [torch.Generator().manual_seed(number) for number in range(first, first + count)]
    prompts = (2 * PROMPTS)[first : first + count]
    return {"prompt": prompts, "num_inference_steps": 2, "generator": generators, "output_type": "pt", **options}


def run(pipe, search, guider=None, **call):
    with guide(pipe, guider, initial_noise=search):
        return pipe(**call).images


class Rows:
    """Counts the rows that a model evaluates, within a block."""

    def __init__(self, module):
        self.module, self.count = module, 0

    def __enter__(self):
        self.hook = self.module.register_forward_pre_hook(self.see, with_kwargs=True)
        return self

    def see(self, module, args, kwargs):
        self.count += len(args[0] if args else kwargs.get("sample", kwargs.get("hidden_states")))

    def __exit__(self, *error):
        self.hook.remove()


@pytest.mark.parametrize("kind", SEARCHES)
def test_the_budget_is_spent_and_not_overspent(pipe, kind):
    """One image is 2 steps of 2 predictions: 22 evaluations are five images, and 2 are left over."""
    search = kind(brightness, 22, judge=contrast, batch_size=2)
    with Rows(pipe.unet) as rows:
        noise = search.latents(pipe, **call_of())
    assert rows.count == 2 * 20
    trace = search.trace
    assert (trace.evaluations, trace.budget, trace.candidates) == (20, 22, 5)
    assert [len(row) for row in (*trace.values, *trace.judge, *trace.parents)] == [5] * 6
    assert noise.shape == (2, 4, 8, 8) and noise.dtype == torch.float32
    report = search.report
    assert report.evaluations == 20 and report.alignment_lost > 0
    # The run in the slot is one image more, and draws what was found to be the best.
    with Rows(pipe.unet) as rows:
        images = run(pipe, search, **call_of())
    assert rows.count == 2 * 24
    torch.testing.assert_close(images, search.images, rtol=0, atol=1e-6)
    torch.testing.assert_close(images, pipe(**call_of(latents=noise)).images, rtol=0, atol=1e-6)
    best = torch.tensor(trace.values).max(1).values
    torch.testing.assert_close(brightness(images, None), best, rtol=0, atol=1e-6)


def test_a_budget_of_one_image_is_the_plain_run(pipe):
    for search in (RandomSearch(brightness, 4), ZeroOrderSearch(brightness, 7), PathSearch(brightness, 5)):
        generators = call_of()["generator"]
        before = torch.get_rng_state()
        found = run(pipe, search, **call_of(generator=generators))
        assert search.trace.chosen == (0, 0) and search.trace.evaluations == 4
        plain = call_of()["generator"]
        assert torch.equal(found, pipe(**call_of(generator=plain)).images)
        states = [[one.get_state() for one in both] for both in (generators, plain)]
        assert all(map(torch.equal, *states)) and torch.equal(before, torch.get_rng_state())
    assert not {"prepare_latents", "encode_prompt"} & set(pipe.__dict__)


def test_more_candidates_are_never_worse(pipe):
    """The first candidates of a larger budget are those of the smaller one."""
    best = []
    for number in (1, 2, 4):
        search = RandomSearch(brightness, 4 * number)
        search.latents(pipe, **call_of())
        best.append(torch.tensor(search.trace.values).max(1).values)
        assert search.trace.values[0][0] == pytest.approx(float(brightness(pipe(**call_of()).images, None)[0]))
        torch.testing.assert_close(torch.tensor(search.trace.values)[:, :1], best[0][:, None])
    assert (best[0] <= best[1]).all() and (best[1] <= best[2]).all() and (best[0] < best[2]).any()


@pytest.mark.parametrize("kind", SEARCHES)
def test_a_sample_is_searched_alike_in_every_batch(pipe, kind):
    whole, alone, together = (kind(brightness, 24, batch_size=size) for size in (1, 1, 3))
    noise = whole.latents(pipe, **call_of())
    torch.testing.assert_close(alone.latents(pipe, **call_of(1, 1)), noise[1:], rtol=0, atol=0)
    torch.testing.assert_close(together.latents(pipe, **call_of()), noise, rtol=0, atol=0)
    assert whole.trace.chosen == together.trace.chosen and whole.trace.parents == together.trace.parents
    torch.testing.assert_close(torch.tensor(whole.trace.values), torch.tensor(together.trace.values))


@pytest.mark.parametrize("kind", SEARCHES)
def test_any_candidate_is_drawn_again_from_the_trace(pipe, kind):
    search = kind(brightness, 28)
    noise = search.latents(pipe, **call_of())
    trace = SearchTrace.from_json(json.dumps(json.loads(search.trace.to_json())))
    assert trace == search.trace
    base = torch.cat([torch.randn(1, 4, 8, 8, generator=one) for one in call_of()["generator"]])
    for sample, index in enumerate(trace.chosen):
        torch.testing.assert_close(trace.noise(sample, index, base[sample]), noise[sample], rtol=0, atol=1e-6)
    every = torch.stack([trace.noise(1, index, base[1]) for index in range(7)])
    images = pipe(**call_of(prompt=PROMPTS[1], generator=None, latents=every, num_images_per_prompt=7)).images
    torch.testing.assert_close(brightness(images, None), torch.tensor(trace.values[1]), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="does not hold: give it as base"):
        trace.noise(0, 0)
    with pytest.raises(IndexError, match="no candidate 7 of sample 0"):
        trace.noise(0, 7)


@pytest.mark.parametrize(
    ("generators", "count"),
    [
        ("list", 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("one", 1), ("one", 2), ("none", 1), ("none", 2)]),
    ],
)
def test_a_stochastic_sampler_draws_what_was_judged(pipe, generators, count):
    """What the search keeps is the image of the call, whoever gives the random numbers."""
    kind = LCMScheduler if generators == "one" else EulerAncestralDiscreteScheduler
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    search = RandomSearch(brightness, 16, batch_size=3)
    call = call_of(count)
    call["generator"] = {"list": call["generator"], "one": torch.Generator().manual_seed(3), "none": None}[generators]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = run(pipe, search, **call)
    assert any(search.trace.chosen)
    torch.testing.assert_close(images, search.images, rtol=0, atol=1e-5)


def test_candidates_are_run_under_the_guider_of_the_call(pipe):
    """With the evaluations that it really needs, and its report is of the call alone."""
    guider = AdaptiveGuidance(guidance_scale=5.0, threshold=1e-6, min_steps=0.0)
    search = RandomSearch(brightness, 16)
    images = run(pipe, search, guider, **call_of())
    torch.testing.assert_close(images, search.images, rtol=0, atol=1e-6)
    assert search.trace.evaluations == 15 and search.trace.candidates == 5
    assert guider.report.evaluations == 2 * 3
    outside = RandomSearch(brightness, 16)
    with guide(pipe, guider):
        noise = outside.latents(pipe, **call_of())
        torch.testing.assert_close(pipe(**call_of(latents=noise)).images, images, rtol=0, atol=1e-6)
    assert outside.trace == search.trace


@pytest.mark.slow
def test_candidates_pass_through_what_comes_after_the_search(pipe):
    search, offset = RandomSearch(brightness, 12), BrightnessOffset(-0.5, direction=[1.0, 0.0, 0.0, 0.0])
    images = run(pipe, [search, offset], **call_of())
    torch.testing.assert_close(images, search.images, rtol=0, atol=1e-6)
    golden = RandomSearch(brightness, 14)
    images = run(pipe, [golden, ReDenoise()], **call_of())
    # 3 evaluations of the model for its golden noise, and 4 for the image.
    assert golden.trace.evaluations == 14 and golden.trace.candidates == 2
    torch.testing.assert_close(images, golden.images, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="a chain has two searches"):
        run(pipe, [RandomSearch(brightness, 8), search], **call_of())


@pytest.mark.slow
def test_an_ensemble_compares_by_ranks(pipe):
    verifiers = {"brightness": lambda images, prompts: 1e-6 * brightness(images, prompts), "contrast": contrast}
    search = RandomSearch(verifiers, 24)
    images = run(pipe, search, **call_of())
    torch.testing.assert_close(images, search.images, rtol=0, atol=1e-6)
    assert set(search.trace.scores) == set(verifiers)
    for sample, best in enumerate(search.trace.chosen):
        ranks = [sorted(scores[sample]).index(scores[sample][best]) for scores in search.trace.scores.values()]
        assert sum(ranks) / 2 == max(search.trace.values[sample])


@pytest.mark.slow
def test_previews_cost_their_steps(pipe):
    search = ZeroOrderSearch(brightness, 20, preview_steps=1, neighbours=3)
    run(pipe, search, **call_of())
    assert (search.trace.candidates, search.trace.evaluations, search.trace.num_inference_steps) == (10, 20, 1)
    assert search.trace.parents[0][1:4] == (0, 0, 0) and search.trace.parents[0][4] in range(4)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="the call gives timesteps"):
        search.latents(pipe, **call_of(timesteps=[900, 300]))


def test_the_bar_obeys_the_pipeline(pipe, capsys):
    search = RandomSearch(brightness, 8)
    run(pipe, search, **call_of(1))
    search.latents(pipe, **call_of(1))
    assert "searching" not in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=False)
    search.latents(pipe, **call_of(1))
    shown = capsys.readouterr().err
    assert "searching noise" in shown and "8/8" in shown


def refused(pipe, error, match, search, **call):
    with pytest.raises(error, match=match):
        search.latents(pipe, **{**call_of(), **call})
    assert search.trace is None


def test_broken_verifiers_and_calls_are_refused(pipe):
    refused(pipe, ValueError, "not finite", RandomSearch(lambda images, prompts: images.mean((1, 2, 3)) / 0.0, 8))
    refused(pipe, ValueError, r"shape \(1,\) for 2 images", RandomSearch(lambda images, prompts: [0.5], 8))
    refused(pipe, TypeError, "no number an image", RandomSearch(lambda images, prompts: None, 8))
    refused(pipe, ValueError, "budget is 3 evaluations a sample, which is below one image: 2 steps",
            RandomSearch(brightness, 3))  # fmt: skip
    one = [torch.Generator()]
    with pytest.raises(ValueError, match="list of generators of length 1"):
        RandomSearch(brightness, 8).latents(pipe, **call_of(generator=one))
    states = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    words = {"prompt": None, "prompt_embeds": states[0], "negative_prompt_embeds": states[1]}
    refused(pipe, ValueError, r"RandomSearch\(..., prompts=...\)", RandomSearch(brightness, 8), **words)
    told = []
    search = RandomSearch(lambda images, prompts: told.extend(prompts) or brightness(images, prompts), 8, prompts="a")
    search.latents(pipe, **call_of(**words))
    assert told == ["a"] * 4
    blocks = StableDiffusionXLAutoBlocks().init_pipeline()
    with pytest.raises(ValueError, match="is modular: search with a classic pipeline"):
        search.check_pipeline(type(blocks))


def test_options_are_refused_at_once():
    with pytest.raises(TypeError, match="verifier must be a function"):
        RandomSearch(3, 8)
    with pytest.raises(TypeError, match="judge must be a function"):
        RandomSearch(brightness, 8, judge="judge")
    with pytest.raises(ValueError, match="empty mapping"):
        RandomSearch({}, 8)
    with pytest.raises(TypeError, match="budget must be a whole number, got 8.0"):
        RandomSearch(brightness, 8.0)
    with pytest.raises(ValueError, match="at least 1 evaluation"):
        PathSearch(brightness, 0)
    for kind, options in (
        (RandomSearch, {"batch_size": 0}), (RandomSearch, {"preview_steps": 0}), (ZeroOrderSearch, {"neighbours": 0}),
        (ZeroOrderSearch, {"cosine": 1.0}), (PathSearch, {"paths": 0}), (PathSearch, {"branches": 0}),
        (PathSearch, {"renoising": 0.0}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            kind(brightness, 8, **options)
    assert issubclass(RandomSearch, NoiseSearch) and hfnoise.pipelines.RandomSearch is RandomSearch


def with_vae(pipe):
    """Return the pipeline with something to decode its latents, if it has nothing."""
    if pipe.vae is None:
        config = pipe.transformer.config
        channels = config.in_channels // 4 if hasattr(pipe, "_pack_latents") else config.in_channels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe.vae = AutoencoderKL(
                block_out_channels=(4,), norm_num_groups=2, latent_channels=channels, shift_factor=0.0
            )
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "flux", "sd3", "sd-controlnet", "sd-inpaint-9", "sd-heun", "pixart-alpha"])
def test_searches_in_every_kind_of_pipeline(name):
    """Batches of candidates; images of ControlNets and masks among what goes with them; one call or two a step."""
    family = FAMILIES[name]
    pipe = with_vae(family.build())
    with Rows(getattr(pipe, "unet", None) or pipe.transformer) as rows:
        stock = images_of(pipe(**{**family.call(2), "output_type": "pt"}))
    cost = rows.count // 2
    search = RandomSearch(brightness, 4 * cost + 1, batch_size=3, prompts="a digit")
    with guide(pipe, initial_noise=search):
        images = images_of(pipe(**{**family.call(2), "output_type": "pt"}))
    assert (search.trace.evaluations, search.trace.candidates) == (4 * cost, 4)
    assert any(search.trace.chosen) and not torch.equal(images, stock)
    torch.testing.assert_close(images.float(), search.images, rtol=0, atol=1e-4)
    plain = torch.tensor([row[0] for row in search.trace.values])
    torch.testing.assert_close(brightness(stock.float(), None), plain, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_what_makes_no_images_is_refused():
    for name in ("wan-2.1", "flux"):
        family = FAMILIES[name]
        with pytest.raises(ValueError, match="has no vae, so that there are no images to compare"):
            RandomSearch(brightness, 1000, prompts="a digit").latents(family.build(), **family.call(1))
    family = FAMILIES["animatediff"]
    with pytest.raises(ValueError, match="compares images"):
        RandomSearch(brightness, 1000, prompts="a digit").latents(with_vae(family.build()), **family.call(1))


@pytest.mark.slow
def test_candidates_are_made_of_the_call_s_own_text_states(pipe):
    """Noise on them is that of the call, for one candidate and for several in a batch."""
    search = RandomSearch(brightness, 16, batch_size=3)
    images = run(pipe, [ConditioningNoise(0.4), search], **call_of())
    assert search.trace.candidates == 4
    torch.testing.assert_close(images, search.images, rtol=0, atol=1e-5)
    plain = RandomSearch(brightness, 16, batch_size=3)
    run(pipe, plain, **call_of())
    assert abs(plain.trace.values[0][0] - search.trace.values[0][0]) > 1e-5


@pytest.mark.slow
def test_evaluations_of_another_network_are_counted(pipe):
    """One More Step has its own: with guidance 2 evaluations beside the 4 of an image."""
    step = OneMoreStep(new_module(pipe.unet.config.cross_attention_dim), guidance_scale=2.0)
    search = RandomSearch(brightness, 30)
    with Rows(step.module) as rows:
        images = run(pipe, [search, step], **call_of())
    torch.testing.assert_close(images, search.images, rtol=0, atol=1e-5)
    assert (search.trace.evaluations, search.trace.candidates) == (30, 5)
    assert rows.count == 2 * 2 * 6
