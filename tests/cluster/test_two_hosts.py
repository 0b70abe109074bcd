"""A network that breaks, between two hosts of which each has an address and a name of its own."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distgan.data.packing.pack import pack
from tests.cluster.faults import record, rows_if_any, wait_for_step
from tests.cluster.slurm import PATIENCE_SECONDS, wait_until
from tests.ranks import Job
from tests.runs import differing, recipe, rows, status, tensors
from tools.hosts import ROOT, Hosts, hosts, missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
]

STEPS = 60
TRAINING = {"steps": STEPS, "batch_size": 16, "critic_steps": 2, "deterministic": True}


@pytest.fixture
def two() -> Iterator[Hosts]:
    if reason := missing():
        pytest.skip(reason)
    with hosts() as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    config = recipe(folder, digits, training=TRAINING, checkpoint={"every": 10})
    assert Job(2, ["train", str(config)]).wait(PATIENCE_SECONDS) == [0, 0]
    return folder / "run"


def test_a_link_that_is_cut_for_a_while_is_waited_for(
    tmp_path: Path, digits: Path, two: Hosts, undisturbed: Path
) -> None:
    config = recipe(tmp_path, digits, training=TRAINING, checkpoint={"every": 10})
    nodes = two.launch(tmp_path / "log", "train", str(config))
    wait_for_step(tmp_path / "run", 20)
    two.cut(2)
    time.sleep(8)
    before = len(rows(tmp_path / "run"))
    time.sleep(2)
    assert len(rows(tmp_path / "run")) == before, "the cut did not stop training"
    start = time.monotonic()
    two.mend(2)
    wait_until(lambda: len(rows(tmp_path / "run")) > before, "training does not go on")
    record("a link is cut for 10 s, counted from its repair", again=time.monotonic() - start)
    assert [node.wait(PATIENCE_SECONDS) for node in nodes] == [0, 0], (tmp_path / "log").read_text()
    assert status(tmp_path / "run")["restarts"] == 0
    assert differing(tensors(tmp_path / "run", STEPS), tensors(undisturbed, STEPS)) == []


def test_a_link_that_stays_cut_ends_all_ranks_in_time(tmp_path: Path, digits: Path, two: Hosts) -> None:
    training = TRAINING | {"steps": 1_000_000, "timeout_minutes": 0.25}
    config = recipe(tmp_path, digits, training=training, checkpoint={"every": 10})
    nodes = two.launch(tmp_path / "log", "train", str(config), MAX_RESTARTS="0")
    wait_until(lambda: len(rows_if_any(tmp_path / "run")) > 2, "does not train")
    start = time.monotonic()
    two.cut(2)
    wait_until(lambda: status(tmp_path / "run")["outcome"] == "failed", "nobody notices")
    record("a link is cut for good, with a timeout of 15 s", noticed=time.monotonic() - start)
    found = status(tmp_path / "run")
    assert found["lost_rank"]
    log = (tmp_path / "log").read_text()
    wait_until(lambda: (tmp_path / "log").read_text().count("distgan: error: ") == 2, "not all ranks say why")
    log = (tmp_path / "log").read_text()
    for rank, other in ((0, 1), (1, 0)):
        [line] = [line for line in log.splitlines() if line.startswith(f"distgan: error: rank {rank} ")]
        assert "waited at step " in line
        assert f"for rank {other} on distgan{other + 1} (its host is not reachable" in line
    # The launcher behind the cut looks for the rendezvous, which is the other host's, for ten minutes more.
    two.mend(2)
    for node in nodes:
        assert node.wait(PATIENCE_SECONDS) != 0


@pytest.mark.parametrize("what", ["config", "code", "data's fingerprint"])
def test_a_host_that_has_something_else_is_refused(tmp_path: Path, digits: Path, two: Hosts, what: str) -> None:
    """Where no storage is shared, each host has a recipe, code and data of its own."""
    config = recipe(tmp_path, Path("shards"))
    roots = [tmp_path / "host1", tmp_path / "host2"]
    for root in roots:
        root.mkdir()
        (root / "launch").symlink_to(ROOT / "launch")
        shutil.copytree(ROOT / "distgan", root / "distgan", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(digits, root / "shards")
        shutil.copy(config, root)
    if what == "config":
        text = config.read_text().replace("seed: 7", "seed: 8")
        (roots[1] / config.name).write_text(text)
    elif what == "code":
        with open(roots[1] / "distgan" / "errors.py", "a") as file:
            file.write("# of another version\n")
    else:
        shutil.rmtree(roots[1] / "shards")
        pack("builtin:digits", roots[1] / "shards", resolution=16, shard_size=500, workers=1, seed=1)
    nodes = two.launch(tmp_path / "log", "train", config.name, roots=roots, MAX_RESTARTS="0")
    assert all(node.wait(PATIENCE_SECONDS) != 0 for node in nodes)
    log = (tmp_path / "log").read_text()
    assert f"distgan: error: the {what} of rank 1 differs from rank 0's; " in log
    assert status(tmp_path / "run")["outcome"] == "failed"
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_doctor_sees_two_hosts(tmp_path: Path, digits: Path, two: Hosts) -> None:
    config = recipe(tmp_path, digits)
    nodes = two.launch(tmp_path / "log", "doctor", str(config))
    assert [node.wait(PATIENCE_SECONDS) for node in nodes] == [0, 0], (tmp_path / "log").read_text()
    assert "2 on 2 hosts" in (tmp_path / "log").read_text()
    assert "GB/s a rank" in (tmp_path / "log").read_text()
