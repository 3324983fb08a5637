"""What is saved is a stock pipeline with the guider beside it: stock loads the one, we load both; all or nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import hfnoise
from hfnoise.pipelines import (
    AdaptiveGuidance,
    AutoGuider,
    InitialNoise,
    LinearGuidance,
    ProjectedGuidance,
    StartState,
    initial_noise_files,
)
from hfnoise.pipelines.guidance_card import guidance_card
from hfnoise.worlds.digits_pipeline import new_digits_pipeline

THRESHOLD = 0.98  # reached in mid-run by the untrained pipeline


def images(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 4, "output_type": "latent", "generator": generator, **options}
    return pipe(["the digit seven", "the digit two"], **call).images


def guided(guider=None, **slots):
    return hfnoise.GuidedStableDiffusionPipeline.from_pipe(new_digits_pipeline(width=8), guider=guider, **slots)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a folder with a pipeline and its guider, and what that makes."""
    folder = tmp_path_factory.mktemp("saved") / "digits"
    pipe = guided(AdaptiveGuidance(threshold=THRESHOLD, inner=ProjectedGuidance(norm_threshold=3.0)))
    made = images(pipe)
    assert pipe.guidance_report.saved > 0
    pipe.save_pretrained(folder)
    return folder, made


@pytest.fixture
def copied(saved, tmp_path):
    """Return a copy to spoil."""
    return shutil.copytree(saved[0], tmp_path / "digits")


def test_stock_diffusers_loads_it_as_its_own(saved):
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    folder, made = saved
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is StableDiffusionPipeline
    stock = images(new_digits_pipeline(width=8))
    assert torch.equal(images(pipe), stock) and not torch.equal(made, stock)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and "guider" not in index


def test_no_module_of_ours_is_named(saved):
    for name, content in files(saved[0]).items():
        assert b"hfnoise" not in content, name


def test_guider_comes_back(saved):
    folder, made = saved
    for load in (hfnoise.AutoGuidedPipeline, hfnoise.GuidedStableDiffusionPipeline):
        pipe = load.from_pretrained(folder)
        assert type(pipe) is hfnoise.GuidedStableDiffusionPipeline
        assert torch.equal(images(pipe), made)


def test_saved_as_its_own_subclass(tmp_path):
    from diffusers import StableDiffusionPipeline

    class MyPipeline(StableDiffusionPipeline):
        pass

    pipe = hfnoise.guided_class(MyPipeline)(**new_digits_pipeline(width=8).components, requires_safety_checker=False)
    pipe.save_pretrained(tmp_path / "mine")
    assert json.loads((tmp_path / "mine" / "model_index.json").read_text())["_class_name"] == "MyPipeline"


def test_live_pipeline_is_not_touched(tmp_path):
    pipe = guided(AdaptiveGuidance())
    before = {**pipe.__dict__, "config": dict(pipe.config)}
    pipe.save_pretrained(tmp_path / "digits")
    assert {**pipe.__dict__, "config": dict(pipe.config)} == before
    assert type(pipe) is hfnoise.GuidedStableDiffusionPipeline


def test_saved_in_the_middle_of_a_call(saved, tmp_path):
    folder, made = saved
    pipe = hfnoise.AutoGuidedPipeline.from_pretrained(folder)

    def save(pipe, step, timestep, tensors):
        pipe.save_pretrained(tmp_path / str(step))
        return {}

    assert torch.equal(images(pipe, callback_on_step_end=save), made)
    assert torch.equal(images(hfnoise.AutoGuidedPipeline.from_pretrained(tmp_path / "2")), made)


class ShiftedNoise(InitialNoise):
    """Adds a constant; can be saved."""

    subfolder = "shifted"

    def __init__(self, shift):
        self.shift = shift

    def refine(self, unit_noise, context):
        return StartState(unit_noise + self.shift)

    def to_config(self):
        return {}

    def save_pretrained(self, folder):
        if self.shift is None:
            raise OSError("disk full")
        Path(folder).mkdir()
        (Path(folder) / "config.json").write_text(json.dumps({"shift": self.shift}))

    @classmethod
    def from_pretrained(cls, path, subfolder, **options):
        return cls(json.loads((Path(path) / subfolder / "config.json").read_text())["shift"])


@pytest.fixture
def shifted_noise(monkeypatch):
    monkeypatch.setitem(initial_noise_files.INITIAL_NOISES, "ShiftedNoise", "shifted")
    monkeypatch.setattr(hfnoise, "ShiftedNoise", ShiftedNoise, raising=False)


def test_initial_noise_has_its_own_folder(tmp_path, shifted_noise):
    pipe = guided(initial_noise=ShiftedNoise(0.5))
    pipe.save_pretrained(tmp_path / "digits")
    loaded = hfnoise.AutoGuidedPipeline.from_pretrained(tmp_path / "digits")
    assert loaded.guider is None and torch.equal(images(loaded), images(pipe))
    other = hfnoise.AutoGuidedPipeline.from_pretrained(tmp_path / "digits", initial_noise=ShiftedNoise(0.0))
    assert torch.equal(images(other), images(new_digits_pipeline(width=8)))
    pipe.initial_noise = None
    pipe.save_pretrained(tmp_path / "digits")
    assert not (tmp_path / "digits" / "shifted").exists()


def test_initial_noise_that_cannot_be_saved_is_told(tmp_path):
    class Unsaved(ShiftedNoise):
        subfolder = None

    with pytest.warns(UserWarning, match="Unsaved is not saved with the pipeline: give initial_noise= again"):
        guided(initial_noise=Unsaved(0.0)).save_pretrained(tmp_path / "digits")


def test_failure_leaves_what_was_there(copied, tmp_path, shifted_noise):
    before = files(copied)
    pipe = guided(LinearGuidance(), initial_noise=ShiftedNoise(None))
    with pytest.raises(OSError, match="disk full"):
        pipe.save_pretrained(copied)
    assert files(copied) == before and sorted(p.name for p in copied.iterdir()) == sorted(
        {name.split("/")[0] for name in before}
    )
    with pytest.raises(OSError, match="disk full"):
        pipe.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="must be a folder, and .*file is a file"):
        pipe.save_pretrained(tmp_path / "file")


def test_saved_again_without_guider(copied):
    pipe = hfnoise.AutoGuidedPipeline.from_pretrained(copied)
    pipe.guider = None
    (copied / "notes.txt").write_text("mine")
    pipe.save_pretrained(copied)
    assert not (copied / "guider").exists() and (copied / "notes.txt").exists()
    assert hfnoise.AutoGuidedPipeline.from_pretrained(copied).guider is None


@pytest.mark.slow
def test_weights_of_an_earlier_save_are_not_read(copied):
    """In another number of files they would be found first."""
    hfnoise.AutoGuidedPipeline.from_pretrained(copied).save_pretrained(copied, max_shard_size="200KB")
    assert len(list((copied / "unet").glob("*-of-*.safetensors"))) > 1
    (copied / "unet" / "lora.safetensors").touch()
    other = hfnoise.GuidedStableDiffusionPipeline.from_pipe(new_digits_pipeline(width=8, seed=1))
    other.save_pretrained(copied)
    assert sorted(path.name for path in (copied / "unet").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors", "lora.safetensors"
    ]  # fmt: skip
    assert torch.equal(images(hfnoise.AutoGuidedPipeline.from_pretrained(copied)), images(other))


@pytest.mark.slow
def test_variants_lie_side_by_side(copied):
    pipe = hfnoise.AutoGuidedPipeline.from_pretrained(copied)
    pipe.save_pretrained(copied, variant="fp16", max_shard_size="200KB")
    names = [path.name for path in (copied / "unet").iterdir()]
    assert "diffusion_pytorch_model.safetensors" in names and any(".fp16-0000" in name for name in names)
    pipe.save_pretrained(copied, variant="fp16")
    names = [path.name for path in (copied / "unet").iterdir()]
    assert not any("-of-" in name or ".index." in name for name in names)
    loaded = hfnoise.AutoGuidedPipeline.from_pretrained(copied, variant="fp16")
    assert loaded.guider.threshold == THRESHOLD and torch.equal(images(loaded), images(pipe))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"_class_name": "MagicGuidance"}, "of class 'MagicGuidance'; known are"),
        ({"_class_name": "ClassifierFreeGuidance"}, "takes a guider of hfnoise"),
        ({"treshold": 0.9}, "AdaptiveGuidance has no option treshold; it has"),
        ({"inner": {"_class_name": "ProjectedGuidance", "etta": 1}}, "ProjectedGuidance has no option etta"),
        ({"threshold": 2}, "threshold must lie in"),
        ({"threshold": "high"}, "threshold must be a number"),
        (None, "not a valid JSON file"),
    ],
)
def test_broken_guider_is_named_before_anything_is_loaded(copied, change, problem):
    file = copied / "guider" / "guider_config.json"
    config = json.loads(file.read_text())
    file.write_text("{" if change is None else json.dumps(config | change))
    shutil.rmtree(copied / "unet")
    with pytest.raises(ValueError, match=f"guider_config.json cannot be used: .*{problem}"):
        hfnoise.AutoGuidedPipeline.from_pretrained(copied)


def test_given_guider_is_used_instead_of_a_broken_one(copied):
    (copied / "guider" / "guider_config.json").write_text("{")
    pipe = hfnoise.GuidedStableDiffusionPipeline.from_pretrained(copied, guider=LinearGuidance())
    assert isinstance(pipe.guider, LinearGuidance)


def test_guider_that_does_not_fit_is_refused_before_anything_is_loaded(copied):
    shutil.rmtree(copied / "unet")
    with pytest.raises(ValueError, match="use_original_formulation"):
        hfnoise.GuidedStableDiffusionPipeline.from_pretrained(
            copied, guider=AdaptiveGuidance(use_original_formulation=True)
        )


def test_subfolder(saved):
    pipe = hfnoise.AutoGuidedPipeline.from_pretrained(saved[0].parent, subfolder="digits")
    assert pipe.guider.threshold == THRESHOLD
    with pytest.raises(ValueError, match="no pipeline from a sub-folder of a Hub repository"):
        hfnoise.AutoGuidedPipeline.from_pretrained("someone/digits", subfolder="small")


def test_guider_options_survive_auto_guider(tmp_path):
    guider = AdaptiveGuidance(3.0, threshold=0.9, inner=LinearGuidance(inner=ProjectedGuidance(momentum=-0.5)))
    guider.save_pretrained(tmp_path)
    loaded = AutoGuider.from_pretrained(tmp_path)
    assert [type(stage) for stage in loaded.stages] == [type(stage) for stage in guider.stages]
    assert loaded.stages[-1].config["momentum"] == -0.5


def test_card_says_what_guides(saved):
    pipe = hfnoise.AutoGuidedPipeline.from_pretrained(saved[0])
    without = guidance_card(pipe, "someone/digits")
    assert "evaluations" not in without.text and "None" not in without.text
    assert without.data.library_name == "diffusers" and without.data.to_dict().get("base_model") is None
    assert without.data.tags == ["diffusers", "hfnoise", "adaptive-guidance", "apg"]
    images(pipe)
    report = pipe.guidance_report
    card = guidance_card(pipe, "someone/digits")
    assert f"The last run before this was pushed: {report}." in card.text and "evaluations" in str(report)
    assert "| AdaptiveGuidance | `threshold` | 0.98 |" in card.text
    assert "| ProjectedGuidance | `norm_threshold` | 3.0 |" in card.text
    assert 'AutoGuidedPipeline.from_pretrained("someone/digits")' in card.text


def test_a_pipeline_without_parts_of_ours_has_a_card_too():
    card = guidance_card(guided(), "someone/digits")
    assert 'DiffusionPipeline.from_pretrained("someone/digits")' in card.text and "import hfnoise" not in card.text
    assert "More Information Needed" not in card.text and "diffusers loads all of it" in card.text


def test_a_second_push_states_the_guider_that_is_pushed(tmp_path):
    from huggingface_hub import ModelCard

    from hfnoise.pipelines.guidance_card import pipeline_card

    def pushed(pipe, existing):
        existing.save(tmp_path / "README.md")  # which is loaded as one on the Hub is
        return pipeline_card(pipe, str(tmp_path / "README.md"))

    adaptive = guidance_card(guided(AdaptiveGuidance(threshold=0.9)), "someone/digits")
    projected = pushed(guided(ProjectedGuidance()), adaptive)
    assert "guided by ProjectedGuidance" in projected.text and "AdaptiveGuidance" not in projected.text
    without = pushed(guided(), projected)
    assert "guided by" not in without.text and "## Use" in without.text and "apg" not in without.data.tags
    theirs = ModelCard("---\nlicense: mit\n---\n# Digits\n\nMy words.\n")
    kept = pushed(guided(AdaptiveGuidance()), theirs)
    assert "My words." in kept.text and "AdaptiveGuidance" in kept.text
    assert pushed(guided(), kept).text.strip().endswith("My words.")
