"""`hfnoise generate`: where sampling starts, from options and from what the repository holds, and what it cost."""

import json
import shlex
import shutil

import numpy
import pytest
import torch

import hfnoise
from hfnoise.__main__ import main
from hfnoise.latents_options import INITIAL_NOISE_OPTIONS, START_OPTIONS
from hfnoise.pipelines.generate import parse_generate
from hfnoise.pipelines.generate_config import GenerateConfig
from hfnoise.pipelines.generate_members import MEMBERS
from hfnoise.pipelines.initial_noise_files import INITIAL_NOISES
from tests.pipelines.test_generate import images, usage_error

PROMPT = "the digit seven"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a folder with a tiny pipeline, `plain`, the same with One More Step, `saved`, and a `module`."""
    from hfnoise.worlds.digits_pipeline import new_digits_pipeline

    path = tmp_path_factory.mktemp("folders")
    pipe = new_digits_pipeline(width=8)
    pipe.save_pretrained(path / "plain")
    new_digits_pipeline(width=8, seed=1).unet.save_pretrained(path / "module")
    shutil.copytree(path / "plain", path / "saved")
    hfnoise.OneMoreStep.from_pretrained(path / "module", eta=0.25).save_pretrained(path / "saved" / "oms_module")
    return path


@pytest.fixture
def run(folders, tmp_path, capsys):
    """Return a function that runs `hfnoise generate` on a pipeline, and returns record, images and print."""

    def generate(name, *options):
        out = tmp_path / "out"
        common = ["--prompt", PROMPT, "--num_inference_steps", "3", "--device", "cpu", "--output_dir", str(out)]
        assert main(["generate", "--model_name_or_path", str(folders / name), *common, *options]) == 0
        return json.loads((out / "generation.json").read_text()), images(out), capsys.readouterr().out

    return generate


def arguments(folders, name="plain", *options):
    return ["generate", "--model_name_or_path", str(folders / name), "--prompt", PROMPT, "--device", "cpu", *options]


def test_the_table_is_complete():
    """What is asked for by an option is made, and would take the place of a saved one."""
    assert set(MEMBERS) == set(INITIAL_NOISE_OPTIONS)
    names = {member.__name__ for key, (classes, _, _) in MEMBERS.items() if key != "search" for member in classes}
    assert names <= set(INITIAL_NOISES)
    assert all(options[0].name == name for name, options in INITIAL_NOISE_OPTIONS.items())
    # Nothing is taken for given: it would change what is saved.
    assert all(option.default is None for option in START_OPTIONS)


def test_help_names_them(capsys):
    assert main(["generate", "--help"]) == 0
    text = capsys.readouterr().out
    assert "where sampling starts:" in text and all(f"--{option.name} " in text for option in START_OPTIONS)
    assert main(["adaptive-guidance", "--help"]) == 0
    assert "--oms_module (str)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--brightness", "1.5"], "brightness must be in [-1, 1], got 1.5"),
        (["--oms_eta", "-0.1", "--oms_module", "x"], "oms_eta must be in [0, 1], got -0.1"),
        (["--oms_guidance_scale", "-1", "--oms_module", "x"], "oms_guidance_scale must be at least 0, got -1"),
        (["--oms_scale", "-1", "--oms_module", "x"], "oms_scale must be at least 0, got -1"),
        (["--oms_variant", "fp16"], "oms_variant is 'fp16', of an oms_module that is not given"),
        (["--initial_noise", "mine"], "initial_noise must be saved or none, got 'mine'"),
        (["--initial_noise", "none", "--oms_eta", "0.5"], "oms_eta is of oms_module, which is not given"),
        (["--oms_eta", "0.5"], "--oms_eta is of --oms_module, which is not given, and"),
        (["--initial_noise", "saved"], "has no initial noise saved with it"),
        (["--oms_module", "./nowhere"], "--oms_module ./nowhere: ./nowhere is neither a folder nor"),
        (["--oms_module", "MODULE", "--oms_variant", "fp16"], "fp16"),
    ],
)
def test_bad_input_ends_before_a_model_is_loaded(folders, capsys, monkeypatch, options, message):
    from hfnoise.pipelines import pipeline_loading

    monkeypatch.setattr(pipeline_loading, "load_pipeline", lambda *_: pytest.fail("loaded the model"))
    given = [str(folders / "module") if option == "MODULE" else option for option in options]
    assert message in usage_error(capsys, *arguments(folders, "plain", *given))


def test_a_pipeline_that_starts_from_an_image_is_refused(folders):
    from diffusers import StableDiffusionImg2ImgPipeline

    from hfnoise.errors import UsageError
    from hfnoise.pipelines.generate_noise import make_initial_noise

    config = GenerateConfig(str(folders / "plain"), prompt=PROMPT, brightness=0.5)
    with pytest.raises(UsageError, match="StableDiffusionImg2ImgPipeline starts from an image"):
        make_initial_noise(StableDiffusionImg2ImgPipeline, str(folders / "plain"), config, torch.float32)


def test_the_command_is_the_configuration():
    config = GenerateConfig("digits", prompt=["seven"], oms_module="a b", oms_eta=0.5, brightness=-0.5)
    program, name, *words = shlex.split(config.command)
    assert parse_generate(name, words) == config


@pytest.mark.slow
def test_it_is_what_python_draws(folders, run, tmp_path):
    """A module and a brightness, chained, to the bit; with and without a guider."""
    from diffusers import StableDiffusionPipeline

    options = ["--oms_module", str(folders / "module"), "--oms_eta", "0.5", "--brightness", "-0.5"]
    record, found, printed = run("plain", *options, "--guider", "none", "--guidance_scale", "3")
    assert "start: OneMoreStep + BrightnessOffset, 1 evaluation of a network per sample" in printed
    assert record["start_evaluations"] == 1 and record["initial_noise"].startswith("InitialNoiseChain([OneMoreStep(")
    pipe = StableDiffusionPipeline.from_pretrained(folders / "plain")
    pipe.set_progress_bar_config(disable=True)
    step = hfnoise.OneMoreStep.from_pretrained(folders / "module", eta=0.5)
    with hfnoise.guide(pipe, initial_noise=[step, hfnoise.BrightnessOffset(-0.5)]):
        generators = [torch.Generator().manual_seed(0)]
        expected = pipe([PROMPT], num_inference_steps=3, guidance_scale=3.0, generator=generators).images[0]
    assert numpy.array_equal(numpy.asarray(expected), found["0000-seed0.png"])
    guided, drawn, _ = run("plain", *options, "--min_steps", "1", "--guidance_scale", "3")
    assert guided["summary"] is not None and numpy.array_equal(drawn["0000-seed0.png"], found["0000-seed0.png"])


@pytest.mark.slow
def test_what_is_saved_is_used_changed_replaced_or_left_out(folders, run):
    plain, without, printed = run("plain")
    assert plain["initial_noise"] is None and plain["start_evaluations"] is None and "start:" not in printed
    record, saved, printed = run("saved")
    assert "eta=0.25" in record["initial_noise"] and record["start_evaluations"] == 1
    assert not numpy.array_equal(saved["0000-seed0.png"], without["0000-seed0.png"])
    assert run("saved", "--initial_noise", "saved")[0]["initial_noise"] == record["initial_noise"]
    none = run("saved", "--initial_noise", "none")
    assert none[0]["initial_noise"] is None and numpy.array_equal(none[1]["0000-seed0.png"], without["0000-seed0.png"])
    changed = run("saved", "--oms_eta", "0.75", "--oms_guidance_scale", "2")[0]
    assert "eta=0.75, guidance_scale=2.0" in changed["initial_noise"] and changed["start_evaluations"] == 2
    assert "eta=0.0" in run("saved", "--oms_module", str(folders / "module"))[0]["initial_noise"]
    # On top of the saved one, and alone.
    chained, _, printed = run("saved", "--brightness", "0.5")
    assert chained["start_evaluations"] == 1 and "start: OneMoreStep + BrightnessOffset, " in printed
    alone, _, printed = run("saved", "--brightness", "0.5", "--initial_noise", "none")
    assert alone["start_evaluations"] == 0 and "start: BrightnessOffset, no evaluation per sample" in printed
    # Noise that is saved comes before what makes the start of it, and a saved member gives way to one of its class.
    pipe = hfnoise.AutoGuidedPipeline.from_pretrained(folders / "plain")
    pipe.initial_noise = [hfnoise.SeedVariation(seed=7, strength=0.5), hfnoise.BrightnessOffset(0.2)]
    pipe.save_pretrained(folders / "varied")
    varied = run("varied", "--brightness", "-0.5", "--oms_module", str(folders / "module"))[2]
    assert "start: SeedVariation + BrightnessOffset + OneMoreStep, " in varied
    pipe.initial_noise = hfnoise.ConditioningNoise(0.8)
    pipe.save_pretrained(folders / "conditioned")
    conditioned = run("conditioned")[1]
    assert not numpy.array_equal(conditioned["0000-seed0.png"], without["0000-seed0.png"])
    # An estimate that is scaled to nothing changes nothing.
    off = run("saved", "--oms_scale", "0")
    assert off[0]["start_evaluations"] == 0 and numpy.array_equal(
        off[1]["0000-seed0.png"], without["0000-seed0.png"]
    )  # fmt: skip
