"""The tiny pipelines are what tests of guidance take them for: deterministic, guided, and every row on its own."""

from functools import cache

import pytest
import torch

from hfnoise.worlds.tiny_pipelines import FAMILIES, STOCK_WARNINGS, images_of
from hfnoise.worlds.tiny_pipelines.family import STEPS

QUICK = ("sd-ddim", "sdxl", "wan-2.1")

pytestmark = [pytest.mark.filterwarnings(warning) for warning in STOCK_WARNINGS]
every_family = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
# What the kernels of another batch size may change, by the steps of a pipeline made larger.
TOLERANCE = 1e-5


@cache
def pipeline(name):
    return FAMILIES[name].build()


def run(name, arguments):
    return images_of(pipeline(name)(**arguments))


@cache
def two(name):
    return run(name, FAMILIES[name].call(2))


def distance(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@every_family
def test_calls_are_finite_and_repeat(name):
    family = FAMILIES[name]
    images = two(name)
    assert images.shape[0] == 2
    assert images.isfinite().all()
    assert torch.equal(run(name, family.call(2)), images)
    assert torch.equal(images_of(family.build()(**family.call(2))), images)


@every_family
def test_rows_do_not_know_their_neighbours(name):
    family = FAMILIES[name]
    images = two(name)
    assert distance(images[:1], images[1:]) > 0.05
    for sample in range(2):
        assert distance(run(name, family.call(1, sample)), images[sample : sample + 1]) < TOLERANCE


@every_family
def test_guidance_is_on_and_can_be_switched_off(name):
    family = FAMILIES[name]
    assert family.scale_name in family.call(1)
    assert distance(run(name, {**family.call(2), family.scale_name: 2.0}), two(name)) > 0.01
    conditional = run(name, family.conditional_call(2))
    assert conditional.isfinite().all()
    assert (distance(conditional, two(name)) > 0.05) == family.guided


def denoiser_rows(name, arguments):
    """Run the pipeline; return the number of rows of each call of its denoiser, with the denoiser's name."""
    pipe, calls = pipeline(name), []
    handles = []
    for component in ("unet", "transformer", "transformer_2"):
        if getattr(pipe, component, None) is not None:

            def count(model, positional, named, component=component):
                sample = positional[0] if positional else named["hidden_states"]
                calls.append((component, sample.shape[0]))

            handles.append(getattr(pipe, component).register_forward_pre_hook(count, with_kwargs=True))
    try:
        pipe(**arguments)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_conditional_call_asks_for_one_branch(name):
    family = FAMILIES[name]
    guided, conditional = denoiser_rows(name, family.call(2)), denoiser_rows(name, family.conditional_call(2))
    assert {rows for _, rows in conditional} == {2}
    branches = 1 if not family.guided else 3 if name == "sd-instruct-pix2pix" else 2
    assert sum(rows for _, rows in guided) == branches * sum(rows for _, rows in conditional)
    assert len(conditional) == (2 * STEPS - 1 if name == "sd-heun" else STEPS)


@pytest.mark.slow
def test_both_transformers_of_wan_are_used():
    used = [component for component, _ in denoiser_rows("wan-2.2", FAMILIES["wan-2.2"].conditional_call(1))]
    assert used == ["transformer"] * 2 + ["transformer_2"] * 2
