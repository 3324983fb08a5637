"""The loopback Hub as a server: what it holds, what tests ask of it, and failures on request."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.minihub.endpoints import ENDPOINTS, Request, Response, answer
from tests.minihub.repository import HubError, Repository


@dataclass
class Failure:
    """A wish of a test for requests that match: answer `status`, cut the connection after so many bytes, or lose the
    answer to what was done."""

    pattern: str
    count: int
    status: int | None = None
    cut_after: int | None = None
    loses_answer: bool = False


class MiniHub:
    """A Hub that listens while it is entered.

    Example:
        with MiniHub() as hub:
            ...  # run a client with HF_ENDPOINT=hub.url
            assert hub.files("tester/model")["config.json"]

    Attributes:
        url: address, with a port that was free.
        requests: every request so far, such as "POST /api/repos/create".
        unrouted: those of them that no endpoint answers.
        large_files: what was uploaded by Git LFS, by SHA-256.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.unrouted: list[str] = []
        self._lock = threading.Lock()
        self._failures: list[Failure] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> MiniHub:
        # Polled often, since leaving waits for the next poll.
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def repository(self, name: str, kind: str = "models") -> Repository:
        """Return a repository; its `history()` lists the commits.

        Raises:
            HubError: if there is none.
        """
        if (kind, name) not in self.repositories:
            raise HubError(404, "RepoNotFound", f"Repository not found: {name}")
        return self.repositories[kind, name]

    def files(self, name: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """Return the files of a repository at a revision."""
        return {path: file.data for path, file in self.repository(name, kind).at(revision).tree.items()}

    def fail_next(self, pattern: str, status: int = 500, count: int = 1) -> None:
        """Answer the next `count` requests that match with an error, without doing what they ask.

        Args:
            pattern: regular expression, searched in "METHOD /path".
            status: HTTP status. The clients try again after a 500 in an upload or a listing, after a 403 nowhere.
            count: number of requests.
        """
        self._failures.append(Failure(pattern, count, status=status))

    def cut_next(self, pattern: str, after: int = 0, count: int = 1) -> None:
        """Cut the connection of the next `count` requests that match, when `after` bytes of the body have travelled.

        The body is that of the request if it has one, which then takes no effect; otherwise that of the answer.
        """
        self._failures.append(Failure(pattern, count, cut_after=after))

    def lose_answer(self, pattern: str, count: int = 1) -> None:
        """Do what the next `count` requests that match ask for, and close the connection without an answer."""
        self._failures.append(Failure(pattern, count, loses_answer=True))

    def wish(self, failures: list[dict[str, Any]]) -> list[str]:
        """Put failures in the place of those that are waiting, whose patterns are returned.

        For a process that breaks its own pushes, by `POST /minihub/failures`, one after another.
        """
        left = [failure.pattern for failure in self._failures]
        self._failures = [Failure(**failure) for failure in failures]
        return left

    def begin(self, line: str) -> Failure | None:
        """Note a request and return the failure that a test wishes for it."""
        with self._lock:
            self.requests.append(line)
            failure = next((failure for failure in self._failures if re.search(failure.pattern, line)), None)
            if failure is not None:
                failure.count -= 1
                self._failures = [failure for failure in self._failures if failure.count > 0]
            return failure

    def respond(self, request: Request) -> Response:
        """Return the answer of the first endpoint that takes the request."""
        for methods, pattern, endpoint in ENDPOINTS:
            match = re.fullmatch(pattern, request.path)
            if match and request.method in methods:
                parts = {name: unquote(part) for name, part in match.groupdict().items() if part is not None}
                try:
                    with self._lock:
                        return endpoint(self, request, **parts)
                except HubError as error:
                    headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
                    return answer({"error": error.message, **error.details}, error.status, headers)
        self.unrouted.append(f"{request.method} {request.path}")
        return answer({"error": f"the loopback Hub has no endpoint for {self.unrouted[-1]}"}, 501)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        hub: MiniHub = self.server.hub
        url = urlsplit(self.path)
        failure = hub.begin(f"{self.command} {url.path}")
        if failure is None:
            self._send(hub.respond(self._request()))
        elif failure.status is not None:
            self._request()
            self._send(answer({"error": "a failure that a test wished for"}, failure.status))
        elif failure.loses_answer:
            hub.respond(self._request())
            self.close_connection = True
        elif self._has_body():
            self.rfile.read(failure.cut_after)
            self.close_connection = True
        else:
            self._send(hub.respond(self._request()), failure.cut_after)
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def _has_body(self) -> bool:
        return "Transfer-Encoding" in self.headers or int(self.headers.get("Content-Length") or 0) > 0

    def _request(self) -> Request:
        url = urlsplit(self.path)
        return Request(self.command, url.path, parse_qs(url.query), self.headers, self._read_body())

    def _read_body(self) -> bytes:
        if "Transfer-Encoding" not in self.headers:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, response: Response, stop_after: int | None = None) -> None:
        self.send_response(response.status)
        for name, value in {"Content-Length": str(len(response.body)), **response.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body[:stop_after])
