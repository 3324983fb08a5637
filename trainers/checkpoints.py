"""Checkpoints that can be trusted: the last complete one, and refusal of corrupted or foreign ones."""

from __future__ import annotations

import logging
import re
import zipfile
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from hfnoise.errors import CheckpointError
from hfnoise.strict_json import parse_json

logger = logging.getLogger(__name__)


class NoiseRunState(TrainerCallback, ExportableState):
    """Writes into every checkpoint which run it belongs to: Trainer, losses, flip rate, beta."""

    def __init__(self, identity: dict[str, Any] | None = None) -> None:
        self.identity = identity or {}

    def state(self) -> dict[str, Any]:
        return {"args": {"identity": self.identity}, "attributes": {}}


def last_complete_checkpoint(output_dir: str) -> str:
    """Return the newest checkpoint folder that is whole; a killed process may leave a half-written one behind.

    Raises:
        CheckpointError: if there is none.
    """
    folder = Path(output_dir)
    numbered = [
        (int(match.group(1)), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    ]
    for _, path in sorted(numbered, reverse=True):
        try:
            read_checkpoint(path)
        except ValueError as error:
            logger.warning("skipping a checkpoint that is not whole: %s", error)
        else:
            return str(path)
    raise CheckpointError(f"no complete checkpoint in {output_dir!r}; start without resume_from_checkpoint.")


def check_checkpoint(path: str, identity: dict[str, Any], model: Any) -> dict[str, Any]:
    """Return the stored states of the callbacks of a checkpoint that is whole and of this run and this model.

    Raises:
        CheckpointError: which file is damaged, or what differs from this run, and what to do.
    """
    states = check_identity(path, identity)
    _check_weights(Path(path), model)
    return states


def check_identity(path: str, identity: dict[str, Any]) -> dict[str, Any]:
    """Return the stored states of the callbacks of a checkpoint that is whole and of this run.

    Raises:
        CheckpointError: which file is damaged, or what differs from this run, and what to do.
    """
    state = read_checkpoint(Path(path))
    states = state.get("stateful_callbacks")
    stored = states.get("NoiseRunState") if isinstance(states, dict) else None
    arguments = stored.get("args") if isinstance(stored, dict) else None
    written = arguments.get("identity") if isinstance(arguments, dict) else None
    if not isinstance(states, dict) or not isinstance(written, dict):
        raise CheckpointError(
            f"checkpoint {path!r} was not written by a Trainer of hfnoise: its losses are unknown. To start from its "
            "weights, pass the folder as the model and do not resume."
        )
    differing = [name for name in identity if written.get(name) != identity[name]]
    if differing:
        listed = ", ".join(f"{name}: {written.get(name)!r} there, {identity[name]!r} here" for name in differing)
        raise CheckpointError(
            f"checkpoint {path!r} belongs to another run ({listed}). Resume with the settings it was written with, or "
            "start a new run in another output_dir."
        )
    return states


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the trainer state of a checkpoint folder after checking that every file of it is whole.

    Raises:
        CheckpointError: naming the missing or damaged file.
    """
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {str(path)!r} is not a folder.")
    try:
        # The history of a run may hold NaN, of an evaluation that has none of something.
        state = parse_json((path / "trainer_state.json").read_text(encoding="utf-8"), finite=False)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {str(path)!r}: trainer_state.json is missing or damaged ({error})."
        ) from None
    weights = list(path.glob("*.safetensors"))
    if not weights:
        raise CheckpointError(f"checkpoint {str(path)!r} holds no *.safetensors weights.")
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"checkpoint {str(path)!r}: {file.name} is damaged ({error}).") from None
    for name in ("optimizer.pt", "scheduler.pt"):
        file = path / name
        if not file.is_file() or not zipfile.is_zipfile(file):
            raise CheckpointError(
                f"checkpoint {str(path)!r}: {name} is missing or damaged, so the run cannot go on as it was. Use an "
                "older checkpoint; save_only_model=True writes none that can be resumed."
            )
    found: dict[str, Any] = state
    return found


def _check_weights(path: Path, model: Any) -> None:
    """Refuse weights that do not fit the model: transformers only warns of names it does not know."""
    if (path / "adapter_config.json").is_file() != is_peft_model(model):
        raise CheckpointError(
            f"checkpoint {str(path)!r} and the model disagree on PEFT: one has adapters and the other has none. Build "
            "the trainer with the peft_config the checkpoint was trained with."
        )
    if is_peft_model(model):
        return  # PEFT renames the tensors on saving and refuses wrong shapes itself
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                shape = tuple(tensors.get_slice(name).get_shape())
                if expected.get(name, shape) != shape or name not in expected:
                    raise CheckpointError(
                        f"checkpoint {str(path)!r} is of another model: tensor {name!r} of shape {shape} there, "
                        f"{expected.get(name, 'absent')} here. Build the trainer with the model it was trained from."
                    )
