"""Trains a small model on real text with 32-, 8- and 4-bit states, and compares where it ends.

This is the command line: `python benchmarks/quality.py`. README.md in this folder says what is
trained on what.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import INTERRUPTED, writable
from bnbx.demo.settings import MAX_SEED, MIN_STEPS, Settings, Size

if TYPE_CHECKING:
    from bnbx.demo.train import Result

HELP = """Train the model of `bnbx demo` in 32, 8 and 4 bits, with several seeds, and compare.

The runs of a seed begin with the same parameters and see the same batches. The last one is a
warning: a 4-bit type like bnbx's, but with a zero for second moments.
"""

app = typer.Typer(
    add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False
)


def _seeds(text: str) -> list[int]:
    """The numbers of a list with commas, each once."""
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = [-1]
    if not all(0 <= seed <= MAX_SEED for seed in found):
        raise typer.BadParameter(
            f"{text!r}: expected whole numbers from 0 to {MAX_SEED} with commas between them.",
            param_hint="--seeds",
        )
    return list(dict.fromkeys(found))


def _picture(path: Path | None) -> Path | None:
    """Refuse, before minutes of training, a picture that could not be drawn after them."""
    if path is None:
        return None
    if path.suffix.lower() != ".png":
        raise typer.BadParameter(f"{path}: expected a name that ends in .png.")
    if importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter("matplotlib is not installed: pip install matplotlib")
    return writable(path)


@app.command(help=HELP)
def main(
    seeds: Annotated[
        str, typer.Option(metavar="LIST", help="One training a run for each of these numbers.")
    ] = "0,1,2",
    size: Annotated[Size, typer.Option(help="The model, as of `bnbx demo`.")] = Size.TINY,
    steps: Annotated[
        int, typer.Option(min=MIN_STEPS, help="Training steps of each run.")
    ] = Settings.steps,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: torch's choice.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", callback=_picture, help="Draw the curves here.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(callback=writable, help="Write every measurement here.")
    ] = None,
) -> None:
    """Train what was asked for; HELP is what the user reads."""
    chosen = _seeds(seeds)
    from benchmarks import quality_report

    settings = Settings(size=size, steps=steps, threads=threads)
    console = Console()
    results: dict[int, list[Result]] = {}
    try:
        for seed, result in _trainings(chosen, settings, console):
            results.setdefault(seed, []).append(result)
            if json is not None:
                quality_report.write_json(json, results, settings)
    except KeyboardInterrupt:
        console.print("Interrupted.")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        if results:
            _conclude(console, results, settings, output, json)


def _trainings(
    seeds: list[int], settings: Settings, console: Console
) -> Iterator[tuple[int, Result]]:
    """Every run of every seed, as each ends."""
    import torch

    from benchmarks.quality_runs import runs
    from bnbx.demo.corpus import load_corpus
    from bnbx.demo.progress import reporting
    from bnbx.demo.train import train

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    corpus = load_corpus(window=settings.shape.context)
    trained = runs()
    console.print(
        f"{len(seeds) * len(trained)} trainings of {settings.steps} steps, "
        f"{settings.batch_size} x {settings.shape.context} bytes of Python's standard library "
        f"each; CPU threads: {torch.get_num_threads()}.",
        highlight=False,
    )
    with reporting(console) as reporter:
        for seed in seeds:
            for run in trained:
                reporter.start(f"seed {seed}, {run.label}", settings.steps)
                result = train(run, corpus, replace(settings, seed=seed), reporter.step)
                if result.diverged_at is not None:
                    reporter.diverged(result.diverged_at)
                yield seed, result


def _conclude(
    console: Console,
    results: dict[int, list[Result]],
    settings: Settings,
    picture: Path | None,
    json: Path | None,
) -> None:
    """The table, and what was written where."""
    from benchmarks import quality_report

    console.print(quality_report.table(results))
    console.print(
        "difference: of the loss to that of the first column, seed by seed; its mean and range.\n"
        "state: bytes of optimizer state per parameter.",
        highlight=False,
    )
    for line in quality_report.diverged(results):
        console.print(line, highlight=False)
    if picture is not None:
        from benchmarks.quality_plot import draw

        draw(results, picture, _title(results, settings))
        console.print(f"Curves: {picture}", soft_wrap=True, markup=False)
    if json is not None:
        console.print(f"Results: {json}", soft_wrap=True, markup=False)


def _title(results: dict[int, list[Result]], settings: Settings) -> str:
    parameters = next(iter(results.values()))[0].parameters
    seeds = ", ".join(map(str, results))
    return (
        f"{parameters / 1e6:.2f} M parameters, byte-level, {settings.steps} steps, "
        f"seeds {seeds}; broad: mean"
    )


if __name__ == "__main__":
    app()
