"""Stores that refuse, fail or are not there, and keys with special characters, over real HTTP and S3 servers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import fsspec
import pytest
from fsspec.asyn import AsyncFileSystem

from distgan.data.index.loading import load_index
from distgan.data.index.rebuild import write_index
from distgan.data.index.saving import save_index
from distgan.data.storage import filesystem
from distgan.data.storage.objects import ObjectFolder
from distgan.data.storage.patterns import expand
from distgan.data.storage.store_errors import StoreError, explain
from distgan.runs.remote_status import remote_standing
from tests.servers import RangeServer, free_port, range_server, s3_server
from tests.shards import build_index, refusal, write_numbered

COUNTS = [3, 2]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(filesystem, "_FIRST_BACKOFF_SECONDS", 0.01)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    write_numbered(tmp_path / "served", COUNTS)
    with range_server(tmp_path / "served") as running:
        yield running


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An S3 server's filesystem and the bytes of two shards."""
    folder = tmp_path_factory.mktemp("shards")
    write_numbered(folder, COUNTS)
    with s3_server() as store:
        yield store, [(folder / f"{i:03d}.tar").read_bytes() for i in range(2)]


@pytest.fixture
def _new_clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """S3 clients are kept by fsspec; this test's take the environment as it is now."""

    def forget() -> None:
        filesystem._filesystem.cache_clear()
        if "s3fs" in sys.modules:
            fsspec.get_filesystem_class("s3").clear_instance_cache()

    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    forget()
    yield
    forget()


STATUSES = {
    401: "requires credentials",
    403: "access refused",
    404: "not found",
    410: "not found",
    418: "HTTP 418",
    429: "too many requests",
    500: "the server failed",
    503: "the server failed",
}


@pytest.mark.parametrize("code", STATUSES)
@pytest.mark.parametrize("action", [build_index, load_index])
def test_http_statuses_are_told_apart(server: RangeServer, code: int, action: Any) -> None:
    server.refuses, server.code = True, code
    said = refusal(action, f"{server.url}/000.tar?token=word")
    assert said.startswith(server.url)
    assert f"HTTP {code}" in said
    assert STATUSES[code] in said
    assert "word" not in said
    # fsspec asks by HEAD and by GET; what may pass is asked 3 times more.
    assert len(server.heads) == (4 if code in (429, 500, 503) else 1)


@pytest.mark.parametrize("code", [429, 503])
def test_an_http_server_that_fails_for_a_while_is_asked_again(server: RangeServer, tmp_path: Path, code: int) -> None:
    whole = build_index(str(server.folder))
    server.failures, server.code = 3, code
    assert build_index(f"{server.url}/{{000..001}}.tar").fingerprint == whole.fingerprint
    assert server.failures == 0
    save_index(whole, server.folder)
    server.failures = 3
    assert load_index(server.url).fingerprint == whole.fingerprint
    assert server.failures == 0


def test_an_error_that_is_being_handled_is_no_cause_of_the_next(server: RangeServer, tmp_path: Path) -> None:
    server.refuses = True
    with pytest.raises(OSError, match="HTTP 503") as first:
        filesystem.download(f"{server.url}/000.tar", str(tmp_path / "copy"), 1 << 20)
    server.refuses = False
    try:
        raise first.value
    except OSError:
        with pytest.raises(OSError, match=r"^not found; check the name$"):
            filesystem.download(f"{server.url}/none.tar", str(tmp_path / "copy"), 1 << 20)
        said = refusal(build_index, f"{server.url}/none.tar")
    assert "HTTP 404" in said


def test_servers_that_are_not_there() -> None:
    port = free_port()
    said = refusal(build_index, f"http://127.0.0.1:{port}/a.tar")
    assert said.startswith(f"http://127.0.0.1:{port}/a.tar: ")
    assert "no connection" in said
    assert "no connection" in refusal(build_index, "http://nowhere.invalid/a.tar")


def test_a_server_that_hangs_up() -> None:
    def hang_up(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                listener.accept()[0].close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=hang_up, args=(listener,), daemon=True).start()
        said = refusal(build_index, f"http://127.0.0.1:{listener.getsockname()[1]}/a.tar")
        listener.shutdown(socket.SHUT_RDWR)
    assert "connection broke" in said


def test_user_and_password_reach_the_server_and_no_message(server: RangeServer) -> None:
    save_index(build_index(str(server.folder)), server.folder)
    url = server.url.replace("http://", "http://user:word@")
    loaded = load_index(url)
    assert loaded.shards[0].url == f"{url}/000.tar"
    server.refuses, server.code = True, 401
    assert "word" not in refusal(load_index, url)


@pytest.mark.parametrize("name", ["epoch#2.tar", "a?b.tar", "100%.tar", "a b.tar", "ü.tar", "%23.tar"])
def test_local_names_are_found_again_over_http(server: RangeServer, name: str) -> None:
    (server.folder / "000.tar").rename(server.folder / name)
    local = build_index(str(server.folder))
    save_index(local, server.folder)
    remote = load_index(server.url)
    assert remote.fingerprint == local.fingerprint
    assert build_index([shard.url for shard in remote.shards]).fingerprint == local.fingerprint


KEYS = ["run#1/epoch#2.tar", "run?1/a?b=c.tar", "q[1]/[!a].tar", "100%20/a b.tar", "b{1,2}/c{0..9}.tar", "s*r/*.tar"]


@pytest.mark.parametrize("key", KEYS)
def test_every_character_belongs_to_a_key(bucket: Any, tmp_path: Path, key: str) -> None:
    store, tars = bucket
    folder, name = key.split("/")
    store.pipe_file(f"bucket/{key}", tars[0])
    store.pipe_file(f"bucket/{folder}/z.tar", tars[1])
    store.pipe_file("bucket/index.safetensors", b"of others")
    for place in (f"s3://bucket/{folder}", f"S3://bucket/{folder}/"):
        written = write_index(place)
        assert written.path == f"s3://bucket/{folder}/index.safetensors"
        assert [shard.url for shard in written.index.shards] == [f"s3://bucket/{key}", f"s3://bucket/{folder}/z.tar"]
    assert store.cat_file("bucket/index.safetensors") == b"of others"
    assert load_index(f"s3://bucket/{folder}").fingerprint == written.index.fingerprint
    assert [shard.url for shard in load_index(f"s3://bucket/{key}").shards] == [f"s3://bucket/{key}"]
    if "*" not in folder + name and "{" not in key:
        assert load_index(f"s3://bucket/{folder}/*.tar").fingerprint == written.index.fingerprint
    # Training reads it through the cache.
    filesystem.download(f"s3://bucket/{key}", str(tmp_path / "copy"), 1 << 20)
    assert (tmp_path / "copy").read_bytes() == tars[0]


def test_a_star_in_a_url_is_the_only_wildcard(bucket: Any) -> None:
    store, tars = bucket
    for key in ("a/x1.tar", "a/x2.tar", "a/.x3.tar", "a/y.txt", "a/b/x4.tar", "a/b/c/x5.tar"):
        store.pipe_file(f"bucket/stars/{key}", tars[0])

    def found(pattern: str) -> list[str]:
        return [url.removeprefix("s3://bucket/stars/") for url in expand(f"s3://bucket/stars/{pattern}")]

    assert found("a/*.tar") == ["a/x1.tar", "a/x2.tar"]
    assert found("a/x*1*") == ["a/x1.tar"]
    assert found("*/x{1,2}.tar") == ["a/x1.tar", "a/x2.tar"]
    assert found("a/*/*.tar") == ["a/b/x4.tar"]
    assert found("**/*.tar") == ["a/b/c/x5.tar", "a/b/x4.tar", "a/x1.tar", "a/x2.tar"]
    assert found("a/b/**") == ["a/b/c/x5.tar", "a/b/x4.tar"]
    assert "found no tar" in refusal(found, "a/x?*.tar")
    assert "found no tar" in refusal(found, "a/[x]*.tar")


@pytest.mark.usefixtures("_new_clients")
@pytest.mark.parametrize("url", ["s3://bucket/photos", "s3://bucket/photos/*.tar", "s3://bucket/photos/a.tar"])
@pytest.mark.parametrize("action", [build_index, load_index])
def test_what_s3_answers(server: RangeServer, monkeypatch: pytest.MonkeyPatch, url: str, action: Any) -> None:
    pytest.importorskip("s3fs")
    server.refuses = True
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert "AWS_ACCESS_KEY_ID" in (said := refusal(action, url))
    assert said.startswith("s3://bucket/photos")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "word")
    for code, words in ((403, "access refused"), (503, "the server failed"), (429, "too many requests")):
        server.code = code
        filesystem._filesystem.cache_clear()
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        assert words in (said := refusal(action, url))
        assert f"HTTP {code}" in said
        assert said.startswith("s3://bucket/photos")


def test_hidden_files_of_a_bucket_are_no_shards(bucket: Any) -> None:
    store, tars = bucket
    store.pipe_file("bucket/hidden/a.tar", tars[0])
    for name in ("._a.tar", ".a.tar"):
        store.pipe_file(f"bucket/hidden/{name}", b"left by a file manager")
    for place in ("s3://bucket/hidden", "s3://bucket/hidden/*.tar"):
        assert expand(place) == ["s3://bucket/hidden/a.tar"]


def test_a_bucket_that_is_not_there(bucket: Any) -> None:
    for url in ("s3://none/a", "s3://none/*.tar", "s3://none/a.tar"):
        assert "not found" in (said := refusal(build_index, url))
        assert said.startswith(url)
    assert "NoSuchBucket" in refusal(build_index, "s3://none/a")
    for given in (True, False):
        assert "NoSuchBucket" in refusal(lambda url, given=given: remote_standing(url, begun=given), "s3://none/a")
    assert "not a run" in refusal(lambda url: remote_standing(url, begun=True), "s3://bucket/no-run")
    assert str(remote_standing("s3://bucket/no-run")) == "none -1"


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    filesystem._filesystem.cache_clear()
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for action in (build_index, load_index):
        said = refusal(action, "GS://bucket/photos/*.tar")
        assert said.startswith("gs://bucket/photos/")
        assert "pip install gcsfs" in said
    assert refusal(remote_standing, "gs://bucket/x").startswith("gs://bucket/x: cannot import")


def test_listing_an_endpoint_that_is_dead_ends_in_one_line(tmp_path: Path) -> None:
    """In a process of its own: clients may also complain when it ends."""
    pytest.importorskip("s3fs")
    dead = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
    }
    command = [sys.executable, "-m", "distgan", "index", "s3://bucket/photos/*.tar"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dead | {"AWS_MAX_ATTEMPTS": "1"})
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("distgan: error: s3://bucket/photos/*.tar: cannot be listed: no connection: ")
    assert "AWS_ENDPOINT_URL" in line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (TimeoutError(), "not answer in time"),
        (ValueError("Invalid endpoint: nohost"), "AWS_ENDPOINT_URL: 'nohost' is no URL"),
        (
            type("ParamValidationError", (Exception,), {})('"u:word@b": must match ^[a-z]'),
            "valid name",
        ),
        (KeyError("x"), "KeyError"),
        (PermissionError("Access Denied"), "access refused"),
        (aiohttp.ClientPayloadError("half"), "connection broke"),
        (RuntimeError("GET https://host/a?sig=word failed\nbadly\x1b"), "GET https://host/a failed badly?"),
    ],
)
def test_any_exception_is_one_line(error: Exception, said: str) -> None:
    shown = str(explain("s3://bucket/a", error))
    assert said in shown
    assert shown.isprintable()
    assert "word" not in shown


class _Hanging(AsyncFileSystem):  # type: ignore[misc]
    """A store that takes writes and does not answer."""

    cachable = False
    canceled = False

    async def _pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.canceled = True
            raise


def test_a_request_that_must_end_in_time_is_canceled(monkeypatch: pytest.MonkeyPatch) -> None:
    store = _Hanging()
    monkeypatch.setattr(filesystem, "_filesystem", lambda protocol, pid: store)
    objects = ObjectFolder("s3://bucket/run").within(0.2)
    for _ in range(2):
        begun = time.monotonic()
        with pytest.raises(StoreError, match="did not answer in time"):
            objects.write("latest", b"")
        assert time.monotonic() - begun < 20
    assert store.canceled
