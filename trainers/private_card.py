"""Report and card of a private Trainer: beside all weights that it writes, in the place of what PEFT and TRL write."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from hfnoise.trainers.private_report import privacy_report, write_report

# How transformers calls what TRL and our card call dataset_name; the identifiers on the Hub go before other names.
_DATASET_NAMES = ("dataset", "dataset_tags", "dataset_name")
_TAKEN = ("model_name", "dataset_name", "tags", "language", "license")


class PrivateCardMixin:
    """The parts of [`~hfnoise.DPTrainerMixin`] that write `dp_report.json` and `README.md`.

    The report is written before the weights: a process that is killed in between leaves a report without weights, or
    one that states more than older weights released, but no weights without a report.
    """

    args: Any
    _is_private: bool
    _card_values: dict[str, Any] | None = None

    def privacy_report(self) -> dict[str, Any]:
        """Return the privacy report of the weights as they are now; see `privacy_report` of `private_report`."""
        return privacy_report(self)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the privacy card to `output_dir/README.md`; takes the arguments of the stock Trainer's method.

        What is given stays valid for cards that are written later, with the weights. Of the arguments of
        `transformers.Trainer`, `finetuned_from`, `tasks` and `dataset_args` are read from the run instead.

        Raises:
            TypeError: for an argument that neither transformers nor TRL knows.
        """
        if not self._is_private:
            super().create_model_card(*args, **kwargs)  # type: ignore[misc]
            return
        if self.is_world_process_zero():  # type: ignore[attr-defined]
            self._card_values = {**(self._card_values or {}), **self._known_card_values(args, kwargs)}
            self._write_card(Path(self.args.output_dir))

    def _known_card_values(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments under the names of our card; positional ones in the order of the stock class."""
        stock = inspect.signature(super().create_model_card)  # type: ignore[misc]
        known = {*stock.parameters, *_TAKEN}
        unknown = sorted(set(kwargs) - known)
        if unknown:
            raise TypeError(f"create_model_card has no argument {unknown[0]!r}; it takes {', '.join(sorted(known))}.")
        given = {**stock.bind(*args).arguments, **kwargs}
        for name in _DATASET_NAMES:
            if given.get(name):
                given["dataset_name"] = given[name]
        return {name: given[name] for name in _TAKEN if given.get(name)}

    def _write_card(self, folder: Path) -> None:
        from hfnoise.privacy.hf_card import privacy_card

        folder.mkdir(parents=True, exist_ok=True)
        privacy_card(self, **(self._card_values or {})).save(folder / "README.md")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save as the Trainer does, with the privacy report first and our card last, over the one that PEFT writes."""
        folder = Path(output_dir or self.args.output_dir)
        if self._is_private:
            write_report(self, folder)
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        if self._is_private and self.is_world_process_zero():  # type: ignore[attr-defined]
            self._write_card(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push as the Trainer does, which copies the weights of a checkpoint to `output_dir` but no report."""
        if self._is_private and self.is_world_process_zero():  # type: ignore[attr-defined]
            folder = Path(self.args.output_dir)
            write_report(self, folder)
            self._write_card(folder)
        super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]
