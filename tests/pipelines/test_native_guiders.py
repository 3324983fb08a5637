"""Pipelines that take a guider themselves: ours is their component, and what is saved has a stock one for stock."""

import json

import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance

import hfnoise
from hfnoise.pipelines import AdaptiveGuidance, ProjectedGuidance
from tests.pipelines.tiny_native import NO_TEXT, native_call, native_pipeline

pytestmark = pytest.mark.slow

NEVER = {"threshold": 1.0}
EARLY = {"threshold": 0.5}  # reached at the first step


def frames(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(**native_call()).frames


@pytest.fixture(scope="module")
def stock():
    return native_pipeline()


@pytest.fixture(scope="module")
def reference(stock):
    return frames(stock)


@pytest.fixture(scope="module")
def early(stock):
    """Return what the guider that stops early makes."""
    return frames(hfnoise.AutoGuidedPipeline.from_pipe(stock, guider=AdaptiveGuidance(4.0, **EARLY)))


def test_its_own_guider_stays(stock, reference):
    pipe = hfnoise.AutoGuidedPipeline.from_pipe(stock)
    assert pipe.guider is stock.guider and torch.equal(frames(pipe), reference)
    made = hfnoise.GuidedMotifVideoPipeline(**stock.components)
    assert torch.equal(frames(made), reference)
    with pytest.raises(ValueError, match="no guider of hfnoise"):
        _ = pipe.guidance_report


def test_ours_guides_it(stock, reference, early):
    pipe = hfnoise.AutoGuidedPipeline.from_pipe(stock, guider=AdaptiveGuidance(4.0, **NEVER))
    assert torch.equal(frames(pipe), reference)
    assert pipe.guidance_report.rows == (4, 4, 4, 4)
    pipe.guider = AdaptiveGuidance(4.0, **EARLY)
    assert torch.equal(frames(pipe), early) and not torch.equal(early, reference)
    assert pipe.guidance_report.rows == (4, 2, 2, 2)
    assert type(stock.guider) is ClassifierFreeGuidance and stock.config["guider"][0] == "diffusers"
    with pytest.raises(TypeError, match="takes a guider of hfnoise or diffusers, got str"):
        hfnoise.AutoGuidedPipeline.from_pipe(stock, guider="adaptive")


def test_scale_of_its_own_guider_is_the_default(stock, early):
    guider = AdaptiveGuidance(**EARLY)
    pipe = hfnoise.AutoGuidedPipeline.from_pipe(stock, guider=guider)
    assert torch.equal(frames(pipe), early) and guider.guidance_scale == 7.5
    pipe.guider = AdaptiveGuidance(2.0, **EARLY)
    assert not torch.equal(frames(pipe), early)


def test_guide_gives_it_back(stock, reference, early):
    state = {**stock.__dict__, "config": dict(stock.config)}
    with hfnoise.guide(stock, AdaptiveGuidance(**EARLY)):
        assert torch.equal(frames(stock), early)
    changed = {name for name, value in stock.__dict__.items() if state.get(name) is not value}
    assert changed <= {"_internal_dict", "_num_timesteps", "_current_timestep", "_progress_bar_config"}
    assert dict(stock.config) == state["config"] and torch.equal(frames(stock), reference)


def test_saved_with_a_stock_guider_for_stock(stock, reference, early, tmp_path):
    from diffusers import MotifVideoPipeline

    pipe = hfnoise.AutoGuidedPipeline.from_pipe(stock, guider=AdaptiveGuidance(**EARLY))
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "MotifVideoPipeline" and index["guider"] == ["diffusers", "ClassifierFreeGuidance"]
    plain = MotifVideoPipeline.from_pretrained(tmp_path, **NO_TEXT)
    assert type(plain.guider) is ClassifierFreeGuidance and torch.equal(frames(plain), reference)
    for load in (hfnoise.AutoGuidedPipeline, hfnoise.GuidedMotifVideoPipeline):
        assert torch.equal(frames(load.from_pretrained(tmp_path, **NO_TEXT)), early)
    given = hfnoise.AutoGuidedPipeline.from_pretrained(tmp_path, guider=ProjectedGuidance(), **NO_TEXT)
    assert type(given.guider) is ProjectedGuidance
    stock.save_pretrained(tmp_path)
    assert type(hfnoise.AutoGuidedPipeline.from_pretrained(tmp_path, **NO_TEXT).guider) is ClassifierFreeGuidance
