"""A push to the Hub is one commit, and one that breaks says what is kept where and how to push again."""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, create_repo
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

from hfnoise.errors import PushError

# What the clients raise: an answer that is none, no network, and RuntimeError for a large file that did not arrive.
FAILURES = (HTTPError, OSError, RuntimeError)
_PUSH_OPTIONS = ("repo_id", "commit_message", "private", "create_pr", "token")


@contextmanager
def explained_push(what: str, repo_id: str, kept: str, again: str) -> Iterator[None]:
    """Turn what breaks a push inside of the block into a [`PushError`] that says what to do.

    Args:
        what (`str`): what is pushed, such as `"NPNet"`.
        repo_id (`str`): where to.
        kept (`str`): a sentence: what is not lost, and where it is.
        again (`str`): how to push again, after "to push it again".

    Raises:
        PushError: for a push that did not go through; the original error is its cause.

    Example:
        >>> from hfnoise.hf_sharing import explained_push
        >>> try:
        ...     with explained_push("NPNet", "me/net", "It is in memory.", "call push_to_hub."):
        ...         raise OSError("connection refused")
        ... except OSError as error:
        ...     print(str(error).split(". ")[0])
        NPNet was not pushed to me/net: connection refused
    """
    try:
        yield
    except PushError:
        raise
    except FAILURES as error:
        raise PushError(
            f"{what} was not pushed to {repo_id}: {reason(error)}. {kept} On the Hub {repo_id} holds all of it or "
            f"nothing of it: a push is one commit. {remedy(error)} push again: {again}"
        ) from error


def reason(error: BaseException) -> str:
    """Return what failed, in one line without a full stop: of an answer its status, the request and what it says.

    Example:
        >>> from hfnoise.hf_sharing import reason
        >>> reason(OSError("no space left.\\nmore"))
        'no space left'
    """
    lines = [_line(error)]
    # Of a large file: which it was, and what became of it.
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        lines.append(_line(error.__cause__))
    return ": ".join(lines)


def _line(error: BaseException) -> str:
    if isinstance(error, HfHubHTTPError):
        answer = error.response
        said = (error.server_message or "").strip().splitlines()
        text = f"{answer.status_code} {answer.reason_phrase} from {answer.request.method} {answer.request.url.path}"
        return f"{text}: {said[0].rstrip('. ')}" if said else text
    words = str(error).strip().splitlines()
    return words[0].rstrip(".: ") if words else type(error).__name__


def remedy(error: BaseException) -> str:
    """Return what must be done before another push, as the first half of a sentence.

    Example:
        >>> from hfnoise.hf_sharing import remedy
        >>> remedy(OSError("connection refused"))
        'When the Hub can be reached,'
    """
    found = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
    status = getattr(getattr(found, "response", None), "status_code", None)
    if isinstance(found, OSError) and found.errno in (errno.ENOSPC, errno.EDQUOT):
        return "Make room on the disk, and"
    if isinstance(found, OfflineModeIsEnabled):
        return "Unset HF_HUB_OFFLINE and"
    if isinstance(found, (LocalTokenNotFoundError, RepositoryNotFoundError)) or status in (401, 403):
        return "Log in with a token that may write there (`hf auth login`, or HF_TOKEN) and"
    if isinstance(found, HfHubHTTPError) and status is not None and status < 500:
        return "Mend that, and"
    return "When the Hub can be reached,"


def upload_command(
    repo_id: str,
    folder: str | PathLike[str],
    exclude: Sequence[str] = (),
    revision: str | None = None,
    private: bool | None = None,
    repo_type: str = "model",
) -> str:
    """Return the command of the Hub's client that uploads a folder.

    Args:
        repo_id (`str`), folder (`str` or `os.PathLike`): where to, and what.
        exclude (sequence of `str`): patterns of files that stay here.
        revision (`str`, *optional*): branch.
        private (`bool`, *optional*): of a repository that is made.
        repo_type (`str`, defaults to `"model"`): or `"dataset"`.

    Example:
        >>> from hfnoise.hf_sharing import upload_command
        >>> upload_command("me/model", "run", exclude=["checkpoint-*"])
        "hf upload me/model run . --exclude 'checkpoint-*'"
    """
    words = ["hf", "upload", repo_id, os.fspath(folder), "."]
    words += [] if repo_type == "model" else ["--repo-type", repo_type]
    words += [] if revision is None else ["--revision", revision]
    words += ["--private"] if private else []
    for pattern in exclude:
        words += ["--exclude", pattern]
    return shlex.join(words)


def upload_in_one_commit(
    repo_id: str,
    folder: str | PathLike[str],
    commit_message: str,
    *,
    path_in_repo: str | None = None,
    ignore_patterns: Sequence[str] = (),
    delete_patterns: Sequence[str] | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> CommitInfo:
    """Upload a folder to a repository of the Hub in exactly one commit, whatever its size; return the commit.

    `huggingface_hub.upload_folder` makes several commits of a folder with many files, and of one with more than 20
    when the first attempt fails: a model could stand there in parts. Files that are as they were are not sent.

    Args:
        repo_id (`str`): which is there.
        folder (`str` or `os.PathLike`): of files.
        commit_message (`str`): first line.
        path_in_repo (`str`, *optional*): folder there.
        ignore_patterns (sequence of `str`): of files that stay here.
        delete_patterns (sequence of `str`, *optional*): of files there that go, unless they are uploaded.
        revision (`str`, *optional*): branch.
        create_pr (`bool`, defaults to `False`): open a pull request instead.
        token (`str`, *optional*): of the Hub.

    Raises:
        ValueError: if the folder holds nothing to upload.
    """
    api, root = HfApi(token=token), Path(folder)
    start = f"{path_in_repo.strip('/')}/" if path_in_repo else ""
    here = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    here = list(filter_repo_objects(here, ignore_patterns=[*DEFAULT_IGNORE_PATTERNS, *ignore_patterns]))
    if not here:
        raise ValueError(f"{str(folder)!r} holds no file to upload; give a folder that something was saved to.")
    gone: list[str] = []
    if delete_patterns:
        there = [
            name.removeprefix(start)
            for name in api.list_repo_files(repo_id, revision=revision)
            if name.startswith(start)
        ]
        gone = [name for name in filter_repo_objects(there, allow_patterns=list(delete_patterns)) if name not in here]
    operations: list[Any] = [CommitOperationDelete(start + name) for name in gone if name != ".gitattributes"]
    operations += [CommitOperationAdd(start + name, root / name) for name in here]
    return api.create_commit(
        repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
    )  # fmt: skip


class ExplainedPush:
    """Put in front of a class with diffusers' `push_to_hub`: a push that breaks raises a [`PushError`].

    Example:
        >>> from hfnoise import NPNet
        >>> from hfnoise.hf_sharing import ExplainedPush
        >>> issubclass(NPNet, ExplainedPush)
        True
    """

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Push as the stock class does, in one commit.

        Args:
            repo_id (`str`): name on the Hub.
            *args, **kwargs: of the stock method.

        Raises:
            PushError: if the push did not go through.
        """
        again = (
            f"call push_to_hub({repo_id!r}) again (large files that arrived are not sent twice), or save_pretrained() "
            f"to a folder and run `{upload_command(repo_id, 'FOLDER')}`."
        )
        with explained_push(type(self).__name__, repo_id, "It is in memory as it was.", again):
            return super().push_to_hub(repo_id, *args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as the stock class does, and push the folder with its card where `push_to_hub=True` asks for it.

        Args:
            save_directory (`str` or `os.PathLike`): made if need be.
            *args, **kwargs: of the stock method; of a push `repo_id` (the name of the folder by default),
                `commit_message`, `private`, `create_pr` and `token`.

        Raises:
            PushError: if the push did not go through; what is saved is in `save_directory`.
        """
        pushes = kwargs.pop("push_to_hub", False) and kwargs.get("is_main_process", True)
        push = {name: kwargs.pop(name) for name in _PUSH_OPTIONS if name in kwargs} if pushes else {}
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if not pushes:
            return
        folder, private = os.fspath(save_directory), push.pop("private", None)
        repo_id = push.pop("repo_id", None) or Path(folder).absolute().name
        command = upload_command(repo_id, folder, private=private)
        with explained_push(type(self).__name__, repo_id, f"It is saved in {folder!r}.", f"run `{command}`."):
            repo_id = create_repo(repo_id, exist_ok=True, private=private, token=push.get("token")).repo_id
            self._write_blank_card(folder, repo_id, push.get("token"))
            self._upload_folder(folder, repo_id, **push)

    def _write_blank_card(self, folder: str, repo_id: str, token: Any) -> None:
        """Write the card that is on the Hub, or a blank one that the upload fills in."""
        from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card

        populate_model_card(load_or_create_model_card(repo_id, token=token)).save(Path(folder) / "README.md")

    def _upload_folder(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Upload as the stock class does, with a card of ours in the place of a blank one."""
        from hfnoise.cards.component import replace_blank_card

        replace_blank_card(self, working_dir, repo_id)
        return super()._upload_folder(working_dir, repo_id, *args, **kwargs)  # type: ignore[misc]
