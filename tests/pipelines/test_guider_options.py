"""What is told to somebody who gives a guider, a pipeline or an option of a wrong kind, and what is not printed."""

import inspect
import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers import ModularPipeline
from diffusers.guiders import ClassifierFreeGuidance

import hfnoise
from hfnoise.guidance import EstimateKey, LinearCoefficients
from hfnoise.pipelines import AdaptiveGuidance, AutoGuider, LinearGuidance, ProjectedGuidance
from hfnoise.worlds.digits_pipeline import new_digits_pipeline

# How the table of options calls them.
OWNERS = {
    "all": [AdaptiveGuidance, ProjectedGuidance, LinearGuidance],
    "AdaptiveGuidance": [AdaptiveGuidance],
    "ProjectedGuidance": [ProjectedGuidance],
    "LinearGuidance": [LinearGuidance],
    "Adaptive, Linear": [AdaptiveGuidance, LinearGuidance],
}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AdaptiveGuidance(threshold="auto"), "threshold must be a number, got 'auto' of type str"),
        (lambda: AdaptiveGuidance(threshold=None), "threshold must be a number, got None"),
        (lambda: AdaptiveGuidance(min_steps=True), "min_steps must be a number, got True"),
        (lambda: AdaptiveGuidance("7.5"), "guidance_scale must be a number, got '7.5'"),
        (lambda: AdaptiveGuidance(guidance_rescale="0.7"), "guidance_rescale must be a number"),
        (lambda: ProjectedGuidance(eta="0"), "eta must be a number"),
        (lambda: ProjectedGuidance(momentum="-0.5"), "momentum must be a number"),
        (lambda: LinearGuidance(coefficients="linear.json"), r"LinearCoefficients.load\(path\)"),
    ],
)
def test_options_of_a_wrong_type(make, words):
    with pytest.raises(TypeError, match=words):
        make()


def test_patience_is_a_whole_number():
    with pytest.raises(ValueError, match="a whole number of steps, at least 1, got 1.5"):
        AdaptiveGuidance(patience=1.5)


@pytest.mark.parametrize(
    ("pipe", "words"),
    [
        ("digits", "guide takes a pipeline of diffusers, got str. Load one first"),
        (torch.nn.Linear(1, 1), "guide takes a pipeline of diffusers, got Linear"),
    ],
)
def test_what_is_no_pipeline(pipe, words):
    with pytest.raises(TypeError, match=words), hfnoise.guide(pipe, AdaptiveGuidance()):
        raise AssertionError("it was taken")


def test_a_pipeline_in_the_place_of_its_class_and_a_name_in_the_place_of_a_pipeline():
    pipe = new_digits_pipeline(width=8)
    with pytest.raises(TypeError, match=r"got a pipeline: give type\(pipe\)"):
        hfnoise.guided_class(pipe)
    with pytest.raises(TypeError, match="ModularPipeline is modular and takes a guider itself"):
        hfnoise.guided_class(ModularPipeline)
    with pytest.raises(TypeError, match="got str"):
        hfnoise.guided_class("StableDiffusionPipeline")
    with pytest.raises(TypeError, match="from_pipe takes a pipeline of diffusers, got str. .*from_pretrained"):
        hfnoise.AdaptiveGuidancePipeline.from_pipe("digits")


def test_a_class_in_the_place_of_a_guider():
    words = r"got the class AdaptiveGuidance: make one, AdaptiveGuidance\(\)"
    with pytest.raises(TypeError, match=words):
        hfnoise.pipelines.guider_checks.check_guider(hfnoise.GuidedStableDiffusionPipeline, AdaptiveGuidance)
    with pytest.raises(ValueError, match=r"inner is the class ProjectedGuidance: make one, ProjectedGuidance\(\)"):
        AdaptiveGuidance(inner=ProjectedGuidance)


def test_a_mismatch_names_what_can_be_done():
    key = EstimateKey("model", "DDIMScheduler", 1, 7.5, "00")
    with pytest.raises(ValueError, match=r"LinearGuidance\(\) holds the last update"):
        LinearCoefficients(key, ((0.0,),), 1e-3).check(EstimateKey("model", "DDIMScheduler", 1, 4.0, "00"))


def test_auto_guider_says_where_to_look_and_takes_no_unknown_option(tmp_path):
    LinearGuidance().save_pretrained(tmp_path / "guider")
    with pytest.raises(OSError, match="no file named guider_config.json .* subfolder='guider'"):
        AutoGuider.from_pretrained(tmp_path)
    assert AutoGuider.from_pretrained(tmp_path, subfolder="guider", policy="full_then_estimate").stages
    with pytest.raises(ValueError, match="LinearGuidance has no option polcy; it has coefficients, "):
        AutoGuider.from_pretrained(tmp_path, subfolder="guider", polcy="full_then_estimate")


def test_the_notice_of_diffusers_is_that_of_its_guiders(monkeypatch):
    logger = logging.getLogger("diffusers.guiders.guider_utils")
    seen, filters = [], list(logger.filters)
    monkeypatch.setattr(logger, "handle", lambda record: logger.filter(record) and seen.append(record.getMessage()))
    AdaptiveGuidance(inner=ProjectedGuidance())
    assert seen == []
    ClassifierFreeGuidance()
    assert len(seen) == 1 and "experimental" in seen[0] and logger.filters == filters


def test_the_table_of_options_in_the_docs():
    """Every option of the guiders stands in it, with its default."""
    page = (Path(__file__).parents[2] / "docs" / "guidance.md").read_text(encoding="utf-8")
    table = page.partition("## Options")[2].partition("## Composing")[0]
    words = {"pipeline's": None, "none": None, "all": None, "true": True, "false": False, "0, 1": (0, 1)}
    said, owners = {}, []
    for line in table.splitlines()[4:]:
        if not line.startswith("|"):
            continue
        owner, names, default, _ = (cell.strip().replace("`", "") for cell in line.strip("|").split(" | ", 3))
        owners = OWNERS[owner] if owner else owners
        default = words[default] if default in words else json.loads(default)
        for number, name in enumerate(names.split(", ")):
            for guider in owners:
                said[guider, name] = default[number] if isinstance(default, tuple) else default
    real = {
        (guider, name): parameter.default
        for guider in OWNERS["all"]
        for name, parameter in inspect.signature(guider).parameters.items()
    }
    assert said == real
