"""The cache of remote shards, over real HTTP: whole files, within its bound, used by many at once."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distgan.config import DataConfig
from distgan.data import reader as reader_module
from distgan.data.index.loading import load_index
from distgan.data.index.saving import save_index
from distgan.data.index.table import Index, Shard
from distgan.data.reader import Reader
from distgan.data.storage import shard_cache as cache_module
from distgan.data.storage.shard_cache import ShardCache
from tests.servers import RangeServer, range_server
from tests.shards import build_index, read_whole_shards, refusal, write_numbered

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


def content(cache: ShardCache, shard: Shard) -> bytes:
    descriptor = cache.open(shard)
    try:
        return os.pread(descriptor, shard.size + 1, 0)
    finally:
        os.close(descriptor)


def stored(folder: Path) -> int:
    """Bytes in the cache while nobody makes room in it; a file renamed meanwhile counts once."""
    with (folder / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sizes: dict[int, int] = {}
        for entry in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):
                sizes[entry.inode()] = entry.stat().st_size
        return sum(sizes.values())


def test_a_shard_is_fetched_once_and_whole(index: Index, server: RangeServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "c", 10**6)
    for _ in range(3):
        assert content(cache, index.shards[1]) == (server.folder / "001.tar").read_bytes()
    assert server.gets == ["/001.tar"]
    assert content(ShardCache(tmp_path / "c", 10**6), index.shards[1])
    assert server.gets == ["/001.tar"]


def test_shards_of_one_name_or_another_version_never_meet(server: RangeServer, tmp_path: Path) -> None:
    write_numbered(server.folder / "other", [30], classes=2)
    urls = [f"{server.url}/000.tar", f"{server.url}/other/000.tar", f"{server.url}/000.tar?version=2"]
    shards = build_index(urls).shards
    cache = ShardCache(tmp_path / "c", 10**6)
    assert content(cache, shards[0]) == (server.folder / "000.tar").read_bytes()
    assert content(cache, shards[1]) == (server.folder / "other" / "000.tar").read_bytes()
    assert content(cache, shards[2]) == (server.folder / "000.tar").read_bytes()
    write_numbered(server.folder, [31], classes=2)
    assert content(cache, build_index(urls[0]).shards[0]) == (server.folder / "000.tar").read_bytes()
    assert len(list((tmp_path / "c").glob("*.tar"))) == 4


@pytest.mark.parametrize("failure", ["status", "cut"])
def test_a_failed_download_leaves_nothing_and_can_be_tried_again(
    index: Index, server: RangeServer, tmp_path: Path, failure: str
) -> None:
    cache = ShardCache(tmp_path / "c", 10**6)
    server.failures, server.failure = 1, failure
    with pytest.raises(OSError, match=r".+"):
        content(cache, index.shards[0])
    assert os.listdir(tmp_path / "c") == ["lock"]
    assert content(cache, index.shards[0]) == (server.folder / "000.tar").read_bytes()


def test_a_download_that_is_not_what_the_index_says(index: Index, server: RangeServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "c", 10**6)
    shard = index.shards[0]
    for wrong, said in (
        (replace(shard, size=shard.size - 1), "more than"),
        (replace(shard, size=shard.size + 1), f"{shard.size:,} bytes, expected {shard.size + 1:,}"),
        (replace(shard, sha256="0" * 64), "SHA-256"),
    ):
        with pytest.raises(OSError, match=said):
            cache.open(wrong)
    assert os.listdir(tmp_path / "c") == ["lock"]
    verified = build_index(f"{server.url}/000.tar", verify=True).shards[0]
    assert content(cache, verified)
    for path in (tmp_path / "c").glob("*.tar"):
        path.write_bytes(b"cut")
    assert content(cache, verified) == (server.folder / "000.tar").read_bytes()


def test_what_was_used_longest_ago_is_evicted(index: Index, server: RangeServer, tmp_path: Path) -> None:
    sizes = [shard.size for shard in index.shards]
    cache = ShardCache(tmp_path / "c", sizes[0] + sizes[1] + sizes[2])
    for shard in index.shards[:3]:
        content(cache, shard)
        time.sleep(0.01)
    held = cache.open(index.shards[0])
    time.sleep(0.01)
    cache.touch([index.shards[1]])
    content(cache, index.shards[3])  # as large as two of the others: the third, then the first must go
    assert stored(tmp_path / "c") <= sizes[0] + sizes[1] + sizes[2]
    server.gets.clear()
    content(cache, index.shards[1])
    assert server.gets == []
    assert os.pread(held, sizes[0], 0) == (server.folder / "000.tar").read_bytes()  # evicted, yet readable
    os.close(held)
    content(cache, index.shards[2])
    assert server.gets == ["/002.tar"]


def test_a_shard_larger_than_the_cache(index: Index, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"raise data\.cache_gigabytes"):
        ShardCache(tmp_path / "c", index.shards[0].size - 1).open(index.shards[0])


def test_many_threads_share_a_small_cache(index: Index, server: RangeServer, tmp_path: Path) -> None:
    bound = index.shards[0].size + index.shards[1].size
    server.delay = 0.005
    cache = ShardCache(tmp_path / "c", bound)
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            with contextlib.suppress(FileNotFoundError):
                most = max(most, stored(tmp_path / "c"))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    choices = np.random.default_rng(0).integers(0, 4, 60).tolist()
    with ThreadPoolExecutor(6) as pool:
        contents = list(pool.map(lambda i: content(cache, index.shards[i]), choices))
    done.set()
    watcher.join()
    whole = [(server.folder / f"{i:03d}.tar").read_bytes() for i in range(4)]
    assert all(data == whole[i] for i, data in zip(choices, contents, strict=True))
    assert 0 < most <= bound
    assert not [name for name in os.listdir(tmp_path / "c") if not name.endswith(".tar") and name != "lock"]


def test_a_download_that_ends_while_room_is_made_counts(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would get its final name after the folder was listed, and give up its claim before that is tried."""
    first, second = index.shards[:2]
    cache = ShardCache(tmp_path / "c", max(first.size, second.size))
    downloaded, go_on = threading.Event(), threading.Event()
    check, locked = cache_module._check, cache_module.locked

    def wait_when_downloaded(part: Path, shard: Shard) -> None:
        check(part, shard)
        if shard == first:
            downloaded.set()
            assert go_on.wait(20)

    monkeypatch.setattr(cache_module, "_check", wait_when_downloaded)
    thread = threading.Thread(target=lambda: content(cache, first))
    thread.start()
    assert downloaded.wait(20)
    part = next((tmp_path / "c").glob("*.part"))
    claim = part.with_name(part.name.partition("-")[0] + ".claim")

    def locked_after_the_download(path: Path, *, wait: bool = False) -> AbstractContextManager[bool]:
        if path == claim:
            go_on.set()
            thread.join(0.5)  # if it can end
        return locked(path, wait=wait)

    monkeypatch.setattr(cache_module, "locked", locked_after_the_download)
    content(cache, second)
    thread.join()
    assert stored(tmp_path / "c") <= max(first.size, second.size)


def test_processes_download_each_shard_once(index: Index, server: RangeServer, tmp_path: Path) -> None:
    server.delay = 0.1
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    arguments = (str(tmp_path / "c"), index.shards, barrier, results)
    processes = [context.Process(target=read_whole_shards, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [[shard.size for shard in index.shards]] * 3
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    assert sorted(server.gets) == [f"/{i:03d}.tar" for i in range(4)]


def test_the_remains_of_a_killed_download_make_room(index: Index, server: RangeServer, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    cache = ShardCache(folder, index.shards[0].size + 10)
    server.delay = 0.5
    script = (
        "import sys; from pathlib import Path; from distgan.data.storage.shard_cache import ShardCache;"
        "from distgan.data.index.loading import load_index;"
        f"ShardCache(Path({str(folder)!r}), 10**6).open(load_index({server.url!r}).shards[1])"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    while not (folder.is_dir() and list(folder.glob("*.part"))):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert len(list(folder.glob("*.part"))) == len(list(folder.glob("*.claim"))) == 1
    assert content(cache, index.shards[0])
    assert sorted(path.suffix for path in folder.iterdir() if path.name != "lock") == [".tar"]
    assert content(cache, index.shards[1])


def test_a_download_that_never_ends_is_not_waited_for_for_ever(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_WAIT_SECONDS", 0.1)
    cache = ShardCache(tmp_path, 10**6)
    claim = os.open(cache._path(index.shards[0]).with_suffix(".claim"), os.O_RDWR | os.O_CREAT)
    fcntl.flock(claim, fcntl.LOCK_EX)
    with pytest.raises(TimeoutError):
        cache.open(index.shards[0])
    os.close(claim)


@pytest.mark.parametrize("trouble", ["folder", "locks"])
def test_a_cache_that_cannot_be_used_is_told_as_that(
    index: Index, server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """And not as shards that cannot be read, after all retries."""
    folder = Path("/proc/none") if trouble == "folder" else tmp_path / "c"
    config = DataConfig(path=server.url, resolution=8, num_workers=0, cache_dir=str(folder))
    if trouble == "locks":

        def no_locks(*_: object) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "flock", no_locks)
    for said in (
        refusal(load_index, server.url, str(folder)),
        refusal(ShardCache.of, config),
        refusal(Reader, config, index, 0),
    ):
        assert said.startswith(f"{folder}/")
        assert "cannot use this folder as a cache: No " in said
        assert "data.cache_dir or $DISTGAN_CACHE" in said
