"""Streaming datasets: neutral to the bit, per-pair columns, and no pair lost without a word."""

import math

import pytest
import torch
from datasets import IterableDataset
from trl import DPOConfig, DPOTrainer

from hfnoise import NoiseDPOConfig, NoiseDPOTrainer, RobustDPOConfig, RobustDPOTrainer
from hfnoise.preference import pair_loss


@pytest.fixture
def make_stream(make_pairs):
    """Return a function that makes a stream of pairs with some values changed."""

    def make(count=16, changes=None, **columns):
        rows = make_pairs(count, **columns).to_list()
        for row, values in (changes or {}).items():
            rows[row].update(values)
        return IterableDataset.from_generator(lambda: iter(rows))

    return make


def test_neutral_settings_equal_trl_to_the_bit(make_trainer, make_stream, losses_of):
    stock = make_trainer(DPOTrainer, DPOConfig, make_stream())
    ours = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, make_stream())
    for trainer in (stock, ours):
        trainer.train()
    assert losses_of(stock) == losses_of(ours) and len(set(losses_of(ours))) == 3
    weights = ours.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in stock.model.state_dict().items())


def test_columns_reach_their_pairs(make_trainer, make_stream, make_pairs, losses_of):
    rates, weights = [0.0, 0.1, 0.2, 0.3] * 4, [0.5, 2.0, 1.0, 0.5] * 4
    settings = {"loss_type": "robust", "flip_rate_column": "rate", "sample_weight_column": "weight", "max_steps": 2}
    trainer = make_trainer(
        NoiseDPOTrainer, NoiseDPOConfig, make_stream(rate=rates, weight=weights), learning_rate=0.05, **settings
    )
    trainer.train()
    margins = trainer.pair_margins(make_pairs(16))
    assert torch.equal(trainer.pair_margins(make_stream()), margins)
    expected = (torch.tensor(weights) * pair_loss("robust", margins, torch.tensor(rates))).mean().item()
    evaluation = trainer.evaluate(make_stream(rate=rates, weight=weights))
    assert evaluation["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_stream_of_held_out_pairs_gives_an_estimate(make_trainer, make_stream):
    trainer = make_trainer(RobustDPOTrainer, RobustDPOConfig, make_stream(), make_stream(8))
    trainer.train()
    assert trainer.flip_rate_estimate.count == 8 and trainer.flip_rate_estimate.refused
    with pytest.raises(ValueError, match="map-style dataset, got IterableDataset"):
        trainer.export_suspects(flip_rate=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({5: {"prompt": "fox " * 40}}, "a pair of the train dataset has a prompt that fills max_length=32.*'fox fox"),
        ({5: {"chosen": " a dog", "rejected": " a dog"}}, "has identical answers.*drop_invalid_pairs"),
        ({5: {"rate": 0.7}}, r"column 'rate' of a batch \(flip_rate_column\) must hold a flip rate.*: 0.7"),
        ({5: {"rate": None}}, "1 do not: row .: None"),
        ({5: {"rate": math.nan}}, "1 do not: row .: nan"),
    ],
)
def test_a_bad_pair_is_an_error_when_it_comes(make_trainer, make_stream, changes, message):
    # The first pair is looked at before training; TRL drops long prompts of a stream without a word.
    trainer = make_trainer(
        NoiseDPOTrainer, NoiseDPOConfig, make_stream(changes=changes, rate=[0.1] * 16), loss_type="robust",
        flip_rate_column="rate", max_steps=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_invalid_pairs_are_dropped_with_one_warning(make_trainer, make_stream, caplog):
    changes = {row: {"prompt": "fox " * 40} for row in (3, 5)} | {7: {"chosen": " a dog", "rejected": " a dog"}}
    trainer = make_trainer(
        NoiseDPOTrainer, NoiseDPOConfig, make_stream(changes=changes), loss_type="sym", drop_invalid_pairs=True
    )
    trainer.train()
    assert caplog.text.count("dropped, as all such pairs will be") == 1
    assert len(trainer.pair_margins(trainer.train_dataset)) == 13


def test_what_needs_all_rows_is_refused_at_construction(make_trainer, make_stream, make_pairs):
    who = ["ann", "bob"] * 8
    for pairs, held_out in [(make_stream(who=who), None), (make_pairs(16, who=who), make_stream(16, who=who))]:
        with pytest.raises(ValueError, match="annotator_column needs map-style datasets"):
            make_trainer(RobustDPOTrainer, RobustDPOConfig, pairs, held_out, annotator_column="who")
    with pytest.raises(ValueError, match="audit_column 'audit' must be a column of eval_dataset, a map-style one"):
        make_trainer(
            RobustDPOTrainer, RobustDPOConfig, None, make_stream(audit=[True] * 16), audit_column="audit"
        )  # fmt: skip
