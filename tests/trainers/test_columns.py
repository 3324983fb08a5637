"""Per-pair columns: flip rates, weights, annotators; and mixtures of losses."""

import pytest
import torch

from hfnoise import NoiseDPOConfig, NoiseDPOTrainer, register_pair_loss
from hfnoise.preference import pair_loss


def first_batch_loss(trainer):
    """Return the loss on the first pairs after one step, and their margins."""
    trainer.train()
    rows = trainer.train_dataset.select(range(4))
    margins = trainer.pair_margins(rows)
    loader = trainer.get_eval_dataloader(rows)
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(next(iter(loader))))
    return loss, margins


def test_a_column_of_equal_rates_is_one_rate(make_trainer, make_pairs, losses_of):
    pairs = make_pairs(16, rate=[0.2] * 16)
    for loss_type in ("robust", "forward_corrected", "cdpo"):
        one = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, pairs, loss_type=loss_type, flip_rate=0.2)
        column = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, pairs, loss_type=loss_type, flip_rate_column="rate")
        for trainer in (one, column):
            trainer.train()
        assert losses_of(column) == pytest.approx(losses_of(one), rel=1e-6)


def test_rates_and_weights_reach_their_pairs(make_trainer, make_pairs):
    rates, weights = [0.0, 0.1, 0.2, 0.3] * 4, [0.0, 2.0, 1.0, 0.5] * 4
    trainer = make_trainer(
        NoiseDPOTrainer, NoiseDPOConfig, make_pairs(16, rate=rates, weight=weights), loss_type=["robust", "hinge"],
        loss_weights=[1.0, 0.3], flip_rate_column="rate", sample_weight_column="weight",
    )  # fmt: skip
    loss, margins = first_batch_loss(trainer)
    values = pair_loss("robust", margins, torch.tensor(rates[:4])) + 0.3 * pair_loss("hinge", margins)
    assert loss.item() == pytest.approx((torch.tensor(weights[:4]) * values).mean().item(), rel=1e-5)


def test_mixture_of_ours_and_of_trl(make_trainer):
    trainer = make_trainer(
        NoiseDPOTrainer, NoiseDPOConfig, loss_type=["sigmoid", "sym"], loss_weights=[0.5, 2.0], max_steps=1
    )
    loss, margins = first_batch_loss(trainer)
    expected = 0.5 * pair_loss("sigmoid", margins).mean() + 2.0 * pair_loss("sym", margins).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_registered_loss_trains(make_trainer):
    seen = []

    def remember(margins, context):
        seen.append((context.mode, context.beta, context.chosen_lengths.tolist()))
        return torch.relu(1 - margins)

    register_pair_loss("test_remember", remember)
    trainer = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, loss_type="test_remember")
    loss, margins = first_batch_loss(trainer)
    assert loss.item() == pytest.approx(torch.relu(1 - margins).mean().item(), rel=1e-5)
    assert seen[0][:2] == ("train", 0.5) and seen[-1][0] == "eval"
    # Words of the answer, the last word, and the end of the sequence.
    assert all(length >= 3 for length in seen[0][2])


def test_annotators_are_logged(make_trainer, make_pairs):
    pairs = make_pairs(16, who=["ann", "bob"] * 8)
    trainer = make_trainer(
        NoiseDPOTrainer, NoiseDPOConfig, pairs, loss_type="sym", annotator_column="who", max_steps=12
    )
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    names = {name for name in last if name.startswith("noise/agreement/")}
    assert names <= {"noise/agreement/ann", "noise/agreement/bob"} and names
    assert all(0 <= last[name] <= 1 for name in names)


def test_noise_metrics(make_trainer):
    trainer = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, loss_type="forward_corrected", flip_rate=0.2)
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    # At the start every margin is 0: the posterior is the rate itself, and all pairs pull alike.
    assert first["noise/posterior_flip_mean"] == pytest.approx(0.2, abs=1e-6)
    assert first["noise/suspect_fraction"] == 0
    assert first["noise/effective_fraction"] == pytest.approx(1.0, abs=1e-6)
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last["noise/effective_fraction"] < 1
