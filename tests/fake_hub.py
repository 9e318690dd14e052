"""A small model hub on localhost: enough of the hub's protocol for huggingface_hub to download from it.

It answers the model's information, its file tree, and its files (HEAD, GET, byte ranges), keeps a log of what it sent,
and can break or stall a transfer at a chosen byte.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

_CHUNK_BYTES = 2**20


@dataclass
class FakeRepo:
    """files of at least `lfs_bytes` are kept in large-file storage, as the hub does with weights."""

    files: dict[str, bytes]
    is_gated: bool = False
    revisions: tuple[str, ...] = ("main",)
    lfs_bytes: int = 4096

    @property
    def commit(self) -> str:
        return hashlib.sha1("".join(sorted(self.files)).encode()).hexdigest()


@dataclass
class Sent:
    """One answer that carried a file's bytes."""

    name: str
    start: int
    num_bytes: int = 0


@dataclass
class FakeHub:
    """break_after, stall_after: close, or fall silent, once this many bytes of a large file were sent; then no more."""

    repos: dict[str, FakeRepo] = field(default_factory=dict)
    sent: list[Sent] = field(default_factory=list)
    break_after: int | None = None
    stall_after: int | None = None
    has_stalled: threading.Event = field(default_factory=threading.Event)
    is_down: bool = False
    url: str = ""

    def sent_of(self, name: str) -> list[Sent]:
        return [sent for sent in self.sent if sent.name == name]


@contextmanager
def run_fake_hub(**repos: FakeRepo) -> Iterator[FakeHub]:
    """Serve repositories called `test/<keyword>`."""
    hub = FakeHub({f"test/{name}": repo for name, repo in repos.items()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler_of(hub_state: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        hub = hub_state

    return Handler


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._route(with_body=True)

    def do_HEAD(self) -> None:
        self._route(with_body=False)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Quiet: the tests read `FakeHub.sent`."""

    def _route(self, with_body: bool) -> None:
        path = urlsplit(self.path).path
        if self.hub.is_down:
            return self._answer_error(503, "Down")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)/?)?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or resolve
        repo = self.hub.repos.get(match[1]) if match else None
        if repo is None or match is None:
            return self._answer_error(404, "RepoNotFound")
        revision = unquote(match[3] or "main") if api else unquote(match[2])
        if revision not in (*repo.revisions, repo.commit):
            return self._answer_error(404, "RevisionNotFound")
        if api:
            return self._answer_json(_tree(repo) if api[2] == "tree" else _info(match[1], repo))
        if repo.is_gated:
            return self._answer_error(403, "GatedRepo")
        if match[3] not in repo.files:
            return self._answer_error(404, "EntryNotFound")
        return self._answer_file(repo, match[3], with_body)

    def _answer_error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer_json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _answer_file(self, repo: FakeRepo, name: str, with_body: bool) -> None:
        content = repo.files[name]
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{_etag(repo, name)}"')
        self.send_header("X-Repo-Commit", repo.commit)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if with_body:
            self._send_body(Sent(name, start), content[start:], len(content) >= repo.lfs_bytes)

    def _send_body(self, sent: Sent, body: bytes, is_large: bool) -> None:
        self.hub.sent.append(sent)
        limit = len(body)
        if is_large and (cut := self.hub.break_after or self.hub.stall_after):
            limit = min(limit, cut)
        for offset in range(0, limit, _CHUNK_BYTES):
            chunk = body[offset : min(offset + _CHUNK_BYTES, limit)]
            self.wfile.write(chunk)
            sent.num_bytes += len(chunk)
        if limit < len(body):
            self._misbehave()

    def _misbehave(self) -> None:
        if self.hub.stall_after:
            self.hub.stall_after = None
            self.hub.has_stalled.set()
            with suppress(OSError):
                self.rfile.read(1)  # returns when the client is gone
        self.hub.break_after = None
        self.close_connection = True


def _is_large(repo: FakeRepo, name: str) -> bool:
    return len(repo.files[name]) >= repo.lfs_bytes


def _etag(repo: FakeRepo, name: str) -> str:
    digest = hashlib.sha256 if _is_large(repo, name) else hashlib.sha1
    return digest(repo.files[name]).hexdigest()


def _info(repo_id: str, repo: FakeRepo) -> dict[str, Any]:
    siblings = [
        {
            "rfilename": name,
            "size": len(content),
            "blobId": hashlib.sha1(content).hexdigest(),
            "lfs": {"sha256": _etag(repo, name), "size": len(content), "pointerSize": 130},
        }
        if _is_large(repo, name)
        else {"rfilename": name, "size": len(content), "blobId": _etag(repo, name)}
        for name, content in repo.files.items()
    ]
    return {"id": repo_id, "sha": repo.commit, "siblings": siblings, "private": False, "tags": []}


def _tree(repo: FakeRepo) -> list[dict[str, Any]]:
    return [
        {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        | (
            {"lfs": {"oid": _etag(repo, name), "size": len(content), "pointerSize": 130}}
            if _is_large(repo, name)
            else {}
        )
        for name, content in repo.files.items()
    ]
