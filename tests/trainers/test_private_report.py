"""dp_report.json and the card of a private run: right, strict JSON, beside all weights, and without any secret."""

import json
import math
import shlex
import subprocess
import sys
from dataclasses import dataclass

import pytest
from huggingface_hub import ModelCard
from transformers import EarlyStoppingCallback

from hfnoise import cards, citations
from hfnoise.privacy import compute_epsilon
from hfnoise.privacy.hf_card import check_command, format_epsilon, privacy_card
from hfnoise.trainers import private_report
from tests.trainers.private_world import private_trainer

SECRET = {"unsafe_seed": None}


def read_report(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((folder / "dp_report.json").read_text(), parse_constant=refuse)


def read_card(folder):
    text = (folder / "README.md").read_text()
    assert "None" not in text and "More Information Needed" not in text
    return ModelCard(text)


def secret_files(tmp_path):
    return {**SECRET, "secret_file": str(tmp_path / "keys" / "secret"), "ledger_file": str(tmp_path / "ledger.json")}


def test_a_private_run_states_its_guarantee(tiny_model_path, tmp_path):
    run = tmp_path / "run"
    trainer = private_trainer(
        "sft", tiny_model_path, run, dp=secret_files(tmp_path), save_strategy="steps", save_steps=1
    )
    trainer.train()
    trainer.save_model()
    report = read_report(run)
    expected = compute_epsilon(1.0, 4 / 20, 2, 1e-5)
    assert report["private"] is True and report["epsilon"] == report["total_epsilon"] == expected
    assert (report["delta"], report["units"], report["sample_rate"], report["steps"]) == (1e-5, 20, 0.2, 2)
    assert report["unit"] == "row" and report["adjacency"] == "add or remove one unit"
    assert report["trained_parameters"] == {"count": 256, "kinds": {"lora_A": 128, "lora_B": 128}}
    assert report["secret"] == "32 bytes from the operating system" and "unsafe" not in json.dumps(report).lower()
    assert report["accountant_description"].startswith("dp-accounting ") and report["audit"] is None
    assert report["chosen_by_evaluation"] == [] and report["private_metrics_logged"] is False
    assert [read_report(run / f"checkpoint-{step}")["steps"] for step in (1, 2)] == [1, 2]
    card = read_card(run)
    block = card.data.to_dict()["hfnoise"]
    assert block["private"] is True and block["epsilon"] == expected and block["noise_multiplier"] == 1.0
    assert {"differential-privacy", "dp-sgd", "hfnoise", "sft", "trl"} <= set(card.data.tags)
    assert report["statement"] in card.text and "NOT PRIVATE" not in card.text
    assert "1607.00133" in card.text and "2206.07136" not in card.text
    assert "dp-sgd" in read_card(run / "checkpoint-1").data.tags  # PEFT wrote its own there
    # What is recorded of the data is its size: a fingerprint would confirm a guess of the dataset.
    secret = (tmp_path / "keys" / "secret").read_text().strip()
    for file in (run / "README.md", run / "dp_report.json"):
        assert secret not in file.read_text() and trainer.fingerprint not in file.read_text()


@pytest.mark.parametrize("accountant", [pytest.param("pld", marks=pytest.mark.slow), "rdp"])
def test_the_command_of_the_card_reproduces_epsilon(capsys, accountant):
    numbers = {"expected_batch_size": 4, "units": 30, "noise_multiplier": 0.9, "steps": 12, "bands": 3, "delta": 1e-5}
    program, option, code = shlex.split(check_command({**numbers, "accountant": accountant}))
    assert (program, option) == ("python", "-c")
    exec(code, {})
    # Cyclic sampling over 3 groups: 4 rounds, each with three times the rate.
    assert float(capsys.readouterr().out) == compute_epsilon(0.9, 12 / 30, 4, 1e-5, accountant)


def test_a_known_seed_and_no_noise_are_not_private(tiny_model_path, tmp_path):
    trainer = private_trainer("sft", tiny_model_path, tmp_path / "seed", dp={"unsafe_seed": 7})
    report = trainer.privacy_report()
    assert (
        report["private"] is False and report["statement"].startswith("NOT PRIVATE") and "seed 7" in report["secret"]
    )
    text = str(privacy_card(trainer))
    assert "**NOT PRIVATE" in text and "not-private" in text and "- differential-privacy" not in text
    assert "if the noise were secret" in text
    trainer = private_trainer(
        "sft", tiny_model_path, tmp_path / "none", dp={**secret_files(tmp_path), "noise_multiplier": 0.0}
    )
    trainer.state.global_step = 2
    trainer.save_model()
    report = read_report(tmp_path / "none")
    assert report["private"] is False and "without noise nothing is guaranteed" in report["statement"]
    assert math.isinf(float(report["epsilon"])) and isinstance(report["epsilon"], str)
    assert read_card(tmp_path / "none").data.to_dict()["hfnoise"]["epsilon"] == "Infinity"
    assert "| epsilon of these weights | infinity at" in (tmp_path / "none" / "README.md").read_text()


@pytest.mark.slow  # three runs
def test_earlier_runs_and_branches_count(tiny_model_path, tmp_path):
    files, model = {**secret_files(tmp_path), "accountant": "rdp"}, tiny_model_path
    first = private_trainer("sft", model, tmp_path / "one", dp=files, save_strategy="steps", save_steps=1)
    first.train()
    second = private_trainer("sft", model, tmp_path / "two", dp=files)
    second.train()
    report = second.privacy_report()
    # Without a checkpoint epsilon is logged at the end.
    logged = [entry for entry in second.state.log_history if "privacy/epsilon" in entry]
    assert [(entry["step"], entry["privacy/epsilon"]) for entry in logged] == [(2, report["epsilon"])]
    assert report["epsilon"] == compute_epsilon(1.0, 0.2, 2, 1e-5, "rdp")
    assert report["total_epsilon"] == compute_epsilon(1.0, 0.2, 4, 1e-5, "rdp")
    # Other settings after step 1: those weights hold a step that belongs to the first run.
    branch = private_trainer("sft", model, tmp_path / "one", dp=files, learning_rate=1e-3)
    branch.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-1"))
    report = branch.privacy_report()
    assert (report["steps"], report["steps_of_an_earlier_run"]) == (1, 1)
    assert report["epsilon"] == report["total_epsilon"] == compute_epsilon(1.0, 0.2, 5, 1e-5, "rdp")
    assert "that of the whole ledger" in str(privacy_card(branch))


def test_what_leaves_the_guarantee_is_listed(tiny_model_path, tmp_path):
    trainer = private_trainer(
        "sft", tiny_model_path, tmp_path, dp={"log_private_metrics": True, "target_delta": 0.1, "clipping": "auto"},
        save_strategy="best", eval_strategy="no", metric_for_best_model="loss",
    )  # fmt: skip
    trainer.add_callback(EarlyStoppingCallback())
    report = trainer.privacy_report()
    assert report["private_metrics_logged"] is True
    assert any("log_private_metrics=True" in line for line in report["not_covered"])
    assert any("delta=0.1 is not below 1 / units" in line for line in report["not_covered"])
    assert [line.split(":")[0] for line in report["chosen_by_evaluation"]] == [
        "save_strategy='best'", "EarlyStoppingCallback",
    ]  # fmt: skip
    for subject in (
        "hyperparameters",
        "evaluation",
        "base model",
        "number of units",
        "side channels",
        "floating point",
    ):
        assert any(subject in line for line in report["not_covered"]), subject

    @dataclass
    class Audit:
        epsilon_lower_bound: float = 0.25
        epsilon_ceiling: float = math.inf
        canaries: int = 100

    trainer.audit_result = Audit()
    trainer.state.log_history = [{"eval_loss": 2.5, "eval_runtime": 1.0}, {"eval_loss": 2.25, "epoch": 1.0}]
    assert trainer.privacy_report()["audit"]["epsilon_ceiling"] == "Infinity"
    text = str(privacy_card(trainer))
    assert "epsilon is at least 0.250 from 100 canaries" in text and "audit_epsilon_lower_bound: 0.25" in text
    assert "| loss | 2.2500 |" in text and "runtime" not in text
    for used in (citations.AUTOMATIC_CLIPPING_BIBTEX, citations.AUDIT_BIBTEX, citations.PLD_BIBTEX):
        assert used in text
    assert citations.RDP_BIBTEX not in text


STOCK_ARGUMENTS = {
    "sft": ("my-model", "me/data", "mine"),  # TRL: model_name, dataset_name, tags
    "made dpo": ("my-model", "me/data", ["mine"]),
    "plain": ("en", "mit", ["mine"], "my-model"),  # transformers: language, license, tags, model_name
}


@pytest.mark.parametrize("kind", STOCK_ARGUMENTS)
def test_cards_of_all_trainers(kind, tiny_model_path, make_pairs, tmp_path):
    trainer = private_trainer(kind, tiny_model_path, tmp_path, make_pairs(20))
    trainer.create_model_card(*STOCK_ARGUMENTS[kind])
    trainer.save_model()  # keeps what was given; PEFT's card is not left behind
    text = (tmp_path / "README.md").read_text()
    card = read_card(tmp_path)
    assert "# my-model\n" in text and "mine" in card.data.tags and card.data.to_dict()["hfnoise"]["steps"] == 0
    if kind == "plain":
        assert (card.data.language, card.data.license) == ("en", "mit")
        assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-classification"
        assert "AutoModelForSequenceClassification.from_pretrained" in text and "Tokenizer" not in text
        trainer.create_model_card(dataset_tags="me/data", dataset="My data")
    else:
        assert card.data.library_name == "peft" and "AutoPeftModelForCausalLM.from_pretrained" in text
        assert ("unit: preference pair" if "dpo" in kind else "unit: row") in text
    assert read_card(tmp_path).data.datasets == ["me/data"] and read_report(tmp_path)["epsilon"] == 0.0
    with pytest.raises(TypeError, match="no argument 'titel'; it takes .*dataset_name"):
        trainer.create_model_card(titel="x")


def test_the_report_is_written_whole_and_before_the_weights(tiny_model_path, tmp_path, monkeypatch):
    trainer = private_trainer("sft", tiny_model_path, tmp_path)
    monkeypatch.setattr(
        type(trainer.model), "save_pretrained", lambda *_, **__: pytest.fail("no space", pytrace=False)
    )
    with pytest.raises(pytest.fail.Exception):
        trainer.save_model()
    before = (tmp_path / "dp_report.json").read_text()
    assert not list(tmp_path.glob("*.safetensors"))
    monkeypatch.setattr(private_report.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        private_report.write_report(trainer, tmp_path)
    assert (tmp_path / "dp_report.json").read_text() == before


@pytest.mark.parametrize(
    ("epsilon", "text"),
    [(0.0, "0"), (3.0, "3"), (2.999001, "3"), (0.0123401, "0.01235"), (11.111, "11.12"), (12345.6, "12346")],
)
def test_epsilon_is_rounded_up(epsilon, text):
    assert format_epsilon(epsilon) == text and float(text) >= epsilon


def test_tokens_of_a_command_line_are_hidden(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # of `python -m pytest`
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token", "hf_x", "--token=hf_y", "--max_length", "9"])
    assert cards.command_line() == "python train.py --hub_token HIDDEN --token=HIDDEN --max_length 9"


@pytest.mark.slow  # a fresh process
def test_the_command_runs_in_a_shell():
    report = {"expected_batch_size": 4, "units": 20, "noise_multiplier": 1.0, "steps": 2, "bands": 1, "delta": 1e-5}
    command = check_command({**report, "accountant": "pld"})
    done = subprocess.run([sys.executable, *shlex.split(command)[1:]], capture_output=True, text=True, check=True)
    assert float(done.stdout) == compute_epsilon(1.0, 0.2, 2, 1e-5)
