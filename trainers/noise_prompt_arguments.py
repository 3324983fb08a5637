"""Arguments of [`NoisePromptTrainer`]: those of [`DiffusionTrainer`] that mean something without noise levels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hfnoise.golden_noise_options import GOLDEN_NOISE_OPTIONS
from hfnoise.option_types import check_option_types
from hfnoise.options import option_default, option_help
from hfnoise.trainers.diffusion_arguments import DiffusionTrainingArguments, finite_number
from hfnoise.trainers.one_more_step_arguments import WITHOUT_NOISE_LEVELS

NOISE_PROMPT_LOSSES = ("pairs", "reward")


def _field(name: str) -> Any:
    default = option_default(GOLDEN_NOISE_OPTIONS, name)
    return field(default=default, metadata={"help": option_help(GOLDEN_NOISE_OPTIONS, name)})


@dataclass
class NoisePromptTrainingArguments(DiffusionTrainingArguments):
    """Arguments of [`NoisePromptTrainer`]: every field of [`DiffusionTrainingArguments`], and these.

    The defaults of `learning_rate` (1e-3), `weight_decay` (1e-2) and `lr_scheduler_type` (cosine) differ; they are
    ours, and suit networks that are small and start as the identity. The official code of golden noise
    (arXiv 2411.09502) uses a constant 1e-4 with batches of 64.

    Args:
        loss (`str`, defaults to `"pairs"`): `"pairs"`, the squared error of the change from noise to golden noise; or
            `"reward"`, minus a differentiable reward of images drawn from fresh noise (arXiv 2508.09968).
        min_margin (`float`, *optional*): pairs whose golden noise is not better than the noise by more than this, in
            units of the verifier, count nothing. The official code keeps those above 0.
        margin_temperature (`float`, *optional*): pairs count sigmoid(margin / this), so that doubtful ones count less
            and none is thrown away; above 0. One of the two; `None` for both counts all pairs alike.
        delta_penalty (`float`, defaults to `0.01`): of the loss `"reward"`: times half the squared norm of the change,
            which is its Kullback-Leibler divergence from noise; at least 0.

    Raises:
        ValueError: for a value out of range, and settings that exclude each other.

    Example:
        >>> from hfnoise.trainers.noise_prompt_arguments import NoisePromptTrainingArguments
        >>> NoisePromptTrainingArguments(output_dir="run", use_cpu=True, margin_temperature="0.5").margin_temperature
        0.5
    """

    learning_rate: float = _field("learning_rate")
    weight_decay: float = _field("weight_decay")
    lr_scheduler_type: str = _field("lr_scheduler_type")
    loss: str = _field("loss")
    min_margin: float | None = _field("min_margin")
    margin_temperature: float | None = _field("margin_temperature")
    delta_penalty: float = _field("delta_penalty")

    def __post_init__(self) -> None:
        check_option_types(self, NoisePromptTrainingArguments)
        given = {
            name: getattr(self, name) for name, value in WITHOUT_NOISE_LEVELS.items() if getattr(self, name) != value
        }
        if given:
            raise ValueError(
                f"{given}: golden noise has no noise levels to choose or to weigh, and its noise is given. Leave them "
                "out."
            )
        if self.prompt_dropout:
            raise ValueError(
                f"prompt_dropout is {self.prompt_dropout}; the network is never used without a prompt. Leave it out."
            )
        if self.gradient_checkpointing or self.activation_checkpointing:
            raise ValueError(
                "gradient_checkpointing and activation_checkpointing: the networks of golden noise are small and have "
                "none. Leave them out; where a reward takes the memory, call enable_gradient_checkpointing() of the "
                "pipeline's denoiser."
            )
        if self.batch_eval_metrics:
            raise ValueError("batch_eval_metrics must be False: a share of the variance is of all rows.")
        if self.loss not in NOISE_PROMPT_LOSSES:
            raise ValueError(f"loss is {self.loss!r}; choose {' or '.join(NOISE_PROMPT_LOSSES)}.")
        for name in ("min_margin", "margin_temperature", "delta_penalty"):
            if name == "delta_penalty" or getattr(self, name) is not None:
                setattr(self, name, finite_number(name, getattr(self, name)))
        if self.min_margin is not None and self.margin_temperature is not None:
            raise ValueError("min_margin leaves pairs out and margin_temperature weighs them: give one of the two.")
        if self.margin_temperature is not None and self.margin_temperature <= 0:
            raise ValueError(f"margin_temperature is {self.margin_temperature}; give a number above 0.")
        if self.delta_penalty < 0:
            raise ValueError(f"delta_penalty is {self.delta_penalty}; give a number of at least 0.")
        if self.loss == "reward" and (self.min_margin is not None or self.margin_temperature is not None):
            raise ValueError("min_margin and margin_temperature are of pairs; loss='reward' has none.")
        super().__post_init__()
