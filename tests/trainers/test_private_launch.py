"""`hfnoise dp-sft` and `dp-dpo`: usage errors of one line, a YAML run with card and report, the examples."""

import json

import pytest
import yaml
from datasets import Dataset

from hfnoise.__main__ import main
from hfnoise.trainers.dataset_loading import load_any
from hfnoise.worlds import code
from tests.trainers.private_world import TEXTS
from tests.trainers.test_launch import ROOT, launch


@pytest.fixture
def config_file(tmp_path, tiny_model_path, make_pairs):
    """Return a function that writes a YAML file of a tiny private run with some settings changed."""
    TEXTS.to_parquet(tmp_path / "texts.parquet")
    make_pairs(24).to_parquet(tmp_path / "pairs.parquet")

    def write(method="dp-sft", **changes):
        data = "texts" if method == "dp-sft" else "pairs"
        settings = {
            "model_name_or_path": tiny_model_path, "dataset_name": str(tmp_path / f"{data}.parquet"),
            "output_dir": str(tmp_path / "run"), "use_cpu": True, "bf16": False, "activation_checkpointing": False,
            "max_steps": 2, "per_device_train_batch_size": 4, "max_length": 32, "disable_tqdm": True,
            "use_peft": True, "lora_target_modules": "all-linear", "lora_r": 2, "save_strategy": "no",
            "noise_multiplier": 1.0, "unsafe_seed": 0, "learning_rate": 1e-2,
        }  # fmt: skip
        settings = {name: value for name, value in (settings | changes).items() if value is not None}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
        return str(tmp_path / "run.yaml")

    return write


def usage_error(capsys, *arguments):
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith(f"hfnoise {arguments[0]}: error: ")
    return error.splitlines()[-1]


def test_help_names_our_options_and_both_classes(capsys):
    for method, trainer in {"dp-sft": "DPSFTTrainer", "dp-dpo": "DPDPOTrainer"}.items():
        assert main([method, "--help"]) == 0
        text = capsys.readouterr().out
        assert f"from hfnoise import DPConfig, {trainer}" in text and "--target_epsilon (float)" in text
        assert "--clip_norm (float, default 1.0)" in text and "inject_flip_rate" not in text


def test_usage_errors(capsys, config_file):
    error = usage_error(capsys, "dp-sft")
    assert "give --model_name_or_path (a Hub id" in error and "or hfnoise:code)" in error
    error = usage_error(capsys, "dp-sft", "--config", config_file(), "--target_epsilon", "3")
    assert "exactly one of target_epsilon and noise_multiplier" in error
    assert "exactly one of" in usage_error(capsys, "dp-dpo", "--config", config_file("dp-dpo", noise_multiplier=None))
    error = usage_error(capsys, "dp-sft", "--config", config_file(), "--target_epsilan", "3")
    assert "unknown option --target_epsilan. Did you mean --target_epsilon?" in error
    assert "bands must be a whole number" in usage_error(
        capsys, "dp-sft", "--config", config_file(noise="banded", bands="many")
    )
    assert "max_grad_norm=0.5 would clip" in usage_error(capsys, "dp-sft", "--config", config_file(max_grad_norm=0.5))
    assert "'aot' cannot be private" in usage_error(
        capsys, "dp-dpo", "--config", config_file("dp-dpo", loss_type=["aot"])
    )
    assert "column of train_dataset" in usage_error(capsys, "dp-sft", "--config", config_file(unit_column="user"))
    assert "expected_batch_size=32 is more than the 20 units" in usage_error(
        capsys, "dp-sft", "--config", config_file(expected_batch_size=32)
    )
    assert "hfnoise:docstrings holds preference pairs. As texts use hfnoise:code" in usage_error(
        capsys, "dp-sft", "--config", config_file(dataset_name="hfnoise:docstrings")
    )
    assert "zero3 means DEEPSPEED" in usage_error(capsys, "dp-sft", "--accelerate_config", "zero3")


@pytest.mark.parametrize("method", ["dp-sft", "dp-dpo"])
def test_yaml_trains_and_the_command_line_wins(config_file, tmp_path, method):
    assert main([method, "--config", config_file(method), "--clip_norm", "0.5"]) == 0
    report = json.loads((tmp_path / "run" / "dp_report.json").read_text())
    assert report["clip_norm"] == 0.5 and report["steps"] == 2 and report["private"] is False
    assert report["unit"] == {"dp-sft": "row", "dp-dpo": "preference pair"}[method]
    text = (tmp_path / "run" / "README.md").read_text()
    assert "NOT PRIVATE" in text and "# run\n" in text and "clip_norm: 0.5" in text
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


@pytest.mark.slow  # calibrates the noise twice
def test_a_spent_budget_is_a_usage_error(capsys, config_file, tmp_path):
    settings = {
        "unsafe_seed": None, "noise_multiplier": None, "target_epsilon": 8.0,
        "secret_file": str(tmp_path / "keys" / "secret"),
    }  # fmt: skip
    assert main(["dp-sft", "--config", config_file(**settings)]) == 0
    report = json.loads((tmp_path / "run" / "dp_report.json").read_text())
    assert report["private"] is True and 7.9 < report["epsilon"] <= 8.0
    assert "is spent" in usage_error(capsys, "dp-sft", "--config", config_file(**settings | {"target_epsilon": 2.0}))


@pytest.mark.slow  # parses the standard library
def test_the_code_world():
    rows, held_out = code.code_texts("train"), code.code_texts("validation")
    assert len(rows) > 20000 and len(held_out) > 4000
    assert not set(rows["module"]) & set(held_out["module"])
    assert all(32 <= len(text.encode()) <= code.ROW_BYTES and text == text.strip() for text in rows["text"])
    assert code.code_texts("train", 5)[:] == rows[:5]
    insort = [row["text"] for row in [*rows, *held_out] if row["function"] == "bisect.insort_right"]
    assert insort and insort[0].startswith("if key is None:\n    lo = bisect_right")  # without the docstring
    texts, pairs = load_any("hfnoise:code", form="text"), load_any("hfnoise:code")
    assert texts["train"].column_names == ["text", "function", "module"] and len(texts["test"]) == 400
    assert (len(pairs["train"]), len(pairs["test"])) == (8000, 400)
    assert all(row["chosen"] != row["rejected"] for row in pairs["test"])
    with pytest.raises(ValueError, match="split must be one of train, validation, got 'test'"):
        code.code_texts("test")
    with pytest.raises(ValueError, match="size must be from 1 to .*got 0"):
        code.code_texts("train", 0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dp-sft", "dp-dpo"])
def test_the_example_configurations_run(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ROOT / "examples" / "configs" / f"{method.replace('-', '_')}.yaml"
    files = ["--secret_file", "keys/secret", "--disable_tqdm", "true"]
    fast = ["--max_steps", "1", "--eval_strategy", "no", "--expected_batch_size", "8"]
    assert main([method, "--config", str(config), *files, *fast]) == 0
    output = tmp_path / yaml.safe_load(config.read_text())["output_dir"]
    report = json.loads((output / "dp_report.json").read_text())
    assert report["private"] is True and report["epsilon"] <= 8.0 and report["steps"] == 1


@pytest.mark.soak  # a launcher and two interpreters that import all libraries
@pytest.mark.slow
def test_accelerate_launch_equals_one_process(config_file, tmp_path):
    from safetensors.torch import load_file

    config = config_file(per_device_train_batch_size=4)
    assert main(["dp-sft", "--config", config, "--output_dir", str(tmp_path / "one")]) == 0
    launch(
        "dp_sft", ["--config", config, "--expected_batch_size", "4", "--output_dir", str(tmp_path / "two")], tmp_path
    )
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-6
    reports = [json.loads((tmp_path / name / "dp_report.json").read_text()) for name in ("one", "two")]
    assert reports[0] == reports[1]


def test_texts_of_a_user_need_no_world(tmp_path):
    Dataset.from_dict({"text": ["a", "b"]}).to_json(tmp_path / "rows.jsonl")
    assert load_any(str(tmp_path / "rows.jsonl"), form="text")["train"]["text"] == ["a", "b"]
