"""Report and card of a private Trainer: beside all weights that it writes, in the place of what PEFT and TRL write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfnoise.trainers.private_report import privacy_report, write_report
from hfnoise.trainers.run_card import RunCardMixin


class PrivateCardMixin(RunCardMixin):
    """The parts of [`~hfnoise.DPTrainerMixin`] that write `dp_report.json` and `README.md`.

    The report is written before the weights: a process that is killed in between leaves a report without weights, or
    one that states more than older weights released, but no weights without a report.
    """

    args: Any
    _is_private: bool

    def privacy_report(self) -> dict[str, Any]:
        """Return the privacy report of the weights as they are now; see `privacy_report` of `private_report`."""
        return privacy_report(self)

    def run_card(self, **given: Any) -> Any:
        """Return the privacy card; that of the class which was made private, once it no longer is."""
        if not self._is_private:
            return super().run_card(**given)
        from hfnoise.privacy.hf_card import privacy_card

        return privacy_card(self, **given)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save as the Trainer does, with the privacy report first."""
        if self._is_private:
            write_report(self, Path(output_dir or self.args.output_dir))
        super()._save(output_dir, state_dict)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push as the Trainer does, with the privacy report beside the weights that it copies."""
        if self._is_private and self.is_world_process_zero():  # type: ignore[attr-defined]
            write_report(self, Path(self.args.output_dir))
        super()._push_from_checkpoint(checkpoint_folder)
