"""Keeps numbers that were computed from the training data without noise out of every log."""

from __future__ import annotations

import math
from typing import Any

from transformers import Trainer, TrainerCallback

from hfnoise.trainers.private_run import UNSAFE

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


class PrivacyLog(TrainerCallback):
    """Logs `privacy/epsilon` at every checkpoint and at the end of training, and `privacy/noise_multiplier` once.

    Not at every log, since a composition takes up to a second. Epsilon is that of the weights, as `epsilon()` of the
    Trainer has it; of a known seed or without noise there is none, and nothing is logged.

    Args:
        trainer ([`DPTrainerMixin`]): a private Trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._logged = trainer, -1

    def log(self) -> None:
        """Log epsilon of the weights as they are, unless that is done already."""
        trainer, run = self._trainer, self._trainer.private_run
        step, noise = trainer.state.global_step, run.state.noise_multiplier
        if step == self._logged or not trainer.is_world_process_zero() or run.state.secret.startswith(UNSAFE):
            return
        found = {"privacy/epsilon": trainer.epsilon()}
        if not math.isfinite(found["privacy/epsilon"]):
            return
        if self._logged < 0:
            found["privacy/noise_multiplier"] = noise
        self._logged = step
        # Not through TRL's method, which would average and forget the metrics of the steps since the last log.
        Trainer.log(trainer, found)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin anew with every training."""
        self._logged = -1

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log before the trackers, whose callbacks come later, are closed."""
        self.log()


def is_public(name: str) -> bool:
    """Return whether a metric may be logged by a private Trainer."""
    return name in _PUBLIC or (name.startswith(_PUBLIC_STARTS) and not name.endswith(_NEVER))
