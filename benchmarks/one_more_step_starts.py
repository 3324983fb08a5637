"""Where sampling in the brightness world can start: our starts, those of official code, and what bounds them."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import PrinterCallback

from hfnoise import OneMoreStepTrainer, OneMoreStepTrainingArguments
from hfnoise.latents import ResidualStatistics, estimated_x0, one_more_step
from hfnoise.latents.hf_time_free_unet import TimeFreeUNet2DConditionModel, module_output
from hfnoise.pipelines import InitialNoise, OneMoreStep, StartEstimate, StartState, TerminalPrior
from hfnoise.pipelines.start_estimate import Estimate, add_noise
from hfnoise.worlds.brightness import (
    CHANNELS,
    SPREAD,
    ExactMean,
    brightness_rows,
    empty_states,
    new_brightness_module,
)

WHITE, ARITHMETIC, OMS, MATCHED = "white noise", "official arithmetic", "One More Step", "with terminal prior"
OFFICIAL, SING = "code of One More Step", "code of SingDiffusion"
EXACT, EXACT_MATCHED, LIMIT = "exact mean", "exact mean with terminal prior", "noised data"
_BATCH, _MEASURED = 16, 1024


def train_module(steps: int, seed: int) -> tuple[TimeFreeUNet2DConditionModel, float]:
    """Train a small module at 16 x 16 with [`OneMoreStepTrainer`], as examples/one_more_step/brightness.py does.

    Args:
        steps (`int`): of training.
        seed (`int`): of weights, data and noise.

    Returns:
        The module as it is saved, with its terminal prior, and its low-frequency R^2 on the rows that that was fitted
        on, which it was not trained on.
    """
    generator = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        args = OneMoreStepTrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=_BATCH, per_device_eval_batch_size=128,
            learning_rate=4e-3, lr_scheduler_type="cosine", warmup_steps=steps // 10, save_strategy="no",
            logging_strategy="no", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, seed=seed,
        )  # fmt: skip
        trainer = OneMoreStepTrainer(
            new_brightness_module(seed),
            args,
            train_dataset=brightness_rows(steps * _BATCH, generator),
            eval_dataset=brightness_rows(_MEASURED, generator),
            empty_prompt={"encoder_hidden_states": empty_states(1)},
        )
        trainer.remove_callback(PrinterCallback)  # with its bar disabled, the Trainer prints every log entry instead
        trainer.train()
        explained = trainer.evaluate()["eval_low_frequency_r2"]
        trainer.save_model()
        module = TimeFreeUNet2DConditionModel.from_pretrained(folder, low_cpu_mem_usage=False)
    return module.eval().requires_grad_(False), explained


class OfficialCode(InitialNoise):
    """What the released code of One More Step makes the start, from its description in words.

    The network is given the pipeline's noise, already times `init_noise_sigma`: 11 and more with Euler, for noise of
    standard deviation 1 in training. New noise is multiplied by its variance; the stock pipeline then multiplies the
    start by `init_noise_sigma` again. With schedulers whose `init_noise_sigma` is 1 only the variance is left of this.
    """

    space = "scheduler"

    def __init__(self, module: Any) -> None:
        self.module = module

    def refine(self, unit_noise: torch.Tensor, context: Any) -> StartState:
        """Return that start."""
        scheduler = context.scheduler
        sigma = float(scheduler.init_noise_sigma)
        power = float(scheduler.alphas_cumprod[int(context.timesteps[0])])
        with torch.no_grad():
            v = module_output(self.module, unit_noise * sigma, context.prompt_embeds)
        start = one_more_step(v, context.normal(*unit_noise.shape[1:]), power, compat="official")
        return StartState(start * sigma, self.space, 1)


class SingDiffusionCode(InitialNoise):
    """What SingDiffusion's code (arXiv 2403.08381) makes the start, without guidance, from its description in words.

    The scheduler's `add_noise` at the estimate, as ours; but the pipeline multiplies that by `init_noise_sigma`.
    """

    space = "scheduler"

    def __init__(self, module: Any) -> None:
        self.module = module

    def refine(self, unit_noise: torch.Tensor, context: Any) -> StartState:
        """Return that start."""
        with torch.no_grad():
            x0 = estimated_x0(module_output(self.module, unit_noise, context.prompt_embeds))
        start = add_noise(context.scheduler, x0, unit_noise, context.timesteps[:1])
        return StartState(start * float(context.scheduler.init_noise_sigma), self.space, 1)


class NoisedData(StartEstimate):
    """The start of training itself: images with noise on them."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def estimate(self, noise: torch.Tensor, context: Any) -> Estimate:
        """Return the images."""
        return Estimate(self.images, noise)


def starts(module: Any, images: torch.Tensor) -> dict[str, InitialNoise | None]:
    """Return every start by name; `images` are noised for the limit."""
    exact = ExactMean()
    within = TerminalPrior(ResidualStatistics([0.0] * CHANNELS, [[SPREAD**2] * CHANNELS] * CHANNELS))
    return {
        WHITE: None,
        OFFICIAL: OfficialCode(module),
        SING: SingDiffusionCode(module),
        ARITHMETIC: OneMoreStep(module, compat="official", terminal_prior=False),
        OMS: OneMoreStep(module, terminal_prior=False),
        MATCHED: OneMoreStep(module),
        EXACT: OneMoreStep(exact),
        EXACT_MATCHED: OneMoreStep(exact, terminal_prior=within),
        LIMIT: NoisedData(images),
    }
