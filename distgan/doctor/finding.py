"""Findings of `distgan doctor`: one line per check, with a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

Verdict = Literal["ok", "warning", "FAILED"]


class Finding(NamedTuple):
    """Result of one check. The text of a `warning` or `FAILED` ends with the fix."""

    verdict: Verdict
    subject: str
    text: str

    def __str__(self) -> str:
        return _line(self.verdict, self.subject, self.text)


def announcement(subject: str, text: str) -> str:
    """Return a line that tells of a check that takes long, before it begins."""
    return _line("checking", subject, text)


def _line(verdict: str, subject: str, text: str) -> str:
    return f"{verdict:<8} {subject:<14} {text}"


def merge(by_rank: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Merge the findings of all ranks, in order; prefix those that only some ranks have with these ranks."""
    everywhere = len(by_rank)
    ranks: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(by_rank):
        for finding in findings:
            ranks.setdefault(finding, []).append(rank)
    return [
        finding if len(who) == everywhere else finding._replace(text=f"{_name(who)}: {finding.text}")
        for finding, who in ranks.items()
    ]


def summary(findings: Iterable[Finding]) -> str:
    """Return the last line of the report: whether a run can start."""
    verdicts = [finding.verdict for finding in findings]
    failed, warnings = verdicts.count("FAILED"), verdicts.count("warning")
    if failed:
        return f"{failed} of {len(verdicts)} checks FAILED; fix these first"
    if warnings:
        return f"ready to train, with {warnings} warning{'s' * (warnings > 1)}"
    return "ready to train"


def _name(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"ranks {shown}"
