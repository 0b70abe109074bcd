"""Experiment trackers: the rows of metrics.jsonl under one id, and failures that never hold training up."""

from __future__ import annotations

import json
import math
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from distgan.config import TrackerConfig
from distgan.errors import UserError
from distgan.monitoring import trackers
from distgan.monitoring.tracker import Tracker, open_tracker

SETTINGS = {"training.steps": 100, "objective.r1": None}


@pytest.fixture(autouse=True)
def _state() -> None:
    PartialState(cpu=True)  # as in a run; accelerate's trackers log by it


def open_main(run_dir: Path, *configs: TrackerConfig, resume_step: int | None = None, **settings: Any) -> Tracker:
    return open_tracker(
        run_dir, tensorboard=False, resume_step=resume_step, main=True, trackers=configs, settings=SETTINGS | settings
    )


def log(tracker: Tracker, *steps: int) -> None:
    for step in steps:
        tracker.scalars(step, step * 64, {"loss/generator": step / 2, "fid[classifier]": math.nan})


class Recorder(GeneralTracker):
    """A tracker that keeps what it is told, or fails."""

    name = "swanlab"
    requires_logging_directory = False
    main_process_only = False
    calls: ClassVar[list[Any]] = []
    broken: ClassVar[set[str | int | None]] = set()
    released = threading.Event()

    def __init__(self, project: str, **options: Any) -> None:
        super().__init__()
        self.calls.append((project, options))
        self.silent = "silent" in self.broken

    def start(self) -> None:
        if "start" in self.broken:
            raise ConnectionError("no\nroute to host")

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        if self.silent:
            self.released.wait(60)
            return
        if step in self.broken:
            raise ConnectionError("gone")
        self.calls.append((step, values["loss/generator"]))

    def finish(self) -> None:
        self.calls.append("finished")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Recorder]]:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "swanlab", Recorder)
    monkeypatch.setattr(trackers, "is_installed", lambda name: name != "comet_ml")
    Recorder.calls.clear()
    Recorder.broken.clear()
    Recorder.released.clear()
    yield Recorder
    Recorder.released.set()


SWANLAB = TrackerConfig.model_validate({"name": "swanlab", "project": "p", "mode": "local"})


def test_options_settings_and_rows_arrive_in_order(tmp_path: Path, recorder: type[Recorder]) -> None:
    tracker = open_main(tmp_path, SWANLAB)
    log(tracker, 10, 20)
    tracker.close()
    assert recorder.calls == [("p", {"mode": "local"}), SETTINGS, (10, 5.0), (20, 10.0), "finished"]


def test_a_tracker_without_a_run_id_gets_all_rows_at_each_start(tmp_path: Path, recorder: type[Recorder]) -> None:
    tracker = open_main(tmp_path, SWANLAB)
    log(tracker, 10, 20, 30)
    tracker.close()
    recorder.calls.clear()
    resumed = open_main(tmp_path, SWANLAB, resume_step=20)
    log(resumed, 30)
    resumed.close()
    assert recorder.calls[2:] == [(10, 5.0), (20, 10.0), (30, 15.0), "finished"]


def test_other_ranks_start_no_tracker(tmp_path: Path, recorder: type[Recorder]) -> None:
    log(open_tracker(tmp_path, tensorboard=False, resume_step=None, main=False, trackers=[SWANLAB]), 10)
    assert not recorder.calls
    assert not list(tmp_path.iterdir())


def test_a_failure_is_counted_and_logged_once(
    tmp_path: Path, recorder: type[Recorder], caplog: pytest.LogCaptureFixture
) -> None:
    recorder.broken |= {20, 30}
    tracker = open_main(tmp_path, SWANLAB)
    log(tracker, 10, 20, 30, 40)
    tracker.close()
    assert tracker.failures == 2
    assert recorder.calls[2:] == [(10, 5.0), (40, 20.0), "finished"]
    (record,) = caplog.records
    assert "step 20: monitoring.trackers: swanlab cannot log: gone" in record.getMessage()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    # The gap is known: a tracker that continues its run would get these rows again.
    assert json.loads((tmp_path / "trackers" / "swanlab.json").read_text())["step"] == 10


def test_a_silent_server_holds_nothing_up(
    tmp_path: Path, recorder: type[Recorder], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "_CLOSE_SECONDS", 0.2)
    recorder.broken.add("silent")
    tracker = open_main(tmp_path, SWANLAB)
    began = time.monotonic()
    log(tracker, *range(10, 1000, 10))
    tracker.close()
    assert time.monotonic() - began < 10
    assert "swanlab did not finish" in caplog.text


def test_a_tracker_that_cannot_start_is_refused_and_the_others_end(tmp_path: Path, recorder: type[Recorder]) -> None:
    recorder.broken.add("start")
    with pytest.raises(UserError) as caught:
        open_main(tmp_path, SWANLAB)
    message = str(caught.value)
    assert message.startswith("monitoring.trackers: swanlab cannot start: no route to host; ")
    assert "remove swanlab from monitoring.trackers" in message
    recorder.broken.clear()
    with pytest.raises(UserError, match=r"monitoring\.trackers: the package comet_ml is not installed; pip install"):
        open_main(tmp_path, SWANLAB, TrackerConfig(name="comet_ml"))
    assert recorder.calls[-1] == "finished"


def mlflow_curve(run: str, name: str) -> list[tuple[int, float]]:
    import mlflow

    return [(point.step, point.value) for point in mlflow.MlflowClient().get_metric_history(run, name)]


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    yield mlflow
    mlflow.set_tracking_uri(before)


MLFLOW = TrackerConfig.model_validate({"name": "mlflow", "project": "digits", "tags": {"a": "b"}})


def test_mlflow_goes_on_in_the_same_run(tmp_path: Path, mlflow_store: Any) -> None:
    run_dir = tmp_path / "first try"
    tracker = open_main(run_dir, MLFLOW)
    log(tracker, 10, 20, 30)
    tracker.close()
    known = run_dir / "trackers" / "mlflow.json"
    state = json.loads(known.read_text())
    # A row that was lost, a step that is given up, and a parameter that changes.
    known.write_text(json.dumps(state | {"step": 10, "time": None}))
    resumed = open_main(run_dir, MLFLOW, resume_step=20, **{"training.steps": 200})
    log(resumed, 40)
    resumed.close()
    assert resumed.failures == 0
    (run,) = mlflow_store.MlflowClient().search_runs([mlflow_store.get_experiment_by_name("digits").experiment_id])
    assert run.info.run_id == state["id"] == json.loads(known.read_text())["id"]
    assert run.info.run_name == "first try"
    assert run.info.status == "FINISHED"
    assert run.data.tags["a"] == "b"
    assert run.data.params == {"training.steps": "100", "objective.r1": "None"}
    # Rows that are logged again are the same points.
    assert mlflow_curve(state["id"], "loss/generator") == [(10, 5.0), (20, 10.0), (30, 15.0), (40, 20.0)]
    assert len(mlflow_curve(state["id"], "fid.classifier")) == 4


def test_a_lost_row_is_logged_again(tmp_path: Path, mlflow_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = LOGGER_TYPE_TO_CLASS["mlflow"]

    class Flaky(real):  # type: ignore[misc, valid-type]
        def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
            if step == 20:
                raise ConnectionError("gone")
            super().log(values, step=step, **options)

    with monkeypatch.context() as patch:
        patch.setitem(LOGGER_TYPE_TO_CLASS, "mlflow", Flaky)
        tracker = open_main(tmp_path, MLFLOW)
        log(tracker, 10, 20, 30)
        tracker.close()
    run = json.loads((tmp_path / "trackers" / "mlflow.json").read_text())["id"]
    assert mlflow_curve(run, "loss/generator") == [(10, 5.0), (30, 15.0)]
    open_main(tmp_path, MLFLOW, resume_step=30).close()
    assert sorted(mlflow_curve(run, "loss/generator")) == [(10, 5.0), (20, 10.0), (30, 15.0)]


def test_another_project_gets_a_run_of_its_own(tmp_path: Path, mlflow_store: Any) -> None:
    log(tracker := open_main(tmp_path, MLFLOW), 10)
    tracker.close()
    open_main(tmp_path, MLFLOW.model_copy(update={"project": "other"}), resume_step=10).close()
    run = json.loads((tmp_path / "trackers" / "mlflow.json").read_text())["id"]
    assert mlflow_curve(run, "loss/generator") == [(10, 5.0)]
    assert mlflow_store.get_run(run).info.experiment_id == mlflow_store.get_experiment_by_name("other").experiment_id


def test_a_run_that_mlflow_does_not_know_is_refused(tmp_path: Path, mlflow_store: Any) -> None:
    (tmp_path / "trackers").mkdir()
    file = tmp_path / "trackers" / "mlflow.json"
    file.write_text(json.dumps({"id": "0" * 32, "project": "digits", "step": 10, "time": 1.0}))
    with pytest.raises(UserError) as caught:
        open_main(tmp_path, MLFLOW, resume_step=10)
    assert "not found" in str(caught.value)
    assert f"remove {file} to begin a new run there" in str(caught.value)


def wandb_records(folder: Path) -> Iterator[Any]:
    """What the runs below a folder would send: records as LevelDB's logs frame them, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        content, place, whole = file.read_bytes(), 7, b""
        while place + 7 <= len(content):
            if (left := 32768 - place % 32768) < 7:
                place += left
                continue
            _, length, kind = struct.unpack_from("<IHB", content, place)
            whole += content[place + 7 : place + 7 + length]
            place += 7 + length
            if place > len(content):  # still being written
                break
            if kind in (1, 4):  # a whole record, or the end of one
                yield wandb_internal_pb2.Record.FromString(whole)
                whole = b""


def test_wandb_goes_on_in_the_same_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    config = TrackerConfig.model_validate({"name": "wandb", "project": "digits", "mode": "offline", "run_name": "try"})
    tracker = open_main(tmp_path, config)
    log(tracker, 10, 20, 30)
    tracker.close()
    known = tmp_path / "trackers" / "wandb.json"
    identifier = json.loads(known.read_text())["id"]
    known.write_text(json.dumps(json.loads(known.read_text()) | {"step": 10, "time": None}))
    time.sleep(1.1)  # offline runs are named by the second
    resumed = open_main(tmp_path, config, resume_step=20)
    log(resumed, 30)
    resumed.close()
    deadline = time.monotonic() + 30
    # wandb's own process writes the end of a file after the run has finished here.
    while [record.HasField("exit") for record in wandb_records(tmp_path)].count(True) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    records = list(wandb_records(tmp_path))
    runs = {(r.run.run_id, r.run.project, r.run.display_name) for r in records if r.HasField("run")}
    assert runs == {(identifier, "digits", "try")}
    rows = [
        {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    # The rows of steps 10 and 20 may be missing; W&B's own step grows all the same.
    assert [row["step"] for row in rows] == [10, 20, 30, 10, 20, 30]
    assert [row["loss/generator"] for row in rows] == [5, 10, 15, 5, 10, 15]
    metrics = [r.metric for r in records if r.HasField("metric")]
    assert any(metric.glob_name == "*" for metric in metrics)


def test_wandb_without_a_login_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError) as caught:
        open_main(tmp_path, TrackerConfig(name="wandb"))
    message = str(caught.value)
    assert message.startswith("monitoring.trackers: wandb cannot start: ")
    assert "wandb login" in message
    assert "\n" not in message


def test_rows_that_wandb_has_not_received_are_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that got the rows up to step 10, of a process that was killed after step 30."""

    class Run:
        id, offline, summary = "abc", False, {"step": 10}

        def define_metric(self, *_: Any, **__: Any) -> None: ...

    class Online(Recorder):
        @property
        def tracker(self) -> Any:
            return Run()

        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            self.calls.append(values["step"])

    monkeypatch.setattr(trackers, "is_installed", lambda name: True)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Online)
    config = TrackerConfig(name="wandb")
    log(first := open_main(tmp_path, config), 10, 20, 30)
    first.close()
    Recorder.calls.clear()
    log(resumed := open_main(tmp_path, config, resume_step=20), 30)
    resumed.close()
    ((_, options), _, *steps) = Recorder.calls
    assert (options["id"], options["resume"]) == ("abc", "allow")
    assert steps == [10, 20, 30, "finished"], "the row of the last step may be incomplete there"
