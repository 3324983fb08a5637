"""The callback that walks a run through its bit schedule."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hfnoise.errors import CheckpointError
from hfnoise.strict_json import parse_json
from hfnoise.trainers.qat_model import current_bits, set_bits
from hfnoise.trainers.qat_schedule import BitSchedule

logger = logging.getLogger(__name__)


class BitScheduleCallback(TrainerCallback):
    """Sets the bits of each step from the number of steps that are done, before its first forward pass.

    So all ranks agree, and a resumed run does. A checkpoint or an evaluation after the last step of a phase is still
    at the bits of that phase.

    Args:
        model (`torch.nn.Module`): the unwrapped model.
        schedule ([`BitSchedule`]).
    """

    def __init__(self, model: Any, schedule: BitSchedule) -> None:
        self.model, self.schedule = model, schedule
        self.resumed_from: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a schedule that does not fit the steps or the checkpoint; set the bits of the first step."""
        bits = self.schedule.at(state.global_step, state.max_steps)
        if self.resumed_from is not None and state.global_step > 0:
            self._check_checkpoint(Path(self.resumed_from), state)
        self._set(bits, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the bits of this step; at the first one of a phase forget the best checkpoint of the one before.

        (More bits have the lower loss: the best checkpoint would be one of the wrong width.)
        """
        if state.global_step in self.schedule.starts(state.max_steps)[1:]:
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        self._set(self.schedule.at(state.global_step, state.max_steps), state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Warn if training ended before the last phase."""
        last = self.schedule.phases[-1]
        if current_bits(self.model) != (last.weight_bits, last.activation_bits):
            logger.warning(
                "training ended at step %d of %d, before bit_schedule %r did: the model is at %s bits, not at %s.",
                state.global_step, state.max_steps, self.schedule.text, current_bits(self.model)[0], last.weight_bits,
            )  # fmt: skip

    def _set(self, bits: tuple[float, float | None], step: int) -> None:
        if current_bits(self.model) != bits:
            logger.info("step %d: bits of weights %s, of activations %s", step, bits[0], bits[1] or "not quantised")
            set_bits(self.model, *bits)

    def _check_checkpoint(self, folder: Path, state: Any) -> None:
        path = folder / "config.json"
        stored = parse_json(path.read_text(encoding="utf-8")).get("quantization_config") if path.is_file() else None
        expected = self.schedule.at(state.global_step - 1, state.max_steps)
        if stored is not None and (stored["weight_bits"], stored["activation_bits"]) != expected:
            raise CheckpointError(
                f"{str(folder)!r} is at {stored['weight_bits']} bits after {state.global_step} steps, and "
                f"bit_schedule {self.schedule.text!r} over {state.max_steps} steps has {expected[0]} there. "
                "Resume with the schedule and the number of steps that the run began with."
            )
