from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.faults import MEASURED
from tests.cluster.jobs import CHECKPOINT, TRAINING
from tests.cluster.slurm import PATIENCE_SECONDS, Slurm, slurm
from tests.ranks import Job
from tests.runs import recipe


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def no_job_left(cluster: Slurm) -> Iterator[None]:
    """A test begins with both nodes free, and no job outlasts it."""
    cluster.wait_for_nodes()
    yield
    cluster.cancel_all()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    config = recipe(folder, digits, training=TRAINING, checkpoint=CHECKPOINT)
    assert Job(2, ["train", str(config)]).wait(PATIENCE_SECONDS) == [0, 0]
    return folder / "run"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of measured faults in docs/resume.md."""
    if not MEASURED:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line("| fault | noticed after | trains again after | test |\n| --- | --- | --- | --- |")
    for name, (*times, test) in MEASURED.items():
        noticed, again = ("" if seconds is None else f"{seconds:.1f} s" for seconds in times)
        terminalreporter.write_line(f"| {name} | {noticed} | {again} | `{test}` |")
