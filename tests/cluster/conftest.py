from __future__ import annotations

import pytest

from tests.cluster.faults import MEASURED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of measured faults in docs/resume.md."""
    if not MEASURED:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line("| fault | noticed after | trains again after | test |\n| --- | --- | --- | --- |")
    for name, (*times, test) in MEASURED.items():
        noticed, again = ("" if seconds is None else f"{seconds:.1f} s" for seconds in times)
        terminalreporter.write_line(f"| {name} | {noticed} | {again} | `{test}` |")
