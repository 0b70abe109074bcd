"""The terminal by rich: messages above a bar that moves."""

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
    """Standard error, since standard output is for what a command is asked for."""

    def __init__(self) -> None:
        super().__init__(stderr=True)

    def on_broken_pipe(self) -> None:
        """Whoever read the messages is gone; that is no reason to end a run, as rich would."""
        self.quiet = True


class TrainingBar(Progress):
    """A bar of steps with a line of text below it."""

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
        """Move to a step, and show `values` in the line below, if they are given."""
        if values is None:
            self.update(self._task, completed=step)
        else:
            self.update(self._task, completed=step, values=values)


def command_bar(terminal: rich.console.Console) -> Progress:
    """The bar of a command's work, gone when that is done; nothing where there is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=terminal, disable=not terminal.is_terminal, transient=True)
