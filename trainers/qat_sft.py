"""Quantisation-aware supervised fine-tuning with TRL."""

from __future__ import annotations

from dataclasses import dataclass

from trl import SFTConfig, SFTTrainer

from hfnoise.trainers.qat import QATTrainerMixin
from hfnoise.trainers.qat_config import QATArguments


@dataclass
class QATSFTConfig(QATArguments, SFTConfig):
    """Arguments of [`QATSFTTrainer`]: every field of [`~trl.SFTConfig`] and those of [`~hfnoise.QATArguments`].

    Example:
        >>> from hfnoise import QATSFTConfig
        >>> QATSFTConfig(output_dir="run", bits=4, use_cpu=True, bf16=False).bits
        4
    """


class QATSFTTrainer(QATTrainerMixin, SFTTrainer):
    """Quantisation-aware [`~trl.SFTTrainer`]: the same arguments; see [`~hfnoise.QATTrainerMixin`].

    `distillation_weight` is refused: TRL's fused head computes the loss without logits.

    Example:
        >>> from hfnoise import QATSFTTrainer
        >>> issubclass(QATSFTTrainer, __import__("trl").SFTTrainer)
        True
    """
