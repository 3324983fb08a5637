"""One function per endpoint of the Hub that the clients use; `ENDPOINTS` lists them in the order they are tried."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import yaml

from tests.minihub.repository import HubError, Repository, apply_operations, is_large, list_folder

if TYPE_CHECKING:
    from tests.minihub.server import MiniHub

USER = "tester"
DATE = "2026-01-01T00:00:00.000Z"
URL_PREFIXES = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")


@dataclass(frozen=True)
class Response:
    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)


def answer(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})


ENDPOINTS: list[tuple[tuple[str, ...], str, Callable[..., Response]]] = []
# A repository's name, with the user or, as for the oldest models of the real Hub, without.
_NAME = r"(?P<name>[^/]+(?:/[^/]+)?)"
_API = rf"/api/(?P<kind>models|datasets|spaces)/{_NAME}"
_WEB = rf"/(?:(?P<kind>datasets|spaces)/)?{_NAME}"
_REVISION = r"/(?P<revision>[^/]+)"


def endpoint(methods: str, pattern: str, writes: bool = False) -> Callable[..., Any]:
    """Enter a function into the list of endpoints; one that writes asks for a token."""

    def enter(function: Callable[..., Response]) -> Callable[..., Response]:
        def checked(hub: MiniHub, request: Request, **parts: str) -> Response:
            if writes and not request.headers.get("Authorization", "").startswith("Bearer "):
                raise HubError(401, "Unauthorized", "Invalid username or password.")
            return function(hub, request, **parts)

        ENDPOINTS.append((tuple(methods.split()), pattern, checked))
        return function

    return enter


def page(hub: MiniHub, kind: str, name: str) -> str:
    return f"{hub.url}/{URL_PREFIXES[kind]}{name}"


def card_of(text: str) -> dict[str, Any]:
    """Return the YAML block of a README.

    Raises:
        ValueError: if it cannot be read or is no mapping.
    """
    match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", text, re.DOTALL)
    try:
        card = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    if not isinstance(card, dict):
        raise ValueError("metadata must be a mapping")
    return card


@endpoint("GET", "/api/whoami-v2", writes=True)
def whoami(hub: MiniHub, request: Request) -> Response:
    token = {"type": "access_token", "accessToken": {"role": "write"}}
    return answer({"name": USER, "fullname": USER, "type": "user", "orgs": [], "auth": token})


@endpoint("HEAD GET POST", "/api/telemetry/.*")
def telemetry(hub: MiniHub, request: Request) -> Response:
    return answer({})


@endpoint("POST", "/minihub/failures")
def break_next(hub: MiniHub, request: Request) -> Response:
    """No endpoint of the Hub: how a process asks for failures of its own requests."""
    return answer(hub.wish(request.json()))


@endpoint("POST DELETE", "/api/repos/(?P<action>create|delete)", writes=True)
def create_or_delete(hub: MiniHub, request: Request, action: str) -> Response:
    wish = request.json()
    kind, name = f"{wish.get('type') or 'model'}s", f"{wish.get('organization') or USER}/{wish['name']}"
    url = page(hub, kind, name)
    if action == "delete":
        hub.repository(name, kind)
        del hub.repositories[kind, name]
    elif (kind, name) in hub.repositories:
        # The client reads the address from the error.
        raise HubError(409, "RepoExists", "You already created this repository", url=url)
    else:
        hub.repositories[kind, name] = Repository()
    return answer({"url": url, "name": name, "id": name})


@endpoint("POST", "/api/validate-yaml")
def validate_card(hub: MiniHub, request: Request) -> Response:
    try:
        card_of(request.json()["content"])
    except ValueError as error:
        return answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
    return answer({"errors": [], "warnings": []})


@endpoint("POST", f"{_API}/preupload{_REVISION}", writes=True)
def upload_modes(hub: MiniHub, request: Request, kind: str, name: str, revision: str) -> Response:
    """Say how each file travels, and what it is now: the client leaves out a file whose hash has not changed."""
    commit = hub.repository(name, kind).at(revision)
    files = []
    for file in request.json()["files"]:
        mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
        old = commit.tree.get(file["path"])
        files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": old and old.oid})
    return answer({"files": files, "commitOid": commit.oid})


@endpoint("POST", rf"{_WEB}\.git/info/lfs/objects/batch", writes=True)
def large_file_batch(hub: MiniHub, request: Request, name: str, kind: str = "models") -> Response:
    objects = [{"oid": wish["oid"], "size": wish["size"], "authenticated": True} for wish in request.json()["objects"]]
    for item in objects:
        # Without actions the client knows that the file is here.
        if item["oid"] not in hub.large_files:
            upload = {"href": f"{hub.url}/lfs/{item['oid']}", "header": {}}
            item["actions"] = {"upload": upload, "verify": {"href": f"{hub.url}/lfs-verify", "header": {}}}
    return answer({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})


@endpoint("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})")
def large_file(hub: MiniHub, request: Request, oid: str) -> Response:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, "BadOid", "the file is not the one that was announced")
    hub.large_files[oid] = request.body
    return answer({})


@endpoint("POST", "/lfs-verify")
def verify_large_file(hub: MiniHub, request: Request) -> Response:
    return answer({}, 200 if request.json()["oid"] in hub.large_files else 404)


@endpoint("POST", f"{_API}/commit{_REVISION}", writes=True)
def commit(hub: MiniHub, request: Request, kind: str, name: str, revision: str) -> Response:
    repository = hub.repository(name, kind)
    parent = repository.at(revision)
    header, *operations = [json.loads(line) for line in request.body.splitlines()]
    if header["value"].get("parentCommit") not in (None, parent.oid):
        raise HubError(412, "PreconditionFailed", "the parent commit is not the head of the branch")
    tree = apply_operations(parent.tree, operations, hub.large_files)
    ref, pull_request_url = repository.full_ref(revision), None
    if request.flag("create_pr"):
        number = repository.next_pull_request()
        ref, pull_request_url = f"refs/pr/{number}", f"{page(hub, kind, name)}/discussions/{number}"
    if ref is None:
        raise HubError(400, "NotABranch", f"{revision} is a commit, not a branch")
    oid = repository.add_commit(ref, header["value"]["summary"], tree, parent.oid).oid
    url = f"{page(hub, kind, name)}/commit/{oid}"
    return answer({"success": True, "commitOid": oid, "commitUrl": url, "pullRequestUrl": pull_request_url})


@endpoint("GET", f"{_API}/refs")
def references(hub: MiniHub, request: Request, kind: str, name: str) -> Response:
    found = hub.repository(name, kind).refs.items()

    def below(start: str) -> list[dict[str, str]]:
        return [
            {"name": ref.removeprefix(start), "ref": ref, "targetCommit": oid}
            for ref, oid in found
            if ref.startswith(start)
        ]

    named = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/", "converts": "refs/convert/"}
    return answer({name: below(start) for name, start in named.items()})


@endpoint("POST DELETE", f"{_API}/(?P<what>branch|tag){_REVISION}", writes=True)
def change_reference(hub: MiniHub, request: Request, kind: str, name: str, what: str, revision: str) -> Response:
    """Make or delete a branch (the address names it) or a tag (the address names what it is put on)."""
    repository, wish = hub.repository(name, kind), request.json()
    if request.method == "DELETE":
        if repository.refs.pop(f"refs/{'tags' if what == 'tag' else 'heads'}/{revision}", None) is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    elif what == "tag":
        repository.add_ref(f"refs/tags/{wish['tag']}", revision)
    else:
        repository.add_ref(f"refs/heads/{revision}", wish.get("startingPoint", "main"))
    return answer({})


@endpoint("GET", f"{_API}/tree{_REVISION}(?:/(?P<folder>.+))?")
def tree(hub: MiniHub, request: Request, kind: str, name: str, revision: str, folder: str = "") -> Response:
    return answer(list_folder(hub.repository(name, kind).at(revision).tree, folder, request.flag("recursive")))


@endpoint("POST", f"{_API}/paths-info{_REVISION}")
def paths_info(hub: MiniHub, request: Request, kind: str, name: str, revision: str) -> Response:
    is_form = "form" in request.headers.get("Content-Type", "")
    paths = parse_qs(request.body.decode()).get("paths", []) if is_form else request.json()["paths"]
    entries = list_folder(hub.repository(name, kind).at(revision).tree, recursive=True)
    return answer([entry for entry in entries if entry["path"] in paths])


@endpoint("GET", rf"{_API}/revision{_REVISION}")
@endpoint("GET", _API)
def info(hub: MiniHub, request: Request, kind: str, name: str, revision: str = "main") -> Response:
    at = hub.repository(name, kind).at(revision)
    card = card_of(at.tree["README.md"].data.decode()) if "README.md" in at.tree else {}
    siblings = [_sibling(at.tree[path].describe(path), request.flag("blobs")) for path in sorted(at.tree)]
    return answer({
        "id": name, "modelId": name, "author": name.split("/")[0], "sha": at.oid, "siblings": siblings,
        "cardData": card, "tags": card.get("tags") or [], "library_name": card.get("library_name"),
        "pipeline_tag": card.get("pipeline_tag"), "private": False, "gated": False, "disabled": False,
        "downloads": 0, "likes": 0, "createdAt": DATE, "lastModified": DATE,
    })  # fmt: skip


def _sibling(entry: dict[str, Any], with_blobs: bool) -> dict[str, Any]:
    if not with_blobs:
        return {"rfilename": entry["path"]}
    blob = {key: entry[key] for key in ("size", "lfs") if key in entry}
    return {"rfilename": entry["path"], "blobId": entry["oid"], **blob}


@endpoint("GET HEAD", rf"{_WEB}/resolve{_REVISION}/(?P<path>.+)")
def resolve(hub: MiniHub, request: Request, name: str, revision: str, path: str, kind: str = "models") -> Response:
    """Serve a file, or the part of it that a resumed download asks for."""
    at = hub.repository(name, kind).at(revision)
    headers = {"X-Repo-Commit": at.oid, "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
    if path not in at.tree:
        # The client remembers that this commit lacks the file, so it wants the commit too.
        message = f"Entry not found: {path}"
        return answer({"error": message}, 404, headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": message})
    file = at.tree[path]
    headers["ETag"] = f'"{file.oid}"'
    if file.is_large:
        headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.data))}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
    if wanted is None:
        return Response(200, file.data, headers)
    first, last = int(wanted[1]), min(int(wanted[2] or len(file.data)), len(file.data) - 1)
    headers["Content-Range"] = f"bytes {first}-{last}/{len(file.data)}"
    return Response(206, file.data[first : last + 1], headers)
