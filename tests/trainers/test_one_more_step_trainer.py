"""OneMoreStepTrainer: its objective, what it logs, and the terminal prior that it saves with the module."""

import json
import math

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

from hfnoise import DiffusionTrainingArguments, OneMoreStep, OneMoreStepTrainer, OneMoreStepTrainingArguments, guide
from hfnoise.latents import ResidualStatistics
from hfnoise.latents.hf_time_free_unet import module_output, module_residuals, set_module_residuals
from hfnoise.trainers.diffusion_latents import encode_prompts
from hfnoise.worlds.digits_pipeline import new_digits_pipeline
from hfnoise.worlds.tiny_pipelines import FAMILIES
from tests.trainers.diffusion_world import assert_same_weights, losses, make_rows, new_scheduler, new_unet, weights
from tests.trainers.one_more_step_world import new_module, new_step_trainer

STATES = "encoder_hidden_states"
both_forms = pytest.mark.parametrize(
    "stock", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["time-free", "stock"]
)


def residuals_of(module, trainer, rows, batch=4):
    """Return x0 - x0_hat of rows at the noise of an evaluation, as sampling calls the module."""
    found = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        positions = list(range(start, start + len(part["latents"])))
        noise = trainer._draw(part, positions, 0, "eval").noise
        with torch.no_grad():
            found.append(part["latents"] + module_output(module, noise, part[STATES]))
    return torch.cat(found)


@both_forms
def test_the_answer_to_noise_is_minus_the_latents(tmp_path, stock):
    trainer = new_step_trainer(tmp_path, new_module(stock), max_steps=1)
    trainer.train()
    rows = make_rows()[:4]
    noise = trainer._draw(rows, [0, 1, 2, 3], 0, "train").noise
    with torch.no_grad():
        expected = (module_output(new_module(stock), noise, rows[STATES]) + rows["latents"]).square().mean()
    assert losses(trainer) == pytest.approx([float(expected)], rel=1e-4)
    assert not torch.equal(trainer.model.conv_in.weight, new_module(stock).conv_in.weight)


@both_forms
def test_the_saved_folder_starts_from_the_residuals_of_its_own_weights(tmp_path, stock):
    rows = make_rows(10)
    trainer = new_step_trainer(tmp_path, new_module(stock), eval_rows=rows, ema_decay=0.5, prompt_dropout=0.5)
    trainer.train()
    trainer.save_model(str(tmp_path / "pipeline" / "oms_module"))
    for place in ("pipeline", "pipeline/oms_module"):
        step = OneMoreStep.from_pretrained(tmp_path / place)
        assert type(step.module) is type(trainer.model)
        residuals = residuals_of(step.module, trainer, rows)
        # Of the averaged weights, which are what was saved.
        expected = ResidualStatistics.fit(residuals)
        found = step.prior.statistics
        torch.testing.assert_close(torch.tensor(found.mean), torch.tensor(expected.mean), rtol=1e-4, atol=1e-6)
        spread = torch.tensor(found.covariance)
        torch.testing.assert_close(spread, torch.tensor(expected.covariance), rtol=1e-4, atol=1e-6)
    metrics = trainer.evaluate()
    means = [one.flatten(2).mean(2).double().var(0).sum() for one in (residuals, rows[:]["latents"])]
    assert metrics["eval_low_frequency_r2"] == pytest.approx(float(1 - means[0] / means[1]), rel=1e-4)
    assert metrics["eval_loss"] != trainer.state.log_history[0]["loss"]
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "OneMoreStep.from_pretrained" in card and "Stock diffusers loads it" not in card
    assert '"YOUR-PIPELINE"' in card and f"diffusers {diffusers.__version__}" in card
    trainer.pipeline_name = "someone/pipeline"  # of a launcher
    trainer.create_model_card()
    named = (tmp_path / "README.md").read_text()
    assert 'from_pretrained("someone/pipeline", initial_noise=step)' in named and "base_model" not in named
    assert f"{found.covariance[0][0] ** 0.5:.3g}, " in card and f"{metrics['eval_low_frequency_r2']:.4f}" in card


def test_a_resumed_run_is_the_run_itself(tmp_path):
    settings = {
        "max_steps": 3, "save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": "random",
        "ema_decay": 0.9, "prompt_dropout": 0.3,
    }  # fmt: skip
    whole, resumed = (new_step_trainer(tmp_path, **settings) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 3
    assert_same_weights(weights(whole.model), weights(resumed.model))
    assert module_residuals(whole.model) == module_residuals(resumed.model) is not None
    with pytest.raises(ValueError, match="prompt_dropout: 0.3 there, 0.0 here"):
        new_step_trainer(tmp_path, ema_decay=0.9).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("stock", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_prior_above_the_mean(tmp_path, stock):
    rows = make_rows(10)
    trainer = new_step_trainer(tmp_path, new_module(stock), eval_rows=rows, max_steps=1, residual_frequencies=2)
    trainer.train()
    trainer.save_model()
    step = OneMoreStep.from_pretrained(tmp_path)
    residuals = residuals_of(step.module, trainer, rows)
    expected, found = ResidualStatistics.fit(residuals, frequencies=2), step.prior.statistics
    for one, other in zip((found, *found.spectra), (expected, *expected.spectra), strict=True):
        torch.testing.assert_close(torch.tensor(one.mean), torch.tensor(other.mean), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(torch.tensor(one.covariance), torch.tensor(other.covariance), rtol=1e-4, atol=1e-6)
    assert step.prior.statistics is found  # with its roots
    means = [one.flatten(2).mean(2).double().var(0).sum() for one in (residuals, rows[:]["latents"])]
    explained = trainer.evaluate()["eval_low_frequency_r2"]
    assert explained == pytest.approx(float(1 - means[0] / means[1]), rel=1e-4)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert f"0 half periods down and 1 across | {found.spectra[0].covariance[0][0] ** 0.5:.3g}, " in card


def test_latents_smaller_than_the_frequencies(tmp_path):
    with pytest.raises(ValueError, match=r"residual_frequencies is 9, and latents of the shape \(4, 8, 8\)"):
        new_step_trainer(tmp_path, residual_frequencies=9)
    stream = make_rows(8).to_iterable_dataset()
    trainer = new_step_trainer(tmp_path, rows=stream, max_steps=1, residual_frequencies=9)
    with pytest.raises(ValueError, match=r"residual_frequencies is 9, and latents of the shape \(4, 4, 8, 8\)"):
        trainer.train()


@pytest.mark.slow
def test_where_the_prior_is_measured(tmp_path):
    """At most so many rows, over the whole evaluation set, all of its parts; none at 0, and no old one stays."""
    trainer = new_step_trainer(tmp_path, eval_rows={"a": make_rows(6), "b": make_rows(5)}, residual_samples=4)
    assert list(trainer._measured_rows().indices) == [0, 2, 5, 8] and len(trainer._measured_rows().dataset) == 11
    streams = new_step_trainer(tmp_path, eval_rows=make_rows(6).to_iterable_dataset(), residual_samples=4)
    assert len(list(streams._measured_rows())) == 4
    assert streams.fit_residuals() == streams.fit_residuals(make_rows(6).select(range(4)))
    module = new_module()
    set_module_residuals(module, ResidualStatistics([0.0], [[1.0]]))
    trainer = new_step_trainer(tmp_path, module, max_steps=1, residual_samples=0)
    assert module_residuals(module) is not None  # a trainer that only evaluates leaves it alone
    trainer.train()
    trainer.save_model()
    assert module_residuals(module) is None and json.loads((tmp_path / "config.json").read_text())["residuals"] is None


@pytest.mark.slow
def test_latents_that_are_all_as_bright_have_no_share_to_explain(tmp_path):
    rows = make_rows(4, latents=torch.ones(4, 4, 8, 8).numpy())
    assert math.isnan(new_step_trainer(tmp_path, eval_rows=rows).evaluate()["eval_low_frequency_r2"])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' Euler scheduler
@pytest.mark.parametrize("family", ["digits", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_pipeline_starts_from_what_was_trained(tmp_path, family):
    if family == "digits":
        pipe, call = new_digits_pipeline(width=8), {"prompt": "seven", "output_type": "latent"}
        empty, beside = encode_prompts(pipe, [""]), {}
    else:
        pipe, call = FAMILIES[family].build(), FAMILIES[family].call(1)
        empty = {STATES: torch.zeros(1, 8, pipe.unet.config.cross_attention_dim)}
        beside = {"added_cond_kwargs.text_embeds": [[0.0]] * 6}  # as precompute_latents makes them for SDXL
        empty["added_cond_kwargs.text_embeds"] = torch.zeros(1, 1)
    shape = empty[STATES].shape[1:]
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(6, *shape, generator=generator).numpy()
    rows = make_rows(6, encoder_hidden_states=states, **beside)
    module = new_module(cross_attention_dim=shape[-1])
    settings = {"prompt_dropout": 0.5, "ema_decay": 0.5, "max_steps": 2}
    trainer = new_step_trainer(tmp_path, module, rows, rows, {"empty_prompt": empty}, **settings)
    trainer.train()
    trainer.save_model()
    step = OneMoreStep.from_pretrained(tmp_path)
    assert step.prior is not None
    images = []
    for start in (None, step):
        with guide(pipe, initial_noise=start):
            images.append(
                pipe(**call | {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 2}).images
            )
    stock, started = images
    assert started.isfinite().all() and not torch.equal(started, stock)


def test_what_is_refused(tmp_path):
    for error, message, options in (
        (TypeError, "one module serves every scheduler", {"scheduler": new_scheduler()}),
        (ValueError, "no config to carry the terminal prior", {"peft_config": LoraConfig(target_modules=["to_q"])}),
    ):
        with pytest.raises(error, match=message):
            new_step_trainer(tmp_path, options=options)
    with pytest.raises(TypeError, match="give OneMoreStepTrainingArguments"):
        OneMoreStepTrainer(new_module(), DiffusionTrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="class_embed_type, and sampling gives it noise and the prompt only"):
        new_step_trainer(tmp_path, new_unet(class_embed_type="timestep"))
    with pytest.raises(ValueError, match="makes 8 channels of 4"):
        new_step_trainer(tmp_path, new_module(out_channels=8))
    with pytest.raises(ValueError, match=r"columns \['timestep_cond'\]"):
        new_step_trainer(tmp_path, new_unet(), make_rows(timestep_cond=[[0.0]] * 16))
    with pytest.raises(ValueError, match="less than 2 rows"):
        new_step_trainer(tmp_path, eval_rows=make_rows(1))
    with pytest.raises(ValueError, match="a batch has no column encoder_hidden_states"):
        new_step_trainer(tmp_path).fit_residuals(make_rows().remove_columns("encoder_hidden_states"))
    with pytest.raises(ValueError, match="prompt_dropout is 0.1 and empty_prompt is missing"):
        args = OneMoreStepTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        OneMoreStepTrainer(new_module(), args, train_dataset=make_rows())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"snr_gamma": 5.0, "noise_offset": 0.1}, "'snr_gamma': 5.0, 'noise_offset': 0.1.*only ever shown white"),
        ({"residual_samples": 1}, "at least 2 rows"),
        ({"residual_samples": 2.5}, "whole number"),
        ({"residual_frequencies": 0}, "residual_frequencies is 0; give a whole number"),
        ({"residual_frequencies": 2, "residual_samples": 0}, "leaves out"),
        ({"batch_eval_metrics": True}, "of all rows"),
    ],
    ids=str,
)
def test_arguments_without_meaning_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        OneMoreStepTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **settings)


@pytest.mark.slow
def test_the_best_checkpoint_is_what_the_prior_is_of(tmp_path):
    settings = {
        "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_low_frequency_r2", "greater_is_better": True,
    }  # fmt: skip
    rows = make_rows(8)
    trainer = new_step_trainer(tmp_path, eval_rows=rows, **settings)
    trainer.train()
    best = UNet2DConditionModel.load_config(trainer.state.best_model_checkpoint)
    assert best["residuals"] is None
    module = type(trainer.model).from_pretrained(trainer.state.best_model_checkpoint)
    expected = ResidualStatistics.fit(residuals_of(module, trainer, rows))
    found = torch.tensor(module_residuals(trainer.model).covariance)
    torch.testing.assert_close(found, torch.tensor(expected.covariance), rtol=1e-4, atol=1e-6)
