"""Building the digits world, for a few steps and on images of stripes: the folder, the same weights for a seed."""

import pytest
import torch

from hfnoise.worlds.digits import prompt, split_digit_images
from hfnoise.worlds.digits_judges import accuracy
from hfnoise.worlds.digits_model import DigitsRecipe, build, load_classifier

SMOKE = DigitsRecipe(width=8, steps=3, text_steps=3, vae_steps=3, classifier_epochs=1, batch_size=16)


@pytest.mark.slow
def test_build_writes_a_pipeline_with_its_judges(tmp_path):
    from diffusers import StableDiffusionPipeline

    digits = torch.arange(420) % 8
    raw = torch.zeros(420, 8, 8)
    raw[torch.arange(420), digits] = 16.0
    train, test = split_digit_images(raw, digits)
    results = build(tmp_path / "one", SMOKE, train, test)
    assert build(tmp_path / "two", SMOKE, train, test) == results
    assert set(results) == {"verifier_accuracy", "judge_accuracy", "reconstruction_accuracy", "loss"}
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "one")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.vae.config.scaling_factor != 0.18215  # measured, not the default
    images = pipe([prompt(1)], num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 1, 16, 16) and images.isfinite().all()
    for kind in ("verifier", "judge"):
        judge = load_classifier(tmp_path / "one", kind)
        assert accuracy(judge, test.images, test.digits) == results[f"{kind}_accuracy"]


def test_bad_recipes():
    with pytest.raises(ValueError, match="at least 1"):
        DigitsRecipe(steps=0)
    with pytest.raises(ValueError, match="prompt_dropout"):
        DigitsRecipe(prompt_dropout=1.5)
