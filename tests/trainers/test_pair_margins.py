"""Margins belong to their rows under every way to load data, and to the reference they are said to."""

import pytest
import torch
from peft import LoraConfig

from hfnoise import NoiseDPOConfig, NoiseDPOTrainer, RobustDPOConfig, RobustDPOTrainer


@pytest.mark.parametrize(
    "settings",
    [
        {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False},
        {"dataloader_drop_last": True},
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
        {"per_device_eval_batch_size": 3},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_loading_does_not_reorder_or_drop_rows(make_trainer, make_pairs, settings):
    pairs, held_out = make_pairs(10, seed=7, length=list(range(10))), make_pairs(8, seed=8, length=list(range(8)))
    plain = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, loss_type="sym", max_steps=2)
    plain.train()
    expected = plain.pair_margins(pairs)
    assert expected.shape == (10,) and len(set(expected.tolist())) == 10

    trainer = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, None, held_out, loss_type="sym", **settings)
    trainer.model.load_state_dict(plain.model.state_dict())
    trainer.evaluate()  # its loader may be kept for later evaluations
    # Other batches pad rows to other lengths, which moves the last bits of float32.
    torch.testing.assert_close(trainer.pair_margins(pairs), expected, rtol=1e-4, atol=1e-5)
    for loader in getattr(trainer, "_eval_dataloaders", {}).values():  # else garbage collection waits for workers
        loader.base_dataloader._iterator._shutdown_workers()


def test_new_pairs_are_not_compared_with_the_trained_policy(make_trainer, make_pairs):
    settings = {"loss_type": "sym", "precompute_ref_log_probs": True}
    trainer = make_trainer(NoiseDPOTrainer, NoiseDPOConfig, **settings)
    assert trainer.pair_margins(make_pairs(4, seed=9)).abs().max() == 0  # before training the policy is the reference
    trainer.train()
    assert trainer.pair_margins(trainer.train_dataset).abs().max() > 0
    with pytest.raises(ValueError, match="reference model is gone.*precompute_ref_log_probs=False"):
        trainer.pair_margins(make_pairs(4, seed=9))
    # Without its adapter the model is the reference, for ever.
    adapted = make_trainer(
        NoiseDPOTrainer, NoiseDPOConfig, peft_config=LoraConfig(r=2, target_modules=["q_proj"]), learning_rate=0.1,
        **settings,
    )  # fmt: skip
    adapted.train()
    margins = adapted.pair_margins(make_pairs(4, seed=9))
    assert margins.abs().min() > 0
    evaluation = adapted.evaluate(make_pairs(4, seed=9))
    assert evaluation["eval_rewards/margins"] == pytest.approx(margins.mean().item(), rel=1e-5)


def with_rows(pairs, changes):
    return pairs.map(lambda row, number: changes.get(number, {}), with_indices=True)


def test_dropped_rows_leave_the_others_at_their_place(make_trainer, make_pairs):
    changes = {2: {"prompt": "fox " * 40}, 5: {"chosen": " a dog", "rejected": " a dog"}}
    pairs = with_rows(make_pairs(12, who=["ann", "bob", "cat"] * 4), changes)
    trainer = make_trainer(
        RobustDPOTrainer, RobustDPOConfig, pairs, pairs, drop_invalid_pairs=True, annotator_column="who"
    )
    trainer.train()
    kept = [row for row in range(12) if row not in changes]
    for suspects in (trainer.export_suspects(flip_rate=0.2), trainer.export_suspects(pairs, flip_rate=0.2)):
        for column in ("prompt", "chosen", "rejected", "who"):  # as given: TRL glues a token to the answers
            assert suspects[column] == pairs.select(kept)[column]
    assert trainer.flip_rate_by_annotator["cat"].count == 2
    assert trainer.flip_rate_by_annotator["ann"].count == 4


def test_a_column_of_the_user_is_never_taken_for_ours(make_trainer, make_pairs, losses_of):
    runs = []
    for columns in ({}, {"pair_index": ["a", "b"] * 8, "hfnoise_pair_index": [7] * 16}):
        pairs = make_pairs(16, **columns)
        trainer = make_trainer(RobustDPOTrainer, RobustDPOConfig, pairs)
        assert list(trainer.train_dataset["hfnoise_pair_index"]) == list(range(16))
        trainer.train()
        runs.append((losses_of(trainer), trainer.export_suspects(flip_rate=0.2)))
    assert runs[0][0] == runs[1][0]
    assert runs[1][1]["p_flip"] == runs[0][1]["p_flip"] and runs[1][1]["pair_index"] == ["a", "b"] * 8


def test_audit_column_is_checked_before_training(make_trainer, make_pairs):
    for held_out, message in [
        (make_pairs(8), "'audit' must be a column of eval_dataset"),
        (None, "'audit' must be a column of eval_dataset"),
        (make_pairs(8, audit=[None] * 8), "not nothing in every row"),
        (make_pairs(8, audit=["False"] * 8), r"true, false or nothing.*\['False'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_trainer(RobustDPOTrainer, RobustDPOConfig, None, held_out, audit_column="audit")


def test_a_failed_estimate_does_not_lose_the_run(make_trainer, make_pairs, caplog):
    trainer = make_trainer(RobustDPOTrainer, RobustDPOConfig, None, make_pairs(8, seed=1), max_steps=1)
    trainer.train()
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError):
        trainer.estimate_flip_rate()
    trainer.args.on_nan_log_probs = trainer._monitor.on_nan = "skip"
    trainer.train()
    assert "8 of 8 held-out margins are not finite" in caplog.text and "was not estimated" in caplog.text
