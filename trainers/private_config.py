"""Configuration of differentially private training, beside any TrainingArguments; validated in `__post_init__`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hfnoise.option_types import check_option_types
from hfnoise.options import DP_OPTIONS
from hfnoise.trainers.noise_dpo_config import option_field

_CHOICES = {
    "clipping": ("flat", "auto", "per_layer"),
    "grad_mode": ("leaf", "loop"),
    "noise": ("gaussian", "banded"),
    "accountant": ("pld", "rdp"),
    "accumulation_dtype": ("float32", "float64"),
}


def _field(name: str, default: Any) -> Any:
    return option_field(name, default, DP_OPTIONS)


@dataclass
class DPConfig:
    """What is private, how private, and how it is done; the Trainer's own arguments stay where they are.

    Exactly one of `target_epsilon` and `noise_multiplier` is needed. No field is called `max_grad_norm`: that is a
    field of TrainingArguments, which clips something else (the mean gradient after the noise) and must be off.

    Formal guarantee: that of [`DPTrainerMixin`], for adding or removing one unit, at `target_delta`. `target_epsilon`
    bounds everything on the ledger of the dataset together with this run; with `noise_multiplier` nothing is bounded,
    and `trainer.epsilon()` says what the steps come to. There is none with `noise_multiplier=0` or `unsafe_seed`, and
    the report says NOT PRIVATE; `log_private_metrics` publishes numbers that it does not cover.

    Args:
        target_epsilon (`float`, *optional*): budget, above 0. It covers everything on the ledger of the dataset, so
            an earlier run on the same data has used a part of it.
        noise_multiplier (`float`, *optional*): standard deviation of the noise, on the sum of the clipped gradients,
            divided by `clip_norm`; at least 0.
        target_delta (`float`, *optional*): in (0, 1); by default min(1e-5, 1 / (10 units)). Below 1 / units, or a
            release of one unit at random would satisfy the guarantee; else a warning, also in the report.
        clip_norm (`float`, defaults to `1.0`): C, above 0: the norm that the gradient of a unit's loss is clipped to.
            Fine-tuning often does better with 0.1 and a larger learning rate (Li et al., arXiv 2110.05679).
        expected_batch_size (`int`, *optional*): units in a step on average, and what the noisy sum is divided by; the
            sample rate is this by the number of units, which it must not exceed. By default per-device batch x
            gradient accumulation x processes.
        micro_batch_size (`int`, *optional*): units per forward pass; by default the per-device batch. Changes memory
            and speed, not the result.
        unit_column (`str`, *optional*): dataset column whose values name the protected units (users, authors); by
            default every row is a unit.
        max_rows_per_unit (`int`, defaults to `1`): rows of one unit that a step may use, a choice drawn anew in each
            step; needs `unit_column`. It limits the work, not the guarantee, which is for all rows of the unit.
        clipping (`str`, defaults to `"flat"`): `"flat"`: the whole gradient of a unit, min(1, C / norm); `"auto"`:
            C / (norm + 0.01), which also scales small gradients up, so that C needs no tuning; `"per_layer"`: each of
            L parameter tensors to C / sqrt(L). See [`~hfnoise.privacy.clip_per_unit`].
        grad_mode (`str`, defaults to `"leaf"`): `"leaf"`: one backward pass for all units of a micro-batch;
            `"loop"`: one unit at a time, slowly, for any layer.
        noise (`str`, defaults to `"gaussian"`): `"gaussian"`, independent in each step; or `"banded"`, correlated so
            that sums of steps are less noisy, for plain SGD (arXiv 2306.08153).
        bands (`int` or `str`, defaults to `"auto"`): of `"banded"` noise, at least 1 and at most units /
            expected_batch_size; `"auto"` takes the least error at `target_epsilon`, without a look at the data.
        accountant (`str`, defaults to `"pld"`): `"pld"`, tight; or `"rdp"`, a looser bound.
        secret_file (`str`, *optional*): where the 32 bytes are kept that the noise follows from; made if it does not
            exist, mode 0600, outside of `output_dir`. By default below the Hugging Face home folder, one for each
            dataset. Who has it can subtract the noise.
        ledger_file (`str`, *optional*): where it is written down what was released; by default beside the secret.
        unsafe_seed (`int`, *optional*): noise anybody can recompute, for tests; excludes `secret_file`.
        accumulation_dtype (`str`, defaults to `"float32"`): of the sum over units; with `"float64"` results do not
            depend on micro-batches and processes, to the bit.
        adam_bias_correction (`bool`, defaults to `False`): DP-AdamBC (Tang et al., arXiv 2312.14334): the variance of
            the noise is subtracted from Adam's second moment. Needs `optim="adamw_torch"` and an `adam_epsilon` of at
            least 1e-6, sensibly 1e-4.
        log_private_metrics (`bool`, defaults to `False`): log what is computed from the training data without noise:
            loss, rewards, accuracies, numbers of tokens.

    Raises:
        ValueError: for a value out of range, and for both or neither of `target_epsilon` and `noise_multiplier`.

    Example:
        >>> from hfnoise import DPConfig
        >>> DPConfig(target_epsilon=3, clip_norm=0.1).accountant
        'pld'
    """

    # Strings as well where YAML or a command line may bring one; converted below.
    target_epsilon: float | None = _field("target_epsilon", None)
    noise_multiplier: float | None = _field("noise_multiplier", None)
    target_delta: float | None = _field("target_delta", None)
    clip_norm: float = _field("clip_norm", 1.0)
    expected_batch_size: int | None = _field("expected_batch_size", None)
    micro_batch_size: int | None = _field("micro_batch_size", None)
    unit_column: str | None = _field("unit_column", None)
    max_rows_per_unit: int = _field("max_rows_per_unit", 1)
    clipping: str = _field("clipping", "flat")
    grad_mode: str = _field("grad_mode", "leaf")
    noise: str = _field("noise", "gaussian")
    bands: int | str | None = _field("bands", "auto")
    accountant: str = _field("accountant", "pld")
    secret_file: str | None = _field("secret_file", None)
    ledger_file: str | None = _field("ledger_file", None)
    unsafe_seed: int | None = _field("unsafe_seed", None)
    accumulation_dtype: str = _field("accumulation_dtype", "float32")
    adam_bias_correction: bool = _field("adam_bias_correction", False)
    log_private_metrics: bool = _field("log_private_metrics", False)

    def __post_init__(self) -> None:
        check_option_types(self, DPConfig)
        self._check_budget()
        self.clip_norm = _number("clip_norm", self.clip_norm, lower=0.0)
        if self.target_delta is not None:
            self.target_delta = _number("target_delta", self.target_delta, lower=0.0, upper=1.0)
        for name in ("expected_batch_size", "micro_batch_size", "max_rows_per_unit"):
            value = getattr(self, name)
            if value is not None or name == "max_rows_per_unit":
                setattr(self, name, _count(name, value))
        self._check_bands()
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        self._check_combinations()

    def _check_budget(self) -> None:
        given = [name for name in ("target_epsilon", "noise_multiplier") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "exactly one of target_epsilon and noise_multiplier must be given, got "
                f"{' and '.join(given) or 'none'}. target_epsilon calibrates the noise; noise_multiplier sets it, "
                "and epsilon follows."
            )
        if self.target_epsilon is not None:
            self.target_epsilon = _number("target_epsilon", self.target_epsilon, lower=0.0)
        else:
            self.noise_multiplier = _number("noise_multiplier", self.noise_multiplier, lower=0.0, lower_allowed=True)

    def _check_bands(self) -> None:
        if self.noise == "gaussian" and self.bands not in ("auto", None, 1, "1"):
            raise ValueError(f"bands={self.bands!r} is read by noise='banded' only; gaussian noise has no bands.")
        if self.bands is None:
            self.bands = "auto"
        if self.bands != "auto":
            self.bands = _count("bands", self.bands)

    def _check_combinations(self) -> None:
        if self.unit_column is None and self.max_rows_per_unit != 1:
            raise ValueError(
                f"max_rows_per_unit={self.max_rows_per_unit} needs unit_column: without it every row is a unit."
            )
        if self.grad_mode == "loop" and self.micro_batch_size not in (None, 1):
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} cannot be combined with grad_mode='loop', which takes one "
                "unit at a time. Leave it out, or use grad_mode='leaf'."
            )
        if self.noise == "banded" and self.adam_bias_correction:
            raise ValueError("adam_bias_correction=True needs noise='gaussian': it corrects independent noise.")
        if self.unsafe_seed is not None:
            if self.secret_file is not None:
                raise ValueError("unsafe_seed and secret_file exclude each other: a seed is no secret.")


def _number(name: str, value: Any, *, lower: float, upper: float = math.inf, lower_allowed: bool = False) -> float:
    """Return a finite float above `lower` and below `upper`."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (lower < number < upper or (lower_allowed and number == lower)):
        least = f"at least {lower:g}" if lower_allowed else f"above {lower:g}"
        most = "" if upper == math.inf else f" and below {upper:g}"
        raise ValueError(f"{name} must be a number {least}{most}, got {value!r}.")
    return number


def _count(name: str, value: Any) -> int:
    """Return an integer of at least 1."""
    try:
        number = 0 if isinstance(value, bool) or float(value) != int(value) else int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
    return number
