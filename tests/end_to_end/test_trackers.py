"""Training with experiment trackers: one run there over a resume, and refusals on all ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distgan.packages import is_installed
from tests.ranks import Job
from tests.runs import recipe, rows, status


def errors(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if line.startswith("distgan: error:")]


@pytest.mark.skipif(is_installed("aim"), reason="aim is installed")
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(tmp_path: Path, digits: Path) -> None:
    config = recipe(tmp_path, digits, monitoring={"trackers": ["aim"]})
    assert Job(2, ["train", str(config)], log=tmp_path / "log").wait() == [2, 2]
    (line,) = errors(tmp_path / "log")
    assert "monitoring.trackers: the package aim is not installed; pip install aim" in line
    assert "the package aim is not installed" in status(tmp_path / "run")["reason"]
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_tracker_that_cannot_start_is_refused_on_all_ranks(tmp_path: Path, digits: Path) -> None:
    pytest.importorskip("mlflow")
    config = recipe(tmp_path, digits, monitoring={"trackers": ["mlflow"]})
    environment = {"MLFLOW_TRACKING_URI": "nonsense://server"}
    assert Job(2, ["train", str(config)], log=tmp_path / "log", environment=environment).wait() == [2, 2]
    (line,) = errors(tmp_path / "log")
    assert "monitoring.trackers: mlflow cannot start: " in line
    assert "check MLFLOW_TRACKING_URI, or remove mlflow from monitoring.trackers" in line
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_resumed_run_goes_on_in_its_run_there(tmp_path: Path, digits: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = recipe(tmp_path, digits, monitoring={"every": 1, "trackers": [{"name": "mlflow", "project": "digits"}]})
    for steps in (4, 8):
        job = Job(2, ["train", str(config), f"training.steps={steps}"], environment={"MLFLOW_TRACKING_URI": uri})
        assert job.wait() == [0, 0]
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert run.info.run_id == json.loads((tmp_path / "run" / "trackers" / "mlflow.json").read_text())["id"]
    assert run.data.params["training.steps"] == "4"
    assert run.data.params["run_dir"] == str(tmp_path / "run")
    curve = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss/generator")]
    assert curve == [(row["step"], row["loss/generator"]) for row in rows(tmp_path / "run")]
    assert [step for step, _ in curve] == list(range(1, 9))
    # A new start is a new run.
    job = Job(1, ["train", str(config), "training.steps=1", "--resume", "never"],
              environment={"MLFLOW_TRACKING_URI": uri})  # fmt: skip
    assert job.wait() == [0]
    assert len(client.search_runs([run.info.experiment_id])) == 2
