"""Arguments of quantisation-aware training: beside any TrainingArguments; validated in `__post_init__`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import SchedulerType, TrainingArguments

from hfnoise.option_types import check_option_types
from hfnoise.options import QAT_OPTIONS, option_default, option_help
from hfnoise.quantization.hf_config import QuestConfig
from hfnoise.trainers.qat_schedule import BitSchedule, parse_bit_schedule, schedule_text, to_bits

EXPORTS = ("packed", "dense", "master")
_BITS = ("weight_bits", "activation_bits", "bits")


def _field(name: str) -> Any:
    return field(default=option_default(QAT_OPTIONS, name), metadata={"help": option_help(QAT_OPTIONS, name)})


@dataclass
class QATArguments:
    """What is quantised, how, and what is written at the end; in front of any class of training arguments.

    ```python
    @dataclass
    class QATDPOConfig(QATArguments, DPOConfig):
        pass
    ```

    Four defaults differ from the stock ones: `adam_beta2` 0.95, `weight_decay` 0.1, `warmup_steps` 0.1 (a share) and
    `lr_scheduler_type` `"cosine"`, which is how the paper trains (QuEST, arXiv 2502.05003, and its official script;
    the gradient is clipped at 1.0 there and in the stock Trainer alike). With a quantised forward the second moment of
    a weight changes when the weight crosses a level, and 0.999 forgets that too slowly. What you set wins.

    Departure from the official script: its cosine ends at a tenth of the peak rate, the stock one at 0; for a tenth
    use `lr_scheduler_type="cosine_with_min_lr"` and `lr_scheduler_kwargs={"min_lr_rate": 0.1}`.

    Args:
        weight_bits (`float`, *optional*): of weights: 1, 1.58 (ternary), 2 to 8. For a float model 4 by default; a
            model that is quantised already keeps its bits, and others are refused.
        activation_bits (`float`, *optional*): of the inputs of linear layers; `None` beside `weight_bits`: none.
        bits (`float`, *optional*): sets both.
        trust_factor (`float`, *optional*): see [`~hfnoise.QuestConfig`].
        hadamard_group (`int`, *optional*): at least 0; 0 is no rotation. 128 by default.
        estimator (`str`, *optional*): `"quest"`, `"ste"`, `"ste_absmax"` or `"lsq"`.
        modules_to_not_convert (`list[str]`, *optional*): linear layers to leave as they are.
        bit_schedule (`str`, `dict` or `list`, *optional*): widths in order with shares of the steps that sum to 1;
            the last is the width of the result. Kept as a string. See [`BitSchedule`].
        distillation_weight (`float`, defaults to `0.0`): w in [0, 1] of (1 - w) loss + w T^2 KL(teacher || student).
        distillation_temperature (`float`, defaults to `1.0`): T, above 0.
        step_learning_rate (`float`, *optional*): of LSQ's steps, above 0; by default a tenth of `learning_rate`.
        export (`str`, defaults to `"packed"`): `"packed"`, `"dense"` or `"master"`.
        weight_only (`bool`, defaults to `False`): allow `export="dense"` where activations are quantised.
        weight_decay (`float`, defaults to `0.1`), adam_beta2 (`float`, defaults to `0.95`), warmup_steps (`float`,
            defaults to `0.1`), lr_scheduler_type (`str`, defaults to `"cosine"`): of the stock arguments.

    Raises:
        ValueError: for a value out of range, or settings that exclude each other.

    Example:
        >>> from hfnoise import QATArguments
        >>> arguments = QATArguments(bit_schedule={8: 0.5, 1: 0.5})
        >>> arguments.bit_schedule, arguments.quest_config().weight_bits
        ('8:0.5,1:0.5', 1)
    """

    weight_bits: float | None = _field("weight_bits")
    activation_bits: float | None = _field("activation_bits")
    bits: float | None = _field("bits")
    trust_factor: float | None = _field("trust_factor")
    hadamard_group: int | None = _field("hadamard_group")
    estimator: str | None = _field("estimator")
    modules_to_not_convert: list[str] | None = _field("modules_to_not_convert")
    # `str` second: the type that a command line is parsed to.
    bit_schedule: dict | str | list | None = _field("bit_schedule")
    distillation_weight: float = _field("distillation_weight")
    distillation_temperature: float = _field("distillation_temperature")
    step_learning_rate: float | None = _field("step_learning_rate")
    export: str = _field("export")
    weight_only: bool = _field("weight_only")
    weight_decay: float = _field("weight_decay")
    adam_beta2: float = _field("adam_beta2")
    warmup_steps: float = _field("warmup_steps")
    lr_scheduler_type: SchedulerType | str = _field("lr_scheduler_type")

    def __post_init__(self) -> None:
        if self.bit_schedule is not None:
            self.bit_schedule = schedule_text(parse_bit_schedule(self.bit_schedule))
        check_option_types(self, QATArguments)
        self._check_quantization()
        weight = self.distillation_weight = _number("distillation_weight", self.distillation_weight)
        if weight > 1:
            raise ValueError(f"distillation_weight is {weight}; it is a share of the loss, in [0, 1].")
        temperature = _number("distillation_temperature", self.distillation_temperature, above=True)
        self.distillation_temperature = temperature
        if not weight and temperature != 1:
            raise ValueError(
                f"distillation_temperature is {temperature} and distillation_weight 0: nothing reads it. Set a weight."
            )
        self._check_step_learning_rate()
        self._check_export()
        after = getattr(super(), "__post_init__", None)
        if after is not None:
            after()

    def _check_quantization(self) -> None:
        for name in _BITS:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, to_bits(value, name))
        if self.trust_factor is not None:
            self.trust_factor = _number("trust_factor", self.trust_factor, above=True)
        if self.hadamard_group is not None:
            group = _number("hadamard_group", self.hadamard_group)
            if not group.is_integer():
                raise ValueError(f"hadamard_group is {group}; give a whole number, 0 for no rotation.")
            self.hadamard_group = int(group)
        if self.bit_schedule is not None:
            phases = parse_bit_schedule(self.bit_schedule)
            if all(getattr(self, name) is None for name in _BITS):
                # The schedule says where it ends; saying it twice is not asked for.
                self.weight_bits = phases[-1].weight_bits
                said = phases[-1].activation_bits
                self.activation_bits = self.weight_bits if said is None else said
        config = self.quest_config()  # raises for what it does not allow
        if self.bit_schedule is not None:
            self.schedule_for(config)

    def _check_step_learning_rate(self) -> None:
        if self.step_learning_rate is None:
            return
        self.step_learning_rate = _number("step_learning_rate", self.step_learning_rate, above=True)
        if self.estimator not in (None, "lsq"):
            raise ValueError(
                f"step_learning_rate is for estimator='lsq', which learns its steps; {self.estimator!r} has none."
            )

    def _check_export(self) -> None:
        if self.export not in EXPORTS:
            raise ValueError(f"export is {self.export!r}; choose {', '.join(EXPORTS)}.")
        if not isinstance(self.weight_only, bool):
            raise ValueError(f"weight_only is {self.weight_only!r}; give True or False.")
        if self.weight_only and self.export != "dense":
            raise ValueError(f"weight_only is read by export='dense' only; export is {self.export!r}.")
        if self.estimator == "lsq" and self.export == "packed":
            raise ValueError(
                "estimator='lsq' has no packed form: its step is one per tensor. Use export='dense' or 'master', or "
                "estimator='quest'."
            )

    def quest_config(self) -> QuestConfig:
        """Return the configuration for a float model, with master weights."""
        given = self.given_quantization()
        return QuestConfig(**{**given, "hadamard_group": given.get("hadamard_group", 128) or None})

    def given_quantization(self) -> dict[str, Any]:
        """Return the settings of the quantisation that were given."""
        names = (*_BITS, "trust_factor", "hadamard_group", "estimator", "modules_to_not_convert")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def schedule_for(self, config: QuestConfig) -> BitSchedule | None:
        """Return the bit schedule that ends at the bits of a configuration, if there is one.

        Raises:
            ValueError: if it ends at others.
        """
        if self.bit_schedule is None:
            return None
        return BitSchedule(parse_bit_schedule(self.bit_schedule), config.weight_bits, config.activation_bits)


@dataclass
class QATTrainingArguments(QATArguments, TrainingArguments):
    """Arguments of [`QATTrainer`]: every field of [`~transformers.TrainingArguments`] and those of [`QATArguments`].

    Example:
        >>> from hfnoise import QATTrainingArguments
        >>> QATTrainingArguments(output_dir="run", bits=1, use_cpu=True).lr_scheduler_type.value
        'cosine'
    """


def _number(name: str, value: Any, above: bool = False) -> float:
    """Return a finite float of at least 0, or above it."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (0 <= number < math.inf) or (above and number == 0):
        raise ValueError(f"{name} is {value!r}; give a number {'above' if above else 'of at least'} 0.")
    return number
