"""The examples of guidance run: digits as it is, the others on a tiny pipeline of their family."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from hfnoise.pipelines.guided import GuidedPipeline, stock_class

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' Euler scheduler

FOLDER = Path(__file__).parent.parent.parent / "examples" / "guidance"
FAMILIES = {"sd": "sd-ddim", "sdxl": "sdxl", "sd3": "sd3", "flux": "flux", "wan": "wan-2.1"}
# What the tiny pipelines take as embeddings, or smaller.
LEFT_OUT = ("negative_prompt", "height", "width", "num_frames")


def tiny_in_place_of(pipeline_class, family):
    """Return a tiny pipeline of that class which stays on the CPU and takes a prompt, as its embeddings."""

    def call(self, prompt, **options):
        count = len(prompt) if isinstance(prompt, list) else 1
        assert family.scale_name in options  # the example says how strong
        options = {name: value for name, value in options.items() if name not in LEFT_OUT}
        pipeline_class.__call__(self, **{**family.call(count), **options})
        images = [Image.new("RGB", (8, 8))] * count
        return SimpleNamespace(images=images, frames=[images])

    pipe = family.build()
    assert isinstance(pipe, stock_class(pipeline_class))
    members = {"__call__": call, "to": lambda self, *_: self, "enable_model_cpu_offload": lambda self: None}
    pipe.__class__ = type(pipeline_class.__name__, (pipeline_class,), members)
    return pipe


@pytest.mark.parametrize("name", FAMILIES)
def test_examples_run_on_a_tiny_pipeline(name, tmp_path, monkeypatch, capsys):
    from hfnoise.worlds.tiny_pipelines import FAMILIES as TINY

    family = TINY[FAMILIES[name]]
    monkeypatch.chdir(tmp_path)
    # That of a stock class too, for the example that wraps one in `guide`.
    loads = classmethod(lambda cls, *_, **__: tiny_in_place_of(cls, family))
    for loader in (GuidedPipeline, DiffusionPipeline):
        monkeypatch.setattr(loader, "from_pretrained", loads)
    monkeypatch.setattr("diffusers.utils.export_to_video", lambda frames, path, fps: Path(path).touch())
    runpy.run_path(str(FOLDER / f"{name}.py"))
    assert re.search(r"\d samples?, 4 steps: \d+ of \d+ evaluations, ", capsys.readouterr().out)
    assert list(tmp_path.glob(f"{name}*"))


def test_every_example_is_tried():
    assert {path.stem for path in FOLDER.glob("*.py")} == {"digits", *FAMILIES}


@pytest.mark.slow
def test_the_digits_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(FOLDER / "digits.py"))
    assert found["SCALES"] == (3.0, 7.5, 15.0)
    # The globals of its functions, with one scale and fewer steps.
    found["main"].__globals__.update(SCALES=(7.5,), STEPS=8)
    found["main"]()
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 5 and "160 evaluations" in shown[0] and " % saved; " in shown[1]
    with Image.open(tmp_path / "guidance_digits.png") as image:
        assert image.size == (640, 256)
