"""Interrupted and resumed, on two processes, killed: the same weights, the same draws, the same ledger."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from accelerate.utils import gather_object

from hfnoise.errors import CheckpointError
from hfnoise.privacy.ledger import Ledger
from hfnoise.trainers.private_run import RunState

ROOT = Path(__file__).parent.parent.parent
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
FLOAT64 = {"accumulation_dtype": "float64", "expected_batch_size": 8, "micro_batch_size": 2}


def drop_checkpoints_after(folder, step):
    for path in Path(folder).glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize(
    "dp", [{}, pytest.param({"noise": "banded", "bands": 2}, marks=pytest.mark.slow)], ids=["gaussian", "banded"]
)
def test_resume_is_a_replay(dp, make_private_trainer, trained_weights, tmp_path):
    settings = SAVING | ({"optim": "sgd"} if dp else {})
    dp = dp | {"unsafe_seed": None, "secret_file": str(tmp_path / "secret"), "expected_batch_size": 4}
    # Dropout: the random state of torch must come back as well.
    first = make_private_trainer(dp=dp, peft=dropout_adapter(), **settings)
    first.train()
    ledger = Ledger(tmp_path / "ledger.json", first.fingerprint)
    entries = ledger.entries()
    drop_checkpoints_after(first.args.output_dir, 2)
    second = make_private_trainer(dp=dp, peft=dropout_adapter(), **settings)
    second.train(resume_from_checkpoint=True)
    assert torch.equal(trained_weights(first), trained_weights(second))
    # Steps that were done again are the same release: charged once.
    assert Ledger(tmp_path / "ledger.json", first.fingerprint).entries() == entries
    assert [entry.steps for entry in entries] == [6]
    assert first.epsilon() == second.epsilon()


def dropout_adapter():
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.2)


def test_other_settings_are_another_release(make_private_trainer, tmp_path, caplog):
    """The same noise under another learning rate would cancel in the difference of the two results."""
    dp = {"unsafe_seed": None, "secret_file": str(tmp_path / "secret")}
    first = make_private_trainer(dp=dp, **SAVING)
    first.train()
    drop_checkpoints_after(first.args.output_dir, 2)
    second = make_private_trainer(dp=dp, **SAVING | {"learning_rate": 1e-3})
    second.train(resume_from_checkpoint=True)
    assert "learning_rate: 0.01 there, 0.001 here" in caplog.text
    assert first.private_run.state.run_id != second.private_run.state.run_id
    entries = Ledger(tmp_path / "ledger.json", first.fingerprint).entries()
    assert sorted((entry.first_step, entry.steps) for entry in entries) == [(0, 6), (2, 4)]
    # The weights depend on two steps of the first run and on four of the second, the data on all of them.
    assert second.epsilon() == pytest.approx(first.epsilon(), rel=1e-6)
    assert second.private_run.total_epsilon(6) > 1.1 * first.epsilon()
    report = second.privacy_report()
    assert report["lineage_epsilon"] == second.epsilon() < report["epsilon"] == report["total_epsilon"]


@pytest.mark.parametrize(
    ("dp", "adapter", "settings", "name"),
    [
        ({"micro_batch_size": 2}, 0.2, {}, "micro_batch_size: 4 there, 2 here"),
        ({}, 0.1, {}, "adapter: "),
        ({}, 0.2, {"max_length": 8}, "rows: "),
        ({}, 0.2, {"optim_target_modules": "all"}, "optim_target_modules: None there, 'all' here"),
        ({}, 0.2, {"logging_steps": 2, "disable_tqdm": True, "run_name": "x", "eval_on_start": True}, None),
    ],
)
def test_what_makes_another_release(dp, adapter, settings, name, make_private_trainer, tmp_path):
    """The draws of a step belong to one gradient; whatever changes it must change them."""
    from peft import LoraConfig

    def trainer(dp, dropout, **settings):
        peft = LoraConfig(r=2, target_modules=["v_proj", "q_proj"], lora_dropout=dropout)
        return make_private_trainer(dp=dp, peft=peft, **SAVING | settings)

    old, new = (t._described(bytes(32)) for t in (trainer({}, 0.2), trainer(dp, adapter, **settings)))
    old = RunState(**json.loads(json.dumps(asdict(old))))
    found = trainer({}, 0.2)._branches(old, new)
    assert found.startswith(name) if name else found == ""


def test_a_lost_secret_is_charged_again(make_private_trainer, tmp_path, caplog):
    dp = {"unsafe_seed": None, "secret_file": str(tmp_path / "secret")}
    make_private_trainer(dp=dp, **SAVING).train()
    drop_checkpoints_after(tmp_path / "run", 4)
    (tmp_path / "secret").unlink()
    again = make_private_trainer(dp=dp, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert "the secret of the checkpoint's run is gone" in caplog.text
    entries = Ledger(tmp_path / "ledger.json", again.fingerprint).entries()
    assert sorted((entry.first_step, entry.steps) for entry in entries) == [(0, 6), (4, 2)]


def test_what_is_no_resume(make_private_trainer, make_texts, tmp_path):
    make_private_trainer(**SAVING).train()
    for dp, data, words in (
        ({"expected_batch_size": 6}, None, "expected_batch_size: 4 there, 6 here"),
        ({"clip_norm": 0.5}, None, "clip_norm: 1.0 there, 0.5 here"),
        ({}, make_texts(23), "fingerprint: "),
    ):
        with pytest.raises(CheckpointError, match=words):
            make_private_trainer(dp=dp, data=data, **SAVING).train(resume_from_checkpoint=True)
    state = tmp_path / "run" / "checkpoint-6" / "dp_state.json"
    state.write_text(state.read_text()[:40])
    with pytest.raises(CheckpointError, match="is damaged"):
        make_private_trainer(**SAVING).train(resume_from_checkpoint=str(state.parent))
    state.unlink()
    with pytest.raises(CheckpointError, match="holds no dp_state.json"):
        make_private_trainer(**SAVING).train(resume_from_checkpoint=str(state.parent))


@pytest.mark.slow
def test_the_budget_ends_the_training(make_private_trainer, tmp_path, caplog):
    """A run that goes on beyond its plan stops where the budget is spent, and a second run finds nothing left."""
    dp = {
        "unsafe_seed": None,
        "secret_file": str(tmp_path / "secret"),
        "target_epsilon": 4.0,
        "noise_multiplier": None,
    }
    first = make_private_trainer(dp=dp, **SAVING)
    first.train()
    assert first.epsilon() <= 4.0 and first.state.global_step == 6
    again = make_private_trainer(dp=dp, **SAVING)
    with pytest.raises(ValueError, match="target_epsilon=4 is spent: 1 earlier run on this dataset has released"):
        again.train()
    longer = make_private_trainer(dp=dp, **SAVING | {"max_steps": 12})
    with pytest.raises(ValueError, match="is spent"):
        longer.train(resume_from_checkpoint=True)
    # What the user accepts in all can be raised: the rest of it buys the steps that are left.
    more = make_private_trainer(dp=dp | {"target_epsilon": 5.0}, **SAVING | {"max_steps": 12})
    more.train(resume_from_checkpoint=True)
    assert 6 < more.state.global_step < 12 and more.epsilon() <= 5.0


@pytest.mark.slow
def test_units_of_a_ledger(make_private_trainer, make_texts, tmp_path):
    """What a user has lost in runs that protect rows is not known; the other way round it is."""
    data = make_texts(24, user=[f"user {n // 2}" for n in range(24)])

    def trainer(folder, **dp):
        files = {"unsafe_seed": None, "secret_file": str(tmp_path / folder / "secret"), "accountant": "rdp"}
        return make_private_trainer(data=data, dp=files | {"expected_batch_size": 2} | dp, max_steps=1)

    trainer("a").train()
    with pytest.raises(ValueError, match=r"protect another unit \(row\), and this one protects all rows with one"):
        trainer("a", unit_column="user").train()
    trainer("b", unit_column="user").train()
    trainer("b").train()


def test_a_run_stops_at_the_last_step_that_fits(make_private_trainer, caplog):
    trainer = make_private_trainer(max_steps=6)
    trainer.private_run.limit = 2  # as `plan_run` sets it where less of the budget is left
    trainer._start_run = lambda checkpoint: None
    trainer.train()
    assert trainer.state.global_step == 2 and "training stops at step 2 of 6" in caplog.text


def test_the_secret_is_nowhere_in_the_output(make_private_trainer, tmp_path):
    dp = {"unsafe_seed": None, "secret_file": str(tmp_path / "secret"), "accountant": "rdp"}
    trainer = make_private_trainer(dp=dp, **SAVING)
    trainer.train()
    trainer.save_model()
    secret = (tmp_path / "secret").read_text()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        assert secret.encode() not in path.read_bytes() and bytes.fromhex(secret) not in path.read_bytes()
    # Epsilon is logged, once for a checkpoint, and the noise once; `trainer_state.json` of the checkpoint has it too.
    found = [
        (entry["step"], entry["privacy/epsilon"]) for entry in trainer.state.log_history if "privacy/epsilon" in entry
    ]
    assert [step for step, _ in found] == [2, 4, 6] and found[-1][1] == trainer.epsilon() > found[0][1] > 0
    assert sum("privacy/noise_multiplier" in entry for entry in trainer.state.log_history) == 1
    assert '"privacy/epsilon"' in (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text()
    state = RunState.read(tmp_path / "run" / "checkpoint-6")
    assert state.global_step == 6 and state.noise_multiplier == 1.0


def train_on_both(make_private_trainer, trained_weights, expected, dp, folder):
    settings = SAVING | {"per_device_train_batch_size": 2, "output_dir": str(folder / "two")}
    trainer = make_private_trainer(dp=dp, peft=dropout_adapter(), **settings)
    assert trainer.expected_batch_size == 8
    trainer.train()
    assert torch.equal(trained_weights(trainer), expected)
    sums = gather_object([float(trained_weights(trainer).double().sum())])
    assert sums[0] == sums[1]


@pytest.mark.slow
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_two_processes(clipping, make_private_trainer, trained_weights, two_processes, tmp_path):
    """Masks, noise and dropout are the same, micro-batches dealt out whole: with float64 sums weights are bitwise."""
    dp = FLOAT64 | {"clipping": clipping, "unsafe_seed": None, "secret_file": str(tmp_path / "secret")}
    one = make_private_trainer(dp=dp, peft=dropout_adapter(), **SAVING)
    run_id = one.private_run.state.run_id
    one._start_run = lambda checkpoint: None
    one.train()
    (tmp_path / "ledger.json").unlink()
    # A second run has a key of its own; here it must have that of the first.
    import hfnoise.trainers.private_course as course

    course.new_run_id, before = (lambda: run_id), course.new_run_id
    try:
        two_processes(train_on_both, make_private_trainer, trained_weights, trained_weights(one), dp, tmp_path)
    finally:
        course.new_run_id = before
    (entry,) = Ledger(tmp_path / "ledger.json", one.fingerprint).entries()
    assert (entry.run_id, entry.steps, entry.sample_rate) == (run_id, 6, 8 / 24)


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig
from hfnoise import DPConfig, DPSFTTrainer
resume, kill_at, place = sys.argv[1] == "resume", int(sys.argv[2]), sys.argv[3]
arguments = SFTConfig(
    "run", use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none", max_steps=6, save_steps=2,
    save_strategy="steps", per_device_train_batch_size=4, learning_rate=1e-2, disable_tqdm=True, max_length=32,
)
trainer = DPSFTTrainer(
    {model!r}, args=arguments, train_dataset=Dataset.from_dict({{"text": {texts!r}}}),
    peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    dp_config=DPConfig(noise_multiplier=1.0, secret_file="secret"),
)
def kill(name):
    stock = getattr(trainer, name)
    def killed(*args, **kwargs):
        if trainer.state.global_step == kill_at and name != "_save_rng_state":
            os.kill(os.getpid(), signal.SIGKILL)
        result = stock(*args, **kwargs)
        if trainer.state.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(trainer, name, killed)
if place:
    kill(place)
trainer.train(resume_from_checkpoint=True if resume else None)
trainer.save_model("final")
"""


@pytest.mark.slow  # fresh processes that import all libraries
def test_kill_and_resume(tiny_model_path, make_texts, tmp_path):
    """SIGKILL in the middle of a step and, when resumed, in the middle of writing a checkpoint."""
    from safetensors.torch import load_file

    code = KILLED.format(root=str(ROOT), model=tiny_model_path, texts=list(make_texts(24)["text"]))

    def start(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
        )

    for arguments in (("fresh", "3", "training_step"), ("resume", "4", "_save_rng_state")):
        killed = start(*arguments)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    written = {path.parent.name for path in (tmp_path / "run").glob("checkpoint-*/*")}
    finished = {path.parent.name for path in (tmp_path / "run").glob("checkpoint-*/trainer_state.json")}
    assert (written, finished) == ({"checkpoint-2", "checkpoint-4"}, {"checkpoint-2"})
    resumed = start("resume", "-1", "")
    assert resumed.returncode == 0, resumed.stderr.decode()[-2000:]
    state = RunState.read(tmp_path / "run" / "checkpoint-6")
    found = load_file(tmp_path / "final" / "adapter_model.safetensors")
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    # The same run without a kill: same key, in another folder.
    shutil.move(tmp_path / "run", tmp_path / "killed")
    (tmp_path / "ledger.json").unlink()
    course = f"import hfnoise.trainers.private_course as c; c.new_run_id = lambda: {state.run_id!r}\n"
    code = code.replace("resume, kill_at", course + "resume, kill_at", 1)
    whole = start("fresh", "-1", "")
    assert whole.returncode == 0, whole.stderr.decode()[-2000:]
    expected = load_file(tmp_path / "final" / "adapter_model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    without_time = [without_dates(ledger), without_dates(json.loads((tmp_path / "ledger.json").read_text()))]
    assert without_time[0] == without_time[1]


def without_dates(content):
    if isinstance(content, dict):
        return {name: without_dates(value) for name, value in content.items() if name != "started"}
    return [without_dates(value) for value in content] if isinstance(content, list) else content
