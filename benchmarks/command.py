"""What the benchmarks' command lines share: lists of words, files to be written, progress."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.process import Report

BUSY = 0.5  # load average before a benchmark adds its own
INTERRUPTED = 130  # as shells report Ctrl-C
Advance = Callable[[str, str, float], None]  # configuration, activity, configurations done


def words(text: str, known: tuple[str, ...], option: str) -> tuple[str, ...]:
    """The words of a list with commas, each once.

    Raises:
        typer.BadParameter: one that is not known.
    """
    chosen = tuple(word.strip() for word in text.split(","))
    for word in chosen:
        if word not in known:
            raise typer.BadParameter(f"{word!r} is none of {', '.join(known)}.", param_hint=option)
    return tuple(dict.fromkeys(chosen))


def writable(path: Path | None) -> Path | None:
    """Refuse, before minutes of measuring, a file that could not be written after them."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise typer.BadParameter(f"{path}: expected the name of a file in an existing folder.")
    return path


def introduce(console: Console, about: dict[str, object]) -> None:
    """Say what the machine is, and whether it is busy."""
    for name, value in about.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        console.print(f"{name.replace('_', ' ')}: {text}", markup=False, highlight=False)
    load = os.getloadavg()[0]
    if load > BUSY:
        console.print(f"Programs are running already (load average {load:.1f}): expect noise.")


@contextmanager
def progress(console: Console, total: int) -> Iterator[Advance]:
    """A bar over all configurations; where there is no terminal, a line for each of them."""
    if not (console.is_interactive and console.file.isatty()):
        began: set[str] = set()

        def say(title: str, _what: str, _done: float) -> None:
            if title not in began:
                console.print(f"{title} ...", highlight=False)
                began.add(title)

        yield say
        return
    columns = (BarColumn(bar_width=16), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda title, what, done: bar.update(
            task, description=f"{title}: {what}", completed=done
        )


def part(advance: Advance, title: str, number: int) -> Report:
    """The progress of one configuration, as progress of the whole."""
    return lambda what, fraction: advance(title, what, number + fraction)
