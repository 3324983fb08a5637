"""Which rows a step uses, and how the losses of rows are put back to those of units."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from hfnoise import DPConfig, RobustDPOConfig, RobustDPOTrainer, make_private
from hfnoise.privacy.keyed_random import KeyedRandom
from hfnoise.trainers.private_metrics import is_public
from hfnoise.trainers.private_scale import LossScale
from hfnoise.trainers.private_units import Units, unit_names

RANDOM = KeyedRandom(bytes(32))


def test_rows_of_units():
    units = Units(rows=7, names=["a", "b", "a", "a", "a", "b", "c"], max_rows=2)
    assert units.count == 3
    rows, counts = units.rows(torch.tensor([1, 2, -1]), RANDOM, step=0)
    assert rows.tolist()[:4] == [1, 5, 6, 6] and counts.tolist() == [True, True, True, False, False, False]
    chosen = {tuple(units.rows(torch.tensor([0]), RANDOM, step)[0].tolist()) for step in range(60)}
    assert chosen == {(0, 2), (0, 3), (0, 4), (2, 3), (2, 4), (3, 4)}  # any two, another two at each step


@pytest.mark.parametrize("reduction", ["sum", "mean", "token_mean"])
def test_row_weights_undo_the_reduction(reduction):
    """Two units of two rows; the second has one row, and the other place is filled up."""
    labels = torch.tensor([[1, 1, 1, -100], [1, 1, -100, -100], [1, 1, 1, 1], [1, 1, 1, 1]])
    counts = torch.tensor([True, True, True, False])
    weights = LossScale(reduction, 1, True).row_weights({"labels": labels}, counts, rows_per_unit=2)
    tokens = torch.tensor([2.0, 1.0, 3.0, 3.0])  # the first label is not predicted
    mean = torch.tensor([0.5, 0.7, 0.9, 1.1])  # loss of each row, per token
    row_loss = {"sum": mean * tokens, "mean": mean / 4, "token_mean": mean * tokens / tokens.sum()}[reduction]
    units = (row_loss * weights).view(2, 2).sum(1)
    first = (0.5 + 0.7) / 2 if reduction == "mean" else (0.5 * 2 + 0.7) / 3
    torch.testing.assert_close(units, torch.tensor([first, 0.9]))


def test_what_may_be_logged():
    assert all(map(is_public, ("grad_norm", "epoch", "eval_loss", "privacy/epsilon")))
    assert not any(
        map(
            is_public,
            ("loss", "train_loss", "num_tokens", "eval_num_tokens", "rewards/margins", "noise/flip_rate", "evaluate"),
        )
    )


@pytest.mark.slow
def test_private_learning_from_noisy_labels(make_trainer, make_pairs, trained_weights):
    """Two kinds of noise at once: a robust loss on flipped labels, and privacy."""
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    trained = []
    for mode in ("leaf", "loop"):
        stock = make_trainer(RobustDPOTrainer, RobustDPOConfig, make_pairs(24), peft_config=adapter, flip_rate=0.2)
        trainer = make_private(stock, DPConfig(noise_multiplier=1.0, unsafe_seed=5, grad_mode=mode))
        trainer.train()
        trained.append(trained_weights(trainer))
    torch.testing.assert_close(*trained, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_a_reward_model(tiny_model_path, tokenizer, make_pairs, cpu_arguments):
    from trl import RewardConfig, RewardTrainer

    arguments = {name: value for name, value in cpu_arguments.items() if name != "beta"}
    trainer = RewardTrainer(
        tiny_model_path, args=RewardConfig(**arguments), train_dataset=make_pairs(24), processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS", modules_to_save=["score"]),
    )  # fmt: skip
    trainer = make_private(trainer, DPConfig(noise_multiplier=1.0, unsafe_seed=5))
    trainer.train()
    assert (trainer._loss_scale.reduction, trainer._loss_scale.copies) == ("mean", 2)


def test_names_of_units_whatever_the_format():
    """Tensors are equal only to themselves: each row would be a unit of its own, and users would have no guarantee."""
    data = Dataset.from_dict({"user": [7, 8, 7, 8, 7], "pair": [[1, 2], [1, 2], [3], [3], [3]]})
    for form in (None, "torch", "numpy"):
        assert Units(5, unit_names(data.with_format(form), "user")).count == 2
        assert Units(5, unit_names(data.with_format(form), "pair")).count == 2
    assert unit_names({"user": [None, float("nan"), "a"]}, "user") == [None, None, "a"]
    with pytest.raises(ValueError, match="the unit column holds a dict"):
        unit_names({"user": [{"a": 1}]}, "user")
