"""Keeps numbers that were computed from the training data without noise out of every log."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

# What a training log may hold: nothing of it depends on the training data beyond the noisy gradients.
_PUBLIC = {
    "epoch", "step", "learning_rate", "grad_norm", "train_runtime", "train_steps_per_second",
    "train_samples_per_second", "total_flos",
}  # fmt: skip
# Of evaluation data, which the guarantee does not cover and the report speaks of; of ourselves.
_PUBLIC_STARTS = ("eval_", "eval/", "test_", "privacy/")
# TRL logs how many tokens it has trained on with the metrics of an evaluation too (`eval_num_tokens`).
_NEVER = ("num_tokens", "num_input_tokens_seen")


class PrivateMetricsFilter(TrainerCallback):
    """The first callback of a private Trainer: removes the loss, rewards, accuracies and token counts of a step.

    They are exact functions of a private batch. `grad_norm` is that of the noised gradient and stays. Callbacks that
    report to trackers come later and see the same, filtered mapping.

    Args:
        log_private_metrics (`bool`): leave everything in.

    Example:
        >>> from hfnoise.trainers.private_metrics import is_public
        >>> is_public("grad_norm"), is_public("rewards/margins")
        (True, False)
    """

    def __init__(self, log_private_metrics: bool = False) -> None:
        self.log_private_metrics = log_private_metrics

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Filter what is about to be reported, and what is already in the history."""
        if self.log_private_metrics or logs is None:
            return
        for mapping in (logs, state.log_history[-1] if state.log_history else {}):
            for name in [name for name in mapping if not is_public(name)]:
                del mapping[name]


def is_public(name: str) -> bool:
    """Return whether a metric may be logged by a private Trainer."""
    return name in _PUBLIC or (name.startswith(_PUBLIC_STARTS) and not name.endswith(_NEVER))
