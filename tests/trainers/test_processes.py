"""Two processes agree with each other, with one process, and with trl.DPOTrainer."""

import datasets
import pytest
import torch
from accelerate.utils import gather_object
from trl import DPOConfig, DPOTrainer

from hfnoise import NoiseDPOConfig, NoiseDPOTrainer, RobustDPOConfig, RobustDPOTrainer
from tests.trainers.poisoned_reference import poisoned

# 20 pairs, 4 to a step of both processes.
SETTINGS = {"loss_type": "sym", "precompute_ref_log_probs": True, "per_device_train_batch_size": 2, "max_steps": 5}


def weights_of(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def raise_on_both(make_trainer, pairs):
    trainer = poisoned(make_trainer(NoiseDPOTrainer, NoiseDPOConfig, pairs, **SETTINGS), 5)
    before = weights_of(trainer)
    with pytest.raises(ValueError) as error:
        trainer.train()
    first, second = gather_object([str(error.value)])
    assert first == second
    assert "rows [5] of the dataset" in first and f"prompt {pairs[5]['prompt']!r}" in first
    # Up to the step with the NaN both made the same steps.
    sums = gather_object([sum(float(tensor.double().sum()) for tensor in trainer.model.state_dict().values())])
    assert sums[0] == sums[1] and all(torch.isfinite(tensor).all() for tensor in before.values())


def skip_on_both(make_trainer, pairs, losses, weights):
    trainer = poisoned(make_trainer(NoiseDPOTrainer, NoiseDPOConfig, pairs, on_nan_log_probs="skip", **SETTINGS), 5)
    trainer.train()
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == pytest.approx(losses, rel=1e-4)
    assert sum(entry.get("noise/skipped_steps", 0) for entry in trainer.state.log_history) == 1
    ours = weights_of(trainer)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, weights[name], rtol=2e-4, atol=2e-5)  # sums in another order
    totals = gather_object([{name: float(tensor.double().sum()) for name, tensor in ours.items()}])
    assert totals[0] == totals[1]


@pytest.mark.slow
def test_nan_on_one_process_stops_both(make_trainer, make_pairs, two_processes):
    two_processes(raise_on_both, make_trainer, make_pairs(20))


@pytest.mark.slow
def test_nan_on_one_process_skips_the_step_on_both(make_trainer, make_pairs, losses_of, two_processes):
    one = make_trainer(
        NoiseDPOTrainer, NoiseDPOConfig, make_pairs(20), on_nan_log_probs="skip",
        **SETTINGS | {"per_device_train_batch_size": 4},
    )  # fmt: skip
    poisoned(one, 5).train()
    two_processes(skip_on_both, make_trainer, make_pairs(20), losses_of(one), weights_of(one))


# TRL looks for the values in another temporary folder on every process when the dataset is in memory.
def precomputed_on_both(make_trainer, pairs, expected):
    datasets.fingerprint._TEMP_DIR_FOR_TEMP_CACHE_FILES = None  # launched processes do not inherit this folder
    trainer = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, pairs, pairs.select(range(5)), **SETTINGS)
    for column, values in expected.items():
        assert list(trainer.train_dataset[column]) == pytest.approx(values, rel=1e-5)
    assert "ref_chosen_logps" in trainer.eval_dataset.column_names and len(trainer.eval_dataset) == 5
    trainer.train()


@pytest.mark.slow
def test_a_precomputed_reference_of_a_dataset_in_memory(make_trainer, make_pairs, two_processes):
    one = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, make_pairs(19), **SETTINGS)
    expected = {name: list(one.train_dataset[name]) for name in ("ref_chosen_logps", "ref_rejected_logps")}
    assert len(expected["ref_chosen_logps"]) == 19
    two_processes(precomputed_on_both, make_trainer, make_pairs(19), expected)


# 20 pairs, 6 to a step of both processes: the last batch is short.
NEUTRAL = {"num_train_epochs": 1, "max_steps": -1, "per_device_train_batch_size": 3}


def equal_to_trl(make_trainer, pairs):
    runs = []
    for trainer_class, config_class in ((DPOTrainer, DPOConfig), (NoiseDPOTrainer, NoiseDPOConfig)):
        trainer = make_trainer(trainer_class, config_class, pairs, pairs.select(range(5)), **NEUTRAL)
        assert trainer.accelerator.num_processes == 2
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runs.append((losses, trainer.evaluate()["eval_loss"], weights_of(trainer)))
    stock, ours = runs
    assert stock[0] == ours[0] and len(set(ours[0])) == 4 and stock[1] == ours[1]
    assert all(torch.equal(tensor, ours[2][name]) for name, tensor in stock[2].items())


def test_neutral_settings_with_a_short_last_batch_equal_trl(make_trainer, make_pairs, two_processes):
    two_processes(equal_to_trl, make_trainer, make_pairs(20))


ESTIMATE = {"max_steps": 6, "learning_rate": 5e-3, "annotator_column": "who", "per_device_eval_batch_size": 7}


def same_estimate(make_trainer, pairs, held_out, margins, expected):
    trainer = make_trainer(
        RobustDPOTrainer, RobustDPOConfig, pairs, held_out, **ESTIMATE | {"per_device_train_batch_size": 4}
    )
    trainer.train()
    ours = trainer.pair_margins(held_out)
    assert ours.shape == margins.shape  # 121 pairs do not fill the batches of two processes
    torch.testing.assert_close(ours, margins, rtol=2e-3, atol=2e-3)  # 6 steps of sums in another order
    estimate = trainer.flip_rate_estimate
    assert estimate.flip_rate == pytest.approx(expected.flip_rate, abs=1e-3) and estimate.count == 121
    both = gather_object([(ours.tolist(), estimate, trainer.flip_rate_by_annotator)])
    assert both[0] == both[1]


@pytest.mark.slow
def test_the_estimate_is_the_same_everywhere(make_trainer, make_pairs, two_processes):
    pairs = make_pairs(48, seed=1, who=["ann", "bob"] * 24)
    held_out = make_pairs(121, seed=2, who=["ann"] * 60 + ["bob"] * 61)
    one = make_trainer(
        RobustDPOTrainer, RobustDPOConfig, pairs, held_out, **ESTIMATE | {"per_device_train_batch_size": 8}
    )
    one.train()
    two_processes(same_estimate, make_trainer, pairs, held_out, one.pair_margins(held_out), one.flip_rate_estimate)


RATES = {"loss_type": "forward_corrected", "flip_rate_column": "rate", "max_steps": 5}


def stream_on_both(make_trainer, pairs, losses, margins):
    trainer = make_trainer(
        NoiseDPOTrainer, NoiseDPOConfig, pairs.to_iterable_dataset(), per_device_train_batch_size=2, **RATES
    )
    trainer.train()
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(trainer.pair_margins(pairs.to_iterable_dataset()), margins, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_a_stream_is_split_over_the_processes(make_trainer, make_pairs, losses_of, two_processes):
    pairs = make_pairs(22, rate=[0.0, 0.3] * 11)
    one = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, pairs.to_iterable_dataset(), **RATES)
    one.train()
    two_processes(stream_on_both, make_trainer, pairs, losses_of(one), one.pair_margins(pairs))
