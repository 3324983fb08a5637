"""kill -9 at random moments, also while a checkpoint is written: resumed, the run ends in the same weights to the bit.

For private runs the ledger never says less than what was released, whenever the process dies.
"""

import json
import multiprocessing
import random
import signal
import time
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from hfnoise.privacy.ledger import Ledger
from tests.conftest import WORDS

STEPS = 6
SAVES = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
KINDS = (
    "noise-dpo", "robust-dpo", "dr-dpo", "bvpo", "dp-sft", "dp-dpo", "fedsvd", "dp-fedsvd", "qat", "qat-sft",
    "diffusion", "one-more-step", "golden-noise",
)  # fmt: skip
# The clear refusals of a resume: nothing whole is there to go on from.
REFUSALS = ("no complete checkpoint in", "there is no state of an earlier")
KILLS_PER_RUN = 4


@dataclass
class Counts:
    """What happened to the runs of a Trainer."""

    kills: int = 0
    while_saving: int = 0
    resumes: int = 0
    refusals: int = 0
    finished_first: int = 0


class Released(TrainerCallback):
    """Writes down each step whose result exists, as one who looks over the shoulder of the process would."""

    def __init__(self, file, trainer):
        self.file, self.trainer = file, trainer

    def on_step_end(self, args, state, control, **kwargs):
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(f"{self.trainer.private_run.state.run_id} {state.global_step}\n")


@pytest.fixture
def builders(make_trainer, make_private_trainer, make_pairs, make_texts, tiny_model_path, tokenizer, cpu_arguments):
    """Return functions by kind that build a Trainer in a folder."""
    import hfnoise

    def preference(trainer, config, pairs=None, **settings):
        return lambda folder: make_trainer(
            getattr(hfnoise, trainer), getattr(hfnoise, config), pairs or make_pairs(32),
            output_dir=str(folder / "run"), **SAVES | settings,
        )  # fmt: skip

    def private(kind, adapter):
        def build(folder):
            files = {"secret_file": str(folder / "secret"), "ledger_file": str(folder / "ledger.json")}
            trainer = make_private_trainer(
                getattr(hfnoise, kind), dp={"unsafe_seed": None, **files}, peft=adapter,
                output_dir=str(folder / "run"), **SAVES,
            )  # fmt: skip
            trainer.add_callback(Released(folder / "released", trainer))
            return trainer

        return build

    def federated(privacy):
        def build(folder):
            arguments = {name: value for name, value in cpu_arguments.items() if name != "beta"}
            arguments |= {"learning_rate": 0.05, "output_dir": str(folder / "run")}
            names = [("alice", "bob")[number % 2] for number in range(24)]
            return hfnoise.FedSVDTrainer(
                tiny_model_path, args=SFTConfig(**arguments),
                fedsvd_config=hfnoise.FedSVDConfig(rounds=4, local_steps=1),
                train_dataset=make_texts(24, owner=names), client_column="owner", processing_class=tokenizer,
                dp_config=hfnoise.DPConfig(noise_multiplier=1.0, unsafe_seed=1) if privacy else None,
                peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
            )  # fmt: skip

        return build

    from peft import LoraConfig
    from trl import SFTConfig

    from tests.trainers import diffusion_world, noise_prompt_world, one_more_step_world, qat_world

    def qat_sft(folder):
        arguments = {name: value for name, value in cpu_arguments.items() if name != "beta"}
        return hfnoise.QATSFTTrainer(
            tiny_model_path, processing_class=tokenizer, train_dataset=make_texts(24),
            args=hfnoise.QATSFTConfig(**arguments | SAVES | {"output_dir": str(folder / "run"), "bits": 2}),
        )  # fmt: skip

    dropout = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.2)
    return {
        "noise-dpo": preference("NoiseDPOTrainer", "NoiseDPOConfig"),
        "robust-dpo": preference("RobustDPOTrainer", "RobustDPOConfig"),
        "dr-dpo": preference("DrDPOTrainer", "DrDPOConfig"),
        "bvpo": preference("BVPOTrainer", "BVPOConfig", trace_pairs(), max_length=64, alpha_every=1),
        "dp-sft": private("DPSFTTrainer", dropout),
        "dp-dpo": private("DPDPOTrainer", dropout),
        "fedsvd": federated(privacy=False),
        "dp-fedsvd": federated(privacy=True),
        "qat": lambda folder: qat_world.make(
            tiny_model_path, folder / "run", bit_schedule="8:0.5,1:0.5", **SAVES
        ),
        "qat-sft": qat_sft,
        "diffusion": lambda folder: diffusion_world.new_trainer(folder / "run", ema_decay=0.9, **SAVES),
        "one-more-step": lambda folder: one_more_step_world.new_step_trainer(
            folder / "run", prompt_dropout=0.5, ema_decay=0.9, **SAVES
        ),
        "golden-noise": lambda folder: noise_prompt_world.new_trainer(folder / "run", ema_decay=0.9, **SAVES),
    }  # fmt: skip


def trace_pairs():
    def text(number, start, length):
        return " ".join(WORDS[(start * 7 + number + at) % len(WORDS)] for at in range(length))

    return Dataset.from_list([
        {
            "prompt": text(number, 1, 4) + " ", "chosen": f"<think>\n{text(number, 2, 5)}\n</think>\n\n fox",
            "rejected": f"<think>\n{text(number, 3, 4)}\n</think>\n\n dog",
            "chosen_nothink": f"{text(number, 4, 2)} fox", "rejected_nothink": f"{text(number, 5, 2)} dog",
        }
        for number in range(32)
    ])  # fmt: skip


def train(build, folder, resume, run_id):
    """Train in this process, which is a fork; write the weights, or the refusal."""
    import hfnoise.trainers.private_course as course

    torch.set_num_threads(1)
    if run_id is not None:
        course.new_run_id = lambda: run_id
    try:
        trainer = build(folder)
        trainer.train(resume_from_checkpoint=True if resume else None)
    except ValueError as error:
        (folder / "refusal").write_text(str(error))
        return
    torch.save({name: value.cpu() for name, value in trainer.model.state_dict().items()}, folder / "weights.new")
    (folder / "weights.new").rename(folder / "weights")


def start(build, folder, resume, run_id):
    folder.mkdir(exist_ok=True)
    (folder / "refusal").unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=train, args=(build, folder, resume, run_id))
    process.start()
    return process


def written(folder):
    """Return the files in the output folder: a new one says that something is being saved."""
    return {path for path in (folder / "run").rglob("*")} if (folder / "run").is_dir() else set()


def wait_for_save(process, folder, number):
    """Return when the output folder has changed so many times, or the process has ended."""
    seen, changes = written(folder), 0
    while process.is_alive() and changes < number:
        now = written(folder)
        changes += now != seen
        seen = now
        time.sleep(0.0005)


def check_ledger(folder):
    """No step whose result anybody could have seen is missing on the ledger, at any time."""
    released = folder / "released"
    if not released.exists():
        return
    content = json.loads((folder / "ledger.json").read_text())
    charged = {
        entry["run_id"]: entry.get("first_step", 0) + entry["steps"]
        for entries in content["datasets"].values() for entry in entries
    }  # fmt: skip
    for line in released.read_text().splitlines():
        run_id, step = line.split()
        assert charged[run_id] >= int(step)
    for state in (folder / "run").glob("checkpoint-*/dp_state.json"):
        found = json.loads(state.read_text())
        assert charged[found["run_id"]] >= found["global_step"]


def killed_run(build, folder, source, seconds, counts, run_id="run"):
    """Train to the end through kills at random moments; return the weights."""
    for kill in range(KILLS_PER_RUN + 1):
        resume = (folder / "run").is_dir()
        counts.resumes += resume
        process = start(build, folder, resume, run_id)
        if kill < KILLS_PER_RUN:
            saving = source.random() < 0.6
            if saving:
                wait_for_save(process, folder, source.randint(1, 12))
            else:
                process.join(source.uniform(0.0, 0.8 * seconds))
            if process.is_alive():
                process.kill()
                counts.kills += 1
                counts.while_saving += saving
        process.join(240)
        assert process.exitcode in (0, -signal.SIGKILL), "another error than a refusal"
        check_ledger(folder)
        if (folder / "weights").exists():
            counts.finished_first += kill < KILLS_PER_RUN
            return torch.load(folder / "weights", weights_only=True)
        if (folder / "refusal").exists():
            text = (folder / "refusal").read_text()
            assert any(words in text for words in REFUSALS), text
            counts.refusals += 1
            # What the message says to do: start anew, in an empty folder.
            (folder / "run").rename(folder / f"run-{kill}")
            if kill == KILLS_PER_RUN:
                process = start(build, folder, False, run_id)
                process.join(240)
                return torch.load(folder / "weights", weights_only=True)
    raise AssertionError("the last process was not killed and left nothing")


def run(kind, builders, tmp_path, trials, capsys):
    build, source, counts = builders[kind], random.Random(f"{kind} 0"), Counts()
    began = time.monotonic()
    process = start(build, tmp_path / "whole", False, "run")
    process.join(240)
    seconds = time.monotonic() - began
    assert process.exitcode == 0 and not (tmp_path / "whole" / "refusal").exists()
    expected = torch.load(tmp_path / "whole" / "weights", weights_only=True)
    secret = tmp_path / "whole" / "secret"
    for trial in range(trials):
        folder = tmp_path / f"trial-{trial}"
        folder.mkdir()
        if secret.exists():
            # The noise follows from the secret and the name of the run: the same in both.
            (folder / "secret").write_bytes(secret.read_bytes())
            (folder / "secret").chmod(0o600)
        found = killed_run(build, folder, source, seconds, counts)
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
        assert_charged_once(folder)
    with capsys.disabled():
        print(f"\n{kind}: {seconds:.1f} s whole, {counts}")
    assert counts.kills >= trials and counts.resumes


def assert_charged_once(folder):
    file = folder / "ledger.json"
    if file.exists():
        (fingerprint,) = json.loads(file.read_text())["datasets"]
        assert [entry.steps for entry in Ledger(file, fingerprint).entries()] == [STEPS]


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random(kind, builders, tmp_path, capsys):
    run(kind, builders, tmp_path, 3, capsys)


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["dp-sft", "dp-dpo"])
def test_what_was_charged_when_runs_have_names_of_their_own(kind, builders, tmp_path):
    """Started anew after a kill the noise is another: both runs stand on the ledger."""
    counts = Counts()
    for trial in range(3):
        (tmp_path / str(trial)).mkdir()
        killed_run(builders[kind], tmp_path / str(trial), random.Random(trial), 2.0, counts, run_id=None)
    assert counts.kills
