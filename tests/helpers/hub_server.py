"""A small stand-in for the hub's HTTP API: repositories in memory, served by a thread.

It answers what huggingface_hub asks to list and download a repository, to create one and to commit
files to it, git's and large ones. A fault makes the next requests fail: by a status, by content cut
in half, or by other content of the same length."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

LARGE_SUFFIXES = (".safetensors", ".parquet", ".jsonl")
TOKEN = "hf_secretsecretsecretsecretsecret"


@dataclass
class Repo:
    """Commits by hash, and what branches and tags point to."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    is_private: bool = False
    is_gated: bool = False

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Add files to a branch; return the new commit."""
        current = self.commits.get(self.refs.get(branch, ""), {})
        content = {**current, **files}
        text = f"{len(self.commits)}{sorted(content)}"
        commit = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.commits[commit] = content
        self.refs[branch] = commit
        return commit

    def find_commit(self, revision: str) -> str:
        return revision if revision in self.commits else self.refs.get(revision, "")


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose path contains `path`."""

    path: str
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    is_cut: bool = False  # the connection ends in the middle of the content
    is_altered: bool = False  # the first byte is another one
    times: int = 1
    method: str = "GET"


class HubServer:
    """Repositories by (kind, id), the requests so far, and faults to come."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.accepted_tokens = {TOKEN}
        self.endpoint = ""

    def add(self, kind: str, repo_id: str, files: Mapping[str, str | bytes], **kwargs: Any) -> Repo:
        """Create a repository with one commit."""
        repo = self.repos[kind, repo_id] = Repo(**kwargs)
        repo.commit({name: to_bytes(content) for name, content in files.items()})
        return repo

    def take_fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.path in path and fault.method == method:
                fault.times -= 1
                return fault
        return None


def to_bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


@contextmanager
def serve(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[HubServer]:
    """Serve the hub on this machine; caches and tokens of huggingface_hub are in `folder`."""
    hub = HubServer()
    handler = type("Handler", (HubHandler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    point_to(hub.endpoint, monkeypatch, folder)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def point_to(endpoint: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Set what huggingface_hub reads from the environment when it is imported, and for programs
    that a test starts."""
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HOME", str(folder))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("TUNESMITH_CACHE", str(folder / "tunesmith"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


# ---------------------------------------------------------------- answers

INFO = re.compile(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/revision/(.+))?")
TREE = re.compile(r"/api/(model|dataset)s/([^/]+/[^/]+)/tree/([^/]+)")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class HubHandler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{method} {path}")
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.hub.take_fault(method, path)
        if fault is not None and fault.status:
            self._send(fault.status, b'{"error": "a fault"}', fault.headers)
        elif match := TREE.fullmatch(path):
            self._send_tree(*match.groups())
        elif match := INFO.fullmatch(path):
            self._send_info(match[1], match[2], match[3] or "main")
        elif match := FILE.fullmatch(path):
            kind = "dataset" if match[1] else "model"
            self._send_file(kind, match[2], match[3], match[4], fault)
        else:
            self._send(404, b'{"error": "no such address"}')

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send_error_code(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code})

    def _find(self, kind: str, repo_id: str, revision: str) -> tuple[Repo, str] | None:
        """Return a repository and a commit; send the error that the hub sends if there is none."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        is_accepted = token in self.hub.accepted_tokens
        repo = self.hub.repos.get((kind, repo_id))
        if token and not is_accepted:
            message = "Invalid credentials in Authorization header"
            self._send(401, b"{}", {"X-Error-Message": message})
            return None
        if repo is None or (repo.is_private and not is_accepted):
            self._send_error_code(404 if is_accepted else 401, "RepoNotFound")
            return None
        if repo.is_gated and not is_accepted:
            self._send_error_code(401, "GatedRepo")
            return None
        commit = repo.find_commit(revision)
        if not commit and repo.commits:
            self._send_error_code(404, "RevisionNotFound")
            return None
        return repo, commit

    def _send_info(self, kind: str, repo_id: str, revision: str) -> None:
        if (match := self._find(kind, repo_id, revision)) is None:
            return
        repo, commit = match
        siblings: list[dict[str, Any]] = []
        for name, content in repo.commits.get(commit, {}).items():
            entry = describe_file(name, content)
            lfs = entry.get("lfs")
            siblings.append(
                {
                    "rfilename": name,
                    "size": len(content),
                    "blobId": entry["oid"],
                    **({"lfs": {**lfs, "sha256": lfs["oid"]}} if lfs else {}),
                }
            )
        self._send_json(
            {
                "id": repo_id,
                "sha": commit or None,
                "private": repo.is_private,
                "siblings": siblings,
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
        )

    def _send_tree(self, kind: str, repo_id: str, revision: str) -> None:
        if (match := self._find(kind, repo_id, revision)) is not None:
            repo, commit = match
            self._send_json([describe_file(*item) for item in repo.commits[commit].items()])

    def _send_file(
        self, kind: str, repo_id: str, revision: str, name: str, fault: Fault | None
    ) -> None:
        if (match := self._find(kind, repo_id, revision)) is None:
            return
        repo, commit = match
        content = repo.commits[commit].get(name)
        if content is None:
            self._send_error_code(404, "EntryNotFound")
            return
        entry = describe_file(name, content)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Content-Type": "text/plain"}
        if fault is not None and fault.is_altered:
            content = bytes([content[0] ^ 1]) + content[1:]
        start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        status = 206 if start else 200
        body = content[start:]
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if fault is not None and fault.is_cut:
            headers["Content-Length"] = str(len(body))
            self._send(status, body[: len(body) // 2], headers)
            self.close_connection = True
            return
        self._send(status, body, headers)


def describe_file(name: str, content: bytes) -> dict[str, Any]:
    """Return a file as the hub lists it."""
    header = f"blob {len(content)}\0".encode()
    blob_id = hashlib.sha1(header + content, usedforsecurity=False).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": blob_id}
    if name.endswith(LARGE_SUFFIXES):
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
    return entry
