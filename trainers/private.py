"""The private Trainers: `Trainer`, `SFTTrainer`, `DPOTrainer` with [`DPTrainerMixin`] in front, and make_private."""

from __future__ import annotations

from typing import Any

from transformers import Trainer
from trl import DPOTrainer, SFTTrainer

from hfnoise.trainers.private_check import dp_check
from hfnoise.trainers.private_config import DPConfig
from hfnoise.trainers.private_mixin import DPTrainerMixin

__all__ = ["DPConfig", "DPDPOTrainer", "DPSFTTrainer", "DPTrainer", "DPTrainerMixin", "dp_check", "make_private"]


class DPTrainer(DPTrainerMixin, Trainer):
    """Differentially private [`~transformers.Trainer`]: the same arguments and `dp_config`; see [`DPTrainerMixin`].

    Example:
        >>> from hfnoise import DPTrainer
        >>> issubclass(DPTrainer, __import__("transformers").Trainer)
        True
    """


class DPSFTTrainer(DPTrainerMixin, SFTTrainer):
    """Differentially private [`~trl.SFTTrainer`]: the same arguments and `dp_config`; see [`DPTrainerMixin`].

    A unit is a row of the dataset (or a user, with `unit_column`), and its loss the mean over the tokens of its rows.
    `packing` and `padding_free` are refused, since they put several units into one row.

    Example:
        >>> from hfnoise import DPSFTTrainer
        >>> issubclass(DPSFTTrainer, __import__("trl").SFTTrainer)
        True
    """


class DPDPOTrainer(DPTrainerMixin, DPOTrainer):
    """Differentially private [`~trl.DPOTrainer`]: the same arguments and `dp_config`; see [`DPTrainerMixin`].

    A unit is a preference pair (or an annotator or user, with `unit_column`): both answers and the label are protected
    together. Losses that mix the pairs of a batch (`aot`, `aot_unpaired`, `sft`) are refused.

    Example:
        >>> from hfnoise import DPDPOTrainer
        >>> issubclass(DPDPOTrainer, __import__("trl").DPOTrainer)
        True
    """


def make_private(trainer: Trainer, dp_config: DPConfig, dataset: Any = None) -> Any:
    """Return `trainer`, made private in place: for a Trainer that is already built, of any subclass.

    The same checks and refusals as in the private Trainers. The object stays the same; its class becomes a subclass of
    the one it had, with [`DPTrainerMixin`] in front.

    The ledger knows a dataset by its content. A built Trainer of TRL no longer has the dataset that it was given, only
    the rows that it made of it; by those the same data would have another fingerprint, and a second budget, for each
    way of tokenising and for [`DPSFTTrainer`]. So give `dataset`, the data as you gave it to the Trainer; without it
    the rows of the Trainer are taken, with a warning where TRL has made them.

    Formal guarantee: that of [`DPTrainerMixin`].

    Args:
        trainer (`transformers.Trainer`): not trained yet; its `training_step` must be one forward and backward pass.
        dp_config ([`DPConfig`]): the privacy settings.
        dataset (*optional*): the `train_dataset` that the Trainer was built with, by which the ledger knows the data;
            `unit_column` may be a column of it.

    Returns:
        The same trainer.

    Raises:
        ValueError: for settings under which the guarantee would not hold; the trainer is then as it was.

    Example:
        >>> from hfnoise import DPConfig, make_private
        >>> make_private("a string", DPConfig(target_epsilon=3))
        Traceback (most recent call last):
        ...
        TypeError: make_private needs a built transformers.Trainer, got str.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(f"make_private needs a built transformers.Trainer, got {type(trainer).__name__}.")
    if isinstance(trainer, DPTrainerMixin):
        raise ValueError(f"{type(trainer).__name__} is private already.")
    if trainer.state.global_step > 0:
        raise ValueError(
            f"this {type(trainer).__name__} has trained {trainer.state.global_step} steps without privacy: what is in "
            "its weights has no guarantee, whatever is added now. Build a new one, from the pretrained weights."
        )
    if dataset is not None and hasattr(dataset, "__len__") and len(dataset) < len(trainer.train_dataset or ()):
        raise ValueError(
            f"dataset has {len(dataset)} rows and the Trainer {len(trainer.train_dataset)}, so it is not the one that "
            "the Trainer was built with, and its budget is not the one to be charged. Give that train_dataset."
        )
    stock, before = type(trainer), dict(vars(trainer))
    trainer.__class__ = type(f"Private{stock.__name__}", (DPTrainerMixin, stock), {"__module__": stock.__module__})
    callbacks = list(trainer.callback_handler.callbacks)
    try:
        trainer._make_private(dp_config, dataset)
    except BaseException:
        trainer.__class__ = stock
        vars(trainer).clear()
        vars(trainer).update(before)
        trainer.callback_handler.callbacks = callbacks
        raise
    return trainer
