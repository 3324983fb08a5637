"""What `hfnoise fedsvd` runs: a federation in one process, from YAML and command line, private or not."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import ScriptArguments

from hfnoise.errors import UsageError
from hfnoise.folders import check_writable
from hfnoise.option_types import check_least, check_option_types
from hfnoise.options import FEDSVD_DATA_OPTIONS, option_help
from hfnoise.trainers.command_line import NoiseParser, given_names, parse
from hfnoise.trainers.dataset_loading import CODE, EMBEDDED
from hfnoise.trainers.launch import hub_dataset

_NEEDED = {
    "model_name_or_path": f"a Hub id, a folder, or {EMBEDDED}",
    "dataset_name": f"a Hub id, a local file or folder, or {CODE}",
    "client_column": "the column that says whose a row is",
}
# One of them makes the clients private.
_PRIVATE = ("target_epsilon", "noise_multiplier")

logger = logging.getLogger(__name__)


@dataclass
class FederatedScriptArguments(ScriptArguments):
    """[`~trl.ScriptArguments`] and how the rows belong to clients.

    Args:
        client_column (`str`, *optional*): dataset column that says whose a row is.
        clients (`int`, *optional*): put the values of the column together to so many clients of about one size; by
            default every value is a client.

    Example:
        >>> from hfnoise.trainers.launch_federated import FederatedScriptArguments
        >>> FederatedScriptArguments(dataset_name="hfnoise:code", client_column="module").clients is None
        True
    """

    client_column: str | None = field(
        default=None, metadata={"help": option_help(FEDSVD_DATA_OPTIONS, "client_column")}
    )
    clients: int | None = field(default=None, metadata={"help": option_help(FEDSVD_DATA_OPTIONS, "clients")})

    def __post_init__(self) -> None:
        check_option_types(self, FederatedScriptArguments)
        check_least(self, 1, "clients")


def train_federated(arguments: Sequence[str]) -> int:
    """Train a federation from a command line and return the exit code.

    Formal guarantee: that of [`~hfnoise.FedSVDTrainer`]; clients are private if `--target_epsilon` or
    `--noise_multiplier` is given, and the card says so or says that they are not.

    Args:
        arguments (`Sequence[str]`): name of the method, then its options: those of [`~hfnoise.FedSVDConfig`], of
            [`~hfnoise.DPConfig`], of [`~trl.SFTConfig`], [`~trl.ModelConfig`] and [`FederatedScriptArguments`].

    Raises:
        UsageError: for options, data or a model that cannot be trained; before anything is trained.
    """
    name, *options = arguments
    from trl import ModelConfig, SFTConfig

    from hfnoise.trainers.federated_config import FedSVDConfig
    from hfnoise.trainers.private_config import DPConfig

    types: list[type] = [FederatedScriptArguments, SFTConfig, FedSVDConfig, ModelConfig]
    if "--help-all" in options:
        NoiseParser(dataclass_types=[*types, DPConfig], prog=f"hfnoise {name}").print_help()
        return 0
    private = any(option in _PRIVATE for option in given_names(options))
    parsed = parse(f"hfnoise {name}", [*types, DPConfig] if private else types, options, _NEEDED)
    script, training, federation, model = parsed[:4]
    try:
        check_writable(training.output_dir)
        _refuse_earlier_federation(training)
        trainer = _trainer(script, training, federation, model, parsed[4] if private else None)
        if training.push_to_hub:  # before hours of rounds
            trainer.init_hf_repo()
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.create_model_card(dataset_name=hub_dataset(script))
    trainer.save_model()
    logger.info("adapter, card and federation_report.json saved to %s", training.output_dir)
    if training.push_to_hub:
        trainer.push_to_hub()
    return 0


def _refuse_earlier_federation(training: Any) -> None:
    # FedSVDTrainer.train refuses it too, after the data were read and the noise was calibrated, and in Python's words.
    from hfnoise.trainers.federated_push import STATE_FOLDER
    from hfnoise.trainers.federated_saving import STATE_FILE

    if not training.resume_from_checkpoint and (Path(training.output_dir) / STATE_FOLDER / STATE_FILE).exists():
        raise ValueError(
            f"output_dir {training.output_dir!r} holds the state of an earlier federation, whose clients remember "
            "their rounds. Go on with it by --resume_from_checkpoint true, or name another --output_dir."
        )


def _trainer(script: Any, training: Any, federation: Any, model: Any, privacy: Any) -> Any:
    from trl import get_peft_config

    from hfnoise.trainers.dataset_loading import load_splits, resolve_model
    from hfnoise.trainers.federated_trainer import FedSVDTrainer
    from hfnoise.worlds.federated import split_by_column

    model.use_peft = True
    training.model_init_kwargs = {
        "revision": model.model_revision, "attn_implementation": model.attn_implementation, "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }  # fmt: skip
    train, held_out = load_splits(script, "text")
    clients = split_by_column(train, script.client_column, script.clients)
    return FedSVDTrainer(
        resolve_model(model.model_name_or_path),
        args=training,
        fedsvd_config=federation,
        train_dataset=clients,
        eval_dataset=held_out,
        dp_config=privacy,
        peft_config=get_peft_config(model),
    )
