"""Latents and prompt states, precomputed: the scale, the sample, the columns of each family, and what is refused."""

import datasets
import numpy
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from hfnoise.trainers.diffusion_latents import encode_prompts, latent_scaling, precompute_latents
from hfnoise.worlds.digits_pipeline import new_digits_pipeline
from tests.trainers.diffusion_world import new_trainer


@pytest.fixture(scope="module")
def pipe():
    return new_digits_pipeline(width=8)


@pytest.fixture(autouse=True)
def no_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def pictures(sizes=((16, 16),) * 5, mode="L"):
    shade = [
        Image.new(mode, size, color=20 * number if mode == "L" else (20 * number,) * 3)
        for number, size in enumerate(sizes)
    ]
    data = {"image": shade, "text": ["one", "two", "three", "", "seven"][: len(sizes)]}
    return datasets.Dataset.from_dict(
        data, features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    )


def test_latents_and_states_are_those_of_the_pipeline(pipe):
    rows = precompute_latents(pictures(), pipe, batch_size=2, seed=None)
    assert rows.column_names == ["latents", "encoder_hidden_states"] and len(rows) == 5
    pixels = torch.full((1, 1, 16, 16), 20 * 4 / 255 * 2 - 1)
    with torch.no_grad():
        mean = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    torch.testing.assert_close(rows[4]["latents"], mean[0], rtol=1e-4, atol=1e-6)
    stock = pipe.encode_prompt("seven", "cpu", 1, False)[0]
    torch.testing.assert_close(rows[4]["encoder_hidden_states"], stock[0], rtol=1e-4, atol=1e-5)
    empty = encode_prompts(pipe, [""])
    torch.testing.assert_close(
        rows[3]["encoder_hidden_states"], empty["encoder_hidden_states"][0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_a_sample_of_the_posterior_depends_on_the_row_only(pipe):
    several = precompute_latents(pictures(), pipe, batch_size=5)
    single = precompute_latents(pictures(), pipe, batch_size=1)
    torch.testing.assert_close(several["latents"][:], single["latents"][:], rtol=1e-4, atol=1e-5)
    assert not torch.equal(precompute_latents(pictures(), pipe, seed=1)[0]["latents"], several[0]["latents"])
    mean = precompute_latents(pictures(), pipe, seed=None)["latents"][:]
    with torch.no_grad():
        std = pipe.vae.encode(torch.zeros(1, 1, 16, 16)).latent_dist.std * pipe.vae.config.scaling_factor
    assert 0.5 < ((several["latents"][:] - mean) / std).std() < 2


def test_images_of_any_size_and_colour_are_brought_to_the_resolution(pipe):
    rows = precompute_latents(pictures([(20, 16), (32, 48)], "RGB"), pipe, resolution=16)
    assert rows["latents"][:].shape == (2, 4, 8, 8)


@pytest.mark.slow
def test_rows_train(pipe, tmp_path):
    rows = precompute_latents(pictures(), pipe)
    options = {"empty_prompt": encode_prompts(pipe, [""])}
    unet = new_digits_pipeline(width=8).unet
    trainer = new_trainer(
        tmp_path, unet, pipe.scheduler, rows, trainer_options=options, max_steps=1, prompt_dropout=0.5
    )
    trainer.train()
    assert trainer.state.global_step == 1


def test_the_three_ways_to_scale_latents():
    settings = {"block_out_channels": (4,), "norm_num_groups": 2, "latent_channels": 4}
    latents = torch.arange(8.0).reshape(1, 4, 2, 1)
    shifted = AutoencoderKL(**settings, scaling_factor=2.0, shift_factor=0.5)
    assert torch.equal(latent_scaling(shifted)(latents), (latents - 0.5) * 2)
    plain = AutoencoderKL(**settings, scaling_factor=2.0)
    assert torch.equal(latent_scaling(plain)(latents), latents * 2)
    moments = AutoencoderKL(**settings, scaling_factor=None, latents_mean=(0, 1, 2, 3), latents_std=(1, 2, 4, 8))
    expected = (latents[0, :, 0, 0] - torch.arange(4.0)) / torch.tensor([1.0, 2, 4, 8])
    assert torch.equal(latent_scaling(moments)(latents)[0, :, 0, 0], expected)
    with pytest.raises(ValueError, match="neither scaling_factor nor latents_mean.*register_to_config"):
        latent_scaling(AutoencoderKL(**settings, scaling_factor=None))


def test_bad_input(pipe):
    tensors = datasets.Dataset.from_dict({"image": numpy.zeros((2, 1, 16, 16)).tolist(), "text": ["one", "two"]})
    for message, call in {
        "no column photo; it has": lambda: precompute_latents(pictures(), pipe, image_column="photo"),
        "no column caption": lambda: precompute_latents(pictures(), pipe, caption_column="caption"),
        r"different sizes: .*Set resolution": lambda: precompute_latents(pictures([(16, 16), (32, 16)]), pipe),
        "resolution is for PIL images": lambda: precompute_latents(tensors, pipe, resolution=16),
        r"values in \[-1, 1\]": lambda: precompute_latents(
            tensors.map(lambda row: {"image": (numpy.asarray(row["image"]) + 2).tolist()}), pipe
        ),
        "an image is missing": lambda: precompute_latents(
            datasets.Dataset.from_dict({"image": [None], "text": ["one"]}), pipe
        ),
        r"rows \[1\] have no caption in 'text'": lambda: precompute_latents(
            datasets.Dataset.from_dict({"image": numpy.zeros((2, 1, 16, 16)).tolist(), "text": ["one", None]}), pipe
        ),
        "resolution is 0; give a whole number": lambda: precompute_latents(pictures(), pipe, resolution=0),
        "images have 3 channels, and the autoencoder takes 1": lambda: precompute_latents(
            datasets.Dataset.from_dict({"image": numpy.zeros((1, 3, 16, 16)).tolist(), "text": ["one"]}), pipe
        ),
        "the dataset is empty": lambda: precompute_latents(pictures([]), pipe),
        "must be a list of texts": lambda: encode_prompts(pipe, "one"),
        "without gaps": lambda: encode_prompts(pipe, ["one", None]),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    broken = new_digits_pipeline(width=8)
    with torch.no_grad():
        broken.vae.quant_conv.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"latents of rows \[0\] are not finite.*to\(torch.float32\)"):
        precompute_latents(pictures(), broken)


def test_sizes_that_differ_from_batch_to_batch(pipe):
    """Upright and lying pictures have as many numbers, which are read in the shape of the first row."""
    with pytest.raises(
        ValueError, match=r"row 1 have the shape \(4, 16, 8\), those of row 0 \(4, 8, 16\).* resolution"
    ):
        precompute_latents(pictures([(32, 16), (16, 32)]), pipe, batch_size=1)


def test_datasets_of_another_kind(pipe):
    splits = datasets.DatasetDict(train=pictures())
    paths = datasets.Dataset.from_dict({"image": ["one.png"], "text": ["one"]})
    for message, dataset in (
        ("is a DatasetDict; give a datasets.Dataset: one split", splits),
        ("is a list; give a datasets.Dataset", [{"image": None, "text": "one"}]),
        (r"an image is a str: 'one.png'. Have datasets open it: dataset.cast_column", paths),
    ):
        with pytest.raises(TypeError, match=message):
            precompute_latents(dataset, pipe)
