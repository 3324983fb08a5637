"""NoisePromptTrainer learns changes of noise, by pairs and by a reward; the same for every split, resumed, saved."""

from __future__ import annotations

import datasets
import pytest
import torch

from hfnoise.latents.hf_prompt_net import NoisePromptModel
from hfnoise.trainers.noise_prompt_arguments import NoisePromptTrainingArguments
from hfnoise.trainers.noise_prompt_rows import NoisePairRows, PromptRows
from hfnoise.worlds.digits_pipeline import new_digits_pipeline
from tests.trainers.diffusion_world import new_unet, weights
from tests.trainers.noise_prompt_world import SHAPE, make_pairs, make_rows, make_states, new_net, new_trainer


def r2(trainer):
    return trainer.evaluate()["eval_delta_r2"]


@pytest.mark.slow
def test_learns_what_the_prompt_and_the_noise_say(tmp_path):
    train, held_out = make_rows(96).split(0.25)
    trainer = new_trainer(
        tmp_path, rows=train, eval_rows=held_out, max_steps=60, learning_rate=1e-2, per_device_train_batch_size=16,
        logging_steps=60,
    )  # fmt: skip
    assert r2(trainer) == 0.0  # the identity changes nothing
    trainer.train()
    assert r2(trainer) > 0.9


def test_the_loss_is_the_mean_squared_error_of_the_change(tmp_path):
    rows = make_rows(4)
    trainer = new_trainer(tmp_path, rows=rows)
    batch = trainer.data_collator([rows[index] for index in range(4)])
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(float(batch["delta"].square().mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({"min_margin": 0.0}, lambda margin: margin > 0),
        ({"margin_temperature": 0.5}, lambda margin: (margin / 0.5).sigmoid()),
    ],
)
def test_margins_weigh_pairs_with_mean_one(tmp_path, settings, counts):
    rows = make_rows(8)
    trainer = new_trainer(tmp_path, rows=rows, **settings)
    batch = trainer.data_collator([rows[index] for index in range(8)])
    expected = counts(batch["margin"]).float()
    errors = batch["delta"].square().flatten(1).mean(1)
    wanted = (errors * expected / expected.mean()).mean()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(float(wanted), rel=1e-5)


def test_accumulation_changes_nothing(tmp_path):
    models = []
    for number, (size, steps) in enumerate([(4, 1), (2, 2)]):
        trainer = new_trainer(
            tmp_path / str(number), new_net(), per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            learning_rate=1e-3,
        )  # fmt: skip
        trainer.train()
        models.append(weights(trainer.model))
    for name, value in models[0].items():
        # Sums in another order.
        torch.testing.assert_close(value, models[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ema_decay", [pytest.param(None, marks=pytest.mark.slow), 0.9])
def test_a_resumed_run_is_the_whole_one_to_the_bit(tmp_path, ema_decay):
    whole = new_trainer(tmp_path / "whole", max_steps=4, ema_decay=ema_decay)
    whole.train()
    begun = new_trainer(tmp_path / "begun", max_steps=4, save_strategy="steps", save_steps=2, ema_decay=ema_decay)
    begun.train()
    resumed = new_trainer(tmp_path / "resumed", new_net(1), max_steps=4, ema_decay=ema_decay)
    resumed.train(resume_from_checkpoint=str(tmp_path / "begun" / "checkpoint-2"))
    for name, value in weights(whole.model).items():
        assert torch.equal(value, weights(resumed.model)[name]), name


def test_saved_network_is_the_trained_one(tmp_path):
    trainer = new_trainer(tmp_path, learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    loaded = NoisePromptModel.from_pretrained(tmp_path)
    row = make_rows(1)[0]
    noise, states = row["latents"][None], row["prompt_embeds"][None]
    assert torch.equal(loaded(noise, states).noise, trainer.model.eval()(noise, states).noise)
    assert not torch.equal(loaded(noise, states).noise, noise)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "24 pairs of 3 prompts" in card and "GoldenNoisePipeline" in card and "None" not in card


def test_reward_of_images_is_raised(tmp_path):
    from hfnoise.pipelines.few_step_reward import few_step_reward

    pipe = new_digits_pipeline(width=8)
    prompts = ["the digit seven", "the digit two"]
    reward = few_step_reward(
        pipe, lambda images, prompts: images.mean((1, 2, 3)), prompts, num_inference_steps=1, guidance_scale=1.0
    )
    net = NoisePromptModel(encoder_hid_dim=64, pooled_dim=8, pooling_heads=2, map_size=4, num_layers=0)
    trainer = new_trainer(
        tmp_path, net, PromptRows(pipe, prompts * 8, SHAPE), PromptRows(pipe, prompts, SHAPE), reward, loss="reward",
        delta_penalty=1e-4, max_steps=8, learning_rate=3e-2, logging_steps=8,
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.02


def test_splits_hold_every_pair_once():
    train, held_out = make_rows(25).split(0.2)
    assert sorted([*train.pairs["seed"], *held_out.pairs["seed"]]) == list(make_pairs(25)["seed"])
    assert set(held_out.pairs["prompt"]) == set(train.pairs["prompt"])


def test_diagnosis_of_known_pairs():
    found = make_rows(96).diagnose()
    assert (found.pairs, found.prompts) == (96, 3)
    assert 0.8 < found.prompt_share < 1.0  # the rest is a tenth of the noise
    assert found.low_frequency_share > 0.8  # the map of a prompt is constant


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "mse"}, "choose pairs or reward"),
        ({"min_margin": 0.0, "margin_temperature": 1.0}, "one of the two"),
        ({"margin_temperature": 0.0}, "above 0"),
        ({"delta_penalty": -1.0}, "at least 0"),
        ({"loss": "reward", "min_margin": 0.0}, "has none"),
        ({"prompt_dropout": 0.1}, "never used without a prompt"),
        ({"snr_gamma": 5.0}, "no noise levels"),
    ],
)
def test_arguments_out_of_range(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        NoisePromptTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_what_cannot_be_trained(tmp_path):
    with pytest.raises(TypeError, match="give a network of golden noise"):
        new_trainer(tmp_path, new_unet())
    with pytest.raises(TypeError, match="reward is None"):
        new_trainer(tmp_path, loss="reward")
    with pytest.raises(ValueError, match="no column margin"):
        new_trainer(tmp_path, rows=make_rows(scored=False), min_margin=0.0)
    with pytest.raises(ValueError, match="leaves none of 24 pairs"):
        new_trainer(tmp_path, min_margin=2.0)
    with pytest.raises(ValueError, match="collect_noise_pairs makes them"):
        NoisePairRows(datasets.Dataset.from_dict({"prompt": ["zero"]}), make_states())
    with pytest.raises(ValueError, match="no text states of"):
        NoisePairRows(make_pairs(), {})
    with pytest.raises(ValueError, match="does not depend on the noise"):
        new_trainer(tmp_path, loss="reward", reward=lambda noise, _: torch.zeros(len(noise))).train()
