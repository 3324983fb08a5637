"""Building the digits world, for a few steps and on images of stripes: the folder, the same weights for a seed."""

import pytest
import torch

from hfnoise.worlds.coloured_digits import COLOURED_DIGITS, colour_images
from hfnoise.worlds.digits import DIGITS, split_digit_images
from hfnoise.worlds.digits_checkpoints import load_digit_classifier, load_digits_pipeline
from hfnoise.worlds.digits_evaluation import draw
from hfnoise.worlds.digits_judges import accuracy
from hfnoise.worlds.digits_model import DigitsRecipe, build

SMOKE = DigitsRecipe(
    width=8, steps=3, text_steps=3, vae_steps=3, variants=2, classifier_epochs=1, batch_size=16, evaluation_images=10
)


def stripes():
    digits = torch.arange(420) % 8
    raw = torch.zeros(420, 8, 8)
    raw[torch.arange(420), digits] = 16.0
    return split_digit_images(raw, digits)


@pytest.mark.slow
def test_build_writes_a_pipeline_with_its_judges(tmp_path):
    train, test = stripes()
    results = build(tmp_path / "one", SMOKE, train, test)
    assert str(build(tmp_path / "two", SMOKE, train, test)) == str(results)  # as text, for nan is not nan
    pipe = load_digits_pipeline(tmp_path / "one")
    assert pipe.vae.config.scaling_factor != 0.18215  # measured, not the default
    assert draw(pipe, DIGITS, torch.tensor([[1]]), 2.0, num_inference_steps=2).isfinite().all()
    for kind in ("verifier", "judge"):
        judge = load_digit_classifier(kind, tmp_path / "one")
        assert accuracy(judge, test.images, test.labels) == results[f"{kind}_accuracy"]
    assert [row["guidance_scale"] for row in results["rows"]] == [1.0, 2.0, 4.0, 7.5]
    card = (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
    assert "weak on purpose" in card and "--steps 3 --seed 0" in card
    assert (tmp_path / "one" / "samples.png").stat().st_size < 100_000


@pytest.mark.slow
def test_held_out_combinations_are_scored_apart(tmp_path):
    images = [colour_images(part[:50]) for part in stripes()]
    results = build(tmp_path, SMOKE, *images, world=COLOURED_DIGITS)
    assert [row["combinations"] for row in results["rows"]] == ["trained on"] * 4 + ["held out"] * 4
    assert len(results["rows"][0]["attribute_accuracy"]) == 3
    assert "60 of the 100 combinations are held out" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_bad_recipes():
    with pytest.raises(ValueError, match="at least 1"):
        DigitsRecipe(steps=0)
    with pytest.raises(ValueError, match="prompt_dropout"):
        DigitsRecipe(prompt_dropout=1.5)
