"""Shards in HTTP and S3 stores: indexed by ranges, fetched ahead, and streamed as if they were local."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from distgan.config import DataConfig
from distgan.data import reader as reader_module
from distgan.data.index.loading import load_index
from distgan.data.index.rebuild import write_index
from distgan.data.index.saving import save_index
from distgan.data.index.table import Index, Shard
from distgan.data.order import Integers, make_order
from distgan.data.reader import read_samples
from distgan.data.storage import filesystem
from distgan.data.storage.prefetch import Prefetcher, check_capacity
from distgan.data.storage.shard_cache import ShardCache
from distgan.data.stream import open_rank_stream
from distgan.errors import UserError
from tests.servers import RangeServer, free_port, range_server, s3_server, wait_for
from tests.shards import build_index, numbered_index, numbers_of, write_numbered, write_tar

COUNTS = [30, 20, 10, 25]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reader_module, "_FIRST_BACKOFF_SECONDS", 0.01)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    write_numbered(tmp_path / "served", COUNTS, classes=3)
    with range_server(tmp_path / "served") as running:
        yield running


@pytest.fixture
def index(server: RangeServer) -> Index:
    save_index(build_index(f"{server.url}/{{000..003}}.tar"), server.folder)
    loaded = load_index(server.url)
    server.gets.clear()
    return loaded


def config(**changes: Any) -> DataConfig:
    lanes = {"lanes": 4, "shuffle_block": 8} if changes.get("order") == "lanes" else {}
    return DataConfig.model_validate({"path": "unused", "resolution": 8, "num_workers": 0} | lanes | changes)


def test_an_index_over_http_is_the_local_one(server: RangeServer, tmp_path: Path) -> None:
    local = build_index(str(server.folder), verify=True)
    remote = build_index(f"{server.url}/{{000..003}}.tar", verify=True)
    assert remote.fingerprint == local.fingerprint
    assert [shard.sha256 for shard in remote.shards] == [shard.sha256 for shard in local.shards]
    assert [remote.entry(i) for i in range(85)] == [local.entry(i) for i in range(85)]
    save_index(remote, tmp_path / "elsewhere")  # names the whole URLs
    assert load_index(str(tmp_path / "elsewhere")).shards == remote.shards
    save_index(local, server.folder)  # names files beside itself
    assert [shard.url for shard in load_index(server.url).shards] == [f"{server.url}/{i:03d}.tar" for i in range(4)]
    assert load_index(f"{server.url}/{{001..002}}.tar").shards == remote.shards[1:3]


def downloads(server: RangeServer) -> int:
    return server.gets.count("/index.safetensors")


@pytest.mark.usefixtures("index")
def test_a_node_downloads_a_revision_of_an_index_once(server: RangeServer, tmp_path: Path) -> None:
    server.tags = True
    folder = tmp_path / "node"
    first = load_index(server.url, str(folder))
    assert downloads(server) == 1
    assert load_index(server.url, str(folder)).fingerprint == first.fingerprint
    assert downloads(server) == 1
    write_numbered(tmp_path / "served", [4], classes=3)
    save_index(build_index(f"{server.url}/000.tar"), server.folder)
    assert len(load_index(server.url, str(folder))) == 4
    assert downloads(server) == 2
    assert len(first.keys) > 4  # still mapped


@pytest.mark.usefixtures("index")
def test_processes_of_a_node_share_one_download(server: RangeServer, tmp_path: Path) -> None:
    server.tags, server.delay = True, 0.1
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: load_index(server.url, str(tmp_path / "node")).fingerprint, range(4)))
    assert len(set(found)) == 1
    assert downloads(server) == 1


def test_a_store_that_names_no_revisions_is_asked_each_time(server: RangeServer, index: Index) -> None:
    assert load_index(server.url).fingerprint == index.fingerprint
    assert downloads(server) == 1


def test_indexing_large_shards_is_no_download(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"{i}.jpg", bytes(1 << 20)) for i in range(10)])
    with range_server(tmp_path) as server:
        build_index(f"{server.url}/a.tar")
        assert server.sent < 100_000


def test_what_http_answers(server: RangeServer) -> None:
    for url, said in ((f"{server.url}/none.tar", "HTTP 404"), ("http://127.0.0.1:1/none.tar", "no connection")):
        with pytest.raises(UserError, match=said):
            build_index(url)
        with pytest.raises(UserError, match=said):
            load_index(url)
    with pytest.raises(UserError, match="cannot be listed"):
        build_index(f"{server.url}/*.tar")
    server.ranges = False
    with pytest.raises(UserError, match="range"):
        build_index(f"{server.url}/000.tar")
    with pytest.raises(UserError) as error:
        build_index(f"{server.url}/none.tar?token=secret")
    assert "secret" not in str(error.value)


def test_a_reader_tries_again_and_then_replaces(index: Index, server: RangeServer) -> None:
    server.failures, server.failure = 2, "cut"
    batch = read_samples(config(retries=2), index, [3, 35])
    assert batch.indices.tolist() == [3, 35] == numbers_of(batch.data.numpy())
    assert batch.failures == []
    (server.folder / "002.tar").unlink()
    (failure,) = read_samples(config(retries=2), index, [3, 52]).failures
    assert failure.sample == 52
    assert failure.reason == "002.tar:0002: not found; check the name"
    assert server.gets.count("/002.tar") <= 2 * 3


def test_a_store_that_falls_silent_is_not_waited_for_for_ever(
    index: Index, server: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "_READ_SECONDS", 0.2)
    filesystem._filesystem.cache_clear()
    fsspec.get_filesystem_class("http").clear_instance_cache()
    server.failures, server.failure = 2, "silence"
    batch = read_samples(config(retries=2), index, [3])
    assert batch.indices.tolist() == [3] == numbers_of(batch.data.numpy())
    assert batch.failures == []
    assert server.gets.count("/000.tar") == 3
    filesystem._filesystem.cache_clear()


@pytest.mark.parametrize("order", ["permutation", "lanes"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_remote_stream_is_the_local_one(index: Index, server: RangeServer, order: str, workers: int) -> None:
    def images(source: Index) -> list[bytes]:
        stream = open_rank_stream(config(order=order, num_workers=workers), 0, source, start=0, micro_batch=10)
        try:
            return [next(stream).data.numpy().tobytes() for _ in range(20)]
        finally:
            stream.close()

    assert images(index) == images(load_index(str(server.folder)))
    assert set(server.gets) == {f"/{i:03d}.tar" for i in range(4)}
    assert len(server.gets) == 4


def test_shards_are_fetched_ahead_in_the_order_of_use(tmp_path: Path) -> None:
    write_numbered(tmp_path / "many", [20] * 24)
    with range_server(tmp_path / "many") as server:
        index = build_index(f"{server.url}/{{000..023}}.tar")
        server.gets.clear()
        size = index.shards[0].size
        settings = config(order="lanes", lanes=2, shuffle_block=20)
        order = make_order(settings, 0, index)
        chunks = ((first + 20, order.samples(np.arange(first, first + 20))) for first in range(0, 10**6, 20))
        prefetcher = Prefetcher(ShardCache(tmp_path / "c", 20 * size), index, chunks, 6 * size)

        def settled() -> list[str]:
            before = None
            while before != (before := list(server.gets)):
                time.sleep(0.3)
            return before

        try:
            used = list(dict.fromkeys((order.samples(np.arange(480)) // 20).tolist()))
            first = settled()
            assert 4 <= len(first) <= 8  # the budget, give or take what one chunk adds
            assert {f"/{shard:03d}.tar" for shard in used[: len(first)]} == set(first)
            prefetcher.advance(240)
            later = settled()
            assert len(first) + 6 <= len(later) <= len(first) + 14
            assert {f"/{shard:03d}.tar" for shard in used[: len(later)]} == set(later)
        finally:
            prefetcher.close()


def test_looking_ahead_ends_after_an_epoch(index: Index, server: RangeServer, tmp_path: Path) -> None:
    looked: list[int] = []

    def chunks() -> Iterator[tuple[int, Integers]]:
        for first in itertools.count(0, 5):
            looked.append(first)
            yield first + 5, np.arange(first, first + 5) % len(index)

    prefetcher = Prefetcher(ShardCache(tmp_path / "c", 10**9), index, chunks(), 10**9)
    try:
        while len(server.gets) < 4:
            time.sleep(0.05)
        time.sleep(0.3)
        assert looked[-1] <= len(index) + 5
        prefetcher.advance(len(index))
        time.sleep(0.3)
        assert len(index) + 5 < looked[-1] <= 2 * len(index) + 10
    finally:
        prefetcher.close()
    assert len(server.gets) == 4


def test_a_download_does_not_hold_up_a_process_that_leaves(index: Index, server: RangeServer, tmp_path: Path) -> None:
    server.delay = 300
    script = f"""
import time
from distgan.config import DataConfig
from distgan.data.index.loading import load_index
from distgan.data.stream import open_rank_stream
config = DataConfig(path="unused", resolution=8, num_workers=0, cache_dir={str(tmp_path / "slow")!r})
index = load_index({str(server.folder)!r}.replace("served", "named"))
stream = open_rank_stream(config, 0, index, start=0, micro_batch=4)
time.sleep(0.5)
stream.close()
"""
    save_index(index, tmp_path / "named")
    process = subprocess.Popen([sys.executable, "-c", script])
    assert process.wait(250) == 0
    assert server.gets


def test_a_cache_that_is_too_small_is_noticed_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = numbered_index(tmp_path / "local", [10])
    check_capacity(config(cache_gigabytes=1e-9), local, 1)
    arrays = {name: getattr(local, name).repeat(100) for name in ("labels", "extensions", "header_crcs")}
    arrays |= {name: np.arange(1000) for name in ("offsets", "sizes", "span_starts", "span_sizes", "key_ends", "keys")}
    shards = [Shard(f"s3://b/{i}.tar", 10**9, 10, "") for i in range(100)]
    remote = Index(shards, arrays)

    def said(**changes: Any) -> str:
        with pytest.raises(UserError) as error:
            check_capacity(config(**changes), remote, world_size)
        return str(error.value)

    world_size = 8
    assert "needs 100 GB" in said(order="permutation", cache_gigabytes=99)
    check_capacity(config(order="permutation", cache_gigabytes=101), remote, world_size)
    # One rank a node of 8: at most 2 lanes + 1, each with the shards of a 25-sample block (3), one cut, one ahead.
    lanes = {"order": "lanes", "lanes": 16, "shuffle_block": 25}
    assert "needs 15 GB" in said(**lanes, cache_gigabytes=14)
    check_capacity(config(**lanes, cache_gigabytes=16), remote, world_size)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert "data.shuffle_block" in said(**lanes, cache_gigabytes=79)
    check_capacity(config(**lanes, cache_gigabytes=81), remote, world_size)


def test_shards_in_s3(tmp_path: Path) -> None:
    local = numbered_index(tmp_path / "local", COUNTS, classes=3)
    with s3_server() as store:
        store.put(str(tmp_path / "local" / "*.tar"), "bucket/data/")
        with pytest.raises(UserError, match="distgan index"):
            load_index("s3://bucket/data")
        for pattern in ("s3://bucket/data", "s3://bucket/data/*.tar", "s3://bucket/data/{000..003}.tar"):
            remote = build_index(pattern)
            assert remote.fingerprint == local.fingerprint
        save_index(remote.with_class_names(["a", "b", "c"]), "s3://bucket/data")
        with pytest.raises(UserError, match=r"lists 3 other shards, .* s3://bucket/data/001\.tar;"):
            write_index("s3://bucket/data/000.tar")
        written = write_index("s3://bucket/data")
        assert written.path == "s3://bucket/data/index.safetensors"
        assert written.index.class_names == ("a", "b", "c")
        loaded = load_index("s3://bucket/data")
        assert loaded.fingerprint == local.fingerprint
        stream = open_rank_stream(config(order="lanes", num_workers=1), 0, loaded, start=0, micro_batch=17)
        samples = [sample for _ in range(5) for sample in numbers_of(next(stream).data.numpy())]
        stream.close()
        assert sorted(samples) == list(range(85))


def test_shards_behind_nginx(tmp_path: Path) -> None:
    nginx = shutil.which("nginx")
    if nginx is None:
        pytest.skip("needs nginx")
    local = numbered_index(tmp_path / "served", COUNTS, classes=3)
    port = free_port()
    scratch = " ".join(
        f"{name}_temp_path {tmp_path}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error; events {{}}\n"
        f"http {{ access_log off; {scratch} server {{ listen 127.0.0.1:{port}; root {tmp_path}/served; }} }}\n"
    )
    tmp_path.chmod(0o755)
    (tmp_path / "served").chmod(0o755)
    user = ["-g", "user root;"] if os.getuid() == 0 else []
    with subprocess.Popen([nginx, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), *user]) as server:
        try:
            wait_for(f"http://127.0.0.1:{port}/index.safetensors", server)
            loaded = load_index(f"http://127.0.0.1:{port}")
            assert loaded.fingerprint == local.fingerprint
            assert build_index(f"http://127.0.0.1:{port}/{{000..003}}.tar").fingerprint == local.fingerprint
            assert numbers_of(read_samples(config(), loaded, range(85)).data.numpy()) == list(range(85))
        finally:
            server.terminate()
