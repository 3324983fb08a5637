"""The demo from end to end, on a recipe of a few steps."""

import json
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM

from hfnoise.__main__ import main
from hfnoise.worlds import demo, docstrings


@pytest.mark.slow
def test_demo(tmp_path, monkeypatch, capsys):
    small = replace(
        docstrings.DEMO_RECIPE, train_size=32, eval_size=24, per_device_eval_batch_size=24, num_train_epochs=1
    )
    monkeypatch.setattr(docstrings, "DEMO_RECIPE", small)
    monkeypatch.setattr(demo, "SHOWN", ("DPO", "TRL robust, true rate", "RobustDPO, rate unknown"))
    assert main(["demo", "--output_dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "RobustDPO, rate unknown" in text and "30% flipped" in text and "flip rate: not estimated" in text
    accuracies = json.loads((tmp_path / "demo.json").read_text())
    assert set(accuracies) == set(demo.SHOWN)
    assert all(0 <= value <= 1 for by_rate in accuracies.values() for value in by_rate.values())
    assert (tmp_path / "demo.png").stat().st_size > 5000
    card = (tmp_path / "model" / "README.md").read_text()
    assert "RobustDPO" in card and "None" not in card
    assert "`hfnoise:docstrings` (0.77 M parameters, part of hfnoise) trained with" in card
    assert "| labels flipped on purpose (`inject_flip_rate`) | 30.0% |" in card
    assert f'from_pretrained("{tmp_path / "model"}")' in card
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_usage(capsys):
    assert main(["demo", "--flip_rate", "0.6"]) == 2
    assert "above 0 and below 0.5" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused_before_training(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "run_trainer", lambda *_, **__: pytest.fail("it trains"))
    (tmp_path / "afile").write_text("")
    for folder in (str(tmp_path / "afile" / "x"), "/proc/x"):
        assert main(["demo", "--output_dir", folder]) == 2
        assert f"output_dir {folder!r} cannot be written" in capsys.readouterr().err


def test_the_benchmark_refuses_such_a_folder_as_well(capsys, tmp_path):
    (tmp_path / "afile").write_text("")
    assert main(["bench", "--output_dir", str(tmp_path / "afile" / "x")]) == 2
    assert "cannot be written" in capsys.readouterr().err
