"""A model that was evaluated before it is trained, on several processes."""

from __future__ import annotations

from typing import Any


def train_in_step(trainer: Any) -> None:
    """Let `train()` wrap a model in DistributedDataParallel that an earlier `evaluate()` has prepared.

    accelerate 1.15 takes a model that the Trainer of transformers 5.23 has prepared for an evaluation for one that is
    ready for training: it is not wrapped, gradients are not averaged, and every process trains a model of its own
    without a word. To be called at the beginning of `train()`.

    Args:
        trainer (`transformers.Trainer`): that is about to train.

    Example:
        >>> from types import SimpleNamespace
        >>> from hfnoise.trainers.evaluated_before import train_in_step
        >>> model = SimpleNamespace(_is_accelerate_prepared=True)
        >>> train_in_step(SimpleNamespace(model=model, accelerator=SimpleNamespace(num_processes=2)))
        >>> model._is_accelerate_prepared
        False
    """
    if trainer.accelerator.num_processes > 1 and getattr(trainer.model, "_is_accelerate_prepared", False):
        trainer.model._is_accelerate_prepared = False
