"""The model of `tools/scaling.py` against calculations by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgan.config import load_config
from tools.communication import Kind, Traffic
from tools.scale import accumulated, generator_batch, line, updates
from tools.scaling import (
    Cluster,
    Link,
    Update,
    efficiency,
    ring_seconds,
    step_seconds,
    sum_seconds,
    tree_seconds,
    update_seconds,
)

CONFIGS = Path(__file__).parents[2] / "configs"
FREE = Link(latency=0.0, bandwidth=math.inf)
GIGABYTE = Link(latency=0.0, bandwidth=1e9)
UPDATE = Update(seconds=0.3, gradient_bytes=8e6, buckets=4, statistics=10, statistics_bytes=1e3)


def flat(link: Link, *, trees: bool = False) -> Cluster:
    """Nodes of one rank."""
    return Cluster(1, FREE, link, trees)


def test_a_ring() -> None:
    # 2 (W - 1) / W x 8 MB / 1 GB/s at W = 4, and six messages of 10 us.
    assert ring_seconds(8e6, 4, GIGABYTE) == pytest.approx(0.012)
    assert ring_seconds(8e6, 4, Link(10e-6, 1e9)) == pytest.approx(0.012060)
    assert ring_seconds(8e6, 1, GIGABYTE) == 0.0


def test_a_tree_has_few_messages_and_a_ring_few_bytes() -> None:
    link = Link(10e-6, 1e9)
    assert tree_seconds(0, 1024, link) == pytest.approx(2 * 10 * 10e-6)
    assert tree_seconds(1e6, 5, link) == pytest.approx(2 * 3 * 10e-6 + 2e-3)
    assert tree_seconds(1e6, 1, link) == 0.0
    with_trees, rings = flat(link, trees=True), flat(link)
    assert sum_seconds(8, 1024, with_trees) == pytest.approx(200e-6, rel=1e-3)
    assert sum_seconds(8, 1024, rings) == pytest.approx(2046 * 10e-6, rel=1e-3)
    assert sum_seconds(1e9, 8, with_trees) == sum_seconds(1e9, 8, rings)


def test_nodes_are_summed_within_and_between() -> None:
    cluster = Cluster(4, inside=GIGABYTE, between=Link(0.0, 0.5e9), trees=False)
    # 3/2 of the bytes within each of two nodes at 1 GB/s, then once the bytes at 0.5 GB/s between them.
    assert sum_seconds(8e6, 8, cluster) == pytest.approx(0.012 + 0.016)
    assert sum_seconds(8e6, 4, cluster) == pytest.approx(0.012)
    assert sum_seconds(8e6, 2, cluster) == pytest.approx(0.008)
    assert sum_seconds(8e6, 1, cluster) == 0.0


@pytest.mark.parametrize("ranks", [1, 2, 64])
def test_without_cost_or_company_an_update_is_its_computation(ranks: int) -> None:
    assert update_seconds(UPDATE, ranks, flat(FREE)) == pytest.approx(0.3)
    assert update_seconds(UPDATE, 1, flat(Link(1.0, 1.0))) == pytest.approx(0.3)
    assert efficiency([UPDATE, UPDATE], ranks, flat(FREE)) == pytest.approx(1.0)


def test_statistics_are_waited_for() -> None:
    update = Update(seconds=0.3, gradient_bytes=0.0, buckets=1, statistics=10, statistics_bytes=0.0)
    # Two messages of 1 ms each at W = 2, ten times, and once for an empty bucket at the end.
    assert update_seconds(update, 2, flat(Link(1e-3, 1e9))) == pytest.approx(0.3 + 10 * 2e-3 + 2e-3)


def test_buckets_hide_behind_the_backward_pass_but_for_the_last() -> None:
    # 200 ms of backward, a bucket each 50 ms; each takes 20 ms, so that only the last is seen.
    hidden = Update(seconds=0.3, gradient_bytes=80e6, buckets=4, statistics=0, statistics_bytes=0.0)
    assert update_seconds(hidden, 2, flat(GIGABYTE)) == pytest.approx(0.3 + 0.020)
    # Each takes 60 ms: the first begins after 100 + 50 ms, and they follow each other.
    queued = Update(seconds=0.3, gradient_bytes=240e6, buckets=4, statistics=0, statistics_bytes=0.0)
    assert update_seconds(queued, 2, flat(GIGABYTE)) == pytest.approx(0.150 + 4 * 0.060)
    whole = Update(seconds=0.3, gradient_bytes=80e6, buckets=1, statistics=0, statistics_bytes=0.0)
    assert update_seconds(whole, 2, flat(GIGABYTE)) == pytest.approx(0.3 + 0.080)


def test_a_statistic_waits_for_the_bucket_before_it() -> None:
    # Backward from 100 to 300 ms. The statistic of the forward pass is free; the one in the middle of the backward
    # pass, at 200 ms, comes after a bucket that was asked for at 200 ms too and takes 80 ms; so 100 ms more are
    # computed after 280 ms, and the last bucket takes 80 ms again.
    update = Update(seconds=0.3, gradient_bytes=160e6, buckets=2, statistics=2, statistics_bytes=0.0)
    assert update_seconds(update, 2, flat(GIGABYTE)) == pytest.approx(0.280 + 0.100 + 0.080)


@given(
    seconds=st.floats(1e-4, 10),
    size=st.floats(0, 1e9),
    buckets=st.integers(1, 20),
    statistics=st.integers(0, 200),
    ranks=st.integers(1, 1024),
    per_node=st.sampled_from([1, 2, 8]),
)
def test_a_step_is_never_shorter_than_its_computation_nor_longer_than_all_one_after_another(
    seconds: float, size: float, buckets: int, statistics: int, ranks: int, per_node: int
) -> None:
    update = Update(seconds, size, buckets, statistics, 1e3)
    cluster = Cluster(per_node, Link(1e-6, 1e11), Link(1e-5, 1e10))
    found = step_seconds([update, update], ranks, cluster)
    sums = buckets * sum_seconds(size / buckets, ranks, cluster) + statistics * sum_seconds(1e3, ranks, cluster)
    assert 2 * seconds <= found * (1 + 1e-9)
    assert found <= 2 * (seconds + sums) * (1 + 1e-9)


def test_updates_are_those_that_were_counted() -> None:
    traffic = {
        Kind("discriminator", "gradients", "allreduce"): Traffic(10, 5e6),
        Kind("discriminator", "batch statistics", "allreduce"): Traffic(15, 3e3),
        Kind("generator", "gradients", "allreduce"): Traffic(1, 7e5),
    }
    made = updates(traffic, 5, 0.75)
    assert made == [Update(0.125, 1e6, 2, 3, 200.0)] * 5 + [Update(0.125, 7e5, 1, 0, 0.0)]


def test_accumulated_micro_batches_share_one_sum_of_gradients() -> None:
    quiet = Update(seconds=0.3, gradient_bytes=8e6, buckets=1, statistics=0, statistics_bytes=0.0)
    one, four = (step_seconds(accumulated([quiet], count), 2, flat(GIGABYTE)) for count in (1, 4))
    assert one == pytest.approx(0.3 + 0.008)
    assert four == pytest.approx(1.2 + 0.008)


def test_a_line_through_timings() -> None:
    assert line([(8, 0.05), (32, 0.11)]) == pytest.approx((0.03, 0.0025))
    assert line([(1, 1.0), (2, 3.0), (3, 2.0)]) == pytest.approx((1.0, 0.5))


def test_both_batches_are_scaled_alike() -> None:
    sngan = load_config(CONFIGS / "cifar10-sngan.yaml")
    assert generator_batch(sngan, 8) == ["training.generator_batch_size=16"], "twice the critic's"
    assert generator_batch(load_config(CONFIGS / "digits-dcgan.yaml"), 8) == []
