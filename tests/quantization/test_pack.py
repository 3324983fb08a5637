"""`hfnoise pack` and `hfnoise unpack`: whole folders or nothing, equal logits, other files carried along."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfnoise import QuestConfig, prepare_qat
from hfnoise.__main__ import main

IDS = torch.tensor([[5, 6, 7, 8]])


def logits(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, **settings)(IDS).logits


def refused(capsys, *arguments):
    assert main([str(one) for one in arguments]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_there_and_back(tiny_model_path, tmp_path, capsys):
    packed, dense = tmp_path / "packed", tmp_path / "new" / "dense"
    assert main(["pack", tiny_model_path, str(packed), "--weight_bits", "3"]) == 0
    assert "14 weights quantised" in capsys.readouterr().out
    expected = logits(tiny_model_path, quantization_config=QuestConfig(weight_bits=3))
    assert torch.equal(logits(packed), expected)
    assert AutoTokenizer.from_pretrained(packed)("the fox")["input_ids"]
    card = (packed / "README.md").read_text()
    assert "| bits of a weight | 3 |" in card and "import hfnoise" in card and "None" not in card

    assert main(["unpack", str(packed), str(dense)]) == 0
    assert torch.equal(logits(dense), expected)
    model = AutoModelForCausalLM.from_pretrained(dense)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert not hasattr(model.config, "quantization_config")
    assert "to the last bit" in (dense / "README.md").read_text()


def test_master_weights_keep_their_bits(tiny_model_path, tmp_path, capsys):
    master, packed, dense = tmp_path / "master", tmp_path / "packed", tmp_path / "dense"
    model = prepare_qat(AutoModelForCausalLM.from_pretrained(tiny_model_path), QuestConfig(bits=1))
    model.save_pretrained(master)
    assert main(["pack", str(master), str(packed)]) == 0
    assert torch.equal(logits(packed), model(IDS).logits)
    assert "quantised already, at 1 bits; leave --bits out" in refused(capsys, "pack", master, dense, "--bits", 2)
    assert "packed already" in refused(capsys, "pack", packed, dense)
    assert "quantise their inputs" in refused(capsys, "unpack", packed, dense) and not dense.exists()
    assert main(["unpack", str(packed), str(dense), "--weight_only"]) == 0
    measured = capsys.readouterr().out.split("differ by ")[1].split("\n")[0]
    assert f"the logits differ by {measured} of their norm" in (dense / "README.md").read_text()


def test_refused_before_anything_is_written(tiny_model_path, tmp_path, capsys):
    out = tmp_path / "out"
    assert "say how many bits" in refused(capsys, "pack", tiny_model_path, out)
    assert "allowed are 1, 1.58" in refused(capsys, "pack", tiny_model_path, out, "--bits", 9)
    assert "matches no module" in refused(
        capsys, "pack", tiny_model_path, out, "--bits", 4, "--modules_to_not_convert", "router"
    )
    assert "nothing to unpack" in refused(capsys, "unpack", tiny_model_path, out)
    assert "is there already" in refused(capsys, "pack", tiny_model_path, tmp_path.parent, "--bits", 4)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(tiny_model_path, tmp_path, capsys):
    from tests.hub.full_disk import full_disk

    with full_disk():
        said = refused(capsys, "pack", tiny_model_path, tmp_path / "out", "--bits", 4)
    assert "was not written, and nothing is left of it" in said and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_help(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "FOLDER OUT" in " ".join(capsys.readouterr().out.split())


def test_what_lies_beside_the_model(tiny_model_path, tmp_path, capsys):
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_model_path, folder)
    templates = folder / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ messages }}")
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in refused(capsys, "pack", folder, out, "--bits", 4) and not out.exists()
    (folder / "adapter_config.json").unlink()
    assert main(["pack", str(folder), str(out), "--bits", "4"]) == 0
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"
