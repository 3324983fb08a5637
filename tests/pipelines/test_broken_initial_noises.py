"""A saved initial noise that cannot be used is named before anything large is loaded."""

import json
import shutil

import pytest

import hfnoise
from hfnoise.pipelines import BrightnessOffset, initial_noise_files
from tests.pipelines.saved_noises import LISTED, Mirrored, own_text, step


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Return a folder with a One More Step that reads prompts itself."""
    folder = tmp_path_factory.mktemp("weights") / "oms_module"
    step(eta=0.25, **own_text()).save_pretrained(folder)
    return folder


@pytest.fixture
def listed(stock_folder, tmp_path):
    """Return a function that makes a folder with a file of members, or whatever else stands in it."""

    def make(content, *, weights=None):
        folder = shutil.copytree(stock_folder, tmp_path / "listed")
        (folder / LISTED).parent.mkdir()
        (folder / LISTED).write_text(content if isinstance(content, str) else json.dumps(content))
        if weights is not None:
            shutil.copytree(weights, folder / "oms_module")
        return folder

    return make


def member(**options):
    return {"members": [options]}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "Expecting property name"),
        ([], "must hold an object, and holds a list"),
        ({}, "'members' must be a list with a member"),
        ({"members": [], "not_saved": ["Mine"]}, "'members' must be a list with a member"),
        ({"members": [1]}, "member 1 is of class None; known are BrightnessOffset, .*TerminalPrior"),
        (member(_class_name="os.system", command="ls"), "member 1 is of class 'os.system'; known are"),
        (member(_class_name="InitialNoiseChain"), "of class 'InitialNoiseChain'"),
        (member(_class_name=["OneMoreStep"]), "of class .'OneMoreStep'."),
        ({**member(_class_name="BrightnessOffset", value=0), "order": 1}, "has the entries order, .* install -U"),
        ({**member(_class_name="BrightnessOffset", value=0), "not_saved": 1}, "must be a list of class names"),
        (member(_class_name="BrightnessOffset", value=0.5, valu=1), "has no option valu; it has value, direction"),
        (member(_class_name="BrightnessOffset"), "member 1, BrightnessOffset: .* needs the option value"),
        (member(_class_name="BrightnessOffset", value=2), r"a brightness \(value\) is in"),
        (member(_class_name="BrightnessOffset", value="dark"), "member 1, BrightnessOffset: .* got 'dark'"),
        (member(_class_name="TerminalPrior", statistics={"mean": [0]}), "have the entries 'mean' and 'covariance'"),
        (member(_class_name="OneMoreStep", subfolder="../other"), "must be {'subfolder': 'oms_module'} and is"),
        (member(_class_name="OneMoreStep", subfolder="oms_module", eta=1), "must be {'subfolder': 'oms_module'}"),
        ({"members": [{"_class_name": "OneMoreStep", "subfolder": "oms_module"}] * 2}, "the sub-folder oms_module"),
    ],
)  # fmt: skip
def test_broken_file_is_named_before_anything_is_loaded(listed, content, problem):
    folder = listed(content)
    shutil.rmtree(folder / "unet")
    with pytest.raises(ValueError, match=rf"initial noise in .*{LISTED} cannot be used: .*{problem}.*or \[\] to load"):
        hfnoise.AutoGuidedPipeline.from_pretrained(folder)


@pytest.mark.slow
def test_another_noise_or_none_instead_of_a_broken_one(listed):
    folder = listed("{")
    for load in (hfnoise.AutoGuidedPipeline, hfnoise.GuidedStableDiffusionPipeline):
        assert load.from_pretrained(folder, initial_noise=[]).initial_noise is None
    given = hfnoise.AutoGuidedPipeline.from_pretrained(folder, initial_noise=[BrightnessOffset(0.5)])
    assert given.initial_noise.members[0].value == 0.5


def test_weights_that_are_listed_and_gone(listed, weights):
    entry = {"_class_name": "OneMoreStep", "subfolder": "oms_module"}
    folder = listed({"members": [entry]})
    with pytest.raises(ValueError, match=f"{LISTED} lists OneMoreStep, and there is no oms_module/config.json"):
        hfnoise.AutoGuidedPipeline.from_pretrained(folder)
    shutil.copytree(weights, folder / "oms_module")
    (folder / "oms_module" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        hfnoise.AutoGuidedPipeline.from_pretrained(folder)


def test_weights_that_are_there_and_not_listed(listed, weights):
    folder = listed(member(_class_name="BrightnessOffset", value=0.5), weights=weights)
    with pytest.warns(UserWarning, match="holds oms_module, which initial_noise/.*json does not list: not used"):
        assert hfnoise.AutoGuidedPipeline.from_pretrained(folder).initial_noise.value == 0.5


def test_members_in_an_order_that_makes_no_start(listed, monkeypatch):
    monkeypatch.setitem(initial_noise_files.INITIAL_NOISES, "Mirrored", None)
    monkeypatch.setattr(hfnoise, "Mirrored", Mirrored, raising=False)
    brightness = {"_class_name": "BrightnessOffset", "value": 0.5}
    folder = listed({"members": [brightness, {"_class_name": "Mirrored"}]})
    with pytest.raises(ValueError, match=f"{LISTED} cannot be used: BrightnessOffset makes the start itself"):
        hfnoise.AutoGuidedPipeline.from_pretrained(folder)


def test_options_of_one_more_step_are_checked(listed, weights):
    folder = listed(member(_class_name="OneMoreStep", subfolder="oms_module"), weights=weights)
    file = folder / "oms_module" / "one_more_step.json"
    options = json.loads(file.read_text())
    for change, problem in (
        ({"eta": 3}, r"eta must be in \[0, 1\]"),
        ({"eta": "high"}, r"eta must be in \[0, 1\], got 'high'"),
        ({"terminal_prior": {"mean": [0.0]}}, "have the entries 'mean' and 'covariance'"),
    ):
        file.write_text(json.dumps(options | change))
        with pytest.raises(ValueError, match=f"oms_module/one_more_step.json, .* cannot be used: .*{problem}"):
            hfnoise.AutoGuidedPipeline.from_pretrained(folder)
    file.write_text(json.dumps(options))
    config = folder / "oms_module" / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["os"]}))
    with pytest.raises(
        ValueError, match="oms_module/text_encoder/config.json names the architecture 'os', which is no"
    ):
        hfnoise.AutoGuidedPipeline.from_pretrained(folder)
