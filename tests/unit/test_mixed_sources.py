"""Data of several sources: orders, batches, replacements, classes and evaluations follow the weights."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distgan import extensions
from distgan.config import DataConfig, load_config, parse_config
from distgan.config.data import SourceConfig
from distgan.data import Loader
from distgan.data.index.checks import unlisted
from distgan.data.index.loading import load_index
from distgan.data.index.proportion import in_proportion, proportional_counts
from distgan.data.index.saving import save_index
from distgan.data.index.table import Index
from distgan.data.order import assign, make_order, trace
from distgan.data.stream import open_rank_stream
from distgan.distributed.runtime import Runtime
from distgan.evaluation.suite import Evaluator
from distgan.training.state import class_counts
from distgan.training.trace import trace as trace_run
from tests.commands import mistake
from tests.labelled_shards import evaluation_config, write_shards
from tests.runs import recipe
from tests.shards import build_index, damage, numbered_index, numbers_of, refusal, write_numbered

SEED = 11
COUNTS = {"a": [13, 7, 20], "b": [6, 5], "c": [90]}
FIRSTS = {"a": 0, "b": 100, "c": 200}
"""Number of the first sample of each source; images spell the numbers."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources of five classes: 40, 11 and 90 samples."""
    root = tmp_path_factory.mktemp("sources")
    for name, counts in COUNTS.items():
        write_numbered(root / name, counts, classes=5, first=FIRSTS[name])
        save_index(build_index(str(root / name)), root / name)
    return root


def mixed(root: Path, **weights: float) -> list[SourceConfig]:
    return [SourceConfig(path=str(root / name), weight=weight) for name, weight in weights.items()]


def settings(path: Any, **changes: Any) -> DataConfig:
    lanes = {"lanes": 4, "shuffle_block": 8} if changes.get("order") == "lanes" else {}
    return DataConfig.model_validate({"path": path, "resolution": 8, "num_workers": 0} | lanes | changes)


def of_source(numbers: np.ndarray) -> np.ndarray:
    return np.array([0, 1, 2])[np.asarray(numbers) // 100]


@pytest.mark.parametrize("order", ["permutation", "lanes"])
def test_each_source_is_read_in_epochs_of_its_own(shards: Path, order: str) -> None:
    config = settings(mixed(shards, a=2, b=1, c=1), order=order)
    index = load_index(config.path)
    rows = trace(index, make_order(config, SEED, index), np.arange(12 * 64))
    drawn = np.array([row["source"] for row in rows])
    assert np.bincount(drawn[: 4 * 64]).tolist() == [128, 64, 64]
    for source, counts in enumerate(COUNTS.values()):
        own = [row for row in rows if row["source"] == source]
        length = sum(counts)
        assert [row["epoch"] for row in own] == [place // length for place in range(len(own))]
        for epoch in range(len(own) // length):
            seen = [row["sample"] for row in own if row["epoch"] == epoch]
            assert sorted(seen) == list(index.sources[source].samples)
        assert {index.shards[index.shard_of(np.array([row["sample"]]))[0]].url.split("/")[-2] for row in own} == {
            "abc"[source]
        }


@pytest.mark.parametrize("order", ["permutation", "lanes"])
def test_a_list_of_one_source_has_the_order_of_its_path(shards: Path, order: str) -> None:
    plain, listed = settings(str(shards / "a"), order=order), settings(mixed(shards, a=0.3), order=order)
    one, other = load_index(plain.path), load_index(listed.path)
    assert (one.fingerprint, one.sources) == (other.fingerprint, ())
    positions = np.arange(200)
    assert np.array_equal(
        make_order(plain, SEED, one).samples(positions), make_order(listed, SEED, other).samples(positions)
    )


@pytest.mark.parametrize("order", ["permutation", "lanes"])
def test_any_number_of_ranks_and_workers_sees_the_same_batches(shards: Path, order: str) -> None:
    config = settings(mixed(shards, a=2, b=1, c=1), order=order, mirror=True)
    index = load_index(config.path)

    def read(workers: int, world_size: int, rank: int, start: int = 0) -> dict[int, bytes]:
        stream = open_rank_stream(
            config.model_copy(update={"num_workers": workers}), SEED, index, start=start, micro_batch=12, rank=rank,
            world_size=world_size,
        )  # fmt: skip
        try:
            batches = [next(stream) for _ in range(12 - start // 12)]
        finally:
            stream.close()
        return {
            position: image.numpy().tobytes() + bytes([label])
            for batch in batches
            for position, image, label in zip(batch.positions.tolist(), batch.data, batch.labels.tolist(), strict=True)
        }

    expected = read(0, 1, 0)
    assert len(expected) == 144
    for workers, world_size in ((0, 2), (0, 4), *([(1, 1)] if order == "lanes" else [])):
        assert {k: v for rank in range(world_size) for k, v in read(workers, world_size, rank).items()} == expected
    assert read(0, 1, 0, start=60).items() <= expected.items()


def test_ranks_share_lanes_of_every_source(tmp_path: Path) -> None:
    """8 lanes over 8 shards of each source: of 4 ranks, each reads two lanes of both, and few samples of others."""
    for name, first in (("a", 0), ("b", 1000)):
        write_numbered(tmp_path / name, [64] * 8, first=first)
        save_index(build_index(str(tmp_path / name)), tmp_path / name)
    config = settings(mixed(tmp_path, a=1, b=1), order="lanes", lanes=8, shuffle_block=64)
    index = load_index(config.path)
    order = make_order(config, SEED, index)
    reads = np.zeros((4, 16), int)
    for start in range(0, 1024, 128):
        for rank, positions in enumerate(assign(order, np.arange(start, start + 128), 4)):
            np.add.at(reads[rank], index.shard_of(order.samples(positions)), 1)
    # Of each source, a rank reads two shards; a uniform split would give it a quarter of all.
    assert (np.sort(reads.reshape(4, 2, 8), axis=-1)[:, :, -2:].sum(-1) >= 0.9 * reads.reshape(4, 2, 8).sum(-1)).all()


def test_an_unreadable_sample_is_replaced_by_one_of_its_source(tmp_path: Path) -> None:
    for name, counts in COUNTS.items():
        damage(numbered_index(tmp_path / name, counts), 3)
    config = settings(mixed(tmp_path, a=1, b=1, c=1))
    index = load_index(config.path)
    stream = open_rank_stream(config, SEED, index, start=0, micro_batch=300)
    failures = {failure.sample: failure.replacement for failure in next(stream).failures}
    stream.close()
    broken = [source.samples.start + 3 for source in index.sources]
    assert sorted(failures) == broken
    assert all(failures[sample] in source.samples for sample, source in zip(broken, index.sources, strict=True))


def test_the_fingerprint_is_that_of_the_sources_and_their_shares(shards: Path, tmp_path: Path) -> None:
    def fingerprint(path: Any) -> str:
        return load_index(path).fingerprint

    base = fingerprint(mixed(shards, a=1, b=3))
    assert fingerprint(mixed(shards, a=0.5, b=1.5)) == base
    others = [mixed(shards, a=1, b=2), mixed(shards, b=3, a=1), mixed(shards, a=1, c=3), [str(shards / "a")]]
    assert base not in {fingerprint(path) for path in others}
    # A source may move by itself.
    (tmp_path / "elsewhere").symlink_to(shards / "b")
    moved = [*mixed(shards, a=1), SourceConfig(path=str(tmp_path / "elsewhere"), weight=3)]
    assert fingerprint(moved) == base


def test_an_index_of_sources_survives_pickling(shards: Path) -> None:
    index = load_index(mixed(shards, a=1, b=3))
    for one in (index, index.with_class_names("vwxyz"), in_proportion(index)):
        again = pickle.loads(pickle.dumps(one))  # noqa: S301
        assert (again.sources, again.fingerprint, len(again)) == (one.sources, one.fingerprint, len(one))
        assert np.array_equal(again.labels, one.labels)


def test_which_sources_are_refused(shards: Path) -> None:
    both = refusal(load_index, [*mixed(shards, a=1), SourceConfig(path=[str(shards / "a")], weight=2)])
    assert "a shard is named twice" in both
    empty = refusal(load_index, [*mixed(shards, a=1), SourceConfig(path=[], weight=2)])
    assert "data.path.1.path" in empty


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("[{path: a, weight: 0}]", "data.path.0.weight = 0"),
        ("[{path: a}]", "data.path.0.weight"),
        ("[{path: a, weight: 1}, b]", "list of sources, each as {path: ..., weight: ...}"),
        ("[{path: a, weight: 1}, {path: b, weight: 1e-7}]", "the weight 1e-07 of b"),
        ("[{path: a, wieght: 1}]", "data.path.0.weight"),
    ],
)
def test_mistakes_in_a_list_of_sources(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str, told: str
) -> None:
    assert told in mistake(capsys, "train", str(recipe(tmp_path, tmp_path)), f"data.path={path}")


def test_classes_that_differ_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, classes in (("a", 5), ("b", 3), ("c", 0)):
        numbered_index(tmp_path / name, [20], classes=classes)
    for names in ("ab", "ac", "ba", "ca"):
        index = load_index(mixed(tmp_path, **dict.fromkeys(names, 1.0)))
        assert index.num_classes == 0
        assert (index.labels == -1).all()
    sources = f"[{{path: {tmp_path}/a, weight: 1}}, {{path: {tmp_path}/b, weight: 1}}]"
    told = mistake(capsys, "train", str(recipe(tmp_path, tmp_path)), f"data.path={sources}", "data.labels=true")
    assert "the sources of data.path have no labels, or not the same classes" in told


def test_labels_are_drawn_as_often_as_the_mixture_has_them(tmp_path: Path) -> None:
    """Source a: 20 of each of 5 classes. Source b: 10 of each, then 30 of class 0 and 20 of class 4."""
    numbered_index(tmp_path / "a", [100], classes=5)
    index = numbered_index(tmp_path / "b", [50], classes=5)
    assert class_counts(index) == [10] * 5
    labels = np.array(class_counts(load_index(mixed(tmp_path, a=3, b=1))))
    assert np.abs(labels / labels.sum() - 0.2).max() < 1e-9
    sources = load_index(mixed(tmp_path, a=3, b=1))
    sources.labels[sources.sources[1].samples.start :] = np.repeat([0, 4], [30, 20])
    labels = np.array(class_counts(sources))
    expected = 0.75 * np.full(5, 0.2) + 0.25 * np.array([0.6, 0, 0, 0, 0.4])
    assert np.abs(labels / labels.sum() - expected).max() < 1e-9


def test_the_reals_of_an_evaluation_are_in_proportion(shards: Path) -> None:
    index = load_index(mixed(shards, a=2, b=1, c=1))
    # 11 samples of b are a quarter: 22 of a and 11 of c go with them.
    assert proportional_counts(index) == [22, 11, 11]
    reals = in_proportion(index)
    assert len(reals) == 44
    assert reals.num_classes == 5
    assert reals.fingerprint not in (index.fingerprint, in_proportion(load_index(mixed(shards, a=1, b=1))).fingerprint)
    entries = {(index.entry(i)[0], index.entry(i)[1]): i for i in range(len(index))}
    originals = [entries[reals.entry(i)[:2]] for i in range(len(reals))]
    assert originals == sorted(set(originals))
    assert [reals.key(i) for i in range(len(reals))] == [index.key(i) for i in originals]
    assert np.array_equal(reals.labels, index.labels[originals])
    assert np.bincount(of_source(np.array(numbers(reals)))).tolist() == [22, 11, 11]
    assert in_proportion(load_index(str(shards / "a"))).sources == ()
    plain = load_index(str(shards / "a"))
    assert in_proportion(plain) is plain


def test_an_evaluation_compares_with_the_mixed_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """12 dark and 100 bright images, mixed 3 : 1. Generated images in that proportion have a distance of 0."""
    monkeypatch.setattr(extensions, "_packages", {"tests"})
    monkeypatch.setattr(extensions, "_paths", set())
    shards = [
        write_shards(tmp_path / name, torch.full((count, 1, 16, 16), value, dtype=torch.uint8))
        for name, count, value in (("dark", 12, 0), ("bright", 100, 255))
    ]
    for path in shards:
        save_index(build_index(path), path)
    metrics = [{"metric": "tests.plugins.lab.metrics:PixelDistance"}]
    config = evaluation_config("unused", tmp_path / "cache", metrics=metrics, num_samples=64)
    sources = [{"path": path, "weight": weight} for path, weight in zip(shards, (3, 1), strict=True)]
    config = parse_config(config.model_dump() | {"data": config.data.model_dump() | {"path": sources}})
    with caplog.at_level("INFO", "distgan"):
        evaluator = Evaluator(config, load_index(config.data.path), Runtime())
    assert "16 real samples, in proportion to the weights of data.path: 12 of 12, 4 of 100" in caplog.text
    values = evaluator(lambda i: torch.where(i[:, None, None, None] % 4 == 0, 255, 0).byte().expand(-1, 1, 16, 16))
    assert values == {"PixelDistance": 0.0}


def numbers(index: Index) -> list[int]:
    stream = open_rank_stream(settings("unused"), 0, index, start=0, micro_batch=len(index))
    try:
        return sorted(numbers_of(next(stream).data.numpy()))
    finally:
        stream.close()


def test_tars_that_no_index_lists_are_told_of_every_source(shards: Path) -> None:
    path = mixed(shards, a=1, b=1)
    assert unlisted(path, load_index(path)) == ()
    assert len(unlisted(path, load_index(mixed(shards, c=1)))) == 2


def test_the_loader_takes_sources(shards: Path) -> None:
    path = [{"path": str(shards / name), "weight": weight} for name, weight in (("a", 3), ("b", 1))]
    with Loader(path, batch_size=32, resolution=8, num_workers=0) as loader:
        batches = list(loader)
    assert sum(len(batch.labels) for batch in batches) == 64  # 51 samples in whole batches
    drawn = of_source(np.array([number for batch in batches for number in numbers_of(batch.data.numpy())]))
    assert np.bincount(drawn).tolist() == [48, 16]
    assert torch.cat([batch.positions for batch in batches]).tolist() == list(range(64))


def test_trace_names_the_source_of_each_sample(shards: Path, tmp_path: Path) -> None:
    sources = [{"path": str(shards / name), "weight": 1} for name in "ab"]
    config = load_config(recipe(tmp_path, shards, data={"path": sources}))
    rows = list(trace_run(config, 0, 4, world_size=2))
    assert [row["position"] for row in rows] == list(range(128))
    assert np.bincount([row["source"] for row in rows]).tolist() == [64, 64]
    assert {row["shard"].split("/")[0] for row in rows if row["source"] == 1} == {"b"}
