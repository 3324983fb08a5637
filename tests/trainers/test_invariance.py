"""The same numbers for every split of the batch, with checkpointing, and after a kill."""

import multiprocessing
import os
import signal

import pytest
import torch
from transformers import TrainerCallback

from hfnoise import NoiseDPOConfig, NoiseDPOTrainer, RobustDPOConfig, RobustDPOTrainer

RATES = [0.0, 0.1, 0.2, 0.3] * 8
WEIGHTS = [0.5, 1.0, 1.5, 1.0] * 8
COLUMNS = {
    "loss_type": ["forward_corrected", "sym"], "loss_weights": [1.0, 0.5], "flip_rate_column": "rate",
    "sample_weight_column": "weight",
}  # fmt: skip


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def pairs(make_pairs):
    return make_pairs(32, rate=RATES, weight=WEIGHTS)


@pytest.mark.parametrize("batch", [(2, 2), (1, 4)])
def test_accumulation(make_trainer, losses_of, pairs, batch):
    size, accumulation = batch
    whole = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, pairs, **COLUMNS)
    split = make_trainer(
        NoiseDPOTrainer, NoiseDPOConfig, pairs, per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation, **COLUMNS,
    )  # fmt: skip
    for trainer in (whole, split):
        trainer.train()
    # Sums in another order differ in the last bits of float32; a wrong scale would differ by a factor.
    assert losses_of(split) == pytest.approx(losses_of(whole), rel=1e-5)
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(split.model.state_dict()[name], tensor, rtol=2e-4, atol=2e-5)


def test_activation_checkpointing_changes_nothing(make_trainer, losses_of, pairs):
    runs = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            NoiseDPOTrainer, NoiseDPOConfig, pairs, activation_checkpointing=checkpointing, **COLUMNS
        )
        trainer.train()
        runs.append((losses_of(trainer), trainer.model.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(tensor, runs[1][1][name]) for name, tensor in runs[0][1].items())


def train_and_compare(make_trainer, losses_of, pairs, expected):
    trainer = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, pairs, per_device_train_batch_size=2, **COLUMNS)
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    losses = [torch.tensor(losses_of(trainer))]
    # What is logged is the mean over the processes, so both must agree with the run of one process.
    assert losses[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_two_processes(make_trainer, losses_of, pairs, two_processes):
    one = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, pairs, **COLUMNS)
    one.train()
    two_processes(train_and_compare, make_trainer, losses_of, pairs, losses_of(one))


@pytest.mark.parametrize("loss_type", [pytest.param("sym", marks=pytest.mark.slow), "robust"])
def test_killed_and_resumed_run_ends_in_the_same_weights(make_trainer, pairs, loss_type):
    settings = {
        "loss_type": loss_type, "flip_rate": 0.2, "max_steps": 6, "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    whole = make_trainer(RobustDPOTrainer, RobustDPOConfig, pairs, **settings)
    whole.train()
    whole_weights = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    output_dir = whole.args.output_dir + "-killed"

    def run_until_killed():
        trainer = make_trainer(
            RobustDPOTrainer, RobustDPOConfig, pairs, callbacks=[KillAt(5)], **settings | {"output_dir": output_dir}
        )
        trainer.train()

    process = multiprocessing.get_context("fork").Process(target=run_until_killed)
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    assert sorted(name for name in os.listdir(output_dir) if name.startswith("checkpoint")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    resumed = make_trainer(RobustDPOTrainer, RobustDPOConfig, pairs, **settings | {"output_dir": output_dir})
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert all(torch.equal(tensor, resumed.model.state_dict()[name]) for name, tensor in whole_weights.items())
