"""Arguments of [`OneMoreStepTrainer`]: those of [`DiffusionTrainer`] that mean something without noise levels."""

from __future__ import annotations

from dataclasses import dataclass, field

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


@dataclass
class OneMoreStepTrainingArguments(DiffusionTrainingArguments):
    """Arguments of [`OneMoreStepTrainer`]: every field of [`DiffusionTrainingArguments`], and one more.

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

    Raises:
        ValueError: for a value out of range, and for settings of noise levels.

    Example:
        >>> from hfnoise import OneMoreStepTrainingArguments
        >>> OneMoreStepTrainingArguments(output_dir="run", use_cpu=True).prompt_dropout
        0.1
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Of AdamW."})
    weight_decay: float = field(default=1e-2, metadata={"help": "Of AdamW."})
    prompt_dropout: float = field(default=0.1, metadata={"help": "Share of examples with the empty prompt."})
    ema_decay: float | None = field(default=0.999, metadata={"help": "Decay of an average of the weights."})
    residual_samples: int = field(
        default=4096, metadata={"help": "Rows that the terminal prior is fitted on; 0 for no prior."}
    )

    def __post_init__(self) -> None:
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
        if isinstance(self.residual_samples, bool) or int(self.residual_samples) != self.residual_samples:
            raise ValueError(f"residual_samples is {self.residual_samples!r}; give a whole number of rows.")
        self.residual_samples = int(self.residual_samples)
        if self.residual_samples < 0 or self.residual_samples == 1:
            raise ValueError(
                f"residual_samples is {self.residual_samples}; a covariance needs at least 2 rows, and 0 is no prior."
            )
        super().__post_init__()
