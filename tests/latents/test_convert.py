"""`hfnoise convert oms`: the forms compute the same, and what cannot be converted leaves nothing behind."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from hfnoise.__main__ import main
from hfnoise.latents.hf_checkpoints import load_module
from hfnoise.latents.hf_time_free_unet import TimeFreeUNet2DConditionModel, module_output
from tests.trainers.one_more_step_world import new_module


@pytest.fixture
def module(tmp_path):
    """Return a tiny module in evaluation mode that is saved in `there`."""
    module = new_module().eval()
    module.save_pretrained(tmp_path / "there")
    return module


def output(module):
    generator = torch.Generator().manual_seed(0)
    sample, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 8, generator=generator)
    with torch.no_grad():
        return module_output(module, sample, states)


def usage_error(capsys, *arguments):
    assert main(["convert", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_there_and_back(module, tmp_path, capsys):
    assert main(["convert", "oms", str(tmp_path / "there"), str(tmp_path / "stock"), "--stock"]) == 0
    count = sum(
        parameter.numel() for parameter in UNet2DConditionModel.from_pretrained(tmp_path / "stock").parameters()
    )
    assert f"UNet2DConditionModel of {count:,} parameters in float32" in capsys.readouterr().out
    assert json.loads((tmp_path / "stock" / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    assert main(["convert", "oms", str(tmp_path / "stock"), str(tmp_path / "back")]) == 0
    stock, back = (load_module(tmp_path / name) for name in ("stock", "back"))
    assert type(stock) is UNet2DConditionModel and type(back) is TimeFreeUNet2DConditionModel
    assert torch.equal(output(stock), output(module)) and torch.equal(output(back), output(module))


def test_half_precision_stays_half(module, tmp_path):
    module.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    assert main(["convert", "oms", str(tmp_path / "half"), str(tmp_path / "out"), "--variant", "fp16"]) == 0
    weights = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}


def test_a_text_encoder_elsewhere_is_named(module, tmp_path, capsys):
    folder = tmp_path / "official"
    module.save_pretrained(folder / "oms_module")
    (folder / "oms_text_encoder").mkdir()
    redirect = {"_name_or_path": "stabilityai/stable-diffusion-2-1", "subfolder": "text_encoder"}
    (folder / "oms_text_encoder" / "config.json").write_text(json.dumps(redirect))
    assert main(["convert", "oms", str(folder), str(tmp_path / "out")]) == 0
    assert "the text encoder of stabilityai/stable-diffusion-2-1/text_encoder" in capsys.readouterr().out


def test_help_names_the_kinds(capsys):
    assert main(["convert", "--help"]) == 0
    assert "oms" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["convert", "oms", "--help"])
    assert "--stock" in capsys.readouterr().out


def test_bad_input(module, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "say what to convert: npnet, oms" in usage_error(capsys)
    assert "got 'unet'" in usage_error(capsys, "unet", "there", "out")
    assert "the following arguments are required: DST" in usage_error(capsys, "oms", "there")
    assert "'there' is not empty" in usage_error(capsys, "oms", "there", "there")
    assert "no such folder: './nowhere'" in usage_error(capsys, "oms", "./nowhere", "out")
    assert "invalid choice: 'int8'" in usage_error(capsys, "oms", "there", "out", "--dtype", "int8")
    (tmp_path / "empty").mkdir()
    error = usage_error(capsys, "oms", "empty", "out")
    assert "holds no module of One More Step" in error and "--variant" not in error
    assert "fp16" in usage_error(capsys, "oms", "there", "out", "--variant", "fp16")
    (tmp_path / "there" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "there" / "moved")
    assert "The published modules need --variant fp16." in usage_error(capsys, "oms", "there", "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
