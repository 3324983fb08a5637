"""Two processes draw different noise, and agree with one process at the same global batch."""

import pytest
import torch
from accelerate.utils import gather_object

from tests.trainers.diffusion_world import losses, make_rows, new_trainer, weights

EMPTY = {"encoder_hidden_states": torch.zeros(1, 3, 8)}
SETTINGS = {
    "max_steps": 4, "noise_offset": 0.1, "input_perturbation": 0.1, "prompt_dropout": 0.3, "ema_decay": 0.9,
    "train_sampling_strategy": "random", "max_grad_norm": 1.0,
}  # fmt: skip


def recorded(trainer):
    """Have the trainer keep the noise of every micro-batch."""
    seen, draw = [], trainer._draw

    def keep(inputs, positions, step, stream):
        draws = draw(inputs, positions, step, stream)
        if stream == "train":
            seen.extend(
                zip([(step, position) for position in positions], draws.noise.flatten(1).tolist(), strict=True)
            )
        return draws

    trainer._draw = keep
    return seen


def train_on_both(folder, per_device, accumulation, noise, expected, expected_losses, eval_loss):
    trainer = new_trainer(
        folder, eval_rows=make_rows(8), trainer_options={"empty_prompt": EMPTY}, per_device_eval_batch_size=2,
        per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation, **SETTINGS,
    )  # fmt: skip
    assert trainer.accelerator.num_processes == 2
    seen = recorded(trainer)
    trainer.train()
    mine, other = gather_object([seen])
    assert not {place for place, _ in mine} & {place for place, _ in other}
    assert dict(mine + other) == noise  # every row of the global batch has the noise it has on one process
    assert losses(trainer) == pytest.approx(expected_losses, rel=1e-4)
    ours = weights(trainer.model)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=5e-4)  # Adam divides by small sums
    assert trainer.evaluate()["eval_loss"] == pytest.approx(eval_loss, rel=1e-3)
    sums = gather_object([sum(float(one.double().sum()) for one in ours.values())])
    assert sums[0] == sums[1]


@pytest.mark.parametrize(("per_device", "accumulation"), [(2, 1), (1, 2)], ids=str)
@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path, two_processes, per_device, accumulation):
    one = new_trainer(tmp_path, eval_rows=make_rows(8), trainer_options={"empty_prompt": EMPTY}, **SETTINGS)
    noise = recorded(one)
    one.train()
    assert len({tuple(values) for _, values in noise}) == 16  # four steps of four rows
    loss = one.evaluate()["eval_loss"]
    two_processes(
        train_on_both, str(tmp_path), per_device, accumulation, dict(noise), weights(one.model), losses(one), loss
    )


RESUMED = {**SETTINGS, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}


def resume_on_both(folder):
    runs = []
    for checkpoint in (None, f"{folder}/checkpoint-2"):
        trainer = new_trainer(folder, trainer_options={"empty_prompt": EMPTY}, **RESUMED)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(f"{folder}/{checkpoint is None}")
        runs.append((losses(trainer), weights(trainer.model)))
    (whole, expected), (resumed, found) = runs
    assert whole == resumed and len(whole) == 4
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_two_processes_resume_to_the_bit(tmp_path, two_processes):
    two_processes(resume_on_both, str(tmp_path))
    names = ("True", "False")
    averages = [(tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes() for name in names]
    assert averages[0] == averages[1]
