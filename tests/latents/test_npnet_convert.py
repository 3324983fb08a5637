"""`hfnoise convert npnet`."""

import pytest
import torch

from hfnoise.__main__ import main
from hfnoise.latents.hf_npnet import NPNetModel
from tests.latents.npnet_states import count, official_state, own_state
from tests.latents.test_npnet_checkpoints import write


def usage_error(capsys, *arguments):
    assert main(["convert", "npnet", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_official_checkpoint(tmp_path, capsys):
    path = write(tmp_path / "npnet.pth", official_state())
    assert main(["convert", "npnet", str(path), str(tmp_path / "out"), "--num_tokens", "5"]) == 0
    net = NPNetModel.from_pretrained(tmp_path / "out")
    assert all(torch.equal(net.state_dict()[name], value) for name, value in own_state().items())
    said = capsys.readouterr().out
    assert f"NPNet of {count(net):,} parameters in float32" in said
    assert "latents of 4 x 8 x 8 and 5 text states 16 wide" in said


@pytest.mark.slow
def test_options(tmp_path):
    write(tmp_path / "one.pth", official_state())
    write(tmp_path / "two.safetensors", official_state())
    options = ["--filename", "two.safetensors", "--num_tokens", "5", "--no_svd_attention", "--dtype", "bfloat16"]
    assert main(["convert", "npnet", str(tmp_path), str(tmp_path / "out"), *options]) == 0
    net = NPNetModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert not net.config.svd_attention and net.dtype == torch.bfloat16
    weight = own_state()["unet_svd.mlp1.0.weight"].to(torch.bfloat16)
    assert torch.equal(net.state_dict()["unet_svd.mlp1.0.weight"], weight)


def test_bad_input(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "npnet.pth", official_state())
    assert "the following arguments are required: DST" in usage_error(capsys, "npnet.pth")
    assert "no such folder: './nowhere.pth'" in usage_error(capsys, "./nowhere.pth", "out")
    assert "there is no file nowhere.pth" in usage_error(capsys, "nowhere.pth", "out")
    assert "which 77 tokens cannot share evenly" in usage_error(capsys, "npnet.pth", "out")
    assert "'.' is not empty" in usage_error(capsys, "npnet.pth", ".")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
