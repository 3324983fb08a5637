"""RobustDPOTrainer: the loss it chooses, the rate it estimates, the suspects it exports, the card it writes."""

import pytest
import torch
from huggingface_hub import ModelCard

from hfnoise import NoiseDPOTrainer, RobustDPOConfig, RobustDPOTrainer
from hfnoise.preference import flip_labels, posterior_flip


@pytest.fixture
def learnable(make_pairs):
    """Return pairs whose better answer ends in 'fox', with a share of labels flipped."""
    return lambda count, rate, seed: flip_labels(make_pairs(count, seed=seed), rate, seed=0)


@pytest.mark.parametrize(("flip_rate", "loss_type"), [("auto", ["sym"]), (0.2, ["robust"]), (0.0, ["robust"])])
def test_the_rate_decides_the_loss(cpu_arguments, flip_rate, loss_type):
    config = RobustDPOConfig(**cpu_arguments, flip_rate=flip_rate)
    assert config.loss_type == loss_type and config.flip_rate == flip_rate


def test_rate_and_suspects(make_trainer, learnable):
    train, held_out = learnable(200, 0.25, 1), learnable(300, 0.25, 2)
    trainer = make_trainer(
        RobustDPOTrainer, RobustDPOConfig, train, held_out, max_steps=60, per_device_train_batch_size=16,
        per_device_eval_batch_size=64, logging_steps=20,
    )  # fmt: skip
    trainer.train()
    estimate, truth = trainer.flip_rate_estimate, sum(held_out["flipped"]) / len(held_out)
    assert not estimate.refused
    assert estimate.flip_rate == pytest.approx(truth, abs=0.05)
    assert estimate.interval[0] <= truth <= estimate.interval[1]
    logged = next(entry for entry in trainer.state.log_history if any("flip_rate_estimate" in name for name in entry))
    assert estimate.flip_rate in logged.values()

    suspects = trainer.export_suspects()
    assert set(suspects.column_names) == {"prompt", "chosen", "rejected", "flipped", "margin", "p_flip"}
    assert suspects["prompt"] == train["prompt"]
    flagged = [p > 0.5 for p in suspects["p_flip"]]
    assert sum(a == b for a, b in zip(flagged, train["flipped"], strict=True)) / len(train) > 0.9
    margins = trainer.pair_margins(train)
    expected = posterior_flip(margins.double(), estimate.flip_rate, scale=estimate.scale)
    assert suspects["p_flip"] == pytest.approx(expected.tolist())


def test_margins_come_in_the_order_of_the_rows(make_trainer, make_pairs):
    trainer = make_trainer(RobustDPOTrainer, RobustDPOConfig, max_steps=2)
    trainer.train()
    pairs = make_pairs(10, seed=7)
    margins = trainer.pair_margins(pairs)
    backwards = trainer.pair_margins(pairs.select(range(9, -1, -1)))
    torch.testing.assert_close(margins, backwards.flip(0), rtol=1e-5, atol=1e-6)
    assert margins.shape == (10,) and margins.abs().sum() > 0


def test_without_held_out_pairs_it_warns_and_refuses_to_guess(make_trainer, caplog):
    trainer = make_trainer(RobustDPOTrainer, RobustDPOConfig)
    assert "got no eval_dataset" in caplog.text
    trainer.train()
    assert trainer.flip_rate_estimate is None
    with pytest.raises(ValueError, match="none was estimated: pass an eval_dataset .* or pass flip_rate to export"):
        trainer.export_suspects()
    assert len(trainer.export_suspects(flip_rate=0.2)) == 16
    with pytest.raises(ValueError, match="no held-out pairs"):
        trainer.estimate_flip_rate()


def test_an_estimate_from_few_pairs_is_refused_and_suspects_are_still_ranked(make_trainer, make_pairs, caplog):
    train = make_pairs(16, margin=[0.0] * 16)
    trainer = make_trainer(RobustDPOTrainer, RobustDPOConfig, train, make_pairs(8, seed=1))
    with pytest.raises(ValueError, match="none was estimated: train, "):
        trainer.export_suspects()
    trainer.train()
    estimate = trainer.flip_rate_estimate
    assert estimate.refused
    suspects = trainer.export_suspects()
    low, high = estimate.interval
    assert f"the interval from {low:.2f} to {high:.2f}" in caplog.text and "level means nothing" in caplog.text
    margins = trainer.pair_margins(train)
    assert suspects["margin"] == pytest.approx(margins.tolist())  # not the zeros of the dataset
    expected = posterior_flip(margins.double(), min(max((low + high) / 2, 0.01), 0.45), scale=estimate.scale)
    assert suspects["p_flip"] == pytest.approx(expected.tolist())
    by_p_flip = sorted(suspects, key=lambda row: -row["p_flip"])
    assert [row["margin"] for row in by_p_flip] == sorted(margins.tolist())
    card = ModelCard(card_of(trainer))
    assert card.data.to_dict()["hfnoise"]["flip_rate_refused"] is True


def test_audited_pairs_are_preferred(make_trainer, make_pairs):
    audit = [True] * 20 + [False] * 80 + [None] * 20
    trainer = make_trainer(RobustDPOTrainer, RobustDPOConfig, None, make_pairs(120, audit=audit), audit_column="audit")
    trainer.train()
    estimate = trainer.flip_rate_estimate
    assert (estimate.method, estimate.count, estimate.flip_rate) == ("audit", 100, 0.2)


@pytest.mark.slow
def test_annotators_get_a_rate_each(make_trainer, make_pairs):
    def noisy(count, seed):
        who = ["careful", "careless"] * (count // 2)
        pairs = make_pairs(count, seed=seed, who=who)
        flipped = flip_labels(pairs, 0.4, seed=0)

        def only_careless(row, number):
            return {} if row["who"] == "careless" else {**pairs[number], "flipped": False}

        return flipped.map(only_careless, with_indices=True)

    trainer = make_trainer(
        RobustDPOTrainer, RobustDPOConfig, noisy(200, 1), noisy(400, 2), annotator_column="who", max_steps=60,
        per_device_train_batch_size=16, per_device_eval_batch_size=64, logging_steps=20,
    )  # fmt: skip
    trainer.train()
    rates = {name: estimate.flip_rate for name, estimate in trainer.flip_rate_by_annotator.items()}
    assert rates["careful"] < 0.1 and 0.25 < rates["careless"] < 0.5
    assert len(trainer.export_suspects()) == 200


def card_of(trainer):
    trainer.create_model_card("tiny-robust")
    with open(f"{trainer.args.output_dir}/README.md", encoding="utf-8") as file:
        return file.read()


@pytest.mark.parametrize(("trainer_class", "flip_rate"), [(RobustDPOTrainer, "auto"), (RobustDPOTrainer, 0.2)])
def test_card(make_trainer, learnable, trainer_class, flip_rate):
    trainer = make_trainer(
        trainer_class, RobustDPOConfig, learnable(64, 0.2, 1), learnable(160, 0.2, 2), flip_rate=flip_rate,
        max_steps=20, per_device_train_batch_size=16, per_device_eval_batch_size=64,
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    text = card_of(trainer)
    assert "None" not in text and "More Information Needed" not in text
    card = ModelCard(text)
    assert card.data.library_name == "transformers" and {"hfnoise", "robust-dpo", "dpo"} <= set(card.data.tags)
    block = card.data.to_dict()["hfnoise"]
    assert block["method"] == "robust-dpo" and block["flip_rate"] == flip_rate
    assert block["flip_rate_estimate"] == round(trainer.flip_rate_estimate.flip_rate, 4)
    assert "2403.00409" in text and "| seed | 3 |" in text and "rewards/accuracies" in text
    assert f'from_pretrained("{trainer.args.output_dir}")' in text  # not pushed: the folder, not a name
    assert "inject_flip_rate" not in text


def test_neutral_trainer_card(make_trainer):
    from hfnoise import NoiseDPOConfig

    trainer = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, loss_type=["sigmoid", "holder"], loss_weights=[1, 1])
    text = card_of(trainer)
    assert "None" not in text and "`sigmoid` + `holder`" in text
