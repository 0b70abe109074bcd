"""The public reductions of `distgan.distributed`: a loss of ones own has the derivatives of one process, in float64."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import distgan.distributed
from distgan.distributed import all_gather, all_reduce_mean, all_reduce_sum, batch_moments, rank, world_size
from distgan.distributed.runtime import Runtime
from tests.ranks import RankPool

PLUGINS = str(Path(__file__).parents[1] / "plugins")
PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
[PROGRAM] = [block for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S) if "batch_moments" in block]


def plain_gradients() -> list[Tensor]:
    """Those of the program on the page, in plain torch with the whole batch."""
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 2, dtype=torch.float64)
    outputs = network(torch.randn(8, 3, dtype=torch.float64)).tanh()
    loss = outputs.mean(0).square().sum() + (outputs.var(0, correction=0) - 1).square().sum()
    return [*torch.autograd.grad(loss, [*network.parameters()])]


def gradients_of_the_page() -> list[Tensor]:
    Runtime()
    found: dict[str, Any] = {}
    exec(PROGRAM, found)
    return [parameter.grad for parameter in found["network"].parameters()]


@pytest.mark.parametrize("ranks_of_job", [1, 2, 4])
def test_the_program_of_the_page_has_the_gradient_of_one_process(ranks: RankPool, ranks_of_job: int) -> None:
    expected = plain_gradients()
    for found in ranks.run(ranks_of_job, gradients_of_the_page):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def term() -> tuple[float, Tensor]:
    """Value and averaged gradient of the term of docs/extending.md, by the whole batch of generated images."""
    if PLUGINS not in sys.path:
        sys.path.insert(0, PLUGINS)
    from lab.losses import MeanMatching  # type: ignore[import-not-found]

    Runtime()
    fakes, reals = torch.randn(2, 8, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fakes.requires_grad_(True)
    mine = [part.chunk(world_size())[rank()] for part in (fakes, reals)]
    value = MeanMatching()(SimpleNamespace(fakes=mine[0], reals=mine[1]))
    return float(value), all_reduce_mean(torch.autograd.grad(value, fakes)[0])


def test_a_term_over_the_batch_of_all_ranks(ranks: RankPool) -> None:
    fakes, reals = torch.randn(2, 8, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    difference = fakes.mean(0) - reals.mean(0)
    for ranks_of_job in (1, 2):
        for value, gradient in ranks.run(ranks_of_job, term):
            assert value == pytest.approx(float(difference.square().sum()), rel=1e-12)
            torch.testing.assert_close(gradient, (2 * difference / 8).expand(8, -1, -1, -1), rtol=1e-12, atol=1e-14)


def statistics(features: Tensor) -> dict[str, Tensor]:
    """A loss of each function."""
    mean, variance = batch_moments(features, (0,))
    everyone = all_gather(features)
    return {
        "sum": all_reduce_sum(features.exp().sum(0)).square().sum(),
        "mean": all_reduce_mean(features.mean(0)).pow(3).sum(),
        "moments": (mean / variance).sum(),
        "gather": torch.cdist(features, everyone + 1).mean(),
    }


def derivatives() -> dict[str, tuple[Tensor, Tensor]]:
    """Gradient and product of the Hessian with ones, by the whole batch and averaged over ranks."""
    Runtime()
    batch = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    found = {}
    for name, loss in statistics(batch.tanh().chunk(world_size())[rank()]).items():
        (first,) = torch.autograd.grad(loss, batch, create_graph=True)
        # A rank's graph reaches its own rows only, so the gradient of the mean loss is whole after the average.
        first = all_reduce_mean(first)
        (second,) = torch.autograd.grad(first.sum(), batch, retain_graph=True)
        found[name] = first.detach(), all_reduce_mean(second)
    return found


@pytest.mark.parametrize("ranks_of_job", [2, 4])
def test_first_and_second_derivatives_are_those_of_one_process(ranks: RankPool, ranks_of_job: int) -> None:
    (expected,) = ranks.run(1, derivatives)
    assert all(second.abs().max() > 1e-3 for _, second in expected.values())
    for found in ranks.run(ranks_of_job, derivatives):
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)


def test_they_are_documented_and_handed_out_without_torch() -> None:
    assert {name for name in distgan.distributed.__all__ if f"`{name}(" not in PAGE} == set()
    for name in distgan.distributed.__all__:
        assert callable(getattr(distgan.distributed, name))
    with pytest.raises(AttributeError, match="has no attribute 'all_reduce_max'"):
        distgan.distributed.all_reduce_max  # noqa: B018
    code = "import sys, distgan.distributed; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
