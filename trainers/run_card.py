"""The card of a run beside all weights that a Trainer writes, in the place of what PEFT, TRL and transformers write.

Who else writes `README.md`, and when: `PeftModel.save_pretrained`, at every save of an adapter; `DPOTrainer` and
`SFTTrainer` of TRL, at every checkpoint; `transformers.Trainer`, at every push. All of them end here.
"""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.trainer_utils import HubStrategy

from hfnoise.trainers.hub_push import HubPushMixin

logger = logging.getLogger(__name__)

# How transformers calls what TRL and our cards call dataset_name; the identifiers on the Hub go before other names.
_DATASET_NAMES = ("dataset", "dataset_tags", "dataset_name")
_TAKEN = ("model_name", "dataset_name", "tags", "language", "license", "finetuned_from")


class RunCardMixin(HubPushMixin):
    """The part of our Trainers that writes `README.md`; a family says by `run_card` what is on it.

    It comes with the pushes that send the card, so that both stand in one order in front of every Trainer.
    """

    args: Any
    state: Any
    _card_values: dict[str, Any] | None = None
    _in_checkpoint = False
    # Where, in the history, the entries begin that are of the best weights, once these were loaded.
    _best_from: int | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does; arguments and result are those of the Trainer."""
        self._best_from = None
        output = super().train(*args, **kwargs)  # type: ignore[misc]
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._best_from = len(self.state.log_history)
        return output

    def evaluation_log(self) -> list[dict[str, Any]]:
        """Return the part of the history that is of the weights as they are now: after `load_best_model_at_end`, the
        evaluation by which they were chosen and those that came after the training."""
        history: list[dict[str, Any]] = self.state.log_history
        if self._best_from is None:
            return history
        best = [entry for entry in history[: self._best_from] if entry.get("step") == self.state.best_global_step]
        return best + history[self._best_from :]

    def steps_text(self) -> str:
        """Return how many steps were trained, and which of them the weights are of where it is not the last."""
        steps, best = self.state.global_step, self.state.best_global_step
        return f"{steps}" if self._best_from is None or best == steps else f"{steps}; the weights are of step {best}"

    def run_card(self, **given: Any) -> ModelCard | None:
        """Return the card of the run as it is now; `None` leaves the stock one, as here, where there is no family.

        Args:
            **given: those of `model_name`, `dataset_name`, `tags`, `language`, `license`, `finetuned_from` that
                `create_model_card` was given.
        """
        return None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card to `output_dir/README.md`; takes the arguments of the stock Trainer's method.

        What is given stays valid for cards that are written later, with the weights. Of the arguments of
        `transformers.Trainer`, `tasks` and `dataset_args` are read from the run instead.

        Raises:
            TypeError: for an argument that neither transformers nor TRL knows.
        """
        if not self.is_world_process_zero():  # type: ignore[attr-defined]
            return
        self._card_values = {**(self._card_values or {}), **self._known_card_values(args, kwargs)}
        # TRL's Trainers come here before each checkpoint.
        write = self._try_card if self._in_checkpoint else self._write_card
        if not write(Path(self.args.output_dir)):
            super().create_model_card(*args, **kwargs)  # type: ignore[misc]

    def _known_card_values(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments under the names of our card; positional ones in the order of the stock class."""
        stock = inspect.signature(super().create_model_card)  # type: ignore[misc]
        known = {*stock.parameters, *_TAKEN}
        unknown = sorted(set(kwargs) - known)
        if unknown:
            raise TypeError(f"create_model_card has no argument {unknown[0]!r}; it takes {', '.join(sorted(known))}.")
        given = {**stock.bind_partial(*args).arguments, **kwargs}
        for name in _DATASET_NAMES:
            if given.get(name):
                given["dataset_name"] = given[name]
        return {name: given[name] for name in _TAKEN if given.get(name)}

    def _write_card(self, folder: Path) -> bool:
        """Write the card, if it is ours; return whether it is."""
        card = self.run_card(**(self._card_values or {}))
        if card is not None:
            folder.mkdir(parents=True, exist_ok=True)
            card.save(folder / "README.md")
        return card is not None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save as the Trainer does, with our card last, over the one that PEFT writes."""
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        if self.args.should_save:
            self._try_card(Path(output_dir or self.args.output_dir))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._in_checkpoint = True
        try:
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._in_checkpoint = False

    def _try_card(self, folder: Path) -> bool:
        """Write the card in mid-run, if it is ours: one that cannot be written costs no weights and no step."""
        try:
            return self._write_card(folder)
        except Exception as error:  # of a subclass's own card too, whatever it is
            logger.warning("README.md of %s is not that of this run, which could not be written: %s", folder, error)
            return True

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push as the Trainer does, which copies the weights of a checkpoint to `output_dir` but no card."""
        if self.args.hub_strategy != HubStrategy.END and self.is_world_process_zero():  # type: ignore[attr-defined]
            self._try_card(Path(self.args.output_dir))
        super()._push_from_checkpoint(checkpoint_folder)
