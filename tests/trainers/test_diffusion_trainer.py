"""DiffusionTrainer computes what a loop written by hand with stock diffusers computes, however the batch is split."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from transformers import TrainerCallback

from hfnoise.latents import P2Weighting
from hfnoise.trainers.diffusion_noise import draw_training_noise
from tests.trainers.diffusion_world import (
    SHAPE,
    TOKENS,
    WIDTH,
    assert_same_weights,
    losses,
    make_rows,
    new_scheduler,
    new_trainer,
    new_unet,
    weights,
)


def by_hand(scheduler, rows, seed=3, steps=3, snr_gamma=None, noise_offset=0.0, input_perturbation=0.0):
    """Train as diffusers' train_text_to_image.py does, on the trainer's noise; return weights and losses."""
    unet, flow = new_unet(), isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-2, weight_decay=0)
    found = []
    for step in range(steps):
        batch = rows[4 * step : 4 * step + 4]
        latents = batch["latents"]
        draws = draw_training_noise(seed, step, [0, 1, 2, 3], SHAPE, perturbation=input_perturbation > 0)
        indices = (draws.level * 1000).long()
        noise = draws.noise + noise_offset * draws.offset
        seen = noise + input_perturbation * draws.perturbation if input_perturbation else noise
        timesteps = scheduler.timesteps[indices] if flow else indices
        kind = "flow" if flow else scheduler.config.prediction_type
        if flow:
            sigmas = scheduler.sigmas[indices].reshape(-1, 1, 1, 1)
            noisy, target = (1.0 - sigmas) * latents + sigmas * seen, noise - latents
        else:
            noisy = scheduler.add_noise(latents, seen, timesteps)
            target = {"epsilon": noise, "sample": latents}.get(kind)
            target = scheduler.get_velocity(latents, noise, timesteps) if target is None else target
        prediction = unet(noisy, timesteps, batch["encoder_hidden_states"]).sample
        if snr_gamma is None:
            loss = F.mse_loss(prediction, target)
        else:
            snr = compute_snr(scheduler, timesteps)
            weight = torch.stack([snr, snr_gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
            weight = weight / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[kind]
            loss = (F.mse_loss(prediction, target, reduction="none").mean(dim=[1, 2, 3]) * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        found.append(loss.item())
    return weights(unet), found


@pytest.mark.parametrize(
    ("scheduler", "settings", "exact"),
    [
        (new_scheduler(), {}, True),
        (new_scheduler("v_prediction"), {"noise_offset": 0.1, "input_perturbation": 0.2}, True),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), {}, True),
        pytest.param(new_scheduler("v_prediction"), {"snr_gamma": 5.0}, False, marks=pytest.mark.slow),
        pytest.param(new_scheduler("sample"), {"snr_gamma": 5.0}, False, marks=pytest.mark.slow),
    ],
    ids=["eps", "v, offset and perturbation", "flow", "v, min-SNR", "x0, min-SNR"],
)
def test_equal_to_a_loop_written_by_hand(tmp_path, scheduler, settings, exact):
    trainer = new_trainer(tmp_path, scheduler=scheduler, optim="adamw_torch", **settings)
    trainer.train()
    expected, found = by_hand(scheduler, make_rows(), **settings)
    # The SNR is computed in float64 here, in float32 there.
    tolerance = {} if exact else {"rtol": 1e-3, "atol": 1e-5}
    assert_same_weights(expected, weights(trainer.model), **tolerance)
    assert losses(trainer) == pytest.approx(found, abs=1e-4)
    assert not torch.equal(expected["conv_out.weight"], new_unet().conv_out.weight)


def test_accumulation_and_checkpointing_change_nothing_but_the_order_of_sums(tmp_path):
    runs = {}
    for name, settings in {
        "one batch": {},
        "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        "recomputed": {"activation_checkpointing": True},
    }.items():
        trainer = new_trainer(tmp_path, noise_offset=0.1, snr_gamma=5.0, max_steps=2, **settings)
        trainer.train()
        assert trainer.model.is_gradient_checkpointing is (name == "recomputed")
        runs[name] = weights(trainer.model)
    assert_same_weights(runs["one batch"], runs["recomputed"])
    assert_same_weights(runs["one batch"], runs["accumulated"], rtol=1e-3, atol=2e-4)  # Adam divides by small numbers


@pytest.mark.slow
def test_a_weighting_given_to_the_trainer(tmp_path):
    trainer = new_trainer(tmp_path, trainer_options={"loss_weighting": P2Weighting(2.0, 0.5)}, max_steps=1)
    named = new_trainer(tmp_path, loss_weighting="p2", loss_weighting_kwargs='{"k": 2.0, "gamma": 0.5}', max_steps=1)
    stock = new_trainer(tmp_path, max_steps=1)
    for one in (trainer, named, stock):
        one.train()
    assert losses(trainer) == losses(named) != losses(stock)


def test_dropped_prompts_depend_on_the_place_of_the_example(tmp_path):
    empty = {"encoder_hidden_states": torch.full((1, TOKENS, WIDTH), 7.0)}
    trainer = new_trainer(tmp_path, prompt_dropout=0.4, trainer_options={"empty_prompt": empty})
    inputs = {name: one for name, one in make_rows()[:16].items()}
    draws = trainer._draw(inputs, list(range(16)), 0, "train")
    states = trainer._with_dropped_prompts(inputs, draws)["encoder_hidden_states"]
    dropped = (states == 7).all(-1).all(-1)
    assert dropped.tolist() == (draws.dropout < 0.4).tolist() and 0 < dropped.sum() < 16
    assert torch.equal(states[~dropped], inputs["encoder_hidden_states"][~dropped])
    later = trainer._draw(inputs, list(range(8, 16)), 0, "train")
    assert torch.equal(later.dropout, draws.dropout[8:]) and torch.equal(later.noise, draws.noise[8:])
    trainer.train()


@pytest.mark.slow
def test_evaluation_has_the_same_noise_each_time_and_in_every_batch_size(tmp_path):
    trainer = new_trainer(tmp_path, eval_rows=make_rows(8))
    first = trainer.evaluate()["eval_loss"]
    trainer.state.global_step = 5
    assert trainer.evaluate()["eval_loss"] == first
    other = new_trainer(tmp_path, eval_rows=make_rows(8), per_device_eval_batch_size=2)
    assert other.evaluate()["eval_loss"] == pytest.approx(first, rel=1e-6)
    trainer.state.global_step = 0
    trainer.train()
    assert trainer.evaluate()["eval_loss"] != first


@pytest.mark.slow
def test_bf16_computes_the_loss_in_float32(tmp_path):
    seen = []

    class Recording(type(new_trainer(tmp_path))):
        def denoise(self, model, *args):
            with torch.no_grad():
                seen.append(torch.mm(torch.ones(1, 1), torch.ones(1, 1)).dtype)
            return super().denoise(model, *args)

    settings = {"per_device_train_batch_size": 4, "max_steps": 2}
    plain, half = (new_trainer(tmp_path, bf16=bf16, **settings) for bf16 in (False, True))
    half.__class__ = Recording
    plain.train()
    half.train()
    assert seen == [torch.float32] * 2  # autocast is around the model only
    assert {one.dtype for one in half.model.parameters()} == {torch.float32}
    assert losses(half) == pytest.approx(losses(plain), rel=0.02) and losses(half) != losses(plain)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    trainer = new_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.conv_out.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="the loss of step 0 is nan. The weights diverged: lower learning_rate"):
        trainer.train()


@pytest.mark.slow
def test_trackers_can_read_the_config(tmp_path):
    class Tracker(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            # TensorBoard's callback of transformers calls the first, MLflow's the second, wandb's the third.
            self.read = json.loads(model.config.to_json_string()), model.config.to_dict(), model.num_parameters()

    tracker = Tracker()
    trainer = new_trainer(tmp_path, trainer_options={"callbacks": [tracker]}, max_steps=1)
    trainer.train()
    text, settings, count = tracker.read
    assert settings["cross_attention_dim"] == WIDTH == text["cross_attention_dim"] and count > 1000
    trainer.save_model()
    assert UNet2DConditionModel.from_pretrained(tmp_path).config["in_channels"] == 4
