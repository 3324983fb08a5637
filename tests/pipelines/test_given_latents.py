"""Latents of a call that has an initial noise: those of another shape are refused, with the shape that is wanted."""

import pytest
import torch

from hfnoise.pipelines import BrightnessOffset, ReDenoise, guide
from hfnoise.worlds.tiny_pipelines import FAMILIES, STOCK_WARNINGS
from tests.pipelines.tiny_starts import Told, run, sd_call

pytestmark = [pytest.mark.filterwarnings(warning) for warning in STOCK_WARNINGS]


@pytest.mark.parametrize(
    "shape", [(1, 4, 8, 8), (4, 4, 8, 8), (2, 3, 8, 8), (2, 4, 8), (2, 4, 1, 8, 8)], ids=lambda shape: str(shape)
)
def test_the_wanted_shape_is_named(sd, shape):
    for member in (Told(), ReDenoise(), BrightnessOffset(0.5, direction=[1.0] * 4)):
        state = torch.get_rng_state()
        with pytest.raises(ValueError, match=r"latents= are of shape .*StableDiffusionPipeline draws \(2, 4, 8, 8\)"):
            run(sd, {**sd_call(2), "latents": torch.zeros(shape)}, member)
        assert torch.equal(torch.get_rng_state(), state)


def test_what_is_no_tensor(sd):
    with pytest.raises(TypeError, match="latents= must be a tensor"):
        run(sd, {**sd_call(), "latents": [1.0]}, Told())


def test_the_generator_is_left_as_stock_leaves_it(sd):
    """Drawing for the shape alone uses up no random numbers: a stochastic sampler would see that."""
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    call = {"prompt": "the digit one", "num_inference_steps": 2, "output_type": "latent", "latents": latents}
    found = []
    for member in (None, Told()):
        generator = torch.Generator().manual_seed(3)
        with guide(sd, initial_noise=member):
            found.append(sd(**call, eta=1.0, generator=generator).images)
        found.append(generator.get_state())
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_other_sides_are_drawn(sd):
    """A UNet draws any size, and stock takes it from the latents."""
    told = Told()
    assert run(sd, {**sd_call(), "latents": torch.randn(1, 4, 16, 8)}, told).shape == told.noise.shape == (1, 4, 16, 8)


@pytest.mark.slow
def test_unpacked_latents_of_a_pipeline_of_tokens():
    family = FAMILIES["flux"]
    pipe = family.build()
    for shape in ((1, 4, 4, 4), (1, 9, 16)):
        with pytest.raises(ValueError, match=r"this call of FluxPipeline draws \(1, 4, 16\)"):
            run(pipe, {**family.call(1), "latents": torch.zeros(shape)}, Told())


@pytest.mark.slow
def test_inpainting_names_the_number_of_samples():
    family = FAMILIES["sd-inpaint-4"]
    with pytest.raises(ValueError, match="StableDiffusionInpaintPipeline draws 1 samples"):
        run(family.build(), {**family.call(1), "latents": torch.zeros(2, 4, 8, 8)}, Told())
