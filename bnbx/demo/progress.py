"""Progress of the runs: live bars on a terminal, a few plain lines anywhere else.

A CI log keeps every line for good, so there a run says where it is four times and no more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

REPORTS = 4

READABLE = 1000.0
"""Losses from here on are shown as powers of ten."""


def short_loss(loss: float, sign: str = "-") -> str:
    """A loss in few characters, even one that has exploded; sign "+" shows that of a difference."""
    if not math.isfinite(loss):
        return "not finite"
    return f"{loss:{sign}.3f}" if abs(loss) < READABLE else f"{loss:{sign}.1e}"


class Reporter(Protocol):
    """Is told of each run as it starts, and of each of its steps."""

    def start(self, label: str, steps: int) -> None:
        """A run of so many steps begins."""

    def step(self, done: int, loss: float) -> None:
        """So many steps of it are done; the last one had this training loss."""

    def diverged(self, step: int) -> None:
        """It ended early: the training loss of this step is not finite."""


class Bars:
    """One bar a run, with its training loss and the time left."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = TaskID(0)

    def start(self, label: str, steps: int) -> None:
        """Add a bar."""
        self._task = self._progress.add_task(label, total=steps, loss="")

    def step(self, done: int, loss: float) -> None:
        """Move it."""
        self._progress.update(self._task, completed=done, loss=f"loss {short_loss(loss)}")

    def diverged(self, step: int) -> None:
        """Leave it where it is."""
        self._progress.update(self._task, loss="loss not finite")
        self._progress.stop_task(self._task)


class Lines:
    """One line at each quarter of a run."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._label = ""
        self._due: frozenset[int] = frozenset()
        self._steps = 0
        self._began = 0.0

    def start(self, label: str, steps: int) -> None:
        """Note when the run began and which steps get a line."""
        self._label, self._steps, self._began = label, steps, perf_counter()
        self._due = frozenset(steps * part // REPORTS for part in range(1, REPORTS + 1))

    def step(self, done: int, loss: float) -> None:
        """Print a line if one is due."""
        if done not in self._due:
            return
        left = (perf_counter() - self._began) / done * (self._steps - done)
        self._console.print(
            f"{self._label}: step {done}/{self._steps}, "
            f"training loss {short_loss(loss)}, {left:.0f} s left"
        )

    def diverged(self, step: int) -> None:
        """Say why no more lines come."""
        self._console.print(f"{self._label}: stopped, the loss of step {step} is not finite")


@contextmanager
def reporting(console: Console) -> Iterator[Reporter]:
    """The reporter that suits the console.

    The file is asked too, because FORCE_COLOR makes rich take a CI log for a terminal.
    """
    if not (console.is_interactive and console.file.isatty()):
        yield Lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        yield Bars(progress)
