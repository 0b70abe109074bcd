"""Terminal output with rich: messages above a moving bar."""

from __future__ import annotations

from collections.abc import Iterator

import rich.console
from rich.console import RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_REFRESH_SECONDS = 0.25


class Terminal(rich.console.Console):
    """Console on standard error; standard output is for the result of a command."""

    def __init__(self) -> None:
        super().__init__(stderr=True)

    def on_broken_pipe(self) -> None:
        """Stop printing when the reader has exited; rich would end the run."""
        self.quiet = True


class TrainingBar(Progress):
    """Progress bar of steps with a line of text below it."""

    def __init__(self, terminal: rich.console.Console, total: int, start: int) -> None:
        super().__init__(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=terminal,
            refresh_per_second=1 / _REFRESH_SECONDS,
            speed_estimate_period=120,
            expand=True,
        )
        self._task: TaskID = self.add_task("training", total=total, completed=start, values="")

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields["values"])

    def show(self, step: int, values: str | None = None) -> None:
        """Move the bar to a step, and show `values`, if given, in the line below."""
        if values is None:
            self.update(self._task, completed=step)
        else:
            self.update(self._task, completed=step, values=values)


def command_bar(terminal: rich.console.Console) -> Progress:
    """Return the progress bar of a command, removed when it ends; disabled without a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=terminal, disable=not terminal.is_terminal, transient=True)
