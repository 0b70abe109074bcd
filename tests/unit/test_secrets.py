"""Users, passwords and tokens in URLs reach the server that they are for, and nothing that others read."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from distgan.cli import main
from distgan.cli.commands import COMMANDS
from distgan.config import dump_config, flatten, parse_config, plain_values
from distgan.errors import UserError, without_secrets
from distgan.monitoring.console import setup_logging
from distgan.monitoring.tracker import open_tracker
from distgan.runs.status import read_status, write_rollback, write_status
from tests.configs import MINIMAL

URL = "https://user:word@host/{000..003}.tar?sig=word"
PUBLIC = "https://host/{000..003}.tar"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"override 'data.path={URL}': no", f"override 'data.path={PUBLIC}': no"),
        ("s3://KEY:wo/rd@bucket/x: no", "s3://bucket/x: no"),
        ("https://word@host:80/a?word; b", "https://host:80/a; b"),
        ("'https://user:wor'", "'https://'"),
        ('{"path": "https://host/a?word"}', '{"path": "https://host/a"}'),
        ("'s3://bucket/x?X-Amz-Signature=word': no", "'s3://bucket/x': no"),
        # Nothing of these is a secret.
        ("s3://bucket/a?b#c", "s3://bucket/a?b#c"),
        ("abfs://container@account/x", "abfs://container@account/x"),
        ("http://127.0.0.1:9000: refused, tcp://[::1]:80", "http://127.0.0.1:9000: refused, tcp://[::1]:80"),
        ("as https://USER:PASSWORD@HOST, or https://HOST:PORT", "as https://USER:PASSWORD@HOST, or https://HOST:PORT"),
    ],
)
def test_what_a_text_hides(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert str(UserError(text)) == shown


def test_copies_of_a_config_have_no_secrets() -> None:
    config = parse_config(MINIMAL, [f"data.path={URL}"])
    assert config.data.path == URL
    for copy in (dump_config(config), json.dumps(plain_values(config)), str(flatten(config))):
        assert PUBLIC in copy
        assert "word" not in copy


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("seed: 1", [f"data.path={URL}", "training.nosuch=1"]),
        ("seed: 1", [f"nosuch={URL}"]),
        ("seed: 1", [f"seed={URL}"]),
        ("seed: 1", [f"run_dir={URL}"]),
        ("seed: 1", [URL]),
        ("seed: 1", [f"data.path={{{URL}: 1, {URL}: 2}}"]),
        (f"{URL}: 1\n{URL}: 2\n", []),
        (f"data: {{path: {URL}", []),
        (f"data: {{path: !x {URL}}}", []),
    ],
)
def test_no_message_of_a_command_has_a_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str, overrides: list[str]
) -> None:
    (tmp_path / "x.yaml").write_text(recipe)
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path / "x.yaml"), *overrides])
    said = capsys.readouterr()
    assert "error" in said.err
    assert "word" not in said.out + said.err


def test_a_traceback_has_no_secret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(options: object) -> None:
        raise RuntimeError(f"cannot reach {URL}")

    monkeypatch.setitem(COMMANDS, "status", fail)
    with pytest.raises(SystemExit):
        main(["status", "runs/x"])
    said = capsys.readouterr().err
    assert f"RuntimeError: cannot reach {PUBLIC}\n" in said
    assert "word" not in said


def test_logs_status_and_texts_have_no_secrets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    setup_logging(0)
    logging.getLogger("distgan").warning("reading %s", URL)
    assert caplog.messages == [f"reading {PUBLIC}"]
    write_status(tmp_path, "running")
    for write in (write_rollback, lambda *given: write_status(given[0], "failed", reason=given[1])):
        write(tmp_path, f"cannot read {URL}")
        status = read_status(tmp_path)
        assert status is not None
        assert status.reason == f"cannot read {PUBLIC}"
    tracker = open_tracker(tmp_path, tensorboard=True, resume_step=None, main=True, trackers=[], settings={})
    tracker.text("rollback", f"cannot read {URL}")
    tracker.close()
    written = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert PUBLIC.encode() in written
    assert b"word" not in written
