"""The progress bar, plain lines and messages, on a terminal and without one."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator

import pytest
import rich.console

from distgan.monitoring import console
from distgan.monitoring.console import Console, setup_logging

ROW = {
    "loss/generator": 0.6931,
    "loss/discriminator": 1.25,
    "fid[classifier]": 12.5,
    "learning_rate/generator": 2e-4,
    "speed/images_per_second": 2048.4,
    "speed/step_seconds": 0.05,
}


@pytest.fixture(autouse=True)
def quiet_afterwards() -> Iterator[None]:
    yield
    logger = logging.getLogger("distgan")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)


def use_terminal(monkeypatch: pytest.MonkeyPatch, *, interactive: bool, width: int = 200) -> io.StringIO:
    shown = io.StringIO()
    monkeypatch.setattr(
        console,
        "terminal",
        rich.console.Console(file=shown, force_terminal=interactive, width=width, color_system=None),
    )
    return shown


def test_without_a_terminal_one_line_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = use_terminal(monkeypatch, interactive=False)
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    setup_logging(0)
    progress = Console(total=1000, start=100, main=True)
    now[0] = 60.0
    progress.advance(150)
    progress.update(200, ROW)
    progress.close()
    (line,) = shown.getvalue().splitlines()
    moment, text = line[:19], line[19:]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", moment)
    # 100 steps took a minute, 800 remain: 8 minutes.
    assert text == (
        " step 200/1000  eta 0:08:00  "
        "generator 0.6931  discriminator 1.25  fid[classifier] 12.5  2,048 img/s  20 step/s"
    )


def test_long_lines_are_not_wrapped_and_markup_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = use_terminal(monkeypatch, interactive=False)
    setup_logging(0)
    message = "[bold]" + "word " * 100 + "/path[0]"
    logging.getLogger("distgan").info(message)
    assert shown.getvalue()[20:] == message + "\n"


def test_on_a_terminal_a_bar_with_messages_above(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = use_terminal(monkeypatch, interactive=True, width=80)
    setup_logging(0)
    progress = Console(total=1000, start=100, main=True)
    progress.update(200, ROW)
    logging.getLogger("distgan").info("a message")
    progress.close()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())
    assert "training" in text
    assert "200/1000" in text
    assert "generator 0.6931 discriminator 1.25 fid[classifier] 12.5 2,048 img/s 20 step/s" in " ".join(text.split())
    assert "━━━━━━" in text
    message = text.index("a message")
    assert text.rindex("200/1000") > message, "the bar is drawn again below the message"
    assert "\x1b[?25h" in shown.getvalue(), "the cursor is given back"


def test_other_ranks_show_only_warnings_with_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = use_terminal(monkeypatch, interactive=True)
    setup_logging(3)
    progress = Console(total=10, start=0, main=False)
    progress.advance(1)
    progress.update(1, ROW)
    progress.close()
    logger = logging.getLogger("distgan")
    logger.info("unimportant")
    logger.warning("slow disk")
    assert shown.getvalue()[20:] == "rank 3: warning: slow disk\n"


def test_setting_up_twice_shows_a_message_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = use_terminal(monkeypatch, interactive=False)
    setup_logging(0)
    setup_logging(0)
    logging.getLogger("distgan").error("once")
    assert shown.getvalue().count("once") == 1


def test_an_exception_is_shown_with_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = use_terminal(monkeypatch, interactive=False)
    setup_logging(0)
    try:
        raise ValueError("cause")
    except ValueError:
        logging.getLogger("distgan").exception("failed")
    assert "failed\nTraceback" in shown.getvalue()
    assert "ValueError: cause" in shown.getvalue()


def test_the_default_terminal_is_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(0)
    logging.getLogger("distgan").info("hello")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith(" hello\n")
