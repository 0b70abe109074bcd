"""metrics.jsonl and TensorBoard: the same numbers, each step once, whatever happened in between."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing import io_wrapper
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from distgan.monitoring import event_files
from distgan.monitoring.event_files import EventFile, next_name
from distgan.monitoring.tracker import Tracker, open_tracker


def rows(run_dir: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=refuse) for line in lines]
    assert all(abs(row.pop("time") - time.time()) < 600 for row in found)
    return found


def events(run_dir: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run_dir / "tensorboard"), {"scalars": 0, "images": 0, "tensors": 0})
    return accumulator.Reload()


def curve(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(run_dir).Scalars(tag)]


def open_main(run_dir: Path, resume_step: int | None = None, *, tensorboard: bool = False) -> Tracker:
    return open_tracker(run_dir, tensorboard=tensorboard, resume_step=resume_step, main=True)


def log(tracker: Tracker, steps: range, offset: float = 0.0) -> None:
    for step in steps:
        tracker.scalars(step, step * 64, {"loss/generator": step + offset})


def test_rows_and_curves_have_the_same_numbers(tmp_path: Path) -> None:
    tracker = open_main(tmp_path, tensorboard=True)
    tracker.scalars(10, 640, {"loss/generator": 0.5, "fid[classifier]": 12.25})
    tracker.scalars(20, 1280, {"loss/generator": 0.25})
    # Not closed: a killed process has not closed it either.
    assert rows(tmp_path) == [
        {"step": 10, "images": 640, "loss/generator": 0.5, "fid[classifier]": 12.25},
        {"step": 20, "images": 1280, "loss/generator": 0.25},
    ]
    assert curve(tmp_path, "loss/generator") == [(10, 0.5), (20, 0.25)]
    assert curve(tmp_path, "fid[classifier]") == [(10, 12.25)]
    assert [step for step, _ in curve(tmp_path, "progress/kimg")] == [10, 20]
    assert curve(tmp_path, "progress/kimg")[1][1] == pytest.approx(1.28)
    tracker.close()


def test_a_resumed_run_goes_on_without_overlap_or_gap(tmp_path: Path) -> None:
    first = open_main(tmp_path, tensorboard=True)
    log(first, range(10, 60, 10))
    first.scalars(60, 0, {"not logged again": 1.0})
    second = open_main(tmp_path, 30, tensorboard=True)
    log(second, range(40, 80, 10), offset=0.5)
    expected = [(10, 10.0), (20, 20.0), (30, 30.0), (40, 40.5), (50, 50.5), (60, 60.5), (70, 70.5)]
    assert [(row["step"], row["loss/generator"]) for row in rows(tmp_path)] == expected
    assert curve(tmp_path, "loss/generator") == expected
    assert "not logged again" not in events(tmp_path).Tags()["scalars"]
    first.close()
    second.close()


def clock_at(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(event_files.time, "time", lambda: seconds)


@pytest.mark.parametrize("back", [0, 1, 3600, 10**9])
def test_a_run_resumed_where_the_clock_is_behind_goes_on_in_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: int
) -> None:
    now = 1_800_000_000
    clock_at(monkeypatch, now)
    first = open_main(tmp_path, tensorboard=True)
    log(first, range(10, 40, 10))
    # A server that reads while the run trains, and one that starts afterwards.
    server = events(tmp_path)
    for resumed in (1, 2):
        clock_at(monkeypatch, now - resumed * back)
        tracker = open_main(tmp_path, 30 * resumed, tensorboard=True)
        log(tracker, range(30 * resumed + 10, 30 * resumed + 40, 10))
        tracker.close()
        steps = [event.step for event in server.Reload().Scalars("loss/generator")]
        assert steps == list(range(10, 30 * resumed + 40, 10))
        assert [step for step, _ in curve(tmp_path, "loss/generator")] == steps
    first.close()


@pytest.mark.parametrize(
    "last",
    ["events.out.tfevents.9999999999.host.1.0", "events.out.tfevents.4000000000.zzz.99.9", "events.out.tfevents.x",
     "old.tfevents", "~tfevents"],
)  # fmt: skip
def test_event_files_sort_after_all_that_are_there(tmp_path: Path, last: str) -> None:
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / last).touch()
    (tmp_path / "tensorboard" / "events.out.tfevents.1000000000.host.1.0").touch()
    for _ in range(3):
        before = {path.name for path in (tmp_path / "tensorboard").iterdir()}
        file = EventFile(tmp_path / "tensorboard")
        file.close()
        [new] = {path.name for path in (tmp_path / "tensorboard").iterdir()} - before
        assert new > max(before)
        assert io_wrapper.IsSummaryEventsFile(new)


def test_event_files_sort_after_those_of_tensorboards_own_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    EventFileWriter(str(tmp_path)).close()
    [theirs] = (path.name for path in tmp_path.iterdir())
    assert next_name(tmp_path) > theirs
    clock_at(monkeypatch, 0)
    assert next_name(tmp_path) > theirs


def test_resuming_from_before_the_first_row_drops_all(tmp_path: Path) -> None:
    first = open_main(tmp_path, tensorboard=True)
    log(first, range(0, 30, 10))
    first.close()
    second = open_main(tmp_path, tensorboard=True)
    assert rows(tmp_path) == []
    log(second, range(0, 20, 10), offset=0.5)
    second.close()
    assert [row["loss/generator"] for row in rows(tmp_path)] == [0.5, 10.5]
    assert curve(tmp_path, "loss/generator") == [(0, 0.5), (10, 10.5)]


@pytest.mark.parametrize("torn", [b'{"step": 30, "imag', b'{"step": 30}', b"\x00\x00\n", b"[1]\n", b'{"step": "x"}\n'])
def test_a_torn_last_line_goes(tmp_path: Path, torn: bytes) -> None:
    log(open_main(tmp_path), range(10, 30, 10))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    tracker = open_main(tmp_path, 40)
    log(tracker, range(50, 60, 10))
    tracker.close()
    assert [row["step"] for row in rows(tmp_path)] == [10, 20, 50]


@pytest.mark.parametrize("torn", [1, 5, 13, 40])
def test_a_torn_last_event_goes(tmp_path: Path, torn: int) -> None:
    log(open_main(tmp_path, tensorboard=True), range(10, 30, 10))
    (file,) = (tmp_path / "tensorboard").iterdir()
    os.truncate(file, file.stat().st_size - torn)
    tracker = open_main(tmp_path, 10, tensorboard=True)
    log(tracker, range(20, 40, 10), offset=0.5)
    tracker.close()
    assert curve(tmp_path, "loss/generator") == [(10, 10.0), (20, 20.5), (30, 30.5)]


def test_a_damaged_event_goes(tmp_path: Path) -> None:
    log(open_main(tmp_path, tensorboard=True), range(10, 40, 10))
    (file,) = (tmp_path / "tensorboard").iterdir()
    content = bytearray(file.read_bytes())
    content[content.index(b"loss/generator") - 2] = 0xFF  # the length of the tag
    file.write_bytes(content)
    tracker = open_main(tmp_path, 30, tensorboard=True)
    log(tracker, range(40, 50, 10))
    tracker.close()
    assert [step for step, _ in curve(tmp_path, "loss/generator")] == [20, 30, 40]


def test_scalars_that_are_only_ever_zero_are_not_in_tensorboard(tmp_path: Path) -> None:
    first = open_main(tmp_path, tensorboard=True)
    for step, skipped in ((10, 0.0), (20, 1.0), (30, 0.0), (40, math.nan)):
        first.scalars(step, 64, {"skipped_updates/generator": skipped, "always zero": 0.0})
    first.close()
    assert [step for step, _ in curve(tmp_path, "skipped_updates/generator")] == [20, 30, 40]
    # What was not zero before the step that a run resumes from stays; what was given up does not count.
    for resumed, expected in ((20, [20, 50]), (10, [])):
        tracker = open_main(tmp_path, resumed, tensorboard=True)
        tracker.scalars(50, 64, {"skipped_updates/generator": 0.0, "always zero": 0.0})
        tracker.close()
        tags = events(tmp_path).Tags()["scalars"]
        steps = [step for step, _ in curve(tmp_path, "skipped_updates/generator")] if expected else []
        assert steps == expected
        assert ("skipped_updates/generator" in tags) == bool(expected)
        assert "always zero" not in tags
        assert rows(tmp_path)[-1]["always zero"] == 0.0


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    tracker = open_main(tmp_path)
    tracker.scalars(1, 64, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1})
    tracker.close()
    assert rows(tmp_path) == [{"step": 1, "images": 64, "a": None, "b": None, "c": None, "d": 1.0}]


def test_other_ranks_and_no_tensorboard_write_nothing(tmp_path: Path) -> None:
    other = open_tracker(tmp_path / "other", tensorboard=True, resume_step=None, main=False)
    for tracker in (other, open_main(tmp_path / "main")):
        log(tracker, range(1, 2))
        tracker.image(1, "samples", torch.zeros(3, 4, 4, dtype=torch.uint8))
        tracker.text("config", "a: 1")
        tracker.hyperparameters({"a": 1}, ["loss/generator"])
        tracker.close()
    assert not (tmp_path / "other").exists()
    assert os.listdir(tmp_path / "main") == ["metrics.jsonl"]


def test_pictures_texts_and_settings(tmp_path: Path) -> None:
    tracker = open_main(tmp_path, tensorboard=True)
    tracker.image(5, "samples", torch.zeros(3, 4, 6, dtype=torch.uint8))
    tracker.image(5, "gray", torch.zeros(1, 4, 6, dtype=torch.uint8))
    tracker.text("config", "a:\n  b: 1")
    tracker.text("samples", "a line", 5)
    tracker.hyperparameters({"lr": 1e-3, "r1": None, "name": "x", "on": True, "list": [1, 2]}, ["loss/generator"])
    log(tracker, range(1, 2))
    tracker.close()
    found = events(tmp_path)
    for tag in ("samples", "gray"):
        (image,) = found.Images(tag)
        assert (image.step, image.width, image.height) == (5, 6, 4)
    (text,) = found.Tensors("config/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "    a:\n      b: 1"
    (lines,) = found.Tensors("samples/text_summary")
    assert (lines.step, lines.tensor_proto.string_val[0].decode()) == (5, "    a line")
    from tensorboard.plugins.hparams import metadata

    content = found.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    settings = metadata.parse_session_start_info_plugin_data(content).hparams
    assert settings["lr"].number_value == 1e-3
    assert settings["name"].string_value == "x"
    assert settings["list"].string_value == "[1, 2]"
    assert settings["on"].string_value == "True"
    assert len(os.listdir(tmp_path / "tensorboard")) == 1, "one run, not one more for the settings"


def test_a_full_disk_is_said_once_and_leaves_only_whole_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_main(tmp_path)
    log(tracker, range(1, 2))
    write = os.write

    def half(descriptor: int, data: bytes) -> int:
        return write(descriptor, data[: len(data) // 2])

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        for fault in (half, full):
            patch.setattr(os, "write", fault)
            log(tracker, range(2, 4))
    log(tracker, range(4, 5))
    tracker.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 4]
    assert tracker.failures == 4
    assert len(caplog.records) == 1
    assert "metrics.jsonl: cannot write" in caplog.text


def test_an_unwritable_folder_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").write_text("in the way")
    tracker = open_main(tmp_path / "run", tensorboard=True)
    log(tracker, range(1, 4))
    tracker.image(1, "samples", torch.zeros(3, 4, 4, dtype=torch.uint8))
    tracker.close()
    assert tracker.failures > 0
    assert len(caplog.records) == 2, "once for each of the two"


def test_tensorboard_begins_a_new_file_after_an_error(tmp_path: Path) -> None:
    tracker = open_main(tmp_path, tensorboard=True)
    log(tracker, range(1, 3))

    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    tracker._events._file.flush = fail  # type: ignore[attr-defined]
    log(tracker, range(3, 4))
    log(tracker, range(4, 6))
    tracker.close()
    assert tracker.failures == 1
    steps = [step for step, _ in curve(tmp_path, "loss/generator")]
    assert steps == [1, 2, 3, 4, 5], "the row's events had been handed over before the failing flush"


def test_a_second_row_of_a_step_is_added_to_the_first(tmp_path: Path) -> None:
    tracker = open_main(tmp_path)
    log(tracker, range(1, 4))
    tracker.close()
    resumed = open_main(tmp_path, resume_step=3)
    assert resumed.recorded(3) == {"step", "images", "time", "loss/generator"}
    assert not resumed.recorded(2)
    resumed.scalars(3, 192, {"fid[classifier]": 4.5, "odd": math.nan})
    assert "fid[classifier]" in resumed.recorded(3)
    log(resumed, range(4, 5))
    assert rows(tmp_path) == [
        {"step": 1, "images": 64, "loss/generator": 1},
        {"step": 2, "images": 128, "loss/generator": 2},
        {"step": 3, "images": 192, "loss/generator": 3, "fid[classifier]": 4.5, "odd": None},
        {"step": 4, "images": 256, "loss/generator": 4},
    ]
    resumed.close()


def test_other_ranks_have_recorded_nothing(tmp_path: Path) -> None:
    log(open_main(tmp_path), range(1, 2))
    assert not open_tracker(tmp_path, tensorboard=False, resume_step=1, main=False).recorded(1)
