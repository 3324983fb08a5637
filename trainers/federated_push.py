"""How a federation is pushed: adapter, report and card in one commit, and nothing of the clients."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfnoise.hf_sharing import explained_push, upload_command, upload_in_one_commit

STATE_FOLDER = "federation"
# What the clients remember, and logs.
_STAYS_HERE = (f"{STATE_FOLDER}/*", "runs/*", "checkpoint-*")


class FederatedPushMixin:
    """The part of [`~hfnoise.FedSVDTrainer`] that talks to the Hub."""

    args: Any

    if TYPE_CHECKING:

        def save_model(self) -> None:
            """Of the Trainer."""

        def create_model_card(
            self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
        ) -> None:
            """Of the Trainer."""

    def push_to_hub(
        self,
        commit_message: str = "Federated LoRA adapter",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **card: Any,
    ) -> Any:
        """Save, and upload adapter, report and card; nothing of the clients' folders.

        Args:
            commit_message (`str`): of the commit.
            blocking (`bool`, defaults to `True`): whether to wait until all is uploaded.
            token (`str`, *optional*): of the Hub; `args.hub_token` by default.
            revision (`str`, *optional*): branch; `args.hub_revision` by default.
            **card: `model_name`, `dataset_name`, `tags`, of the card.

        Raises:
            TypeError: for other names.
            PushError: if the push did not go through; adapter, report and card are in `output_dir` then.
        """
        from huggingface_hub import HfApi

        if card:
            self.create_model_card(**card)
        self.save_model()
        api = HfApi(token=token or self.args.hub_token)
        folder, branch = str(self.args.output_dir), revision or getattr(self.args, "hub_revision", None)
        kept = f"Adapter, report and card are saved in {folder!r}."

        def push() -> Any:
            with self._explained_push(kept, "call push_to_hub() again, or", branch):
                repo_id = self._create_repo(api.token)
                if branch is not None:
                    api.create_branch(repo_id, branch=branch, exist_ok=True)
                return upload_in_one_commit(
                    repo_id, folder, commit_message, ignore_patterns=_STAYS_HERE, revision=branch, token=api.token
                )  # fmt: skip

        return push() if blocking else api.run_as_future(push)

    def init_hf_repo(self, token: str | None = None) -> None:
        """Make the repository of `push_to_hub`, so that a Hub that refuses it does so before training.

        Args:
            token (`str`, *optional*): of the Hub; `args.hub_token` by default.

        Raises:
            PushError: if the Hub cannot be reached or refuses it.
        """
        with self._explained_push("Nothing was trained.", "start it again, or leave push_to_hub out and, later,"):
            self._create_repo(token or self.args.hub_token)

    def _create_repo(self, token: Any) -> str:
        from huggingface_hub import create_repo

        return create_repo(self._repository(), private=self.args.hub_private_repo, token=token, exist_ok=True).repo_id

    def _repository(self) -> str:
        return str(self.args.hub_model_id or Path(self.args.output_dir).name)

    def _explained_push(self, kept: str, again: str, branch: str | None = None) -> AbstractContextManager[None]:
        name, private = self._repository(), self.args.hub_private_repo
        command = upload_command(name, str(self.args.output_dir), _STAYS_HERE, branch, private)
        return explained_push("The federation's adapter", name, kept, f"{again} run `{command}`.")
