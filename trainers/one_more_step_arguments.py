"""Arguments of [`OneMoreStepTrainer`]: those of [`DiffusionTrainer`] that mean something without noise levels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hfnoise.latents.residuals import check_frequencies
from hfnoise.latents_options import ONE_MORE_STEP_OPTIONS
from hfnoise.option_types import check_option_types
from hfnoise.options import option_default, option_help
from hfnoise.trainers.diffusion_arguments import DiffusionTrainingArguments

# What is said about noise levels, or changes the noise: the module is only ever shown white noise.
WITHOUT_NOISE_LEVELS = {
    "snr_gamma": None,
    "loss_weighting": "uniform",
    "loss_weighting_kwargs": None,
    "noise_offset": 0.0,
    "input_perturbation": 0.0,
    "timestep_sampling": "uniform",
}


def _field(name: str) -> Any:
    help = option_help(ONE_MORE_STEP_OPTIONS, name)
    return field(default=option_default(ONE_MORE_STEP_OPTIONS, name), metadata={"help": help})


@dataclass
class OneMoreStepTrainingArguments(DiffusionTrainingArguments):
    """Arguments of [`OneMoreStepTrainer`]: every field of [`DiffusionTrainingArguments`], and two more.

    The defaults of `learning_rate` (1e-4), `weight_decay` (1e-2), `prompt_dropout` (0.1) and `ema_decay` (0.999)
    differ. They are ours: the training of One More Step (arXiv 2311.15744) has not been published. An effective batch
    of 256 or more helps, since a single image says little about the mean of the images of its prompt.

    Args:
        prompt_dropout (`float`, defaults to `0.1`): as in [`DiffusionTrainingArguments`]; 0 for a module that is never
            used with a `guidance_scale` of its own.
        ema_decay (`float`, *optional*, defaults to `0.999`): as in [`DiffusionTrainingArguments`].
        residual_samples (`int`, defaults to `4096`): rows that the terminal prior is fitted on after training, spread
            over the evaluation set, or else over the training set; 0 for no prior, else at least 2. The spread comes
            out to 1 / sqrt(2 residual_samples) of itself, 1 % at the default.
        residual_frequencies (`int`, defaults to `1`): along each side of the image, of which the terminal prior keeps
            mean and covariance; 1 is the channel means only, 2 adds light that falls from one side. Ours, as the
            prior is.

    Raises:
        ValueError: for a value out of range, and for settings of noise levels.

    Example:
        >>> from hfnoise import OneMoreStepTrainingArguments
        >>> OneMoreStepTrainingArguments(output_dir="run", use_cpu=True).prompt_dropout
        0.1
    """

    learning_rate: float = _field("learning_rate")
    weight_decay: float = _field("weight_decay")
    prompt_dropout: float = _field("prompt_dropout")
    ema_decay: float | None = _field("ema_decay")
    residual_samples: int = _field("residual_samples")
    residual_frequencies: int = _field("residual_frequencies")

    def __post_init__(self) -> None:
        check_option_types(self, OneMoreStepTrainingArguments)
        given = {
            name: getattr(self, name) for name, value in WITHOUT_NOISE_LEVELS.items() if getattr(self, name) != value
        }
        if given:
            raise ValueError(
                f"{given}: One More Step has no noise levels to choose or to weigh, and its module is only ever shown "
                "white noise. Leave them out."
            )
        if self.batch_eval_metrics:
            raise ValueError("batch_eval_metrics must be False: a variance is of all rows and not of one batch.")
        if self.residual_samples < 0 or self.residual_samples == 1:
            raise ValueError(
                f"residual_samples is {self.residual_samples}; a covariance needs at least 2 rows, and 0 is no prior."
            )
        check_frequencies(self.residual_frequencies, "residual_frequencies")
        if self.residual_frequencies > 1 and not self.residual_samples:
            raise ValueError(
                f"residual_frequencies is {self.residual_frequencies}, of a prior that residual_samples=0 leaves out. "
                "Give one of them only."
            )
        super().__post_init__()
