from __future__ import annotations

import math

import pytest

from tests.cluster.faults import MEASURED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of docs/cluster.md."""
    if not MEASURED:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line("| fault | noticed after | training again after |\n| --- | --- | --- |")
    for name, (noticed, again) in MEASURED.items():
        cells = ["-" if math.isnan(seconds) else f"{seconds:.1f} s" for seconds in (noticed, again)]
        terminalreporter.write_line(f"| {name} | {' | '.join(cells)} |")
