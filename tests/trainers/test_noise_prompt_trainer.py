"""NoisePromptTrainer learns changes of noise, by pairs and by a reward; the same for every split, resumed, saved."""

from __future__ import annotations

import datasets
import pytest
import torch

import hfnoise
from hfnoise.latents.hf_prompt_net import NoisePromptModel
from hfnoise.pipelines.few_step_reward import few_step_reward
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


def in_another_form(form, rows):
    if form == "subset":
        return torch.utils.data.Subset(rows, range(len(rows)))
    if form == "list":
        return [rows[index] for index in range(len(rows))]
    return datasets.Dataset.from_list(
        [{name: one.tolist() for name, one in rows[index].items()} for index in range(len(rows))]
    )


@pytest.mark.parametrize("form", ["subset", "list", "dataset"])
def test_margins_weigh_rows_of_any_form(tmp_path, form):
    rows = make_rows(8)
    other = in_another_form(form, rows)
    losses = [
        trainer.compute_loss(trainer.model, trainer.data_collator([rows[index] for index in range(4, 8)])).item()
        for trainer in (new_trainer(tmp_path, rows=given, min_margin=0.0) for given in (rows, other))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    with pytest.raises(ValueError, match="leaves none of 8 pairs"):
        new_trainer(tmp_path, rows=other, min_margin=2.0)


def test_mixed_precision(tmp_path):
    """Of the model's output accelerate makes a new one."""
    trainer = new_trainer(tmp_path, eval_rows=make_rows(4), bf16=True, max_steps=2)
    trainer.train()
    assert 0.0 < r2(trainer) < 1.0


def test_card_of_several_evaluations(tmp_path):
    trainer = new_trainer(tmp_path, eval_rows={"seen": make_rows(4), "new": make_rows(6)})
    trainer.evaluate()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "R² of the change (seen)" in card and "R² of the change (new)" in card


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


PROMPTS = ["the digit seven", "the digit two"]


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def test_reward_of_images_is_raised(tmp_path):
    pipe, prompts = new_digits_pipeline(width=8), PROMPTS
    reward = few_step_reward(pipe, brightness, prompts, num_inference_steps=1, guidance_scale=1.0)
    with pytest.raises(ValueError, match="no column prompt_index"):
        reward(torch.zeros(1, *SHAPE), {})
    net = NoisePromptModel(encoder_hid_dim=64, pooled_dim=8, pooling_heads=2, map_size=4, num_layers=0)
    trainer = new_trainer(
        tmp_path, net, PromptRows(pipe, prompts * 8, SHAPE), PromptRows(pipe, prompts, SHAPE), reward, loss="reward",
        delta_penalty=1e-4, max_steps=8, learning_rate=3e-2, logging_steps=8,
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.02


@pytest.mark.parametrize(
    "new_guider",
    [pytest.param(lambda: None, marks=pytest.mark.slow), lambda: hfnoise.ProjectedGuidance(eta=0.0)],
    ids=["plain", "projected"],
)
def test_reward_is_that_of_the_pipeline_and_its_gradient(new_guider):
    """The guider's own images, whatever is in the slot, by differences; a negative prompt of all."""
    pipe = new_digits_pipeline(width=8)
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "negative_prompt": "a digit"}
    noise, way = (torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    columns = {"prompt_index": torch.tensor([1, 0])}
    with hfnoise.guide(pipe, new_guider(), initial_noise=hfnoise.SeedVariation(0.5, seed=1)):
        reward = few_step_reward(pipe, brightness, PROMPTS, **call)
    with hfnoise.guide(pipe, new_guider()):
        words = {**call, "negative_prompt": ["a digit"] * 2, "output_type": "pt"}
        images = pipe(PROMPTS[::-1], latents=noise, **words).images
    torch.testing.assert_close(reward(noise, columns).detach(), brightness(images, None), rtol=1e-5, atol=1e-6)
    start = noise.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(start, columns).sum(), start)
    size = 1e-3
    after, before = (reward(noise + sign * size * way, columns).double().sum().item() for sign in (1, -1))
    # Single precision leaves four digits of a difference of this size.
    assert (after - before) / (2 * size) == pytest.approx(float((gradient * way).sum()), rel=2e-2, abs=1e-4)


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
        ({"delta_penalty": None}, "delta_penalty must be a finite number, got None"),
        ({"gradient_checkpointing": True}, "are small and have none"),
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
    with pytest.raises(ValueError, match="NoisePairRows makes them from pairs, with margins"):
        new_trainer(tmp_path, eval_rows=make_rows(scored=False), min_margin=0.0)
    with pytest.raises(ValueError, match="the mean of a stream is not known"):
        new_trainer(tmp_path, rows=make_pairs().to_iterable_dataset(), min_margin=0.0)
    with pytest.raises(ValueError, match=r"first row of train_dataset: .* text states of shape \(1, tokens, 7\)"):
        new_trainer(tmp_path, NoisePromptModel(encoder_hid_dim=7, pooled_dim=8))
    with pytest.raises(ValueError, match=r"first row of eval_dataset: delta is of shape \(1, 1, 8, 8\)"):
        new_trainer(tmp_path, eval_rows=[{**make_rows(1)[0], "delta": torch.zeros(1, 8, 8)}])
    with pytest.raises(ValueError, match="leaves none of 24 pairs"):
        new_trainer(tmp_path, min_margin=2.0)
    with pytest.raises(ValueError, match="collect_noise_pairs makes them"):
        NoisePairRows(datasets.Dataset.from_dict({"prompt": ["zero"]}), make_states())
    with pytest.raises(ValueError, match="no text states of"):
        NoisePairRows(make_pairs(), {})
    with pytest.raises(ValueError, match="does not depend on the noise"):
        new_trainer(tmp_path, loss="reward", reward=lambda noise, _: torch.zeros(len(noise))).train()
