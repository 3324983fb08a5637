"""OneMoreStepTrainer on two processes, and over the loopback Hub."""

import textwrap

import pytest
import torch
from accelerate.utils import gather_object

from hfnoise.latents.hf_time_free_unet import module_residuals
from tests.trainers.diffusion_world import losses, make_rows, weights
from tests.trainers.one_more_step_world import new_step_trainer

SETTINGS = {"max_steps": 4, "prompt_dropout": 0.3, "ema_decay": 0.9, "train_sampling_strategy": "random"}
# Not a multiple of the batch: the last one is filled up on two processes, which must not be counted.
EVALUATED = 7


def results(trainer):
    trainer.train()
    residuals = module_residuals(trainer.model)
    metrics = trainer.evaluate()
    explained = [
        metrics["eval_low_frequency_r2"],
        *residuals.mean,
        *(entry for row in residuals.covariance for entry in row),
    ]
    return losses(trainer), explained, weights(trainer.model)


def train_on_both(folder, expected_losses, expected, expected_weights):
    trainer = new_step_trainer(
        folder, eval_rows=make_rows(EVALUATED), per_device_train_batch_size=2, per_device_eval_batch_size=2, **SETTINGS
    )
    assert trainer.accelerator.num_processes == 2
    found_losses, found, found_weights = results(trainer)
    assert found_losses == pytest.approx(expected_losses, rel=1e-4)
    assert found == pytest.approx(expected, rel=1e-2, abs=2e-4)
    for name, value in expected_weights.items():
        torch.testing.assert_close(found_weights[name], value, rtol=1e-3, atol=5e-4)  # Adam divides by small sums
    mine, other = gather_object([found])
    assert mine == other


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path, two_processes):
    trainer = new_step_trainer(tmp_path, eval_rows=make_rows(EVALUATED), **SETTINGS)
    two_processes(train_on_both, str(tmp_path), *results(trainer))


TRAIN = """
    import torch
    torch.set_num_threads(1)
    from tests.trainers.diffusion_world import make_rows
    from tests.trainers.one_more_step_world import new_step_trainer

    trainer = new_step_trainer(
        "tiny-step", eval_rows=make_rows(4), push_to_hub=True, hub_token="hf_x", hub_strategy="end", ema_decay=0.9
    )
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub(license="openrail++")
    with trainer.average.in_place_of(trainer.model):
        torch.save({name: one.clone() for name, one in trainer.model.state_dict().items()}, "weights.pt")
    print(trainer.model.config.residuals)
"""

PULL = """
    import torch
    from huggingface_hub import ModelCard
    from hfnoise import OneMoreStep

    step = OneMoreStep.from_pretrained("tester/tiny-step")
    expected = torch.load("weights.pt")
    assert all(torch.equal(one, expected[name]) for name, one in step.module.state_dict().items())
    card = ModelCard.load("tester/tiny-step")
    assert card.data.library_name == "diffusers" and card.data.license == "openrail++", card.data
    assert "one-more-step" in card.data.tags and 'OneMoreStep.from_pretrained("' in card.text, card
    assert "None" not in card.text
    print(step.prior.statistics.to_config())
"""


@pytest.mark.hub
@pytest.mark.slow
def test_pushed_with_its_prior(run_python):
    written, read = (run_python(textwrap.dedent(code)).splitlines()[-1] for code in (TRAIN, PULL))
    assert written == read and "covariance" in read
