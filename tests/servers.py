"""Stores on loopback: an HTTP server with byte ranges that can be told to fail, and an S3 server if moto is there."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import unquote

import pytest

from distgan.data.storage import filesystem


class RangeServer(ThreadingHTTPServer):
    """Serves the files of a folder. Set `failures` to have that many GETs fail in the way `failure` says."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.failures = 0
        self.failure = "status"
        """`status`: the status `code`; `cut`: half of what was asked for; `silence`: half, and then nothing more."""
        self.code = 503
        self.refuses = False
        """Whether all requests, HEAD too, are answered with `code`."""
        self.heads: list[str] = []
        self.over = threading.Event()
        self.ranges = True
        self.tags = False
        """Whether answers tell revisions of a file apart (ETag)."""
        self.delay = 0.0
        self.gets: list[str] = []
        self.sent = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RangeServer

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.server.heads.append(self.path)
        self._answer(body=False)

    def do_GET(self) -> None:
        self.server.gets.append(self.path)
        time.sleep(self.server.delay)
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.server.folder / unquote(self.path.partition("?")[0]).lstrip("/")
        failing = body and self.server.failures > 0
        if failing:
            self.server.failures -= 1
        broken = self.server.refuses or (failing and self.server.failure == "status")
        if broken or not path.is_file():
            self.send_response(self.server.code if broken else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.server.ranges else None
        size = len(data)
        if wanted:
            start, stop = int(wanted[1]), min(int(wanted[2] or size - 1) + 1, size)
            data = data[start:stop]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        else:
            self.send_response(200)
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if self.server.tags:
            self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body:
            return
        if failing and self.server.failure in ("cut", "silence"):
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            if self.server.failure == "silence":
                self.server.over.wait()
            return
        self.wfile.write(data)
        self.server.sent += len(data)


@contextmanager
def range_server(folder: Path) -> Iterator[RangeServer]:
    server = RangeServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def s3_server() -> Iterator[Any]:
    """An S3 server with the bucket `bucket`, which this process has credentials for; its s3fs filesystem.

    Skips the test where moto or s3fs is not installed.
    """
    pytest.importorskip("moto", reason="needs moto's S3 server")
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs")
    port = free_port()
    settings = {
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (
        mock.patch.dict(os.environ, settings),
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server,
    ):
        try:
            wait_for(f"http://127.0.0.1:{port}/moto-api/", server)
            filesystem._filesystem.cache_clear()
            s3fs.S3FileSystem.clear_instance_cache()
            store = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
            store.mkdir("bucket")
            yield store
        finally:
            server.terminate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(400):
        assert process.poll() is None
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        time.sleep(0.05)
    raise AssertionError(f"{url} does not answer")
