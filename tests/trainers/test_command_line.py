"""The command line: help without TRL, usage errors of one line with exit code 2, YAML and overrides."""

import json
import logging
import shutil
import warnings

import pytest
import yaml
from datasets import load_from_disk
from transformers import TrainingArguments

from hfnoise.__main__ import main
from hfnoise.trainers.command_line import parse


def usage_error(capsys, *arguments):
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    error = error.splitlines()[-1]  # progress bars come before
    assert error.startswith(f"hfnoise {arguments[0]}: error: ")
    return error


@pytest.fixture
def config_file(tmp_path, tiny_model_path, make_pairs):
    """Return a function that writes a YAML file of a tiny run with some settings changed."""
    make_pairs(16).to_parquet(tmp_path / "pairs.parquet")

    def write(**changes):
        settings = {
            "model_name_or_path": tiny_model_path, "dataset_name": str(tmp_path / "pairs.parquet"),
            "output_dir": str(tmp_path / "run"), "use_cpu": True, "bf16": False, "activation_checkpointing": False,
            "max_steps": 2, "per_device_train_batch_size": 4, "max_length": 32, "disable_tqdm": True,
        }  # fmt: skip
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings | changes))
        return str(tmp_path / "run.yaml")

    return write


def test_help_and_list_name_everything(capsys):
    assert main([]) == 0 and "robust-dpo" in capsys.readouterr().out
    assert main(["list"]) == 0 and "arXiv 2403.00409" in capsys.readouterr().out
    assert main(["robust-dpo", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--flip_rate (float or 'auto', default auto)" in text and "--accelerate_config" in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_help_all_lists_trl_options(capsys):
    assert main(["robust-dpo", "--help-all"]) == 0
    text = capsys.readouterr().out
    assert "--flip_rate" in text and "--precompute_ref_log_probs" in text and "--lora_r" in text


def test_usage_errors(capsys, config_file, tmp_path):
    assert "Known are list" in usage_error(capsys, "frobnicate")
    assert "Did you mean robust-dpo?" in usage_error(capsys, "robust_dpo")
    assert "--flip_rat" in usage_error(capsys, "robust-dpo", "--config", config_file(), "--flip_rat", "0.1")
    assert "[0, 0.5), got 0.7" in usage_error(capsys, "robust-dpo", "--config", config_file(flip_rate=0.7))
    assert "[0, 0.5), got 0.8" in usage_error(capsys, "robust-dpo", "--config", config_file(), "--flip_rate", "0.8")
    assert "cannot be read" in usage_error(capsys, "robust-dpo", "--config", str(tmp_path / "absent.yaml"))
    assert "needs the name" in usage_error(capsys, "robust-dpo", "--config")
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "option: value" in usage_error(capsys, "robust-dpo", f"--config={tmp_path / 'list.yaml'}")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    assert "not valid YAML" in usage_error(capsys, "robust-dpo", "--config", str(tmp_path / "broken.yaml"))
    assert usage_error(capsys, "robust-dpo", "--accelerate_config", "nowhere").endswith("multi_gpu, single_gpu.")
    assert "zero3 means DEEPSPEED" in usage_error(capsys, "robust-dpo", "--accelerate_config", "zero3")
    assert "no split 'validation'" in usage_error(
        capsys, "robust-dpo", "--config", config_file(dataset_train_split="validation")
    )
    assert "unknown loss 'rdpo'" in usage_error(capsys, "noise-dpo", "--config", config_file(loss_type="rdpo"))


def test_what_is_missing_is_asked_for_first(capsys, config_file):
    """Without a GPU transformers complains about bf16, which TRL turns on: no help to whom has named no model yet."""
    error = usage_error(capsys, "robust-dpo")
    assert "give --model_name_or_path (a Hub id" in error and "and --dataset_name (" in error
    error = usage_error(capsys, "robust-dpo", "--model_name=m")  # argparse takes a beginning of an option
    assert "--model_name_or_path" not in error and "give --dataset_name" in error


def test_unknown_options_are_named_with_what_was_meant(capsys, config_file):
    common = ["robust-dpo", "--config", config_file()]
    assert "unknown option --flip_rte. Did you mean --flip_rate? (see" in usage_error(
        capsys, *common, "--flip_rte=0.1"
    )
    error = usage_error(capsys, *common, "--zzzz", "1")
    assert "unknown option --zzzz. (see hfnoise robust-dpo --help)" in error
    error = usage_error(capsys, "robust-dpo", "--config", config_file(flip_rte=0.1))
    assert "unknown option --flip_rte in the --config file. Did you mean --flip_rate?" in error
    assert "Did you mean --folds?" in usage_error(capsys, "audit-labels", "--fold_s", "3")


def test_injected_flips_are_named(capsys, config_file):
    common = ["robust-dpo", "--config", config_file()]
    assert "inject_flip_rate must be in [0, 0.5), got 0.7" in usage_error(capsys, *common, "--inject_flip_rate", "0.7")


@pytest.mark.parametrize("name", ["nofile.jsonl", "./nofolder", "data/of/mine", "~/pairs", "data/pairs.csv"])
def test_a_file_that_does_not_exist_is_not_looked_for_on_the_hub(capsys, config_file, monkeypatch, name):
    from hfnoise.trainers import dataset_loading

    monkeypatch.setattr(dataset_loading, "load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    error = usage_error(capsys, "robust-dpo", "--config", config_file(dataset_name=name))
    assert "no such file or folder" in error and f"--dataset_name {name}" in error


def test_yaml_trains_and_the_command_line_wins(capsys, caplog, config_file, tmp_path):
    configuration = config_file(flip_rate="auto", inject_flip_rate=0.25)
    with warnings.catch_warnings():
        warnings.resetwarnings()  # those that pyproject.toml ignores
        warnings.simplefilter("error", FutureWarning)
        assert main(["robust-dpo", "--config", configuration, "--flip_rate", "0.2"]) == 0
    card = (tmp_path / "run" / "README.md").read_text()
    assert "\n  flip_rate: 0.2\n" in card and "`robust`" in card
    assert "inject_flip_rate: 0.25" in card and "| labels flipped on purpose (`inject_flip_rate`) | 25.0% |" in card
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward from kernels")
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("something else")
    assert "gemm_4bit_forward" not in caplog.text and "something else" in caplog.text
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("true", True),
        ("True", True),
        ("false", False),
        (True, True),
        (False, False),
        ("run/checkpoint-2", "run/checkpoint-2"),
    ],
)
def test_resume_is_a_word_or_a_folder(tmp_path, given, meant):
    """By an option, always a text, or by YAML; for all commands, since all of them parse like this."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"output_dir": "run", "resume_from_checkpoint": given}))
    ways = [["--config", str(tmp_path / "run.yaml")], ["--output_dir", "run", "--resume_from_checkpoint", str(given)]]
    for arguments in ways:
        (training,) = parse("hfnoise dp-sft", [TrainingArguments], [*arguments, "--use_cpu"])
        assert training.resume_from_checkpoint == meant and type(training.resume_from_checkpoint) is type(meant)


def test_a_run_is_resumed_or_refused_in_a_line(capsys, config_file, tmp_path):
    train = ["robust-dpo", "--config", config_file(flip_rate=0.2, save_steps=1), "--resume_from_checkpoint"]
    assert "no complete checkpoint in" in usage_error(capsys, *train, "true")
    assert "'elsewhere' is not a folder" in usage_error(capsys, *train, "elsewhere")
    assert main([*train, "false"]) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    (tmp_path / "run" / "checkpoint-1").rename(tmp_path / "run" / "checkpoint-1-kept")
    assert "no complete checkpoint in" in usage_error(capsys, *train, "true")
    (tmp_path / "run" / "checkpoint-1-kept").rename(tmp_path / "run" / "checkpoint-1")
    written = (tmp_path / "run" / "checkpoint-1" / "optimizer.pt").stat().st_mtime_ns
    assert main([*train, "true"]) == 0 and (tmp_path / "run" / "checkpoint-2").is_dir()
    # A run from the start would write the first checkpoint anew.
    assert (tmp_path / "run" / "checkpoint-1" / "optimizer.pt").stat().st_mtime_ns == written
    assert "belongs to another run (" in usage_error(capsys, *train, "true", "--beta", "0.7")


@pytest.mark.slow
def test_audit_labels(capsys, caplog, tiny_model_path, tmp_path, make_pairs):
    make_pairs(240).to_parquet(tmp_path / "pairs.parquet")
    arguments = [
        "audit-labels", "--model_name_or_path", tiny_model_path, "--dataset_name", str(tmp_path / "pairs.parquet"),
        "--output_dir", str(tmp_path / "audit"), "--use_cpu", "--learning_rate", "1e-2", "--num_train_epochs", "4",
        "--beta", "0.5", "--per_device_train_batch_size", "16", "--max_length", "32", "--inject_flip_rate", "0.25",
        "--top", "30",
    ]  # fmt: skip
    assert main(arguments) == 0
    estimate = json.loads((tmp_path / "audit" / "report.json").read_text())["estimate"]
    assert not estimate["refused"] and estimate["flip_rate"] == pytest.approx(0.25, abs=0.08)
    scored = load_from_disk(tmp_path / "audit" / "dataset")
    suspects = sorted(scored, key=lambda row: -row["p_flip"])[:30]
    assert sum(row["flipped"] for row in suspects) > 25  # a quarter of all pairs is flipped
    assert (tmp_path / "audit" / "margins.png").stat().st_size > 5000
    assert (tmp_path / "audit" / "suspects.md").read_text().count("\n") == 32
    report = json.loads((tmp_path / "audit" / "report.json").read_text())
    assert report["p_flip"] == {
        **report["p_flip"],
        "flip_rate": estimate["flip_rate"],
        "source": "estimate",
        "note": "",
    }
    output = capsys.readouterr()
    assert "95 % interval" in output.out and "no eval_dataset" not in caplog.text


def test_audit_labels_refusals(capsys, tiny_model_path, tmp_path, make_pairs):
    make_pairs(8).to_parquet(tmp_path / "pairs.parquet")
    common = ["--model_name_or_path", tiny_model_path, "--dataset_name", str(tmp_path / "pairs.parquet"), "--use_cpu"]
    assert "folds must be at least 2" in usage_error(capsys, "audit-labels", *common, "--folds", "1")
    assert "no split 'other'" in usage_error(capsys, "audit-labels", *common, "--dataset_split", "other")
    assert "required" in usage_error(capsys, "audit-labels", "--use_cpu")
    assert main(["audit-labels", *common, "--output_dir", str(tmp_path / "audit"), "--max_length", "32"]) == 0
    assert "p_flip ranks the pairs but its level means nothing" in " ".join(capsys.readouterr().out.split())
    scored = load_from_disk(tmp_path / "audit" / "dataset")
    assert [row["margin"] for row in sorted(scored, key=lambda row: -row["p_flip"])] == sorted(scored["margin"])
    report = json.loads((tmp_path / "audit" / "report.json").read_text())
    assert report["estimate"]["refused"] and report["p_flip"]["source"].startswith("refused estimate")
    assert 0.01 <= report["p_flip"]["flip_rate"] <= 0.45 and "8 pairs are too few" in report["p_flip"]["note"]
