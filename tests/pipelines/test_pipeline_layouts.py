"""Every classic pipeline of the installed diffusers has a layout, and its source still says what the layout says."""

import re
from pathlib import Path

import diffusers
import pytest

from hfnoise.pipelines.pipeline_layouts import LAYOUTS, PipelineLayout, layout_of

PIPELINES = Path(diffusers.__file__).parent / "pipelines"
GUIDED = {
    name: layout for name, layout in LAYOUTS.items() if layout.kind in ("batched", "two_calls", "three_branches")
}


def test_every_classic_pipeline_has_a_layout():
    names = {name for name in dir(diffusers) if name.endswith("Pipeline") and not name.endswith("ModularPipeline")}
    unknown = sorted(names - {"DiffusionPipeline"} - set(LAYOUTS))
    assert not unknown, (
        f"diffusers {diffusers.__version__} has {unknown}: read the denoising loop of their __call__ (rows of a call, "
        "order of the branches, the line of guidance, what is done to its value) and add each to a group of "
        "hfnoise/pipelines/pipeline_layouts.py, or with a reason to refused_pipelines.py."
    )


def test_no_layout_is_left_over():
    gone = sorted(set(LAYOUTS) - set(dir(diffusers)))
    assert not gone, f"diffusers {diffusers.__version__} no longer has {gone}: remove them from the table."


def test_layouts_are_valid():
    for name, layout in LAYOUTS.items():
        assert (layout.kind == "refused") == bool(layout.reason), name
        assert not (layout.cond_first and layout.kind != "batched"), name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("batch",), "kind must be one of batched, two_calls,.* got 'batch'"),
        (("two_calls",), "must be one of cache_context, same_input, order for two_calls"),
        (("two_calls", "guidance_scale", 0, False, "second"), "got 'second'"),
        (("batched", "guidance_scale", 0, False, "order"), "left out otherwise"),
    ],
)
def test_a_layout_of_yours_is_checked(arguments, words):
    with pytest.raises(ValueError, match=words):
        PipelineLayout(*arguments)


def test_names_are_listed_once():
    from hfnoise.pipelines import pipeline_layouts, refused_pipelines

    names = [name for _, group in (*pipeline_layouts._GROUPS, *refused_pipelines.REFUSED) for name in group.split()]
    assert len(names) == len(set(names)) == len(LAYOUTS)


def test_reasons_say_what_to_do_instead():
    for name, layout in LAYOUTS.items():
        if layout.kind == "refused":
            assert re.search(r"; (use|convert|guide|switch|set) .*\.$", layout.reason), name
            # A class that is named as the way out must be one that we, or the modular pipelines, can guide.
            for other in re.findall(r"\b[A-Z]\w+Pipeline\b", layout.reason):
                assert other in dir(diffusers), (name, other)
                assert other.endswith("ModularPipeline") or LAYOUTS[other].kind != "refused", (name, other)


def test_a_subclass_is_found():
    # Layouts go by name: importing a pipeline to ask for it would cost this test seconds.
    class DiffusionPipeline:
        pass

    class WanPipeline(DiffusionPipeline):
        pass

    class MyPipeline(WanPipeline):
        pass

    assert layout_of(WanPipeline) is layout_of(MyPipeline) is LAYOUTS["WanPipeline"]
    # Not in the table: whatever is unknown derives from it too.
    assert layout_of(DiffusionPipeline) is None


@pytest.fixture(scope="module")
def calls():
    """The source of `__call__` of every guided pipeline, without importing one."""
    found = {}
    for path in PIPELINES.rglob("pipeline_*.py"):
        for text in re.split(r"^(?=class )", path.read_text(), flags=re.MULTILINE)[1:]:
            name = re.match(r"class (\w+)", text)[1]
            if name in GUIDED:
                found[name] = re.split(r"\n    def (?!__call__)", text[text.index("    def __call__") :])[0]
    assert set(found) == set(GUIDED)
    return found


def test_arguments_and_components_are_in_the_source(calls):
    for name, layout in GUIDED.items():
        assert re.search(rf"\b{layout.scale_name}: ", calls[name]), name
        for component in (*layout.denoisers, *layout.controlnets):
            assert f"self.{component}" in calls[name], (name, component)


def test_number_of_calls_is_that_of_the_source(calls):
    # The third call of Stable Diffusion 3 skips layers; the extra one of GLM-Image is made before the first step.
    more = {"StableDiffusion3Pipeline": 1, "GlmImagePipeline": 1}
    for name, layout in GUIDED.items():
        denoiser = "current_model" if len(layout.denoisers) > 1 else f"self\\.{layout.denoisers[0]}"
        number = len(re.findall(rf"\b{denoiser}\(\s", calls[name]) or re.findall(rf"\b{denoiser}\(", calls[name]))
        assert number == (2 if layout.kind == "two_calls" else 1) + more.get(name, 0), name


def test_announcements_and_signs_are_those_of_the_source(calls):
    for name, layout in GUIDED.items():
        announced = bool(re.search(r'cache_context\(\s*"uncond"', calls[name]))
        assert announced == (layout.uncond_call == "cache_context"), name
        assert ("noise_pred = -noise_pred" in calls[name]) == layout.negated, name


def test_order_and_offset_are_those_of_the_source(calls):
    for name, layout in GUIDED.items():
        pairs = re.findall(r"(\w+), (\w+) = (?:torch\.split\(|\w+\.chunk\(2)", calls[name])
        firsts = {"uncond" in first for first, second in pairs if ("uncond" in first) != ("uncond" in second)}
        if layout.kind == "batched":
            assert firsts == {not layout.cond_first}, name
        conditional = r"\b(\w+) \+ (?:self\.)?guidance_scale \* \(\1 - |\(guidance_scale \+ 1\.0\) \*"
        lines = [line for line in calls[name].splitlines() if "guidance_scale" in line]
        assert any(re.search(conditional, line) for line in lines) == bool(layout.scale_offset), name


def test_norms_are_those_of_the_source(calls):
    for name, layout in GUIDED.items():
        # An option that is off by default.
        assert ("torch.norm(" in calls[name]) == (layout.rescaled or name == "QwenImageLayeredPipeline"), name
