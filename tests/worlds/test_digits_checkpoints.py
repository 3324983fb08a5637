"""The shipped checkpoints of the worlds of digits: they load without hfnoise, draw what is asked, and have cards."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from hfnoise.worlds.coloured_digits import COLOURED_DIGITS
from hfnoise.worlds.digits import DIGITS
from hfnoise.worlds.digits_checkpoints import (
    CHECKPOINTS,
    checkpoint_path,
    load_digit_classifier,
    load_digits_pipeline,
)
from hfnoise.worlds.digits_evaluation import draw
from hfnoise.worlds.digits_score import frechet_distance, moments, score_digit_images

EVERY = pytest.mark.parametrize("name", CHECKPOINTS)


@EVERY
def test_folders_are_small_and_complete(name):
    folder = Path(checkpoint_path(name))
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < 4e6
    assert {"README.md", "samples.png", "verifier/config.json", "judge/reference.safetensors"} <= set(sizes)
    assert sizes["samples.png"] < 100_000
    # Stock diffusers is told of stock classes only.
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert not {"verifier", "judge"} & set(index) and "hfnoise" not in str(index)
    assert not any("/" in str(value) for path in folder.rglob("*config.json") for value in _values(path))


def _values(path):
    return json.loads(path.read_text(encoding="utf-8")).values()


@EVERY
def test_cards_say_what_they_must(name):
    card = ModelCard.load(Path(checkpoint_path(name)) / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "diffusers")
    assert card.data.pipeline_tag == "text-to-image" and "hfnoise" in card.data.tags
    assert not re.search(r"None|nan|\{\{|More Information", card.content)
    assert f"--output_dir model_cards/{name} " in card.text and "CC BY 4.0" in card.text
    assert ("--steps 445" in card.text) is (name == "digits-sd-weak")
    assert card.text.count("\n| held out |") == (4 if name == "coloured-digits-sd" else 0)


def test_weak_and_good_have_the_same_judges():
    for kind in ("verifier", "judge"):
        good, weak = (load_digit_classifier(kind, name).state_dict() for name in ("digits-sd", "digits-sd-weak"))
        assert all(torch.equal(good[key], weak[key]) for key in good)


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="give one of digits-sd, digits-sd-weak, coloured-digits-sd"):
        load_digits_pipeline("sd-turbo")
    with pytest.raises(ValueError, match="no checkpoint"):
        load_digit_classifier("judge", tmp_path)
    with pytest.raises(ValueError, match="kind must be one of"):
        load_digit_classifier("jury")


def test_scores_refuse_what_they_cannot_score():
    grey = torch.zeros(4, 1, 16, 16)
    for images, labels in ((grey, torch.zeros(3)), (grey[:, 0], torch.zeros(4)), (grey, torch.zeros(4, 3))):
        with pytest.raises(ValueError, match="needed are images of shape"):
            score_digit_images(images, labels)
    for images in (grey - 1, grey + torch.nan, grey[:1]):
        with pytest.raises(ValueError, match="at least 2 images in .0, 1."):
            score_digit_images(images, torch.zeros(len(images)))
    with pytest.raises(ValueError, match="reference must be one of all for 'digits-sd', got 'held_out'"):
        score_digit_images(grey, torch.zeros(4), reference="held_out")


def test_frechet_distance_is_that_of_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(count, 5, generator=generator, dtype=torch.float64) for count in (40, 30))
    second = 2 * second @ torch.randn(5, 5, generator=generator, dtype=torch.float64) + 1
    (mean, covariance), (other_mean, other_covariance) = moments(first), moments(second)
    root = torch.as_tensor(linalg.sqrtm((covariance @ other_covariance).numpy())).real
    expected = (mean - other_mean).square().sum() + (covariance + other_covariance - 2 * root).trace()
    assert frechet_distance(moments(first), moments(second)) == pytest.approx(float(expected), rel=1e-9)


def test_noise_is_far_from_digits():
    noise = torch.rand(100, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    scores = score_digit_images(noise, torch.arange(100) % 10)
    assert scores.judge_accuracy < 0.3 and scores.frechet_distance > 50


@pytest.mark.slow
def test_real_images_score_as_real():
    _, test = DIGITS.load()
    scores = score_digit_images((test.images + 1) / 2, test.labels)
    assert min(scores.judge_accuracy, scores.verifier_accuracy) > 0.98
    assert scores.frechet_distance < 1e-6  # the reference is made of them


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "guidance_scale", "least", "most"),
    [
        ("digits-sd", 4.0, 0.97, 1.0),
        ("digits-sd-weak", 4.0, 0.88, 1.0),
        ("digits-sd-weak", 1.0, 0.35, 0.75),
    ],
)
def test_digits_are_drawn(name, guidance_scale, least, most):
    labels = DIGITS.combinations().repeat(10, 1)
    images = draw(load_digits_pipeline(name), DIGITS, labels, guidance_scale)
    assert least <= score_digit_images(images, labels, name).judge_accuracy <= most


@pytest.mark.slow
def test_held_out_combinations_leave_something_to_win():
    every = COLOURED_DIGITS.combinations()
    labels = every[COLOURED_DIGITS.is_held_out(every)].repeat(2, 1)
    images = draw(load_digits_pipeline("coloured-digits-sd"), COLOURED_DIGITS, labels, 4.0)
    scores = score_digit_images(images, labels, "coloured-digits-sd", reference="held_out")
    assert 0.5 < scores.judge_accuracy < 0.95
    assert min(scores.attribute_accuracy) >= scores.judge_accuracy


@pytest.mark.slow
@EVERY
def test_stock_diffusers_loads_them(name):
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(checkpoint_path(name))
    assert type(pipe) is StableDiffusionPipeline
    pipe.set_progress_bar_config(disable=True)
    world = CHECKPOINTS[name]
    image = pipe(world.prompt(world.combinations()[0].tolist()), num_inference_steps=2).images[0]
    assert image.size == (16, 16) and image.mode == {1: "L", 3: "RGB"}[world.channels]
