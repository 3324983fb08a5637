"""What the sub-commands run: `hfnoise robust-dpo --config run.yaml` builds the Trainer and trains.

No configuration class lives here: a module that is launched would pickle it as `__main__.Config`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import hfnoise
from hfnoise.errors import UsageError
from hfnoise.methods import find_method
from hfnoise.trainers.command_line import NoiseParser, parse, take_option

logger = logging.getLogger(__name__)


def train_preference(arguments: Sequence[str]) -> int:
    """Train a preference method from a command line and return the exit code.

    Args:
        arguments (`Sequence[str]`): name of the method, then its options.

    Raises:
        UsageError: for options, data or a model that cannot be trained; before anything is trained.
    """
    name, *options = arguments
    accelerate_config, options = take_option(options, "--accelerate_config")
    if accelerate_config is not None:
        return _launch_with_accelerate(accelerate_config, [name, *options])

    from trl import ModelConfig

    from hfnoise.trainers.launch_arguments import PreferenceScriptArguments

    method = find_method(name)
    types = (PreferenceScriptArguments, getattr(hfnoise, method.config), ModelConfig)
    if "--help-all" in options:
        NoiseParser(dataclass_types=list(types), prog=f"hfnoise {name}").print_help()
        return 0
    script, training, model = parse(f"hfnoise {name}", types, options)
    try:
        trainer = _build(getattr(hfnoise, method.trainer), script, training, model)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    trainer.create_model_card(model_name=Path(training.output_dir).name, dataset_name=_hub_dataset(script))
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=_hub_dataset(script))
    logger.info("model and card saved to %s", training.output_dir)
    trainer.end()
    return 0


def _build(trainer_class: Any, script: Any, training: Any, model: Any) -> Any:
    from trl import get_peft_config, get_quantization_config

    from hfnoise.trainers.dataset_loading import load_splits, resolve_model

    if model.model_name_or_path is None:
        raise UsageError("give --model_name_or_path: a Hub id, a folder, or hfnoise:docstrings.")
    given = training.model_init_kwargs or {}
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **given,
    }
    train, evaluation = load_splits(script)
    return trainer_class(
        resolve_model(model.model_name_or_path),
        args=training,
        train_dataset=train,
        eval_dataset=evaluation,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )


def _hub_dataset(script: Any) -> str | None:
    """Return the dataset name for the card, unless it is a local path."""
    name = script.dataset_name
    return None if name is None or Path(name).exists() or ":" in name else str(name)


def _launch_with_accelerate(config: str, arguments: list[str]) -> int:
    """Run this command line again under `accelerate launch`."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    processes, arguments = take_option(arguments, "--num_processes")
    launcher = ["--config_file", _accelerate_config_file(config)]
    launcher += [] if processes is None else ["--num_processes", processes]
    launch_command(launch_command_parser().parse_args([*launcher, "-m", "hfnoise", *arguments]))
    return 0


def _accelerate_config_file(name: str) -> str:
    """Return the path of a YAML file of the user's, or of one of those that TRL ships."""
    if Path(name).is_file():
        return name
    shipped = resources.files("trl.accelerate_configs")
    if (shipped / f"{name}.yaml").is_file():
        return str(shipped / f"{name}.yaml")
    known = sorted(Path(str(file)).stem for file in shipped.iterdir() if str(file).endswith(".yaml"))
    raise UsageError(f"--accelerate_config {name!r} is neither a file nor one of {', '.join(known)}.")
