"""Runs the demo, from the corpus to the picture."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from bnbx.demo import report
from bnbx.demo.corpus import Corpus, load_corpus
from bnbx.demo.progress import reporting
from bnbx.demo.runs import RUNS
from bnbx.demo.settings import Settings
from bnbx.demo.train import Result, train

NO_MATPLOTLIB = (
    "No picture will be drawn: matplotlib is not installed. To get one: pip install 'bnbx[demo]'"
)


class DemoInterruptedError(Exception):
    """Ctrl-C came during a run; the message says which."""


def compare(settings: Settings, picture: Path, json_path: Path | None, console: Console) -> None:
    """Train all runs, then print the table and write the picture and, if asked, the JSON."""
    corpus = load_corpus(window=settings.shape.context)
    drawing = can_draw(console)
    with cpu_threads(settings.threads):
        console.print(_introduction(corpus, settings), highlight=False)
        results = _train_all(corpus, settings, console)
        text = report.as_json(results, settings)
    console.print(report.table(results))
    console.print(report.verdict(results), highlight=False)
    if drawing:
        from bnbx.demo.plot import draw

        draw(results, picture, _title(results, settings))
    say_where(console, picture if drawing else None, json_path, text)


def can_draw(console: Console) -> bool:
    """Whether there will be a picture; says how to get one before minutes of training."""
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        console.print(NO_MATPLOTLIB, markup=False)
    return found


def say_where(console: Console, picture: Path | None, json_path: Path | None, text: str) -> None:
    """Write the JSON, if a path is given, and say where everything is."""
    if picture is not None:
        console.print(f"Curves: {picture}", soft_wrap=True, markup=False)
    if json_path is not None:
        json_path.write_text(text, encoding="utf-8")
        console.print(f"Results: {json_path}", soft_wrap=True, markup=False)


def _train_all(corpus: Corpus, settings: Settings, console: Console) -> list[Result]:
    results: list[Result] = []
    with reporting(console) as reporter:
        for run in RUNS:
            reporter.start(run.label, settings.steps)
            try:
                result = train(run, corpus, settings, reporter.step)
            except KeyboardInterrupt:
                raise DemoInterruptedError(
                    f"Interrupted during {run.label}: no file written."
                ) from None
            if result.diverged_at is not None:
                reporter.diverged(result.diverged_at)
            results.append(result)
    return results


def _introduction(corpus: Corpus, settings: Settings) -> str:
    shape = settings.shape
    return (
        f"Text: the standard library of Python {platform.python_version()}, "
        f"{len(corpus.train) / 1e6:.1f} MB to train on, "
        f"{len(corpus.validation) / 1e6:.1f} MB from other files to validate on.\n"
        f"Model: {settings.size.value}, {shape.layers} layers of width {shape.width}, "
        f"predicting bytes. Each of the {len(RUNS)} runs takes {settings.steps} steps of "
        f"{settings.batch_size} x {shape.context} bytes; CPU threads: {torch.get_num_threads()}."
    )


def _title(results: list[Result], settings: Settings) -> str:
    parameters = results[0].parameters
    return (
        f"bnbx demo: {parameters / 1e6:.2f} M parameters, byte-level, "
        f"Python {platform.python_version()} source, seed {settings.seed}"
    )


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Set torch's CPU threads and put them back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
