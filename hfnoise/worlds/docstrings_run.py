"""Whole Trainer runs on the docstrings world: stock DPO, TRL's robust loss told the rate, and ours."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from transformers import PrinterCallback

from hfnoise.preference import flip_labels
from hfnoise.worlds import docstrings

# Name in tables -> module of Trainer and configuration, their names, and the settings at a flip rate.
METHODS: dict[str, tuple[str, str, str, Any]] = {
    "DPO": ("trl", "DPOTrainer", "DPOConfig", lambda rate: {"loss_type": "sigmoid"}),
    "TRL robust, true rate": (
        "trl", "DPOTrainer", "DPOConfig", lambda rate: {"loss_type": "robust", "label_smoothing": rate},
    ),
    "RobustDPO, rate unknown": (
        "hfnoise", "RobustDPOTrainer", "RobustDPOConfig", lambda rate: {"flip_rate": "auto"},
    ),
    "Dr. DPO, rate unknown": ("hfnoise", "DrDPOTrainer", "DrDPOConfig", lambda rate: {}),
    "Dr. DPO at dr_beta 0.5, rate unknown": (
        "hfnoise", "DrDPOTrainer", "DrDPOConfig", lambda rate: {"dr_beta": 0.5},
    ),
    "forward_corrected, true rate": (
        "hfnoise", "RobustDPOTrainer", "RobustDPOConfig",
        lambda rate: {"flip_rate": rate, "loss_type": ["forward_corrected"]},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class RunResult:
    """Outcome of a run.

    Args:
        accuracy: share of clean held-out pairs with a positive margin: every pair counts once, because the batches of
            the recipe divide the held-out pairs (TRL's metric is the mean of batch means).
        seconds: of training.
        estimate: flip rate estimated from held-out pairs with labels as noisy as the training labels; ours only.
        trainer: the trainer, still in memory.
    """

    accuracy: float
    seconds: float
    estimate: Any
    trainer: Any


def run_trainer(
    method: str,
    flip_rate: float,
    seed: int,
    output_dir: str | None = None,
    callbacks: list[Any] | None = None,
    train_size: int | None = None,
    **changes: Any,
) -> RunResult:
    """Train one method on the docstrings world with a share of the labels flipped, and score it on clean pairs.

    The first evaluation dataset of RobustDPO is as noisy as the training pairs: the flip rate is estimated from it.

    Args:
        method (`str`): a key of `METHODS`.
        flip_rate (`float`): share of flipped labels, in [0, 0.5).
        seed (`int`): of the training pairs, the flips and the run.
        output_dir (`str`, *optional*): where the run would save; a temporary folder by default.
        callbacks (`list`, *optional*): callbacks of the Trainer.
        train_size (`int`, *optional*): training pairs; those of the recipe by default.
        **changes: settings that differ from the recipe of the world.
    """
    module_name, trainer_name, config_name, settings = METHODS[method]
    module = import_module(module_name)
    recipe = docstrings.DEMO_RECIPE
    train = flip_labels(docstrings.preference_pairs("train", train_size or recipe.train_size, seed), flip_rate, seed)
    clean = docstrings.preference_pairs("validation", recipe.eval_size, seed)
    # RobustDPOTrainer estimates the rate from the first evaluation dataset: labels from the same noisy source.
    estimates = trainer_name == "RobustDPOTrainer"
    arguments = {
        "output_dir": output_dir or tempfile.gettempdir(), "seed": seed, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "bf16": False, "activation_checkpointing": False, "precompute_ref_log_probs": True,
        "logging_steps": 5, "beta": recipe.beta, "learning_rate": recipe.learning_rate,
        "num_train_epochs": recipe.num_train_epochs, "max_length": recipe.max_length,
        "per_device_train_batch_size": recipe.per_device_train_batch_size,
        "per_device_eval_batch_size": recipe.per_device_eval_batch_size,
    }  # fmt: skip
    trainer = getattr(module, trainer_name)(
        docstrings.model_path(),
        args=getattr(module, config_name)(**{**arguments, **settings(flip_rate), **changes}),
        train_dataset=train,
        eval_dataset={"noisy": flip_labels(clean, flip_rate, seed), "clean": clean} if estimates else {"clean": clean},
        callbacks=callbacks,
    )
    trainer.injected_flip_rate = flip_rate or None  # for the card of ours
    trainer.remove_callback(PrinterCallback)  # with its bar disabled, the Trainer prints every log entry instead
    output = trainer.train()
    accuracy = trainer.evaluate("clean")["eval_rewards/accuracies"]
    estimate = trainer.flip_rate_estimate if estimates else None
    return RunResult(accuracy, output.metrics["train_runtime"], estimate, trainer)
