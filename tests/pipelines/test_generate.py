"""`hfnoise generate`: what it writes, that its images are those of the pipeline, and that bad input ends at once."""

import json
import shlex
import shutil
import textwrap
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from PIL import Image

import hfnoise
from hfnoise.__main__ import main
from hfnoise.errors import UsageError
from hfnoise.pipelines.generate import _remove_earlier, parse_generate
from hfnoise.pipelines.generate_config import GenerateConfig
from hfnoise.pipelines.picture_files import can_write_videos, save_grid, save_sample

PROMPTS = ["the digit seven", "the digit two"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a tiny pipeline."""
    from hfnoise.worlds.digits_pipeline import new_digits_pipeline

    path = tmp_path_factory.mktemp("pipeline")
    new_digits_pipeline(width=8).save_pretrained(path)
    return str(path)


@pytest.fixture
def config_file(tmp_path, folder):
    """Return a function that writes a YAML file of a tiny run with some settings changed."""

    def write(**changes):
        settings = {
            "model_name_or_path": folder, "prompt": PROMPTS, "num_inference_steps": 4, "guidance_scale": 4.0,
            "device": "cpu", "output_dir": str(tmp_path / "out"), "threshold": 0.97, "seed": 5, "batch_size": 3,
            "num_images_per_prompt": 2,
        }  # fmt: skip
        settings = {name: value for name, value in (settings | changes).items() if value is not None}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
        return str(tmp_path / "run.yaml")

    return write


def pixels(path):
    with Image.open(path) as image:
        return numpy.asarray(image)


def images(folder):
    return {path.name: pixels(path) for path in sorted(folder.glob("0*.png"))}


def usage_error(capsys, *arguments):
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    error = error.splitlines()[-1]  # warnings of libraries come before
    assert error.startswith(f"hfnoise {arguments[0]}: error: ")
    return error


def test_a_run_and_its_command(config_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["adaptive-guidance", "--config", config_file(), "--num_images_per_prompt", "1"]) == 0
    printed, bars = capsys.readouterr()
    assert "it/s" not in bars  # the switch of HF is set for all tests
    record = json.loads((out / "generation.json").read_text())
    report = hfnoise.GuidanceReport.load(out / "guidance_report.json")
    assert record["summary"] == str(report) and str(report) in printed
    assert [sample["prompt"] for sample in record["samples"]] == PROMPTS
    assert [sample["seed"] for sample in record["samples"]] == [5, 6]
    assert [sample["file"] for sample in record["samples"]] == ["0000-seed5.png", "0001-seed6.png"]
    assert tuple(sample["evaluations"] for sample in record["samples"]) == report.sample_evaluations
    assert tuple(sample["stop_step"] for sample in record["samples"]) == report.stop_steps
    assert all(sample["file"] in printed for sample in record["samples"])
    assert record["guider"]["threshold"] == 0.97 and record["guider"]["guidance_scale"] == 4.0
    assert (out / "guidance_report.png").is_file() and pixels(out / "grid.png").shape == (104, 204, 3)
    before = images(out)
    assert len(before) == 2 and not numpy.array_equal(*before.values())
    # The command that it writes down makes the same images again, without the YAML file.
    program, *arguments = shlex.split(record["command"])
    assert program == "hfnoise" and main([*arguments, "--output_dir", str(tmp_path / "again")]) == 0
    again = images(tmp_path / "again")
    assert list(again) == list(before) and all(numpy.array_equal(again[name], before[name]) for name in before)


def test_images_are_those_of_the_pipeline(config_file, folder, tmp_path, capsys):
    """Of the stock one for the guider none, and for a guider that never triggers: to the bit."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    expected = pipe(PROMPTS, num_inference_steps=4, guidance_scale=4.0, generator=generators).images
    options = ["--num_images_per_prompt", "1", "--output_dir", str(tmp_path / "out")]
    for guider in (["--guider", "none"], ["--min_steps", "1"]):
        file = config_file(threshold=None)
        assert main(["generate", "--config", file, *guider, *options]) == 0
        found = list(images(tmp_path / "out").values())
        assert all(
            numpy.array_equal(numpy.asarray(image), other) for image, other in zip(expected, found, strict=True)
        )
    assert not (tmp_path / "none").exists()
    printed = capsys.readouterr().out
    assert "│ 0000-seed5.png │ 5    │ -         │ -           │" in printed
    assert "2 samples, 4 steps: 16 of 16 evaluations, none saved; none stopped" in printed


@pytest.mark.slow
def test_the_saved_guider(folder, tmp_path, capsys):
    copy = tmp_path / "pipeline"
    shutil.copytree(folder, copy)
    hfnoise.AdaptiveGuidance(guidance_scale=3.0, threshold=0.25, min_steps=0.5).save_pretrained(copy / "guider")
    options = ["--guider", "saved", "--num_inference_steps", "4", "--output_dir", str(tmp_path / "out")]
    assert main(["generate", "--model_name_or_path", str(copy), "--prompt", PROMPTS[0], *options]) == 0
    guider = json.loads((tmp_path / "out" / "generation.json").read_text())["guider"]
    assert (guider["threshold"], guider["min_steps"], guider["guidance_scale"]) == (0.25, 0.5, 3.0)
    # It is one that stops as soon as it may.
    assert "1 sample, 4 steps: 6 of 8 evaluations, 25.0 % saved; stopped at step 2" in capsys.readouterr().out


@pytest.mark.slow
def test_noise_does_not_depend_on_the_batch(config_file, tmp_path, capsys):
    for size in (1, 4):
        options = ["--batch_size", str(size), "--output_dir", str(tmp_path / str(size))]
        assert main(["generate", "--config", config_file(), *options]) == 0
    one, four = images(tmp_path / "1"), images(tmp_path / "4")
    assert len(one) == 4
    # Another batch is another rounding, and a pixel has 256 values.
    assert all(abs(one[name].astype(int) - four[name].astype(int)).max() <= 1 for name in one)
    reports = [hfnoise.GuidanceReport.load(tmp_path / name / "guidance_report.json") for name in "14"]
    assert reports[0].rows == reports[1].rows and reports[0].stop_steps == reports[1].stop_steps


def test_a_run_replaces_the_one_before_it_in_a_folder_and_nothing_else(config_file, tmp_path, capsys):
    assert main(["generate", "--config", config_file()]) == 0
    out = tmp_path / "out"
    assert len(images(out)) == 4
    (out / "0009-mine.png").touch()  # of the user
    assert main(["generate", "--config", config_file(prompt=PROMPTS[:1], num_images_per_prompt=1)]) == 0
    assert [path.name for path in sorted(out.glob("0*"))] == ["0000-seed5.png", "0009-mine.png"]
    # A record that names other files, or is of somebody else, removes nothing of theirs.
    (tmp_path / "kept.png").touch()
    for record in ({"samples": [{"file": "../kept.png"}, {"file": 3}]}, {"other": 1}, []):
        (out / "generation.json").write_text(json.dumps(record))
        _remove_earlier(out)
    assert (tmp_path / "kept.png").is_file() and (out / "generation.json").is_file()


def test_a_run_that_is_cut_off_leaves_what_it_has(folder, tmp_path):
    from diffusers import StableDiffusionPipeline

    from hfnoise.pipelines.generate import draw

    class CutOff(StableDiffusionPipeline):
        def __call__(self, prompt, **options):
            if prompt == PROMPTS[1:]:
                raise KeyboardInterrupt
            return super().__call__(prompt, **options)

    config = GenerateConfig(folder, prompt=PROMPTS, num_inference_steps=2, batch_size=1, guider="none")
    with pytest.raises(KeyboardInterrupt):
        draw(CutOff.from_pretrained(folder), config, None, tmp_path / "a" / "out")
    assert [path.name for path in (tmp_path / "a" / "out").iterdir()] == ["0000-seed0.png"]


def test_guiders_are_composed():
    config = GenerateConfig(
        "digits", prompt="seven", guider="projected+adaptive+linear", guidance_scale=4, space="v", norm_threshold=2,
        momentum=-0.5, policy="full_then_estimate",
    )  # fmt: skip
    guider = config.make_guider()
    assert [type(stage).__name__ for stage in guider.stages] == [
        "AdaptiveGuidance", "LinearGuidance", "ProjectedGuidance"
    ]  # fmt: skip
    adaptive, linear, projected = guider.stages
    assert (adaptive.guidance_scale, adaptive.space, linear.policy) == (4.0, "v", "full_then_estimate")
    # A projection is defined on x0 and on the output.
    assert (projected.space, projected.norm_threshold, projected.momentum) == ("x0", 2.0, -0.5)
    assert GenerateConfig("digits", prompt="seven", guider="none").make_guider() is None
    assert not GenerateConfig("digits", prompt="seven").make_guider().asks_for_scale  # the pipeline's default


def test_coefficients_come_from_a_file(tmp_path):
    from hfnoise.guidance import EstimateKey, LinearCoefficients

    LinearCoefficients(EstimateKey("m", "s", 2, 4.0, "0"), ((0.0,), (0.9,)), 1e-3).save(tmp_path / "linear.json")
    file = str(tmp_path / "linear.json")
    assert GenerateConfig("digits", prompt="x", guider="linear", coefficients=file).make_guider().order == 1


def test_the_scale_goes_where_the_pipeline_takes_it():
    from diffusers import FluxPipeline, StableDiffusionPipeline

    from hfnoise.pipelines.generate import _call_options

    config = GenerateConfig("digits", prompt="seven", guider="none", guidance_scale=4.0)
    for cls, name in ((FluxPipeline, "true_cfg_scale"), (StableDiffusionPipeline, "guidance_scale")):
        assert _call_options(cls.__new__(cls), config, None) == {name: 4.0}


def test_the_command_line_wins(config_file, tmp_path):
    file = config_file(guider="projected", threshold=None, eta=0.5)
    config = parse_generate("generate", ["--config", file, "--eta", "1", "--prompt", "a", "b", "--prompt", "c"])
    assert (config.guider, config.eta, config.prompts(), config.seed) == ("projected", 1.0, ["a", "b", "c"], 5)
    (tmp_path / "prompts.txt").write_text("one\n\n two \n")
    config = parse_generate("generate", ["--config", file, "--prompts_file", str(tmp_path / "prompts.txt")])
    assert config.prompts() == ["one", "two"] and config.prompt is None


@pytest.mark.parametrize(
    "changes", [{}, {"negative_prompt": "-x 'y'", "guider": "adaptive+projected", "norm_threshold": "auto"}]
)
def test_the_command_is_the_configuration(changes):
    config = GenerateConfig("digits", prompt=["-a 'b'", "two words"], seed=3, threshold=0.99, **changes)
    program, name, *arguments = shlex.split(config.command)
    assert parse_generate(name, arguments) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": None}, "give --model_name_or_path (a Hub id, a folder, or digits)"),
        ({"model_name_or_path": "./nowhere"}, "no such folder"),
        ({"model_name_or_path": "a/b/c"}, "no such folder"),
        ({"model_name_or_path": "digit"}, "Did you mean digits?"),
        ({"height": 64}, "height and width go together, got 64 and None"),
        (
            {"model_name_or_path": "hfnoise:letters"},
            "no embedded pipeline 'hfnoise:letters'; there are digits, digits-",
        ),
        ({"prompt": None}, "give either prompt or prompts_file"),
        ({"prompt": []}, "there are no prompts"),
        ({"prompt": [7]}, "prompt must be a text or a list of texts, got [7]. In YAML put numbers in quotes."),
        ({"prompt": None, "prompts_file": "nowhere.txt"}, "prompts_file 'nowhere.txt' cannot be read"),
        ({"prompts_file": "some.txt"}, "give either prompt or prompts_file"),
        ({"threshold": 1.2}, "threshold must lie in (0, 1], got 1.2"),
        ({"threshold": True}, "threshold must be of type float, got True"),
        ({"space": "pixels"}, "space must be one of"),
        (
            {"guider": "adaptative"},
            "guider must be one of adaptive, linear, projected, saved, none, or several of the first",
        ),
        ({"guider": "adaptive+none"}, "guider must be one of"),
        ({"guider": "adaptive+saved"}, "guider must be one of"),
        ({"guider": "saved"}, "threshold is of the guider 'adaptive', and the guider is 'saved'"),
        ({"guider": "saved", "threshold": None}, "Name the guider instead, as in --guider adaptive."),
        ({"guider": "projected"}, "threshold is of the guider 'adaptive', and the guider is 'projected'"),
        ({"eta": 0.5}, "eta is of the guider 'projected', and the guider is 'adaptive'"),
        ({"guider": "linear", "threshold": None, "policy": "never"}, "policy must be one of"),
        ({"guider": "linear", "threshold": None, "coefficients": "nowhere.json"}, "nowhere.json"),
        ({"guider": "projected", "threshold": None, "norm_threshold": "automatic"}, "norm_threshold must be of type"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be of type int, got 2.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be finite"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"dtype": "float64"}, "dtype must be one of float32, float16, bfloat16, got 'float64'"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({"device": "meta"}, "computes nothing"),
        ({"num_frames": 9}, "StableDiffusionPipeline takes no num_frames: leave it out."),
        ({"treshold": 0.9}, "unknown option --treshold in the --config file. Did you mean --threshold?"),
        ({"output_dir": "run.yaml/out"}, "cannot be written"),
    ],
)
def test_bad_input_ends_before_a_model_is_loaded(capsys, config_file, tmp_path, monkeypatch, changes, message):
    from hfnoise.pipelines import pipeline_loading

    monkeypatch.setattr(pipeline_loading, "load_pipeline", lambda *_: pytest.fail("loaded the model"))
    file = config_file(**changes)
    monkeypatch.chdir(tmp_path)
    assert message in usage_error(capsys, "generate", "--config", file)
    assert not (tmp_path / "out").exists()


def test_bad_command_lines(capsys, config_file, tmp_path):
    file = config_file()
    assert "unknown option --thresold. Did you mean --threshold?" in usage_error(
        capsys, "generate", "--config", file, "--thresold=0.9"
    )
    assert "invalid int value: 'x'" in usage_error(capsys, "generate", "--config", file, "--seed", "x")
    assert "--config needs a value" in usage_error(capsys, "generate", "--config")
    error = usage_error(capsys, "projected-guidance", "--config", file, "--guider", "adaptive")
    assert "use `hfnoise generate`, or --guider projected" in error
    (tmp_path / "empty").mkdir()
    error = usage_error(capsys, "generate", "--config", file, "--model_name_or_path", str(tmp_path / "empty"))
    assert "holds no model_index.json" in error


def test_pipelines_that_cannot_are_named(capsys, config_file, tmp_path):
    def index(name):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "model_index.json").write_text(json.dumps({"_class_name": name}))
        return ["generate", "--config", config_file(model_name_or_path=str(tmp_path / "other"))]

    assert "takes no guidance_scale: leave it out, or ask for a --guider" in usage_error(
        capsys, *index("MotifVideoPipeline"), "--guider", "none", "--threshold", "0.999"
    )
    assert "DiTPipeline takes no prompt" in usage_error(capsys, *index("DiTPipeline"))
    assert "takes no negative_prompt: leave it out." in usage_error(
        capsys, *index("LatentConsistencyModelPipeline"), "--negative_prompt", "blurred"
    )
    assert "LatentConsistencyModelPipeline" in usage_error(capsys, *index("LatentConsistencyModelPipeline"))
    assert "'NoPipeline', which diffusers" in usage_error(capsys, *index("NoPipeline"))


def test_help_names_every_option(capsys):
    assert main(["generate", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in GenerateConfig.__dataclass_fields__)
    assert main(["adaptive-guidance", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--threshold (float, default 0.999)" in text and "--prompts_file" in text and "--eta" not in text
    assert "from hfnoise import guide, AdaptiveGuidance" in text


def test_videos_are_frames_where_nothing_writes_them(tmp_path, monkeypatch):
    frames = [Image.new("RGB", (16, 8), colour) for colour in ("red", "green", "blue")]
    monkeypatch.setattr("hfnoise.pipelines.picture_files.can_write_videos", lambda: False)
    assert save_sample(frames, tmp_path, "0000-seed0") == "0000-seed0"
    assert [path.name for path in sorted((tmp_path / "0000-seed0").iterdir())] == [
        "frame-0000.png", "frame-0001.png", "frame-0002.png"
    ]  # fmt: skip
    save_grid([frames], tmp_path / "grid.png")
    grid = pixels(tmp_path / "grid.png")
    assert grid.shape == (104, 200, 3) and grid[50, 100].tolist() == [0, 128, 0]  # its middle frame, enlarged


@pytest.mark.skipif(not can_write_videos(), reason="imageio and imageio-ffmpeg are not installed")
def test_videos_are_written(tmp_path):
    frames = [Image.new("RGB", (16, 16), "red")] * 4
    assert save_sample(frames, tmp_path, "0000-seed0") == "0000-seed0.mp4"
    assert (tmp_path / "0000-seed0.mp4").stat().st_size > 0


@pytest.mark.parametrize("name", ["digits", "digits-weak", "coloured-digits", "shaded-digits", "hfnoise:digits"])
def test_embedded_pipelines(name):
    from hfnoise.worlds.pipeline_names import resolve_pipeline

    assert (Path(resolve_pipeline(name)) / "model_index.json").is_file()


def test_a_name_of_the_hub_is_left_alone():
    from hfnoise.pipelines.pipeline_loading import find_pipeline_class
    from hfnoise.worlds.pipeline_names import resolve_pipeline

    name = "someone/no-such-pipeline"
    assert resolve_pipeline(name) == name
    with pytest.raises(UsageError, match="cannot be read"):  # offline, and in one line
        find_pipeline_class(name)


@pytest.mark.slow
def test_the_example_of_a_yaml_file(tmp_path, capsys):
    file = Path(__file__).parent.parent.parent / "examples" / "configs" / "generate.yaml"
    smaller = ["--num_inference_steps", "8", "--num_images_per_prompt", "1", "--output_dir", str(tmp_path / "out")]
    assert main(["generate", "--config", str(file), *smaller]) == 0
    assert "2 samples, 8 steps: " in capsys.readouterr().out and len(images(tmp_path / "out")) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
def test_a_pipeline_of_videos(tmp_path, monkeypatch, capsys):
    from hfnoise.worlds.tiny_pipelines import FAMILIES

    FAMILIES["animatediff"].build().save_pretrained(tmp_path / "pipeline")
    monkeypatch.setattr("hfnoise.pipelines.picture_files.can_write_videos", lambda: False)
    options = ["--num_frames", "3", "--num_inference_steps", "4", "--output_dir", str(tmp_path / "out")]
    options += ["--threshold", "0.5", "--negative_prompt", "b"]
    name = str(tmp_path / "pipeline")
    assert main(["generate", "--model_name_or_path", name, "--prompt", "a", "c", *options]) == 0
    report = hfnoise.GuidanceReport.load(tmp_path / "out" / "guidance_report.json")
    # A video is one sample, though its frames are rows of the model.
    assert report.batch == 2 and sum(report.sample_evaluations) == report.evaluations
    assert [len(list((tmp_path / "out" / f"000{n}-seed{n}").glob("frame-*.png"))) for n in range(2)] == [3, 3]
    assert "0001-seed1 " in capsys.readouterr().out


@pytest.mark.hub
@pytest.mark.slow  # a fresh process that imports all libraries
def test_a_pipeline_of_the_hub(hub, run_python):
    code = """
        from hfnoise.__main__ import main
        from hfnoise.worlds.digits_pipeline import new_digits_pipeline

        new_digits_pipeline(width=8).push_to_hub("tester/digits")
        options = ["--prompt", "the digit two", "--num_inference_steps", "3", "--guider", "projected"]
        print(main(["generate", "--model_name_or_path", "tester/digits", *options]))
        print(main(["generate", "--model_name_or_path", "tester/nothing", *options]))
    """
    lines = run_python(textwrap.dedent(code)).splitlines()
    assert "1 sample, 3 steps: 6 of 6 evaluations, none saved" in lines
    assert lines[-1] == "2"
