"""The shaded digits: brightness as the prompt says and vaguely so, the shipped pipeline, and its One More Step."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from hfnoise.worlds.digit_world import LabelledImages, augment
from hfnoise.worlds.digits_checkpoints import MODULES, checkpoint_path, one_more_step_path
from hfnoise.worlds.digits_pipeline import new_digits_tokenizer
from hfnoise.worlds.digits_recipe import RECIPES, DigitsRecipe
from hfnoise.worlds.shaded_digits import ANY_BACKGROUND, SHADED_DIGITS, draw_shades, shade_images

ROOT = Path(__file__).parent.parent.parent


def plain(count=100):
    """Digits that are a square in the middle."""
    images = -torch.ones(count, 1, 16, 16)
    images[:, :, 4:12, 4:12] = 1.0
    return LabelledImages(images, torch.arange(count)[:, None] % 10)


def test_shades_are_what_the_word_says_and_wide():
    words = torch.arange(3).repeat(4000)
    shades = draw_shades(words, torch.Generator().manual_seed(0))
    for word, mean in enumerate((-0.6, 0.0, 0.6)):
        shown = shades[words == word]
        assert float(shown.mean()) == pytest.approx(mean, abs=0.02)
        assert float(shown.std()) == pytest.approx(1 / 3, abs=0.015)
        assert shown.abs().max() <= 1
    # The words overlap: some dark backgrounds are brighter than mid grey, 1 in 16.
    assert 0.04 < float((shades[words == 0] > 0).float().mean()) < 0.09


def test_images_have_the_background_of_their_label():
    shaded = shade_images(plain(), 2, seed=0)
    again, other = shade_images(plain(), 2, seed=0), shade_images(plain(), 2, seed=1)
    assert torch.equal(shaded.images, again.images) and not torch.equal(shaded.images, other.images)
    assert len(shaded) == 600 and shaded.images.abs().max() <= 1
    assert torch.equal(shaded.labels[:, 1], plain().labels[:, 0].repeat_interleave(6))
    background = shaded.images[:, 0, 0, 0]
    assert (shaded.images[:, 0, :2] == background[:, None, None]).all()
    means = [float(shaded.images[shaded.labels[:, 0] == word].mean()) for word in range(3)]
    assert means[0] < -0.3 < means[1] < 0.3 < means[2]
    # Ink that contrasts: half the way from black to white.
    ink = shaded.images[:, 0, 7:9, 7:9].mean((1, 2)) - background
    assert torch.equal(ink > 0, background < 0) and ink.abs().min() > 0.9


def test_moved_images_keep_their_background():
    shaded = shade_images(plain(), 1, seed=0).images
    moved = augment(shaded, torch.Generator().manual_seed(0))
    assert not torch.equal(moved, shaded)
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert torch.allclose(moved[:, 0, corner[0], corner[1]], shaded[:, 0, 0, 0], atol=1e-6)


def test_prompts_name_the_background_or_leave_it_open():
    tokenizer = new_digits_tokenizer(SHADED_DIGITS)
    every = SHADED_DIGITS.combinations().tolist()
    texts = [SHADED_DIGITS.prompt(labels, template) for labels in every for template in SHADED_DIGITS.templates]
    ids = [tokenizer(text).input_ids for text in texts]
    assert max(map(len, ids)) == SHADED_DIGITS.max_tokens and not any(tokenizer.unk_token_id in row for row in ids)
    assert SHADED_DIGITS.prompt([0, 7]) == "a photo of the digit seven on a dark background"
    open_ones = {SHADED_DIGITS.prompt([word, 7], ANY_BACKGROUND) for word in range(3)}
    assert open_ones == {"a photo of the digit seven"}


def test_brightness_can_be_read_from_the_noise():
    """As from 32 x 32 latents with the schedule of Stable Diffusion; see DigitsRecipe."""

    def ratio(beta_end, size):
        betas = torch.linspace(0.00085**0.5, beta_end**0.5, 1000, dtype=torch.float64) ** 2
        power = (1 - betas).prod()
        return float(size * size * power / (1 - power))

    recipe = RECIPES["shaded-digits"]
    assert ratio(recipe.beta_end, 8) == pytest.approx(ratio(DigitsRecipe.beta_end, 32), rel=0.05)
    saved = json.loads((Path(checkpoint_path("shaded-digits-sd")) / "scheduler/scheduler_config.json").read_text())
    assert (saved["beta_end"], saved["beta_start"], saved["beta_schedule"]) == (
        recipe.beta_end, 0.00085, "scaled_linear"
    )  # fmt: skip
    with pytest.raises(ValueError, match="beta_end must lie between 0 and 1, got 12"):
        DigitsRecipe(beta_end=12)


def test_the_module_is_small_and_complete():
    for name, base in MODULES.items():
        folder = Path(one_more_step_path(name))
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 1.5e6
        assert {path.name for path in folder.iterdir()} == {
            "README.md", "config.json", "diffusion_pytorch_model.safetensors"
        }  # fmt: skip
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        unet = json.loads((Path(checkpoint_path(base)) / "unet/config.json").read_text(encoding="utf-8"))
        assert all(config[key] == unet[key] for key in ("in_channels", "cross_attention_dim"))
        card = ModelCard.load(folder / "README.md")
        assert card.data.license == "apache-2.0" and "one-more-step" in card.data.tags
        assert "/tmp" not in card.content and "/tmp" not in str(config)
    with pytest.raises(ValueError, match="give one of shaded-digits-oms"):
        one_more_step_path("digits-oms")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_prompts_are_as_dark_and_as_bright_as_they_say():
    """From white noise everything is mid grey, in spite of the prompt; the means of real images are 0.28 and 0.73."""
    from hfnoise import OneMoreStep
    from hfnoise.benchmarks.one_more_step_digits import draw
    from hfnoise.worlds.digits_checkpoints import load_digits_pipeline

    pipe = load_digits_pipeline("shaded-digits-sd")
    step = OneMoreStep.from_pretrained(one_more_step_path())
    assert step.prior is not None
    brightness, spread = {}, {}
    for word in (0, 2):
        labels = torch.tensor([[word, digit] for digit in range(10)]).repeat(4, 1)
        for name, start in (("white", None), ("step", step)):
            images = draw(pipe, labels, None, start, 0, guidance_scale=1.0, num_inference_steps=10)
            brightness[word, name], spread[word, name] = images.mean(), images.mean((1, 2, 3)).std()
    assert all(0.4 < brightness[word, "white"] < 0.6 for word in (0, 2))
    assert brightness[0, "step"] < 0.34 and brightness[2, "step"] > 0.66
    assert all(0.09 < spread[word, "step"] < 0.18 for word in (0, 2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_example_and_benchmark(tmp_path, monkeypatch):
    """The example writes a module with a prior and a card; the benchmark writes its table and its picture."""
    from hfnoise import OneMoreStep
    from hfnoise.benchmarks import one_more_step_digits as benchmark

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = ROOT / "examples" / "configs" / "one_more_step_digits.yaml"
    options = ["--max_steps", "2", "--warmup_steps", "0", "--eval_steps", "1", "--per_device_train_batch_size", "8"]
    monkeypatch.setattr(sys, "argv", ["digits.py", "--config", str(config), "--disable_tqdm", "true", *options])
    example = runpy.run_path(str(ROOT / "examples" / "one_more_step" / "digits.py"))
    example["main"].__globals__.update(TRAIN_ROWS=60, EVAL_ROWS=60)
    example["main"]()
    assert OneMoreStep.from_pretrained(tmp_path / "shaded-digits-oms").prior is not None
    assert "license: apache-2.0" in (tmp_path / "shaded-digits-oms" / "README.md").read_text(encoding="utf-8")
    arguments = ["--images", "4", "--steps", "2", "--scales", "1", "--seeds", "0", "--output_dir", str(tmp_path)]
    assert benchmark.main(arguments) in (0, 1)
    written = json.loads((tmp_path / "one_more_step_digits.json").read_text(encoding="utf-8"))
    assert set(written["runs"][0]["1"]) == {"dark", "grey", "bright", "any"}
    assert 0 < written["theory"]["white_mean"] < 0.5
    assert "| 1 | dark | white noise |" in (tmp_path / "one_more_step_digits.md").read_text(encoding="utf-8")
    assert (tmp_path / "one_more_step_digits.png").stat().st_size > 0
    with pytest.raises(ValueError, match="--images can be at most"):
        benchmark.main(["--images", "5000", "--output_dir", str(tmp_path)])
