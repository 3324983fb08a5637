"""GoldenNoisePipeline, networks by name, verifiers by name, and the comparison of starts."""

import json

import pytest
import torch

import hfnoise
from hfnoise.__main__ import main
from hfnoise.pipelines.generate_config import GenerateConfig
from hfnoise.worlds.digits_checkpoints import checkpoint_path, load_digits_pipeline
from hfnoise.worlds.digits_pipeline import new_digits_pipeline

PROMPT = "the digit seven"
SIZES = {"encoder_hid_dim": 64, "pooled_dim": 8, "map_size": 4, "hidden_channels": 8}


def new_net(**options):
    """Return a network that changes the noise."""
    torch.manual_seed(0)
    net = hfnoise.NoisePromptNet(**SIZES, **options)
    torch.nn.init.normal_(net.map.weight, std=0.1)
    return net


@pytest.fixture(scope="module")
def stock():
    pipe = new_digits_pipeline(width=8)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, **options):
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 2, "output_type": "latent", "generator": generator}
    return pipe(PROMPT, **call | options).images


def test_a_network_by_object_and_folder(stock, tmp_path):
    net = new_net()
    net.save_pretrained(tmp_path / "net")
    pipes = [hfnoise.GoldenNoisePipeline.from_pipe(stock, npnet=given) for given in (net, tmp_path / "net")] + [
        hfnoise.GoldenNoisePipeline.from_pipe(stock, initial_noise=[net])
    ]
    first, *others = (latents(pipe) for pipe in pipes)
    assert not torch.equal(first, latents(stock)) and all(torch.equal(first, other) for other in others)
    pipes[0].save_pretrained(tmp_path / "pipe")
    assert torch.equal(latents(hfnoise.GoldenNoisePipeline.from_pretrained(tmp_path / "pipe")), first)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "has no npnet. Give npnet="),
        ({"npnet": torch.nn.Linear(1, 1)}, TypeError, "npnet is a Linear; give hfnoise.NoisePromptNet"),
        ({"initial_noise": hfnoise.BrightnessOffset(0.5)}, TypeError, "makes unit noise.*got BrightnessOffset"),
        ({"initial_noise": hfnoise.ReDenoise(), "npnet": "there"}, ValueError, "give initial_noise or npnet"),
        ({"npnet": checkpoint_path("digits-sd")}, ValueError, "holds no network of golden noise"),
    ],
)
def test_what_is_refused(stock, options, error, message):
    with pytest.raises(error, match=message):
        hfnoise.GoldenNoisePipeline.from_pipe(stock, **options)


def test_a_network_of_another_model_is_refused_when_it_is_given(stock, tmp_path):
    """Not at the call, when gigabytes have been loaded and a report is awaited."""
    other = hfnoise.NoisePromptNet(**{**SIZES, "encoder_hid_dim": 12})
    other.save_pretrained(tmp_path)
    wrong = r"NoisePromptNet takes text states 12 wide .* StableDiffusionPipeline are 64 wide\. Load one"
    for given in (other, tmp_path):
        with pytest.raises(ValueError, match=wrong):
            hfnoise.GoldenNoisePipeline.from_pipe(stock, npnet=given)
    guided = hfnoise.AutoGuidedPipeline.from_pipe(stock)
    with pytest.raises(ValueError, match=wrong):
        guided.initial_noise = [hfnoise.ReDenoise(), other]
    with pytest.raises(ValueError, match=wrong):
        latents(guided, initial_noise=other)
    with pytest.raises(ValueError, match=wrong), hfnoise.guide(stock, initial_noise=other):
        pass
    assert type(stock).__name__ == "StableDiffusionPipeline" and guided.initial_noise is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": "best"}, "search must be one of random, zero_order, path"),
        ({"search": "random", "budget": 8}, "search needs verifier"),
        ({"verifier": "digits"}, "verifier is of search, which is not given"),
        ({"seed_variation": 2.0}, r"seed_variation must be in \[0, 1\]"),
        ({"npnet_scale": -1.0, "npnet": "x"}, "npnet_scale must be at least 0"),
        ({"noise_level_guidance": 0}, "noise_level_guidance must be at least 1"),
        ({"redenoise": 3}, "redenoise must be of type bool"),
        ({"redenoise": False}, "leave it out"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        GenerateConfig("digits", prompt=[PROMPT], **options)


def test_a_command_can_be_repeated():
    config = GenerateConfig("digits", prompt=["seven"], redenoise=True, redenoise_strength=0.5)
    assert config.command.endswith("--prompt seven --redenoise --redenoise_strength 0.5")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "members", "evaluations"),
    [
        (["--redenoise", "--seed_variation", "0.5"], "SeedVariation + ReDenoise", 3),
        (["--noise_level_guidance", "2"], "NoiseLevelGuidance", 4),
        (["--npnet", "NET", "--npnet_scale", "0.5"], "NoisePromptNet", 1),
        (["--search", "random", "--budget", "5", "--verifier", "digits"], "RandomSearch", 4),
        (["--search", "path", "--budget", "4", "--verifier", "digits", "--preview_steps", "1"], "PathSearch", 4),
    ],
)
def test_generate(stock, tmp_path, capsys, options, members, evaluations):
    stock.save_pretrained(tmp_path / "pipe")
    new_net().save_pretrained(tmp_path / "net")
    options = [str(tmp_path / "net") if one == "NET" else one for one in options]
    given = ["--prompt", PROMPT, "--num_inference_steps", "2", "--guidance_scale", "1", "--guider", "none"]
    folders = ["--model_name_or_path", str(tmp_path / "pipe"), "--output_dir", str(tmp_path / "out")]
    assert main(["generate", *folders, *given, "--device", "cpu", *options]) == 0
    record = json.loads((tmp_path / "out" / "generation.json").read_text())
    assert record["start_evaluations"] == evaluations
    assert f"start: {members}, {evaluations} evaluation" in capsys.readouterr().out


@pytest.mark.slow
def test_the_shipped_network_is_golden():
    pipe = load_digits_pipeline()
    pipe.set_progress_bar_config(disable=True)
    net = hfnoise.load_noise_net(checkpoint_path("digits-sd").replace("digits-sd", "digits-npnet"))
    prompts = [f"the digit {word}" for word in ("two", "three", "eight", "nine")]
    found = hfnoise.compare_starts(
        pipe, net, prompts, hfnoise.named_verifier("digits", kind="judge"), images=32, batch_size=32,
        num_inference_steps=4, guidance_scale=1.0,
    )  # fmt: skip
    assert found.images == 32 and found.interval[0] > 0.5 and found.score_refined > found.score_plain


def test_a_comparison_with_itself_is_undecided(stock):
    call = {"images": 3, "batch_size": 2, "num_inference_steps": 1, "guidance_scale": 1.0}
    found = hfnoise.compare_starts(
        stock, hfnoise.SeedVariation(0.0), [PROMPT], lambda images, prompts: images.mean((1, 2, 3)),
        summary=lambda images, prompts: {"count": float(len(images))}, **call,
    )  # fmt: skip
    assert found.win_rate == 0.5 and found.score_plain == found.score_refined
    assert found.plain == found.refined == {"count": 3.0} and "count: 3 -> 3" in str(found)
    with pytest.raises(ValueError, match="at least 1 image"):
        hfnoise.compare_starts(stock, hfnoise.ReDenoise(), [PROMPT], lambda *_: 0, images=0)


def test_verifiers_by_name():
    with pytest.raises(ValueError, match="needs no processor"):
        hfnoise.named_verifier("digits", processor="there")
