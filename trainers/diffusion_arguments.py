"""Arguments of [`DiffusionTrainer`]: those of the Trainer, and what is said about the noise of training."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hfnoise.latents import LossWeighting
from hfnoise.option_types import check_option_types

TIMESTEP_SAMPLINGS = ("uniform", "logit_normal")


@dataclass
class DiffusionTrainingArguments(TrainingArguments):
    """Arguments of [`DiffusionTrainer`]: every field of [`~transformers.TrainingArguments`], and these.

    The names have the meaning they have in diffusers' training scripts. Three stock defaults differ:
    `remove_unused_columns` is `False` (the Trainer knows no inputs of a denoiser, and `True` would leave empty
    batches), `ddp_find_unused_parameters` is `False` (`None` makes the Trainer search for unused parameters in every
    step), and `logging_nan_inf_filter` is `False`, since a loss that is not finite is an error here.

    Args:
        snr_gamma (`float`, *optional*): gamma of min-SNR weighting (arXiv 2303.09556), above 0, usually 5. Short for
            `loss_weighting="min_snr"`.
        loss_weighting (`str`, defaults to `"uniform"`): `"uniform"`, `"min_snr"`, `"p2"`, `"debias"` or `"kohya"`; see
            [`LossWeighting`].
        loss_weighting_kwargs (`dict` or `str`, *optional*): settings of the weighting, such as `{"k": 1.0}`; a string
            is JSON.
        noise_offset (`float`, defaults to `0.0`): strength of one more N(0, 1) for each channel; at least 0.
        input_perturbation (`float`, defaults to `0.0`): the model sees noise + this * N(0, 1), and is to predict the
            noise without it (arXiv 2301.11706, recommended 0.1); at least 0.
        prompt_dropout (`float`, defaults to `0.0`): share of the examples that are learned with the empty prompt, in
            [0, 1]; 0.1 is usual, for classifier-free guidance.
        ema_decay (`float`, *optional*): of an average of the weights, in (0, 1), usually 0.9999. It is what is
            evaluated and saved at the end; checkpoints hold both. Warmed up as in diffusers' `EMAModel`.
        timestep_sampling (`str`, defaults to `"uniform"`): `"uniform"` or `"logit_normal"`, the latter for flow
            matching (SD3, arXiv 2403.03206).
        logit_mean (`float`, defaults to `0.0`), logit_std (`float`, defaults to `1.0`): of `"logit_normal"`.

    Raises:
        ValueError: for a value out of range, or settings that exclude each other.

    Example:
        >>> from hfnoise import DiffusionTrainingArguments
        >>> DiffusionTrainingArguments(output_dir="run", use_cpu=True, snr_gamma=5.0).weighting()
        MinSNRWeighting(gamma=5.0)
    """

    snr_gamma: float | None = field(default=None, metadata={"help": "Gamma of min-SNR loss weighting, usually 5."})
    loss_weighting: str = field(
        default="uniform", metadata={"help": "Loss by noise level: uniform, min_snr, p2, debias or kohya."}
    )
    loss_weighting_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Settings of the loss weighting, as JSON: {"gamma": 0.5}.'}
    )
    noise_offset: float = field(default=0.0, metadata={"help": "Strength of a noise offset for each channel."})
    input_perturbation: float = field(default=0.0, metadata={"help": "Noise on the input only; 0.1 is recommended."})
    prompt_dropout: float = field(default=0.0, metadata={"help": "Share of examples with the empty prompt."})
    ema_decay: float | None = field(default=None, metadata={"help": "Decay of an average of the weights."})
    timestep_sampling: str = field(
        default="uniform", metadata={"help": "uniform, or logit_normal (flow matching only)."}
    )
    logit_mean: float = field(default=0.0, metadata={"help": "Mean of the logit of logit_normal."})
    logit_std: float = field(default=1.0, metadata={"help": "Standard deviation of the logit of logit_normal."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be False: the rows are ours."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "As in the Trainer; False saves a search in every step."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "A loss that is not finite is an error."})

    def __post_init__(self) -> None:
        check_option_types(self, DiffusionTrainingArguments)
        for name in ("noise_offset", "input_perturbation", "prompt_dropout", "logit_mean", "logit_std"):
            setattr(self, name, finite_number(name, getattr(self, name)))
        for name in ("noise_offset", "input_perturbation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number of at least 0.")
        if not 0 <= self.prompt_dropout <= 1:
            raise ValueError(f"prompt_dropout is {self.prompt_dropout}; it is a share of the examples, in [0, 1].")
        if self.ema_decay is not None:
            self.ema_decay = finite_number("ema_decay", self.ema_decay)
            if not 0 < self.ema_decay < 1:
                raise ValueError(f"ema_decay is {self.ema_decay}; give a number in (0, 1), or None for no average.")
        if self.timestep_sampling not in TIMESTEP_SAMPLINGS:
            raise ValueError(
                f"timestep_sampling is {self.timestep_sampling!r}; choose {', '.join(TIMESTEP_SAMPLINGS)}."
            )
        if self.logit_std <= 0:
            raise ValueError(f"logit_std is {self.logit_std}; give a number above 0.")
        if self.timestep_sampling == "uniform" and (self.logit_mean, self.logit_std) != (0.0, 1.0):
            raise ValueError(
                "logit_mean and logit_std are read by timestep_sampling='logit_normal' only; it is 'uniform'."
            )
        if self.snr_gamma is not None:
            self.snr_gamma = finite_number("snr_gamma", self.snr_gamma)
        self.weighting()  # raises for what it does not allow
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns must be False: the Trainer does not know what a denoiser is given, and would "
                "remove the latents."
            )
        super().__post_init__()

    def weighting(self) -> LossWeighting:
        """Return the loss weighting that `snr_gamma`, or `loss_weighting` with its settings, names.

        Raises:
            ValueError: if they name two, or one that does not exist.
        """
        settings = self.loss_weighting_kwargs or {}
        if isinstance(settings, str):
            try:
                settings = json.loads(settings)
            except json.JSONDecodeError as error:
                raise ValueError(f"loss_weighting_kwargs is {settings!r}, which is no JSON ({error}).") from None
        if not isinstance(settings, dict):
            raise ValueError(
                f'loss_weighting_kwargs is {settings!r}; give settings by name, such as {{"gamma": 0.5}}.'
            )
        if self.snr_gamma is None:
            return LossWeighting.named(self.loss_weighting, **settings)
        if self.loss_weighting not in ("uniform", "min_snr") or settings:
            raise ValueError(
                f"snr_gamma={self.snr_gamma} is min-SNR, and loss_weighting={self.loss_weighting!r} with "
                f"loss_weighting_kwargs={settings} says something else. Give one of the two."
            )
        return LossWeighting.named("min_snr", gamma=self.snr_gamma)


def finite_number(name: str, value: Any) -> float:
    """Return a finite float; the command line and YAML give strings.

    Raises:
        ValueError: naming the option, if it is none.

    Example:
        >>> from hfnoise.trainers.diffusion_arguments import finite_number
        >>> finite_number("noise_offset", "0.1")
        0.1
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} is {value!r}; give a finite number.")
    return number
