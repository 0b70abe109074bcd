"""Metrics of images on real ranks, as a program that is not distgan's uses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.evaluation.moments import all_reduce
from distgan.metrics import FrechetDistance, InceptionScore, KernelDistance, load_detector
from tests.ranks import RankPool

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(192, 10, generator=GENERATOR, dtype=torch.float64) / 4
REALS, FAKES = (torch.randint(0, most, (61, 3, 8, 8), dtype=torch.uint8, generator=GENERATOR) for most in (256, 190))
SIZES = {1: [61], 2: [43, 18], 3: [40, 21, 0]}


class Network(nn.Module):
    """Features (n, 10) and logits (n, 10), which rounding to float32 makes the same in batches of all sizes."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = (images.flatten(1).double() / 127.5 - 1) @ WEIGHT
        return features, features / 2


def metrics_of(**settings: Any) -> dict[str, Any]:
    detector = load_detector(Network(), image_shape=(3, 8, 8))
    return {
        "fid": FrechetDistance(detector, **settings),
        "kid": KernelDistance(detector, subset_size=20, **settings),
        "score": InceptionScore(detector, **settings),
    }


def flat(result: Any) -> list[float]:
    return [float(value) for value in (result if isinstance(result, tuple) else (result,))]


def values(numbered: bool, **settings: Any) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """What plain `compute` gives, twice, with an update between that only rank 0 makes."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    metrics = metrics_of(**settings)
    mine = torch.arange(61).split(SIZES[world_size])[rank]
    other = torch.arange(61).split(SIZES[world_size][::-1])[rank]  # a rank may have no real image
    for name, metric in metrics.items():
        for samples, images, real in ((mine, FAKES, False), (other, REALS, True)):
            for part in samples.split(9) if len(samples) else ():
                numbers = {"numbers": part} if numbered and name != "fid" else {}
                metric.update(images[part], real=real, **numbers)
    first = {name: flat(metric.compute()) for name, metric in metrics.items()}
    if rank == 0:
        for name, metric in metrics.items():
            numbers = {"numbers": torch.arange(61, 66)} if numbered and name != "fid" else {}
            metric.update(REALS[:5], real=False, **numbers)
    for metric in metrics.values():
        metric._computed = None
    return first, {name: flat(metric.compute()) for name, metric in metrics.items()}


def as_another_program(numbered: bool, **settings: Any) -> Any:
    dist.init_process_group("gloo")
    return values(numbered, **settings)


@pytest.mark.parametrize("settings", [{}, {"dist_sync_fn": None}], ids=["default", "all-gather"])
def test_plain_compute_has_one_value_for_any_number_of_ranks(ranks: RankPool, settings: dict[str, Any]) -> None:
    ((expected, later),) = ranks.run(1, as_another_program, True, **settings)
    assert expected["fid"][0] > 1
    assert later["fid"] != expected["fid"]
    assert later["kid"] != expected["kid"]
    for world_size in (2, 3):
        for first, second in ranks.run(world_size, as_another_program, True, **settings):
            for found, values_of_one in ((first, expected), (second, later)):
                for name, value in values_of_one.items():
                    assert found[name] == pytest.approx(value, rel=1e-10), name


def test_without_numbers_images_count_in_order_of_rank(ranks: RankPool) -> None:
    ((expected, _),) = ranks.run(1, as_another_program, False)
    # The ranks hold contiguous parts here, so this order is the same for any number of them.
    for found, _ in ranks.run(2, as_another_program, False):
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-10), name


def synchronized_by_hand() -> dict[str, list[float]]:
    """As the suite does: states reduced or gathered on rank 0 inside a context, computed there alone."""
    runtime = Runtime()
    metrics = metrics_of(sync_on_compute=False)
    mine = torch.arange(61).split(SIZES[runtime.world_size])[runtime.rank]
    found: dict[str, list[float]] = {}
    for name, metric in metrics.items():
        numbers = {} if name == "fid" else {"numbers": mine}
        if len(mine):
            metric.update(FAKES[mine], real=False, **numbers)
            metric.update(REALS[mine], real=True, **numbers)
        sync: Any = all_reduce if name == "fid" else lambda rows, group=None: [runtime.gather_rows(rows)]
        with metric.sync_context(dist_sync_fn=sync):
            if runtime.is_main:
                found[name] = flat(metric.compute())
    return found


def test_the_suites_synchronization_gives_the_same(ranks: RankPool) -> None:
    ((expected, _),) = ranks.run(1, as_another_program, True)
    for world_size in (1, 2, 3):
        found = ranks.run(world_size, synchronized_by_hand)[0]
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-10), name


def without_images() -> list[str]:
    dist.init_process_group("gloo")
    messages = []
    for metric in metrics_of().values():
        with pytest.raises(UserError) as caught:
            metric.compute()
        messages.append(str(caught.value))
    return messages


def test_no_rank_waits_for_images_that_never_came(ranks: RankPool) -> None:
    for messages in ranks.run(2, without_images):
        assert ["found 0 " in message for message in messages] == [True] * 3
