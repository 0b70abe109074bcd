from __future__ import annotations

import pytest

from tests.cluster.faults import MEASURED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of docs/cluster.md."""
    if not MEASURED:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line("| fault | noticed after | training again after |\n| --- | --- | --- |")
    for name, (noticed, again) in MEASURED.items():
        terminalreporter.write_line(f"| {name} | {noticed:.1f} s | {again:.1f} s |")
