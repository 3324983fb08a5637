"""What `hfnoise dp-sft` and `hfnoise dp-dpo` run: TRL's configuration and a DPConfig, from YAML and command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hfnoise
from hfnoise.errors import UsageError
from hfnoise.folders import check_writable
from hfnoise.methods import find_method
from hfnoise.trainers.dataset_loading import CODE, EMBEDDED
from hfnoise.trainers.launch import build, finish, run_command
from hfnoise.trainers.private_config import DPConfig

_NEEDED = {
    "model_name_or_path": f"a Hub id, a folder, or {EMBEDDED}",
    "dataset_name": f"a Hub id, a local file or folder, or {CODE}",
}
# Which form of a dataset a method trains on.
_FORMS = {"dp-sft": "text", "dp-dpo": "pairs"}


def train_private(arguments: Sequence[str]) -> int:
    """Train a private method from a command line and return the exit code.

    Formal guarantee: that of the Trainer, see [`~hfnoise.DPTrainerMixin`]; the command adds no release of its own
    beyond the model, its card and `dp_report.json`.

    Args:
        arguments (`Sequence[str]`): name of the method, then its options: those of [`~hfnoise.DPConfig`], of
            [`~trl.SFTConfig`] or [`~trl.DPOConfig`], of [`~trl.ModelConfig`] and [`~trl.ScriptArguments`].

    Raises:
        UsageError: for options, data or a model that cannot be trained privately; before anything is trained.
    """
    return run_command(arguments, _types, _train, _NEEDED)


def _types(name: str) -> tuple[type, ...]:
    from trl import DPOConfig, ModelConfig, ScriptArguments, SFTConfig

    return ScriptArguments, {"dp-sft": SFTConfig, "dp-dpo": DPOConfig}[name], DPConfig, ModelConfig


def _train(name: str, script: Any, training: Any, privacy: Any, model: Any) -> None:
    try:
        trainer = _private_trainer(name, script, training, privacy, model)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error
    finish(trainer, training, script)


def _private_trainer(name: str, script: Any, training: Any, privacy: Any, model: Any) -> Any:
    from hfnoise.trainers.dataset_loading import load_splits

    check_writable(training.output_dir)
    data = load_splits(script, _FORMS[name])
    trainer = build(getattr(hfnoise, find_method(name).trainer), script, training, model, data, dp_config=privacy)
    # Calibrates the noise, and refuses a budget that is spent, with one line instead of a traceback.
    _ = trainer.private_run
    return trainer
