"""What was trained is never lost to a push that breaks: it is on the disk, the Hub has the old or the new, and a
command line ends with a message in place of a traceback."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = [pytest.mark.hub, pytest.mark.soak]
QUIET = {"HFNOISE_KERNELS": "0"}


def test_trainers(hub, run_python, tiny_model_path, make_pairs, tmp_path):
    make_pairs(16).save_to_disk(tmp_path / "pairs")
    environment = {"MODEL": tiny_model_path, "PAIRS": str(tmp_path / "pairs"), **QUIET}
    said = run_python("from tests.hub.broken_trainers import push; push()", environment)
    said = json.loads(said.splitlines()[-1])
    assert said.keys() == {"preference", "private", "quantized", "denoiser", "federation", "late"}
    for name in said.keys() - {"late"}:
        message = said[name]["the commit is refused"]
        assert f"in '{name}'" in message and f"hf upload tester/{name} {name} ." in message
    # The clients' folders must stay here, by the command too.
    assert "--exclude 'federation/*'" in said["federation"]["a large file is refused"]
    assert "Model and card are saved in 'late'" in said["late"]["the repository is refused"]
    found = run_python("from tests.hub.broken_trainers import pull; pull()", QUIET).splitlines()[-1]
    assert set(json.loads(found).values()) == {True} and len(json.loads(found)) == 7
    assert not [name for name in hub.files("tester/federation") if "client" in name or name.startswith("federation/")]


RUN = """
    import os, sys
    from hfnoise.__main__ import main
    from tests.hub.broken import break_next

    if os.environ.get("BREAK"):
        break_next({"pattern": os.environ["BREAK"], "status": int(os.environ["STATUS"])})
    sys.exit(main([
        "robust-dpo", "--model_name_or_path", os.environ["MODEL"], "--dataset_name", os.environ["PAIRS"],
        "--output_dir", "run", "--max_steps", "1", "--flip_rate", "0.1", "--use_cpu", "--bf16", "false",
        "--activation_checkpointing", "false", "--report_to", "none", "--disable_tqdm", "true", "--max_length", "32",
        "--push_to_hub", "--hub_model_id", "tester/run",
    ]))
"""


@pytest.fixture
def run(hub, tiny_model_path, make_pairs, tmp_path):
    """Return `run(**environment)`: the command line in a fresh process; its exit code and what it said last."""
    make_pairs(16).to_parquet(tmp_path / "pairs.parquet")
    base = {
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x",
        "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parents[2]), "MODEL": tiny_model_path,
        "PAIRS": str(tmp_path / "pairs.parquet"),
    }  # fmt: skip

    def run(command=None, **environment):
        done = subprocess.run(
            command or [sys.executable, "-c", textwrap.dedent(RUN)],
            env={**os.environ, **base, **environment}, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, done.stderr

    return run


def test_command_line(run, hub, tmp_path):
    """No network at first: refused before training. One that goes away: trained, saved, said; and `hf` pushes it."""
    for environment, reason in [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "Connection refused"),
        ({"HF_HUB_OFFLINE": "1"}, "Unset HF_HUB_OFFLINE"),
        ({"HF_TOKEN": "", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}, "hf auth login"),
    ]:
        code, said = run(**environment)
        last = said.strip().splitlines()[-1]
        assert code == 2 and last.startswith("hfnoise robust-dpo: error: "), said
        assert reason in last and "Nothing was trained." in last and "hf upload tester/run run ." in last
        assert "Traceback" not in said and not (tmp_path / "run" / "model.safetensors").exists()

    code, said = run(BREAK="POST .*/commit/", STATUS="500")
    last = said.strip().splitlines()[-1]
    assert code == 1 and last.startswith("hfnoise robust-dpo: What was trained was not pushed to tester/run: 500")
    assert "Traceback" not in said and "Model and card are saved in 'run'" in last
    assert {"model.safetensors", "config.json", "README.md"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert hub.files("tester/run").keys() == {".gitattributes"}
    assert hub.wish([])  # the Hub is back
    command = last.split("run `")[1].split("`")[0]
    code, said = run(["sh", "-c", f"{command}"])
    assert code == 0, said
    files = hub.files("tester/run")
    assert {"model.safetensors", "config.json", "README.md"} <= files.keys()
    assert files["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()


def test_pushes_during_training_that_break_are_named(hub, run_python, tiny_model_path, make_pairs, tmp_path):
    make_pairs(16).save_to_disk(tmp_path / "pairs")
    code = """
        import logging, os, sys
        logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
        from datasets import load_from_disk
        from hfnoise import RobustDPOConfig, RobustDPOTrainer
        from tests.hub.broken import break_next
        from tests.hub.broken_trainers import text_arguments

        given = text_arguments("run") | {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
        args = RobustDPOConfig(**given, flip_rate=0.1, hub_strategy="every_save")
        trainer = RobustDPOTrainer(os.environ["MODEL"], args=args, train_dataset=load_from_disk(os.environ["PAIRS"]))
        break_next({"pattern": "POST .*/commit/", "status": 403})
        trainer.train()
        assert break_next()
        trainer.push_to_hub()
    """
    environment = {"MODEL": tiny_model_path, "PAIRS": str(tmp_path / "pairs")}
    said = run_python(textwrap.dedent(code), environment)
    assert said.count("a push during training did not go through: 403 Forbidden from POST") == 1
    assert "model.safetensors" in hub.files("tester/run")
