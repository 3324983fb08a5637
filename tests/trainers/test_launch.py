"""The example is what a user launches: its YAML follows the world's recipe, and two processes equal one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hfnoise.__main__ import main
from hfnoise.worlds.docstrings import DEMO_RECIPE

ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / "examples" / "configs" / "robust_dpo.yaml"
LAUNCHER = ROOT / "examples" / "accelerate" / "two_cpu_processes.yaml"


def test_the_yaml_is_the_recipe_of_the_world():
    settings = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    for name in (
        "beta", "learning_rate", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size",
        "max_length",
    ):  # fmt: skip
        assert settings[name] == getattr(DEMO_RECIPE, name), name
    assert settings["inject_flip_rate"] == DEMO_RECIPE.flip_rate and settings["flip_rate"] == "auto"


def arguments(output_dir, config=CONFIG, **overrides):
    options = [text for name, value in overrides.items() for text in (f"--{name}", str(value))]
    return ["--config", str(config), "--output_dir", str(output_dir), *options]


def losses(output_dir):
    (state,) = output_dir.glob("checkpoint-*/trainer_state.json")
    return [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


def launch(example, options, folder):
    """Run an example in two processes on the CPU."""
    # Port 0: a free one, since another test may be launching too.
    settings = ["--config_file", str(LAUNCHER), "--main_process_port", "0"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *settings]
    done = subprocess.run(
        [*launcher, str(ROOT / "examples" / f"{example}.py"), *options],
        # One thread each: the processes share two cores.
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, cwd=folder, capture_output=True,
        text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "find_unused_parameters" not in done.stdout + done.stderr


@pytest.mark.slow  # a launcher and two interpreters that import all libraries
def test_accelerate_launch_equals_one_process(tiny_model_path, make_pairs, tmp_path):
    make_pairs(24).to_parquet(tmp_path / "pairs.parquet")
    overrides = {
        "model_name_or_path": tiny_model_path, "dataset_name": tmp_path / "pairs.parquet", "max_length": 32,
        "num_train_epochs": 1, "learning_rate": 1e-2, "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip
    # What the example calls, in this process.
    assert main(["robust-dpo", *arguments(tmp_path / "one", per_device_train_batch_size=8, **overrides)]) == 0
    launch("robust_dpo", arguments(tmp_path / "two", per_device_train_batch_size=4, **overrides), tmp_path)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 3 and len(set(one)) == 3
    assert two == pytest.approx(one, rel=1e-4)
    # With one process and 4 pairs to a step these would be 4 pairs, and 6 losses.
    assert re.search(r"\| pairs per step \| 8 \|", (tmp_path / "two" / "README.md").read_text())


@pytest.mark.soak  # as above, for the other examples, on their own worlds
@pytest.mark.slow
@pytest.mark.parametrize(("example", "size"), [("dr_dpo", 8), ("bvpo", 8)])
def test_accelerate_launch_of_the_other_examples(tmp_path, example, size):
    config = ROOT / "examples" / "configs" / f"{example}.yaml"
    overrides = {"config": config, "max_steps": 3, "logging_steps": 1, "disable_tqdm": True, "eval_strategy": "no"}
    method = example.replace("_", "-")
    whole = arguments(tmp_path / "one", per_device_train_batch_size=size, **overrides)
    assert main([method, *whole]) == 0
    launch(example, arguments(tmp_path / "two", per_device_train_batch_size=size // 2, **overrides), tmp_path)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
