"""Pairs are what the refiner makes, resumed without duplicates, the same however they are batched."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler

from hfnoise.pipelines import InitialNoise, NoiseLevelGuidance, ReDenoise, StartState, guide
from hfnoise.pipelines.noise_pairs import collect_noise_pairs
from hfnoise.pipelines.verifiers import verified
from hfnoise.trainers.noise_prompt_rows import NoisePairRows
from hfnoise.worlds.digits_pipeline import new_digits_pipeline
from hfnoise.worlds.tiny_pipelines import STOCK_WARNINGS

PROMPTS = ["the digit seven", "the digit two", "the digit one"]
CALL = {"num_inference_steps": 2, "guidance_scale": 1.0}


def brightness(images, prompts):
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def pipe():
    return new_digits_pipeline(width=8)


def collect(pipe, folder, **options):
    return collect_noise_pairs(
        pipe,
        PROMPTS,
        output_dir=folder,
        **{"noises_per_prompt": 2, "batch_size": 4, "pairs_per_file": 4} | CALL | options,
    )


def test_a_pair_is_what_the_refiner_makes_of_the_noise_of_its_seed(pipe, tmp_path):
    pairs = collect(pipe, tmp_path, verifier=brightness)
    row = pairs.with_format("torch")[4]
    generator = torch.Generator().manual_seed(int(row["seed"]))
    golden = ReDenoise().latents(pipe, row["prompt"], generator=generator, **CALL)
    noise = NoisePairRows.from_pairs(pairs, pipe)[4]["latents"]
    torch.testing.assert_close(noise + row["delta"].float(), golden[0], rtol=0, atol=2e-3)  # float16
    images = pipe(row["prompt"], latents=golden, output_type="pt", **CALL).images
    assert float(row["score_golden"]) == pytest.approx(float(brightness(images, None)), abs=1e-5)
    plain = torch.Generator().manual_seed(int(row["seed"]))
    images = pipe(row["prompt"], generator=plain, output_type="pt", **CALL).images
    assert float(row["score_noise"]) == pytest.approx(float(brightness(images, None)), abs=1e-5)


def test_every_prompt_and_seed_once(pipe, tmp_path):
    pairs = collect(pipe, tmp_path)
    assert pairs["prompt"][:] == PROMPTS * 2
    assert len(set(pairs["seed"])) == 6


@pytest.mark.slow
def test_interrupted_and_resumed_is_the_whole_collection(pipe, tmp_path):
    whole = collect(pipe, tmp_path / "whole", verifier=brightness)
    calls = []

    def brightness_until_cut(images, prompts):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return brightness(images, prompts)

    brightness_until_cut.__name__ = "brightness"
    with pytest.raises(KeyboardInterrupt):
        collect(pipe, tmp_path / "cut", verifier=brightness_until_cut)
    (file,) = sorted((tmp_path / "cut" / "data").glob("*.parquet"))
    before = file.stat().st_mtime_ns
    resumed = collect(pipe, tmp_path / "cut", verifier=brightness)
    assert file.stat().st_mtime_ns == before  # what was there is not made again
    assert resumed.to_dict() == whole.to_dict()
    loaded = datasets.load_dataset(str(tmp_path / "cut"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.to_dict() == whole.to_dict()
    card = (tmp_path / "cut" / "README.md").read_text(encoding="utf-8")
    assert "pairs whose golden noise is better" in card and "None" not in card


@pytest.mark.slow
def test_batches_change_rounding_only(pipe, tmp_path):
    one, many = (collect(pipe, tmp_path / str(size), batch_size=size).with_format("torch") for size in (1, 4))
    torch.testing.assert_close(one["delta"][:].float(), many["delta"][:].float(), rtol=0, atol=2e-3)
    assert list(one["seed"][:]) == list(many["seed"][:])


def test_another_collection_in_the_same_folder_is_refused(pipe, tmp_path):
    collect(pipe, tmp_path, noises_per_prompt=1)
    with pytest.raises(ValueError, match="seed: 0 there, 1 here"):
        collect(pipe, tmp_path, noises_per_prompt=1, seed=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.png").write_bytes(b"")
    with pytest.raises(ValueError, match="is not empty"):
        collect(pipe, tmp_path / "other")
    assert json.loads((tmp_path / "collection.json").read_text(encoding="utf-8"))["seed"] == 0


@pytest.mark.filterwarnings(*STOCK_WARNINGS)
def test_scores_are_those_of_the_plain_run(tmp_path):
    """Stochastic samplers draw on behind the noise, and what is in the slot refines none of the two."""
    pipe = new_digits_pipeline(width=8)
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    with guide(pipe, initial_noise=NoiseLevelGuidance(1)):
        pairs = collect(pipe, tmp_path, verifier=brightness, noises_per_prompt=1, negative_prompt="a digit")
    for row in pairs:
        generator = torch.Generator().manual_seed(row["seed"])
        call = {**CALL, "generator": generator, "negative_prompt": "a digit", "output_type": "pt"}
        images = pipe(row["prompt"], **call).images
        assert row["score_noise"] == pytest.approx(float(brightness(images, None)), abs=1e-6)


def test_another_model_or_other_options_are_another_collection(tmp_path):
    pipe = new_digits_pipeline(width=8)
    collect(pipe, tmp_path, noises_per_prompt=1)
    with pytest.raises(ValueError, match="refiner_options"):
        collect(pipe, tmp_path, noises_per_prompt=1, refiner=ReDenoise(iterations=2))
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(2.0)
    with pytest.raises(ValueError, match="weights"):
        collect(pipe, tmp_path, noises_per_prompt=1)


def test_cut_off_before_its_settings_were_written(pipe, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "collection.unfinished").write_text('{"pipe', encoding="utf-8")
    assert len(collect(pipe, tmp_path, noises_per_prompt=1)) == 3


@pytest.mark.slow
def test_a_chain_refines(pipe, tmp_path):
    pairs = collect(pipe, tmp_path, noises_per_prompt=1, refiner=[ReDenoise(), NoiseLevelGuidance(1)])
    assert float(torch.as_tensor(pairs["delta"][:]).abs().max()) > 0


class Broken(InitialNoise):
    def __init__(self, change):
        self.change = change

    def refine(self, unit_noise, context):
        return StartState(self.change(unit_noise))


@pytest.mark.parametrize(
    ("refiner", "message"),
    [
        (Broken(lambda noise: noise / 0), "made a start with NaN or infinity"),
        (Broken(lambda noise: noise[:1, :2]), "made a start of shape"),
        (ReDenoise(strength=0.0), "changes nothing"),
    ],
)
def test_refiners_that_make_no_pairs(pipe, tmp_path, refiner, message):
    with pytest.raises(ValueError, match=message):
        collect(pipe, tmp_path, refiner=refiner)
    assert not list(tmp_path.glob("data/*.parquet"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "at least one"),
        ({"prompts": "seven"}, "list of texts"),
        ({"prompts": ["a", "a"]}, "more than once"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"latents": torch.zeros(1)}, "leave them out"),
    ],
)
def test_bad_input(pipe, tmp_path, options, message):
    given = {"prompts": PROMPTS, "output_dir": tmp_path / "pairs", **options}
    with pytest.raises(ValueError, match=message):
        collect_noise_pairs(pipe, given.pop("prompts"), **given)
    assert not (tmp_path / "pairs").exists()


def test_verifiers_are_checked():
    images = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"shape \(1,\) for 2 images"):
        verified(lambda *_: [1.0], images, ["a", "b"])
    with pytest.raises(ValueError, match=r"gave images \[1\] of 2 scores that are not finite"):
        verified(lambda *_: [1.0, float("nan")], images, ["a", "b"])
    with pytest.raises(TypeError, match="no number an image"):
        verified(lambda *_: ["good", "bad"], images, ["a", "b"])


def test_what_the_card_says_to_run_runs(tmp_path, monkeypatch, capsys):
    import re

    from hfnoise.worlds.digits_checkpoints import load_digits_pipeline

    pairs = tmp_path / "pairs"
    collect(load_digits_pipeline(), pairs)
    code = re.search(r"## Use\n+```python\n(.*?)```", (pairs / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert "6 pairs of 3 prompts" in capsys.readouterr().out
