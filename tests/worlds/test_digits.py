"""The digits world: images, prompts, the untrained pipeline, the classifiers. Training is another file's matter."""

import pytest
import torch

from hfnoise.worlds.coloured_digits import COLOURED_DIGITS, colour_images
from hfnoise.worlds.digit_world import augment
from hfnoise.worlds.digits import DIGITS, load_digit_images, prompt, split_digit_images
from hfnoise.worlds.digits_judges import DigitClassifier, accuracy, train_digit_classifier
from hfnoise.worlds.digits_pipeline import new_digits_pipeline, new_digits_tokenizer


def stripes(count=360):
    """Raw images of 8 x 8 whose digit is the row that is inked: what a classifier learns in seconds."""
    digits = torch.arange(count) % 8
    raw = torch.zeros(count, 8, 8)
    raw[torch.arange(count), digits] = 16.0
    return raw, digits


def test_images():
    train, test = split_digit_images(*stripes())
    again, _ = split_digit_images(*stripes())
    assert torch.equal(train.images, again.images) and len(test) == 297
    assert train.images.min() == -1 and train.images.max() == 1
    # The ink is still in the row of its digit.
    row = train.images.mean(dim=(1, 3)).argmax(dim=1) // 2
    assert torch.equal(row, train.labels[:, 0])
    with pytest.raises(ValueError, match="297 images are for tests"):
        split_digit_images(*stripes(200))


def test_augmented_images_are_near():
    images = split_digit_images(*stripes())[0].images
    moved = augment(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape and moved.min() >= -1 and not torch.equal(moved, images)
    assert torch.equal(moved, augment(images, torch.Generator().manual_seed(0)))
    assert float(moved.mean()) == pytest.approx(float(images.mean()), abs=0.05)


@pytest.mark.slow  # the import of scikit-learn alone takes two seconds
def test_real_images():
    train, test = load_digit_images()
    assert len(train) == 1500 and len(test) == 297 and set(train.labels[:, 0].tolist()) == set(range(10))


@pytest.mark.parametrize("world", [DIGITS, COLOURED_DIGITS], ids=lambda world: world.name)
def test_every_prompt_fits_the_tokenizer(world):
    tokenizer = new_digits_tokenizer(world)
    prompts = {
        world.prompt(labels, template): labels
        for labels in world.combinations().tolist()
        for template in world.templates
    }
    assert len(prompts) == len(world.combinations()) * len(world.templates)
    ids = [tokenizer(text).input_ids for text in prompts]
    assert max(map(len, ids)) == world.max_tokens and not any(tokenizer.unk_token_id in row for row in ids)
    assert tokenizer("").input_ids == [1, 3]


def test_bad_prompts():
    with pytest.raises(ValueError, match="digit must be 0 to 9, got 10"):
        prompt(10)
    with pytest.raises(ValueError, match="3 labels are needed .thickness, colour, digit., got .7."):
        COLOURED_DIGITS.prompt(7)


@pytest.mark.parametrize("world", [DIGITS, COLOURED_DIGITS], ids=lambda world: world.name)
def test_combinations_are_numbered(world):
    every = world.combinations()
    assert torch.equal(world.numbers(every), torch.arange(len(every)))


def test_held_out_combinations_are_spread_evenly():
    every = COLOURED_DIGITS.combinations()
    held_out = every[COLOURED_DIGITS.is_held_out(every)]
    assert len(every) == 100 and len(held_out) == 60
    assert [held_out[:, column].bincount().unique().tolist() for column in range(3)] == [[30], [12], [6]]
    trained_on = every[~COLOURED_DIGITS.is_held_out(every)]
    assert len(trained_on[:, :2].unique(dim=0)) == 10 and len(trained_on[:, 1:].unique(dim=0)) == 40
    assert not DIGITS.is_held_out(DIGITS.combinations()).any()


def test_coloured_images():
    grey = split_digit_images(*stripes())[0][:6]
    coloured = colour_images(grey)
    assert coloured.images.shape == (60, 3, 16, 16) and coloured.images.min() >= -1 and coloured.images.max() <= 1
    assert torch.equal(coloured.labels[:, 2], grey.labels[:, 0].repeat_interleave(10))
    assert len(coloured.labels[:10].unique(dim=0)) == 10
    ink = (coloured.images + 1).sum(dim=(2, 3))
    by_thickness = [ink[coloured.labels[:, 0] == thickness] for thickness in (0, 1)]
    assert (by_thickness[1] > 1.2 * by_thickness[0]).all()
    red, green, blue = ink[coloured.labels[:, 1] == 0].T
    assert (red > 5 * green).all() and (red > 5 * blue).all()


@pytest.mark.slow
def test_classifiers_learn():
    train, test = split_digit_images(*stripes(800))
    for kind in ("verifier", "judge"):
        model = train_digit_classifier(kind, train[:256], (10,), seed=1, epochs=4)
        again = train_digit_classifier(kind, train[:256], (10,), seed=1, epochs=4)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        # A shift by a pixel is half a stripe, so not all.
        assert accuracy(model, test.images, test.labels) > 0.8


def test_classifiers_have_a_head_for_each_attribute(tmp_path):
    model = DigitClassifier("judge", channels=3, classes=(2, 5, 10)).eval()
    images, labels = torch.randn(4, 3, 16, 16), COLOURED_DIGITS.combinations()
    every = torch.stack([model.log_probability(images, row.expand(4, 3)) for row in labels])
    assert every.logsumexp(dim=0).abs().max() < 1e-5  # probabilities of all combinations
    assert torch.equal(labels[every.argmax(dim=0)], model.predict(images))
    assert accuracy(model, images, model.predict(images)) == 1
    model.save_pretrained(tmp_path)
    assert torch.equal(DigitClassifier.from_pretrained(tmp_path)(images), model(images))
    with pytest.raises(ValueError, match="kind must be one of"):
        DigitClassifier("jury")


@pytest.mark.slow
def test_pipeline_is_stable_diffusion(tmp_path):
    """Stock classes, the same weights for a seed, saved and loaded by stock diffusers, and it draws."""
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    pipe = new_digits_pipeline()
    assert sum(p.numel() for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()) < 800_000
    arguments = {
        "prompt": [prompt(3), prompt(5)], "num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"
    }  # fmt: skip
    drawn = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    assert drawn.shape == (2, 4, 8, 8) and drawn.isfinite().all()
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is StableDiffusionPipeline
    assert torch.equal(loaded(**arguments, generator=torch.Generator().manual_seed(0)).images, drawn)
    same = new_digits_pipeline(seed=0).unet.state_dict()
    assert all(torch.equal(same[name], value) for name, value in pipe.unet.state_dict().items())
    with pytest.raises(ValueError, match="multiple of 8"):
        new_digits_pipeline(width=12)
