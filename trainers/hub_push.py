"""A Trainer whose push breaks: what it trained is on the disk, and the error says so and how to push it again."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hfnoise.hf_sharing import FAILURES, explained_push, reason, upload_command

logger = logging.getLogger(__name__)

# As `transformers.Trainer.push_to_hub` leaves them out.
_STAYS_HERE = ("_*", f"{PREFIX_CHECKPOINT_DIR}-*")


class HubPushMixin:
    """Put in front of a Trainer: its pushes raise a [`~hfnoise.errors.PushError`] that says what to do.

    At construction, with `push_to_hub=True`, the repository is made: a Hub that cannot be reached, or a token that may
    not write, is refused before anything is trained. After training the model and its card are saved before anything
    is sent, so an error loses nothing.
    """

    args: Any
    hub_model_id: str | None
    push_in_progress: Any
    _saved_for_push = False

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, as the Trainer does.

        Raises:
            PushError: if the Hub cannot be reached or refuses it.
        """
        # The Trainer calls this in its own construction, where it has no state yet.
        trained = getattr(getattr(self, "state", None), "global_step", 0)
        kept = "What was trained is in memory." if trained else "Nothing was trained."
        again = (
            "start it again. Or leave push_to_hub out: what is saved can be pushed later, with "
            f"`{self._upload_command()}`."
        )
        with explained_push("The repository of this run", self._repository_name(), kept, again):
            super().init_hf_repo(token, private)  # type: ignore[misc]

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save and push, as the Trainer does.

        Args:
            commit_message, blocking, token, revision, private, **kwargs: of the Trainer.

        Raises:
            PushError: if the push did not go through; model and card are in `output_dir` then.
        """
        stock: Any = super()
        again = f"call push_to_hub() again, or run `{self._upload_command(revision, private)}`."
        kept = f"Model and card are saved in {str(self.args.output_dir)!r}."
        explained = explained_push("What was trained", self._repository_name(), kept, again)
        if self.hub_model_id is None:  # made here, since the stock method would make it before it saves
            try:
                stock.init_hf_repo(self.args.hub_token if token is None else token, private)
            except FAILURES:
                self.save_model(_internal_call=True)  # type: ignore[attr-defined]
                self.create_model_card(**kwargs)  # type: ignore[attr-defined]
                with explained:
                    raise
        self._saved_for_push = False
        try:
            return stock.push_to_hub(commit_message, blocking, token, revision, private, **kwargs)
        except FAILURES:
            if not self._saved_for_push:  # it is about this disk, not about the Hub
                raise
            with explained:
                raise

    def _finish_current_push(self) -> None:
        """Wait for the pushes of the run; the stock `push_to_hub` comes here when it has saved, before it uploads."""
        super()._finish_current_push()  # type: ignore[misc]
        self._saved_for_push = True
        self._report_failed_pushes()
        self.push_in_progress = None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._report_failed_pushes()
        super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def _report_failed_pushes(self) -> None:
        """Say which pushes of the run did not go through; the Trainer drops their errors."""
        jobs = getattr(getattr(self, "push_in_progress", None), "jobs", [])
        for error in [job.exception() for job in jobs if job.done()]:
            if error is not None:
                logger.warning(
                    "a push during training did not go through: %s. Training goes on; the push at its end sends the "
                    "model again.",
                    reason(error),
                )

    def _repository_name(self) -> str:
        return str(getattr(self, "hub_model_id", None) or self.args.hub_model_id or Path(self.args.output_dir).name)

    def _upload_command(self, revision: str | None = None, private: bool | None = None) -> str:
        revision = revision or getattr(self.args, "hub_revision", None)
        private = self.args.hub_private_repo if private is None else private
        return upload_command(self._repository_name(), self.args.output_dir, _STAYS_HERE, revision, private)
