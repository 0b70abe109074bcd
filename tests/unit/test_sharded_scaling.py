"""The model of FSDP2, HSDP and ZeRO in `tools/sharding.py` against calculations by hand, and its laws."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgan.config import load_config
from tools.recipe_costs import Costs, costs, discriminator_passes, engine_step, sent_bytes, step_flops, updates
from tools.scaling import Cluster, Link, Update, update_seconds
from tools.sharding import Network, Phase, half_seconds, segments, sharded_seconds, zero_seconds

CONFIGS = Path(__file__).parents[2] / "configs"
FREE = Link(latency=0.0, bandwidth=math.inf)
GIGABYTE = Link(latency=0.0, bandwidth=1e9)
NETWORK = Network(around=1e6, blocks=(4e6, 2e6))
SECONDS = 0.007
FORWARD, BACKWARD = Phase(NETWORK, SECONDS), Phase(NETWORK, 2 * SECONDS, backward=True, reduces=True)


def flat(link: Link) -> Cluster:
    """Nodes of one rank."""
    return Cluster(1, FREE, link, trees=False)


def test_bytes_of_a_forward_and_a_backward_pass() -> None:
    made = segments([FORWARD, BACKWARD])
    # Around the blocks, the first block, the second block; then back, where what is around is still there.
    assert [one.gathered for one in made] == [1e6, 4e6, 2e6, 2e6, 4e6, 0]
    assert [one.reduced for one in made] == [0, 0, 0, 2e6, 4e6, 1e6]
    assert [one.seconds for one in made] == pytest.approx([0.001, 0.004, 0.002, 0.004, 0.008, 0.002])
    kept = segments([FORWARD, BACKWARD], reshards=False, gradient_bytes=0.5)
    assert [one.gathered for one in kept] == [1e6, 4e6, 2e6, 0, 0, 0]
    assert sum(one.reduced for one in kept) == NETWORK.bytes / 2


@pytest.mark.parametrize(
    ("penalties", "gathered", "passes"),
    [
        # Reals and fakes together: the generator forward, then A+B and B, as with the ends of differences below.
        (["r1=null", "r2=null"], (739_072, 1_235_488), [1]),
        # With second derivatives, weights stay: each is gathered once.
        (["r1.every=1", "r2.every=1"], (501_088, 1_235_488), [2]),
        # Every fourth update has them: (501,088 + 3 x 739,072) / 4.
        (["r1.every=4", "r2.every=4"], (679_576, 1_235_488), [2, 1]),
        # The ends of differences go through the discriminator too.
        (
            [
                "r1={gamma: 1, method: finite_difference, sigma: 0.1, antithetic: false}",
                "r2={gamma: 1, method: finite_difference, sigma: 0.1, antithetic: false}",
            ],
            (739_072, 1_235_488),
            [1],
        ),
    ],
)
def test_bytes_are_those_that_real_ranks_send(
    penalties: list[str], gathered: tuple[int, int], passes: list[int]
) -> None:
    """By `tools/communication.py configs/digits-r3gan.yaml --engine fsdp`, whose shards are padded to whole rows."""
    config = load_config(CONFIGS / "digits-r3gan.yaml", [f"objective.{penalty}" for penalty in penalties])
    found = sent_bytes(config, costs(config, 10))
    kinds = [due for role, _, due in updates(config) if role == "discriminator"]
    assert [len(discriminator_passes(config, due)) for due in kinds] == passes
    for role, weights, gradients in zip(("discriminator", "generator"), gathered, (242_592, 258_496), strict=True):
        assert found[role]["weights"] == pytest.approx(weights, rel=1e-3)
        assert found[role]["gradients"] == pytest.approx(gradients, rel=2e-3)


def test_micro_batches_gather_and_reduce_anew() -> None:
    """Replicas exchange the sum of their gradients, unless it would be kept in bfloat16."""
    made = segments([FORWARD, BACKWARD], micro_batches=3)
    assert sum(one.gathered for one in made) == 3 * 13e6
    assert sum(one.reduced for one in made) == 3 * 7e6
    assert sum(one.exchanged for one in made) == 7e6
    low = segments([FORWARD, BACKWARD], micro_batches=3, gradient_bytes=0.5)
    assert sum(one.exchanged for one in low) == 3 * 7e6 / 2
    kept = segments([FORWARD, BACKWARD], micro_batches=3, reshards=False)
    assert sum(one.gathered for one in kept) == NETWORK.bytes
    whole = Network(around=7e6)
    made = segments([Phase(whole, 1.0), Phase(whole, 2.0, backward=True, reduces=True)], micro_batches=3)
    assert sum(one.reduced for one in made) == 7e6


def test_a_gather_is_half_an_all_reduce() -> None:
    # 3/4 of 8 MB at 1 GB/s, and three messages of 10 us.
    assert half_seconds(8e6, 4, flat(Link(10e-6, 1e9))) == pytest.approx(0.006030)
    # Within nodes of 4 at 1 GB/s, then between two of them at 0.5 GB/s.
    assert half_seconds(8e6, 8, Cluster(4, GIGABYTE, Link(0.0, 0.5e9))) == pytest.approx(0.006 + 0.008)


def test_the_next_unit_is_gathered_beside_the_computation() -> None:
    two = flat(GIGABYTE)  # half of the bytes at 1 GB/s: 0.5 ms, 2 ms and 1 ms
    forward = segments([FORWARD])
    # 0.5 ms for the first unit, and 1 ms of it computes beside 2 ms of the next gather.
    assert sharded_seconds(forward, 2, two) == pytest.approx(0.0005 + 0.002 + 0.004 + 0.002)
    assert sharded_seconds(forward, 2, two, overlaps=False) == pytest.approx(0.007 + 0.0035)


def test_the_last_gradients_are_waited_for() -> None:
    # All weights are there. Backward takes 4, 8 and 2 ms; of 1, 2 and 0.5 ms of reductions, the last one is left, and
    # the one before, which ends with the computation.
    made = [replace(one, gathered=0.0) for one in segments([BACKWARD])]
    assert sharded_seconds(made, 2, flat(GIGABYTE)) == pytest.approx(0.014 + 0.0005)


def test_hsdp_gathers_within_a_node_and_sums_shards_between_nodes() -> None:
    cluster = Cluster(2, inside=GIGABYTE, between=Link(0.0, 0.5e9), trees=False)
    made = segments([FORWARD, BACKWARD])
    # On 4 ranks: gathers of 13 MB and reductions of 7 MB within a node, half of them at 1 GB/s. Between two nodes
    # an all-reduce of 7 MB, all shards together, at 0.5 GB/s.
    expected = 3 * SECONDS + 13e6 / 2 / 1e9 + 7e6 / 2 / 1e9 + 7e6 / 0.5e9
    assert sharded_seconds(made, 4, cluster, replicas=2, overlaps=False) == pytest.approx(expected)


def test_zero_gathers_new_weights_after_the_update() -> None:
    update = Update(seconds=0.3, gradient_bytes=80e6, buckets=1, statistics=0, statistics_bytes=0.0)
    assert zero_seconds(update, 80e6, 2, flat(GIGABYTE)) == pytest.approx(0.3 + 0.080 + 0.040)


def test_a_single_gpu_computes_all_the_time() -> None:
    config = load_config(CONFIGS / "digits-r3gan.yaml")
    by_role = costs(config, 10)
    alone = 4 * step_flops(config, by_role) / 1e12
    for engine in ("ddp", "zero2", "fsdp", "hsdp"):
        assert engine_step(config, by_role, engine, 1, flat(Link(1.0, 1.0)), 4, 1e12) == pytest.approx(alone)


links = st.builds(Link, st.floats(0, 1e-3), st.floats(1e6, 1e12))
networks = st.builds(Network, st.floats(0, 1e8), st.lists(st.floats(1, 1e8), min_size=1, max_size=6).map(tuple))


@given(
    network=networks, other=networks, inside=links, between=links, per_node=st.sampled_from([1, 2, 8]),
    nodes=st.integers(1, 64), faster=st.floats(1, 100), reshards=st.booleans(), shards=st.booleans(),
)  # fmt: skip
def test_more_bandwidth_is_never_slower(
    network: Network, other: Network, inside: Link, between: Link, per_node: int, nodes: int, faster: float,
    reshards: bool, shards: bool,
) -> None:  # fmt: skip
    """And an update takes at least its computation, and at most all of its parts one after another."""
    made = segments(
        [Phase(other, 0.1), Phase(network, 0.2), Phase(network, 0.4, backward=True, reduces=True)], reshards=reshards
    )
    replicas = nodes if shards else 1
    times = []
    for factor in (1.0, faster):
        slow, quick = (Link(link.latency, link.bandwidth * factor) for link in (between, inside))
        cluster = Cluster(per_node, quick, slow)
        times.append(sharded_seconds(made, nodes * per_node, cluster, replicas=replicas))
        in_turn = sharded_seconds(made, nodes * per_node, cluster, replicas=replicas, overlaps=False)
        assert times[-1] * (1 + 1e-9) >= 0.7
        assert times[-1] <= in_turn * (1 + 1e-9)
    assert times[1] <= times[0] * (1 + 1e-9)


@given(size=st.floats(1, 1e10), between=links, nodes=st.integers(1, 128))
def test_zero_is_never_faster_than_ddp(size: float, between: Link, nodes: int) -> None:
    update, cluster = Update(0.3, size, 4, 0, 0.0), Cluster(8, Link(1e-6, 1e11), between)
    assert zero_seconds(update, size, 8 * nodes, cluster) >= update_seconds(update, 8 * nodes, cluster)


def test_networks_of_the_published_sizes() -> None:
    """GAT-XL/2 and R3GAN at 64x64, from their configs alone."""
    found: dict[str, dict[str, Costs]] = {
        name: costs(load_config(CONFIGS / f"{name}.yaml"), 1000) for name in ("imagenet256-gat-xl2", "imagenet64-r3gan")
    }
    for of in found.values():
        for cost in of.values():
            assert cost.network.blocks
            assert 0 < cost.network.around < 0.1 * cost.network.bytes
    assert len(found["imagenet256-gat-xl2"]["generator"].network.blocks) == 28
