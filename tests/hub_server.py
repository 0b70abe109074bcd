"""A stand-in of the Hugging Face Hub on loopback: the part of its API that pushes and downloads of models use."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import unquote

import pytest
import yaml

TOKEN = "hf_stand_in"
"""Token of the user `user`, who may write below that name only."""


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """SHA -> files, the newest last."""
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        whole = {**(list(self.commits.values()) or [{}])[-1], **files}
        sha = hashlib.sha1(repr((len(self.commits), sorted(whole.items()))).encode()).hexdigest()
        self.commits[sha] = whole
        return sha

    def resolve(self, revision: str) -> str | None:
        named = {**{sha: sha for sha in self.commits}, **self.tags, "main": (list(self.commits) or [None])[-1]}
        return named.get(revision)


class HubServer(ThreadingHTTPServer):
    """Set `cut` to have bodies of downloads and uploads end after so many bytes, as if the server had died."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        """Large files by SHA-256."""
        self.sizes: dict[str, int] = {}
        """Sizes that are claimed for files, by name."""
        self.cut: int | None = None
        self.requests: list[str] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self._download()

    def do_GET(self) -> None:
        path = self._path()
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._describe(match[1], unquote(match[2] or "main"))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._list(match[1], unquote(match[2]))
        else:
            self._download()

    def do_PUT(self) -> None:
        path = self._path()
        if self.server.cut is not None:
            self.rfile.read(self.server.cut)
            self.close_connection = True
            return
        content = self._body()
        assert hashlib.sha256(content).hexdigest() == path.rpartition("/")[2]
        self.server.objects[path.rpartition("/")[2]] = content
        self._answer(b"")

    def do_POST(self) -> None:
        path, body = self._path(), self._body()
        if path == "/api/validate-yaml":
            _, front, _ = json.loads(body)["content"].split("---\n", 2)
            assert yaml.safe_load(front)["library_name"]
            self._json({"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [
                {"path": file["path"], "uploadMode": _mode(file["path"]), "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            asked = json.loads(body)["objects"]
            objects = [{**one, "actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}} for one in asked]
            self._json({"objects": objects, "transfer": "basic"})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            sha = self.server.repositories[match[1]].commit(self._committed(body))
            self._json({"commitUrl": f"{self.server.url}/{match[1]}/commit/{sha}", "commitOid": sha})
        else:
            self._refuse(404, "", "no such endpoint")

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        answer = {"url": f"{self.server.url}/{name}"}
        if asked["organization"] != "user":
            self._refuse(403, "", "You don't have the rights to create a model under this namespace")
        elif name in self.server.repositories:
            self._json(answer, 409)
        else:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.server.repositories[name] = Repository(private=private)
            self._json(answer)

    def _committed(self, body: bytes) -> dict[str, bytes]:
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        return files

    def _find(self, name: str, revision: str) -> tuple[Repository, str] | None:
        """A repository and the commit of a revision; answers the request and returns None if there is none."""
        repository = self.server.repositories.get(name)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not known):
            self._refuse(404 if known else 401, "RepoNotFound", "Repository not found")
            return None
        sha = repository.resolve(revision)
        if sha is None and revision != "main":
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, sha or ""

    def _describe(self, name: str, revision: str) -> None:
        if found := self._find(name, revision):
            repository, sha = found
            siblings = [
                {"rfilename": path, "size": self._size(path, content), "blobId": _blob(content)}
                for path, content in repository.commits.get(sha, {}).items()
            ]
            self._json({"id": name, "sha": sha, "private": repository.private, "siblings": siblings})

    def _list(self, name: str, revision: str) -> None:
        if found := self._find(name, revision):
            files = found[0].commits[found[1]].items()
            listed: list[dict[str, Any]] = [
                {"type": "file", "path": path, "size": self._size(path, content), "oid": _blob(content)}
                for path, content in files
            ]
            for entry, (_, content) in zip(listed, files, strict=True):
                if _mode(entry["path"]) == "lfs":
                    digest = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"oid": digest, "size": entry["size"], "pointerSize": 100}
            self._json(listed)

    def _download(self) -> None:
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._path())
        found = self._find(match[1], unquote(match[2])) if match else None
        if match is None:
            self._refuse(404, "", "no such page")
        if match is None or found is None:
            return
        content = found[0].commits[found[1]].get(unquote(match[3]))
        if content is None:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        start = int((re.search(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        etag = hashlib.sha256(content).hexdigest() if _mode(match[3]) == "lfs" else _blob(content)
        headers = {"X-Repo-Commit": found[1], "ETag": f'"{etag}"'}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._answer(content[start:], 206 if start else 200, headers)

    def _size(self, path: str, content: bytes) -> int:
        return self.server.sizes.get(path, len(content))

    def _path(self) -> str:
        self.server.requests.append(f"{self.command} {self.path}")
        return self.path.partition("?")[0]

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._answer(json.dumps({"error": message}).encode(), status, headers)

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _answer(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.server.cut
        if cut is not None and "/resolve/" in self.path and len(content) > cut:
            content, self.close_connection = content[:cut], True
        self.wfile.write(content)


def _mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".png", ".bin", ".pkl")) else "regular"


def _blob(content: bytes) -> str:
    """Name of a file's content in git."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@contextmanager
def hub_server(folder: Path) -> Iterator[HubServer]:
    """The stand-in, which this process's client talks to with a token, and with a cache in a folder.

    Skips the test where huggingface_hub is not installed.
    """
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs huggingface_hub")
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    # The client reads its variables when it is imported.
    client = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(folder / "cache"),
        "HF_TOKEN_PATH": str(folder / "no-token"),
        "HF_HUB_DISABLE_XET": True,
    }
    try:
        with mock.patch.multiple(constants, **client), mock.patch.dict(os.environ, HF_TOKEN=TOKEN):
            yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
