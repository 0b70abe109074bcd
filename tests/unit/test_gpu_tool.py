"""The parts of `tools/gpu.py` that can be held against a calculation by hand."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from distgan.config import Config
from distgan.distributed.runtime import Runtime
from distgan.players.objective import DiscriminatorObjective, GeneratorObjective
from distgan.players.samples import MicroBatch
from tools import gpu
from tools.bench.training import Bare
from tools.benchmarks_gpu import measures
from tools.benchmarks_gpu.flops import CountedFlops
from tools.benchmarks_gpu.page import PartOutcome, page
from tools.benchmarks_gpu.recipes import RECIPES

BATCH, BEFORE, AFTER, SIDE = 2, 8, 16, 10


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_operations_of_a_convolution_by_hand(groups: int, transposed: bool) -> None:
    """2 N H W k^2 C C' / groups for a pass, and as much for each gradient; a transposed one is counted at its input."""
    layer = nn.ConvTranspose2d if transposed else nn.Conv2d
    network = layer(BEFORE, AFTER, 3, padding=1, groups=groups, bias=False)
    images = torch.randn(BATCH, BEFORE, SIDE, SIDE, requires_grad=True)
    one_pass = 2 * BATCH * SIDE**2 * 9 * BEFORE * AFTER // groups
    with CountedFlops() as once:
        network(images).square().sum().backward()
    assert once.total == 3 * one_pass
    with CountedFlops() as twice:
        value = network(images).square().sum()
        (gradient,) = torch.autograd.grad(value, images, create_graph=True)
        (gradient.square().sum() + value).backward()
    # The pass, its input gradient; that one's derivatives by what came into it and by the weight; the pass's by both.
    assert twice.total == 6 * one_pass


def test_operations_of_a_product_by_hand() -> None:
    with CountedFlops() as counted:
        nn.Linear(30, 7)(torch.randn(5, 30)).sum().backward()
    # Forward, and the gradient by the weight alone.
    assert counted.total == 2 * (2 * 5 * 30 * 7)


class Fixed(Bare):
    """The bare loop on given latents, which it would draw."""

    def __init__(self, config: Config, latents: Tensor, reals: Tensor) -> None:
        self.config, self.device, self._format = config, torch.device("cpu"), torch.contiguous_format
        self.generator, self.discriminator = self._build()
        self._discriminator = self.discriminator
        self._latents = lambda: latents  # type: ignore[method-assign]


@pytest.mark.parametrize("name", RECIPES)
def test_the_bare_loop_minimises_what_distgan_does(name: str, tmp_path: Path) -> None:
    """The discriminator's loss and its gradient; networks are built from the same seed."""
    config = RECIPES[name].config(tmp_path, tmp_path / "run", rehearsal=True)
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(4, config.generator.latent_size, generator=random)
    reals = torch.rand(4, 3, config.data.resolution, config.data.resolution, generator=random)
    bare = Fixed(config, latents, reals)
    networks = bare.discriminator, bare.generator
    moving = {key: value.clone() for key, value in bare.discriminator.state_dict().items()}
    found = bare._discriminator_loss(reals)
    found.backward()
    gradients = [parameter.grad.clone() for parameter in bare.discriminator.parameters() if parameter.grad is not None]
    bare.discriminator.load_state_dict(moving)  # spectral norm's vectors have moved
    bare.discriminator.zero_grad()
    Runtime()
    batch = MicroBatch(torch.arange(4), latents, None, reals, None)
    expected, _ = DiscriminatorObjective(*networks, config, None)(batch, 0, 0)
    expected.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, [p.grad for p in bare.discriminator.parameters() if p.grad is not None])
    assert GeneratorObjective(*networks[::-1], config, None).adversarial is not None


def options(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(dry_run=True, r3gan=None, seconds=0.0, part=None, **changes)


PRINTS = f"""
import subprocess, sys, time
print('{gpu.MARK}{{"kind": "text", "text": "measured"}}', flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
print(child.pid, flush=True)
time.sleep(100)
"""


def test_a_part_is_stopped_at_its_limit_and_keeps_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "command", lambda *_: [sys.executable, "-c", PRINTS])
    records: list[dict[str, Any]] = []
    outcome = gpu.run(gpu.Part("checkpoint", 5.0), options(), tmp_path, 100.0, records)
    assert (outcome.part, outcome.verdict) == ("checkpoint", "stopped at its limit of 5 s")
    assert [record["text"] for record in records if record["kind"] == "text"] == ["measured"]
    assert "measured" in capsys.readouterr().out
    deadline = time.monotonic() + 30
    while is_running(int(records[-1]["text"])):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(process: int) -> bool:
    """Whether a process has not ended, though nobody may have taken note of its end."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    return False


def test_a_part_that_fails_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "command", lambda *_: [sys.executable, "-c", "raise ValueError('no such kernel')"])
    outcome = gpu.run(gpu.Part("machine", 60.0), options(), tmp_path, 100.0, [])
    assert outcome.verdict == "failed: ValueError: no such kernel"
    assert gpu.run(gpu.Part("machine", 60.0), options(), tmp_path, 1.0, []).verdict.startswith("not started")


def test_a_measurement_that_fails_does_not_stop_the_next() -> None:
    def failing() -> Iterator[dict[str, Any]]:
        yield {"number": 1}
        raise ValueError("out of\nluck")

    found: list[dict[str, Any]] = []

    def follow() -> None:
        for record in measures.each([failing(), iter([{"number": 2}])]):
            found.append(record)

    with pytest.raises(RuntimeError, match=r"^ValueError: out of luck$"):
        follow()
    assert found == [{"number": 1}, {"number": 2}]


def test_tests_are_counted_by_what_pytest_prints() -> None:
    printed = [
        "tests/gpu/test_a.py::test_one[two ranks] PASSED    [ 10%]\n", "tests/gpu/test_a.py::test_two FAILED [ 20%]\n",
        "tests/gpu/test_b.py::test_three SKIPPED (needs a GPU)   [ 30%]\n", "FAILED tests/gpu/test_a.py::test_two\n",
    ]  # fmt: skip
    (record,) = gpu.of_output("tests", printed)
    assert record == {"kind": "tests", "passed": 1, "skipped": 1, "failed": "tests/gpu/test_a.py::test_two"}


def test_the_page_has_the_share_of_the_peak() -> None:
    """A step of 8 images and 4 GFLOP, at 1,000 img/s, is 0.5 TFLOP/s: a quarter of a peak of 2."""
    speed = {"kind": "speed", "recipe": "R3GAN-32", "gigabytes": 1.25, "part": "R3GAN-32"}
    records: list[dict[str, Any]] = [
        {"kind": "machine", "card": "Card 9", "gigabytes": 79.6, "torch": "2", "cuda": "13", "part": "machine"},
        {"kind": "peak", "precision": "float32", "side": 8192, "flops": 2e12, "part": "machine"},
        {"kind": "flops", "flops": 4e9, "step_images": 8, "recipe": "R3GAN-32", "part": "R3GAN-32"},
        speed | {"by": "distgan", "images_per_second": 1000.0, "data_wait": 0.0015},
        speed | {"by": "bare PyTorch", "images_per_second": 800.0},
    ]
    text = page(
        records, [PartOutcome("R3GAN-32", "stopped at its limit", 90.2)], "python tools/gpu.py", rehearsal=False
    )
    assert text.startswith("# Benchmarks on a GPU: Card 9, 80 GB\n")
    assert "| R3GAN-32 | distgan | 1,000 | 1.250 | 1.25 GB | 0.50 | 25.0% | 1.50 |" in text
    assert "| R3GAN-32 | stopped at its limit | 90 |" in text
    assert "Dry run" not in text


def test_a_card_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without one nothing is measured, and no page takes the place of the last."""
    out = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(out)])
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit, match="--dry-run"):
        gpu.main()
    assert not out.exists()
