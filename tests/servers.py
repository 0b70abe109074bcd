"""Stores on loopback: an HTTP server with byte ranges that can be told to fail, and an S3 server if moto is there."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class RangeServer(ThreadingHTTPServer):
    """Serves the files of a folder. Set `failures` to have that many GETs fail in the way `failure` says."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.failures = 0
        self.failure = "status"
        """`status`: 503; `cut`: half of what was asked for; `silence`: half, and then nothing more."""
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
        self._answer(body=False)

    def do_GET(self) -> None:
        self.server.gets.append(self.path)
        time.sleep(self.server.delay)
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.server.folder / self.path.partition("?")[0].lstrip("/")
        failing = body and self.server.failures > 0
        if failing:
            self.server.failures -= 1
        if not path.is_file() or (failing and self.server.failure == "status"):
            self.send_response(404 if not path.is_file() else 503)
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
