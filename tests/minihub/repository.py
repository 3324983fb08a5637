"""What a Hub stores: files, commits and references. No HTTP here."""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# As in the .gitattributes that the Hub gives to new repositories.
LARGE_SUFFIXES = (
    ".arrow", ".bin", ".ckpt", ".gguf", ".npy", ".npz", ".onnx", ".parquet", ".pkl", ".png", ".pt", ".pth",
    ".safetensors", ".zip",
)  # fmt: skip
LARGE_SIZE = 10 * 2**20


class HubError(Exception):
    """An answer that is not a success: HTTP status, the code that clients turn into an exception class, and more."""

    def __init__(self, status: int, code: str, message: str, **details: str):
        super().__init__(message)
        self.status, self.code, self.message, self.details = status, code, message, details


@dataclass(frozen=True)
class File:
    """One version of a file; `is_large` ones travel by Git LFS and are named by SHA-256 instead of the git hash."""

    data: bytes
    is_large: bool = False

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def oid(self) -> str:
        return hashlib.sha256(self.data).hexdigest() if self.is_large else self.git_oid

    def describe(self, path: str) -> dict[str, Any]:
        """Return the file's entry in a listing."""
        entry = {"type": "file", "path": path, "size": len(self.data), "oid": self.git_oid}
        if self.is_large:
            entry["lfs"] = {"oid": self.oid, "size": len(self.data), "pointerSize": 130}
        return entry


Tree = Mapping[str, File]


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    parent: str | None
    tree: Tree


class Repository:
    """Commits, and references by their full names: refs/heads/main, refs/tags/v1, refs/pr/1."""

    def __init__(self) -> None:
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self._counter = itertools.count()
        self.add_commit("refs/heads/main", "initial commit", {".gitattributes": File(b"")}, parent=None)

    def add_commit(self, ref: str, title: str, tree: Tree, parent: str | None) -> Commit:
        oid = hashlib.sha1(f"{next(self._counter)} {ref} {title}".encode()).hexdigest()
        commit = Commit(oid, title, parent, dict(tree))
        self.commits[oid], self.refs[ref] = commit, oid
        return commit

    def full_ref(self, revision: str) -> str | None:
        """Return the full name of a branch, tag or pull request given in any form, None if there is none."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def at(self, revision: str) -> Commit:
        """Return the commit that a branch, tag, pull request or commit hash stands for."""
        oid = self.refs.get(self.full_ref(revision) or "", revision)
        if oid not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]

    def history(self, revision: str = "main") -> list[Commit]:
        """Return the commits of a revision, newest first."""
        commits = [self.at(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def add_ref(self, ref: str, revision: str) -> None:
        if ref in self.refs:
            raise HubError(409, "RefExists", f"Reference already exists: {ref}")
        self.refs[ref] = self.at(revision).oid

    def next_pull_request(self) -> int:
        return 1 + sum(ref.startswith("refs/pr/") for ref in self.refs)


def is_large(path: str, size: int) -> bool:
    return path.endswith(LARGE_SUFFIXES) or size > LARGE_SIZE


def apply_operations(tree: Tree, operations: Iterable[dict[str, Any]], large_files: Mapping[str, bytes]) -> Tree:
    """Return the tree after the operations of a commit; the old one stays, so that a refused commit changes nothing.

    Args:
        tree: the parent's files.
        operations: the lines of the commit after its header, each with `key` and `value`.
        large_files: what was uploaded by Git LFS, by SHA-256.
    """
    changed = dict(tree)
    for operation in operations:
        key, value = operation["key"], operation["value"]
        path = value["path"]
        if key == "file":
            changed[path] = File(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in large_files:
                raise HubError(400, "LfsObjectMissing", f"{path} was not uploaded before the commit")
            changed[path] = File(large_files[value["oid"]], is_large=True)
        elif key == "deletedFile":
            if path not in changed:
                raise HubError(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
            del changed[path]
        elif key == "deletedFolder":
            folder = path.rstrip("/") + "/"
            changed = {path: file for path, file in changed.items() if not path.startswith(folder)}
        else:
            raise HubError(400, "UnknownOperation", f"unknown operation {key!r}")
    return changed


def list_folder(tree: Tree, folder: str = "", recursive: bool = False) -> list[dict[str, Any]]:
    """Return the entries below a folder, folders first.

    Raises:
        HubError: if the folder is not there; an empty list would make `Dataset.push_to_hub` fail.
    """
    start = folder.strip("/") + "/" if folder.strip("/") else ""
    files: list[dict[str, Any]] = []
    folders: set[str] = set()
    for path in sorted(tree):
        if not path.startswith(start):
            continue
        parents = path.removeprefix(start).split("/")[:-1]
        depths = range(1, len(parents) + 1) if recursive else range(1, min(len(parents), 1) + 1)
        folders.update(start + "/".join(parents[:depth]) for depth in depths)
        if recursive or not parents:
            files.append(tree[path].describe(path))
    if start and not files and not folders:
        raise HubError(404, "EntryNotFound", f"{folder} does not exist")
    return [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)] + files
