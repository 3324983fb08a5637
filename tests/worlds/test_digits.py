"""The digits world: images, prompts, the untrained pipeline, the classifiers. Training is another file's matter."""

import pytest
import torch

from hfnoise.worlds.digits import TEMPLATES, WORDS, augment, load_digit_images, prompt, split_digit_images
from hfnoise.worlds.digits_judges import DigitClassifier, accuracy, train_digit_classifier
from hfnoise.worlds.digits_pipeline import MAX_TOKENS, new_digits_pipeline, new_digits_tokenizer


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
    assert torch.equal(row, train.digits)
    with pytest.raises(ValueError, match="297 images are for tests"):
        split_digit_images(*stripes(200))


def test_augmented_images_are_near():
    images = split_digit_images(*stripes())[0].images
    moved = augment(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape and moved.min() >= -1 and not torch.equal(moved, images)
    assert torch.equal(moved, augment(images, torch.Generator().manual_seed(0)))
    assert float(moved.mean()) == pytest.approx(float(images.mean()), abs=0.05)


def test_real_images():
    pytest.importorskip("sklearn")
    train, test = load_digit_images()
    assert len(train) == 1500 and len(test) == 297 and set(train.digits.tolist()) == set(range(10))


def test_every_prompt_fits_the_tokenizer():
    tokenizer = new_digits_tokenizer()
    for template in TEMPLATES:
        for digit in range(10):
            ids = tokenizer(prompt(digit, template)).input_ids
            assert len(ids) <= MAX_TOKENS and tokenizer.unk_token_id not in ids
    assert tokenizer("").input_ids == [1, 3] and len(set(WORDS)) == 10
    with pytest.raises(ValueError, match="0 to 9"):
        prompt(10)


@pytest.mark.slow
def test_classifiers_learn():
    train, test = split_digit_images(*stripes(800))
    for kind in ("verifier", "judge"):
        model = train_digit_classifier(kind, train[:256], seed=1, epochs=4)
        again = train_digit_classifier(kind, train[:256], seed=1, epochs=4)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        # A shift by a pixel is half a stripe, so not all.
        assert accuracy(model, test.images, test.digits) > 0.8
    with pytest.raises(ValueError, match="kind"):
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
