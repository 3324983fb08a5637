"""`hfnoise one-more-step`: from images and captions to a module that `hfnoise generate` uses."""

import json
import textwrap
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from PIL import Image

from hfnoise.__main__ import main
from hfnoise.latents.hf_checkpoints import load_module
from hfnoise.latents.hf_time_free_unet import module_residuals
from hfnoise.latents_options import IMAGE_DATA_OPTIONS, MODULE_OPTIONS, ONE_MORE_STEP_OPTIONS
from hfnoise.trainers.image_arguments import OneMoreStepScriptArguments
from hfnoise.trainers.launch_one_more_step import new_module
from tests.test_import import loaded_by

ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / "examples" / "configs" / "one_more_step.yaml"
CAPTIONS = ["the digit zero", "the digit one"] * 8


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Return the folder of a tiny pipeline."""
    from hfnoise.worlds.digits_pipeline import new_digits_pipeline

    path = tmp_path_factory.mktemp("pipeline")
    new_digits_pipeline(width=8).save_pretrained(path)
    return str(path)


@pytest.fixture
def pictures(tmp_path):
    """Return a csv file that names images beside it, dark ones of zeros and bright ones of ones, with captions."""
    (tmp_path / "images").mkdir()
    lines = ["file,caption"]
    for number, caption in enumerate(CAPTIONS):
        shade = 20 if "zero" in caption else 230
        Image.new("L", (20, 16), shade + number % 4).save(tmp_path / "images" / f"{number}.png")
        lines.append(f"{number}.png,{caption}")
    (tmp_path / "images" / "captions.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "images" / "captions.csv"


@pytest.fixture
def arguments(pipeline, tmp_path):
    """Return a function that gives the command line of a tiny run with some options changed."""

    def make(**changes):
        settings = {
            "model_name_or_path": pipeline, "dataset_name": "hfnoise:digits", "output_dir": str(tmp_path / "module"),
            "latents_dir": str(tmp_path / "latents"), "block_out_channels": "8 16", "layers_per_block": 1,
            "max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "learning_rate": 1e-2,
            "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
            "logging_steps": 1, "ema_decay": 0.5,
        }  # fmt: skip
        given = {name: value for name, value in (settings | changes).items() if value is not None}
        return [
            "one-more-step",
            *(word for name, value in given.items() for word in (f"--{name}", *str(value).split())),
        ]

    return make


def usage_error(capsys, arguments):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    error = error.splitlines()[-1]
    assert error.startswith("hfnoise one-more-step: error: ")
    return error


def test_help_is_light():
    quiet = "import contextlib, io; from hfnoise.__main__ import main; exec({!r})"
    code = "with contextlib.redirect_stdout(io.StringIO()): main(['one-more-step', '--help'])"
    seconds, heavy = loaded_by(quiet.format(code))
    assert heavy == set() and seconds < 0.5


def test_help(capsys):
    assert main(["one-more-step", "--help"]) == 0
    text = capsys.readouterr().out
    for option in (*ONE_MORE_STEP_OPTIONS, *IMAGE_DATA_OPTIONS, *MODULE_OPTIONS):
        assert f"--{option.name} (" in text
    assert "Every option of transformers.TrainingArguments" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": None}, "give --model_name_or_path (a Hub id, a folder, or digits)"),
        ({"dataset_name": None}, "give --dataset_name (a Hub id, a local file or folder, or hfnoise:digits)"),
        ({"world": "brightness"}, "has its own pipeline and images: leave --model_name_or_path"),
        ({"world": "sea", "model_name_or_path": None, "dataset_name": None}, "world is 'sea'; there is brightness"),
        ({"dataset_name": "hfnoise:letters"}, "no images named 'hfnoise:letters'; there are hfnoise:digits, "),
        ({"dataset_name": "./nowhere.csv"}, "no such file or folder"),
        ({"model_name_or_path": "./nowhere"}, "no such folder"),
        ({"module_name_or_path": "there"}, "whose sizes are its own: leave --block_out_channels, --layers_per_block"),
        ({"module_variant": "fp16"}, "module_variant is of --module_name_or_path"),
        ({"block_out_channels": "8 0"}, "block_out_channels is [8, 0]; give whole numbers"),
        ({"attention_head_dim": "1 2 3"}, "attention_head_dim has 3 entries for 2 levels"),
        ({"validation_size": 1.5}, "validation_size is 1.5; give a share below 1, or a number of rows"),
        ({"posterior": "mode"}, "posterior is 'mode'; choose sample or mean."),
        ({"resolution": 0}, "resolution is 0"),
        ({"snr_gamma": 5}, "One More Step has no noise levels"),
        ({"block_out_channels": "10 30", "norm_num_groups": 4}, "must be divisible by num_groups"),
        (
            {"module_name_or_path": str(ROOT / "docs"), **dict.fromkeys(("block_out_channels", "layers_per_block"))},
            "holds no module",
        ),
        ({"residual_samples": 1}, "a covariance needs at least 2 rows"),
        ({"caption_colunm": "text"}, "unknown option --caption_colunm"),
    ],
)
def test_bad_input_ends_before_anything_is_encoded(capsys, arguments, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("hfnoise.trainers.encoded_images.precompute_latents", lambda *_, **__: pytest.fail("encoded"))
    assert message in usage_error(capsys, arguments(**changes))
    assert not (tmp_path / "module").exists()


def test_a_run_that_cannot_be_resumed_is_one_line(capsys, arguments, tmp_path):
    changes = {"model_name_or_path": None, "dataset_name": None, "latents_dir": None, "world": "brightness"}
    error = usage_error(capsys, arguments(**changes, resume_from_checkpoint="true"))
    assert "no complete checkpoint in" in error and "start without resume_from_checkpoint" in error
    error = usage_error(capsys, arguments(**changes, resume_from_checkpoint=str(tmp_path / "checkpoint-1")))
    assert "checkpoint-1' is not a folder" in error


def rows_in(folder, images=None, captions=None, **columns):
    """Save images with captions, and return the folder."""
    images = [Image.new("L", (16, 16), 9)] * 3 if images is None else images
    columns = {"image": images, "text": ["one", "two", "six"] if captions is None else captions, **columns}
    datasets.Dataset.from_dict(columns).save_to_disk(folder / "rows")
    return str(folder / "rows")


@pytest.mark.slow
def test_rows_that_cannot_be_encoded(capsys, arguments, tmp_path):
    def error(rows, **changes):
        return usage_error(capsys, arguments(dataset_name=rows, **{"validation_size": 0} | changes))

    rows = rows_in(tmp_path / "a", captions=["one", None, None])
    for held_out in (0, 2):
        assert "2 of 3 rows have no text in 'text' (the first is row 1: None)" in error(rows, validation_size=held_out)
    rows = rows_in(tmp_path / "b")
    assert "has no column 'caption'; it has ['image', 'text']. Name it by --caption_column." in error(
        rows, caption_column="caption"
    )
    assert "no split 'validation'; it has ['train']" in error(rows, dataset_train_split="validation")
    assert "validation_size=0.05 of 3 images is 0" in error(rows, validation_size=0.05)
    rows = rows_in(tmp_path / "c", images=[Image.new("L", (size, 16)) for size in (16, 16, 18)])
    assert "images have different sizes" in error(rows)
    rows = rows_in(tmp_path / "d", images=["x.png", "y.png", "z.png"])
    assert "row 0 names the image 'x.png', and there is no file" in error(rows)
    rows = rows_in(tmp_path / "e", images=[1.0, 2.0, 3.0])
    assert "no images: name another by --image_column" in error(rows)
    (tmp_path / "flow").mkdir()
    (tmp_path / "flow" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert "is a FluxPipeline, which has no UNet" in error(rows, model_name_or_path=str(tmp_path / "flow"))


def test_the_published_module_is_the_default():
    script = OneMoreStepScriptArguments()
    with torch.device("meta"):
        module = new_module(script, channels=4, width=1024)
    # The parameters of h1t/oms_b_openclip_15_21, and its heads of 32 channels.
    assert round(sum(parameter.numel() for parameter in module.parameters()) / 1e6, 1) == 154.0
    assert module.config.attention_head_dim == (5, 10, 20) and module.config.norm_num_groups == 32


def test_images_are_encoded_once(pipeline, tmp_path, monkeypatch):
    from types import SimpleNamespace

    from transformers import TrainingArguments

    from hfnoise.trainers import encoded_images

    training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    given = {"dataset_name": rows_in(tmp_path), "validation_size": 0, "latents_dir": str(tmp_path / "latents")}
    script = OneMoreStepScriptArguments(pipeline, **given)
    pipe = encoded_images.load_training_pipeline(script, torch.device("cpu"), denoiser=False)
    assert pipe.unet.device.type == "meta" and not pipe.vae.training
    first = encoded_images.encode_images(script, training, pipe)
    assert first.evaluation is None and first.empty_prompt["encoder_hidden_states"].shape == (1, 8, 64)
    assert first.train[0]["latents"].shape == (4, 8, 8) and len(first.train) == 3

    def encodes(**changes):
        called = SimpleNamespace(times=0)

        def encode(images, *args, **kwargs):
            called.times += 1
            return first.train

        with monkeypatch.context() as patch:
            patch.setattr(encoded_images, "precompute_latents", encode)
            encoded_images.encode_images(OneMoreStepScriptArguments(pipeline, **given | changes), training, pipe)
        return called.times

    assert encodes() == 0 and encodes(posterior="mean") == 1 and encodes(posterior="mean") == 0
    assert encodes(resolution=8) == 1
    with torch.no_grad():
        next(pipe.vae.parameters()).add_(1e-3)  # trained a little more, under the same name
    assert encodes() == 1


@pytest.mark.slow
def test_from_a_csv_to_a_picture(pictures, arguments, tmp_path, capsys):
    """A module learns from file names and captions what the prompts say of brightness, and is used by `generate`."""
    options = {
        "dataset_name": pictures, "image_column": "file", "caption_column": "caption", "resolution": 16,
        "validation_size": 4, "max_steps": 60, "posterior": "mean", "learning_rate": 2e-2, "prompt_dropout": 0,
        "per_device_train_batch_size": 12, "model_name_or_path": "digits",
    }  # fmt: skip
    assert main(arguments(**options)) == 0
    printed = capsys.readouterr().out
    explained = float(printed.partition("low-frequency R2: ")[2].split()[0])
    assert 0.9 < explained <= 1.0
    folder = tmp_path / "module"
    assert f"hfnoise generate --model_name_or_path digits --oms_module {folder}" in printed
    module = load_module(folder)
    assert module_residuals(module) is not None and module.config.block_out_channels == [8, 16]
    on_the_card = (folder / "README.md").read_text().partition("brightness explained) | ")[2].split()[0]
    assert float(on_the_card) == pytest.approx(explained, abs=1e-3)
    run = ["generate", "--model_name_or_path", "digits", "--prompt", CAPTIONS[0], "--num_inference_steps", "2"]
    assert main([*run, "--oms_module", str(folder), "--output_dir", str(tmp_path / "out")]) == 0
    assert "start: OneMoreStep, 1 evaluation of a network per sample" in capsys.readouterr().out
    # Going on with it, and with text states of another width.
    sizes = dict.fromkeys(("block_out_channels", "layers_per_block"))
    more = arguments(**options | sizes | {"max_steps": 1, "module_name_or_path": folder})
    assert main([*more, "--output_dir", str(tmp_path / "more")]) == 0
    new_module(OneMoreStepScriptArguments(block_out_channels=[8]), 4, 32).save_pretrained(tmp_path / "narrow")
    error = usage_error(capsys, arguments(**options | sizes | {"module_name_or_path": tmp_path / "narrow"}))
    assert "takes text states 32 wide (cross_attention_dim)" in error and "are 64 wide" in error


@pytest.mark.slow
def test_the_yaml_and_a_run_that_is_resumed(tmp_path, capsys):
    short = ["--config", str(CONFIG), "--disable_tqdm", "true", "--max_steps", "4", "--eval_strategy", "no"]
    whole = [*short, "--output_dir", str(tmp_path / "whole"), "--save_strategy", "steps", "--save_steps", "2"]
    assert main(["one-more-step", *whole]) == 0
    assert "low-frequency R2: " in capsys.readouterr().out
    resumed = [*short, "--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint"]
    assert main(["one-more-step", *resumed, str(tmp_path / "whole" / "checkpoint-2")]) == 0
    one, two = (load_module(tmp_path / name).state_dict() for name in ("whole", "resumed"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    settings = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    assert load_module(tmp_path / "whole").config.block_out_channels == settings["block_out_channels"]


@pytest.mark.hub
@pytest.mark.slow
def test_pushed_and_used_from_the_hub(hub, run_python, tmp_path):
    """What `--push_to_hub` pushes has a card that says how to load it, and `hfnoise convert` reads it from there."""
    code = f"""
        from hfnoise.__main__ import main
        short = ["--max_steps", "2", "--disable_tqdm", "true", "--eval_strategy", "no", "--hub_token", "hf_x"]
        place = ["--output_dir", "oms-brightness", "--push_to_hub"]
        train = ["one-more-step", "--config", {str(CONFIG)!r}, *short, *place]
        print("trained", main(train))
        print("converted", main(["convert", "oms", "tester/oms-brightness", "stock", "--stock"]))
    """
    printed = run_python(textwrap.dedent(code))
    assert "trained 0" in printed and "converted 0" in printed and (tmp_path / "stock" / "config.json").is_file()
    card = (tmp_path / "oms-brightness" / "README.md").read_text()
    assert 'OneMoreStep.from_pretrained("tester/oms-brightness")' in card
