"""What the sub-commands run: `hfnoise robust-dpo --config run.yaml` builds the Trainer and trains.

No configuration class lives here: a module that is launched would pickle it as `__main__.Config`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

import hfnoise
from hfnoise.errors import UsageError
from hfnoise.methods import find_method
from hfnoise.trainers.command_line import NoiseParser, parse, take_option
from hfnoise.trainers.dataset_loading import EMBEDDED

logger = logging.getLogger(__name__)

NEEDED = {
    "model_name_or_path": f"a Hub id, a folder, or {EMBEDDED}",
    "dataset_name": f"a Hub id, a local file or folder, or {EMBEDDED}",
}
# What the Trainers run under; the other kinds they refuse by name.
_ACCEPTED_ENGINES = ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "MULTI_NPU")


def train_preference(arguments: Sequence[str]) -> int:
    """Train a preference method from a command line and return the exit code.

    Args:
        arguments (`Sequence[str]`): name of the method, then its options.

    Raises:
        UsageError: for options, data or a model that cannot be trained; before anything is trained.
    """
    return run_command(arguments, _preference_types, _train_preference, NEEDED)


def _preference_types(name: str) -> tuple[type, ...]:
    from trl import ModelConfig

    from hfnoise.trainers.launch_arguments import PreferenceScriptArguments

    return PreferenceScriptArguments, getattr(hfnoise, find_method(name).config), ModelConfig


def _train_preference(name: str, script: Any, training: Any, model: Any) -> None:
    from hfnoise.trainers.dataset_loading import load_splits

    try:
        trainer_class = getattr(hfnoise, find_method(name).trainer)
        trainer = build(trainer_class, script, training, model, load_splits(script))
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error
    trainer.injected_flip_rate = script.inject_flip_rate or None
    finish(trainer, training, script)


def run_command(
    arguments: Sequence[str],
    types: Callable[[str], Sequence[type]],
    run: Callable[..., None],
    needed: Mapping[str, str],
) -> int:
    """Run what a command line asks for, here or under `accelerate launch`, and return the exit code.

    Args:
        arguments (`Sequence[str]`): name of the method, then its options.
        types (`Callable`): from that name to the dataclasses of the options; called only to run or to describe them.
        run (`Callable`): is given the name and an instance of each.
        needed (`Mapping[str, str]`): as in [`~hfnoise.trainers.command_line.parse`].

    Raises:
        UsageError: for options that cannot be parsed.
    """
    name, *options = arguments
    accelerate_config, options = take_option(options, "--accelerate_config")
    if accelerate_config is not None:
        return launch_with_accelerate(accelerate_config, [name, *options])
    if "--help-all" in options:
        NoiseParser(dataclass_types=list(types(name)), prog=f"hfnoise {name}").print_help()
        return 0
    run(name, *parse(f"hfnoise {name}", types(name), options, needed))
    return 0


def finish(trainer: Any, training: Any, script: Any) -> None:
    """Train a built Trainer, save it with its card, and push it if that was asked for.

    Args:
        trainer (`transformers.Trainer`): with the `create_model_card` of TRL.
        training (`TrainingArguments`): of the command line.
        script (`trl.ScriptArguments`): of the command line.
    """
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    save(trainer, training, script)
    share(trainer, training, script)
    trainer.end()


def save(trainer: Any, training: Any, script: Any) -> None:
    """Save what a Trainer has trained, with its card.

    Args:
        trainer (`transformers.Trainer`), training (`TrainingArguments`), script: as in [`finish`].
    """
    trainer.save_model(training.output_dir)
    trainer.create_model_card(model_name=Path(training.output_dir).name, dataset_name=hub_dataset(script))
    logger.info("model and card saved to %s", training.output_dir)


def share(trainer: Any, training: Any, script: Any) -> None:
    """Push what is saved, if that was asked for: the last act of a run, since the network may be gone by then.

    Args:
        trainer (`transformers.Trainer`), training (`TrainingArguments`), script: as in [`finish`].

    Raises:
        PushError: if the push did not go through; the command line ends with its message and exit code 1.
    """
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=hub_dataset(script))


def last_metrics(trainer: Any) -> dict[str, float]:
    """Return the metrics of the trained module, measured unless the last step was evaluated."""
    if trainer.eval_dataset is None:
        return {}
    history = reversed(trainer.state.log_history)
    last: dict[str, float] = next((one for one in history if "eval_loss" in one), {})
    found: dict[str, float] = last if last.get("step") == trainer.state.global_step else trainer.evaluate()
    return found


def build(trainer_class: Any, script: Any, training: Any, model: Any, data: tuple[Any, Any], **more: Any) -> Any:
    """Return a Trainer of TRL built from a command line.

    Args:
        trainer_class (`type`): the Trainer.
        script (`trl.ScriptArguments`), training (`TrainingArguments`), model (`trl.ModelConfig`): the command line.
        data (`tuple`): training and evaluation split.
        **more: further arguments of the Trainer.
    """
    from trl import get_peft_config, get_quantization_config

    from hfnoise.trainers.dataset_loading import resolve_model

    given = training.model_init_kwargs or {}
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **given,
    }
    return trainer_class(
        resolve_model(model.model_name_or_path),
        args=training,
        train_dataset=data[0],
        eval_dataset=data[1],
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
        **more,
    )


def hub_dataset(script: Any) -> str | None:
    """Return the dataset name for the card, unless it is a local path."""
    name = script.dataset_name
    return None if name is None or Path(name).exists() or ":" in name else str(name)


def launch_with_accelerate(config: str, arguments: list[str]) -> int:
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
    shipped = {Path(str(file)).stem: file for file in resources.files("trl.accelerate_configs").iterdir()}
    kinds = {
        stem: str((yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("distributed_type", "NO"))
        for stem, file in shipped.items()
        if str(file).endswith(".yaml")
    }
    known = sorted(stem for stem, kind in kinds.items() if kind in _ACCEPTED_ENGINES)
    if name in known:
        return str(shipped[name])
    if name in kinds:
        raise UsageError(
            f"--accelerate_config {name} means {kinds[name]}, under which no Trainer of hfnoise runs: it was never "
            f"verified. Use {', '.join(known)} or a YAML file of yours."
        )
    raise UsageError(f"--accelerate_config {name!r} is neither a file nor one of {', '.join(known)}.")
