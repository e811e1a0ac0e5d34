"""The `bnbx` command.

Torch and all that imports it load inside the commands, so that `bnbx --help` answers at once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bnbx import __version__
from bnbx.demo.settings import MAX_SEED, MIN_STEPS, SHAPES, Settings, Size
from bnbx.errors import BnbxError

INTERRUPTED = 130
"""The exit status that shells give a program ended by Ctrl-C."""

app = typer.Typer(
    name="bnbx",
    help="Low-bit optimizers for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bnbx {__version__}")
        raise typer.Exit


@app.callback()
def bnbx(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Low-bit optimizers for PyTorch."""


def _writable(path: Path | None) -> Path | None:
    """Refuse, before minutes of training, a file that could not be written after them."""
    if path is None:
        return None
    folder = path.absolute().parent
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; give the name of a file.")
    if not folder.is_dir():
        raise typer.BadParameter(f"the folder {folder} does not exist; create it first.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise typer.BadParameter(f"no permission to write {path}; choose another place.")
    return path


def _writable_png(path: Path) -> Path:
    if path.suffix.lower() != ".png":
        raise typer.BadParameter(f"{path} does not end in .png, the one format it is written in.")
    _writable(path)
    return path


def _size_help() -> str:
    shapes = ", ".join(
        f"{size.value} ({shape.layers} layers of width {shape.width}, context {shape.context})"
        for size, shape in SHAPES.items()
    )
    return f"The model: {shapes}."


@app.command()
def demo(
    steps: Annotated[int, typer.Option(min=MIN_STEPS, help="Training steps of each run.")] = (
        Settings.steps
    ),
    size: Annotated[Size, typer.Option(help=_size_help())] = Settings.size,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Windows of text in a training step.")
    ] = Settings.batch_size,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Of the first parameters and of the batches.")
    ] = Settings.seed,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads; by default, torch's own choice."),
    ] = None,
    output: Annotated[
        Path, typer.Option(callback=_writable_png, help="Where to write the curves.")
    ] = Path("bnbx-demo.png"),
    json: Annotated[
        Path | None,
        typer.Option(callback=_writable, help="Also write settings and measurements here."),
    ] = None,
) -> None:
    """Train one small model with 32-bit and with 8-bit optimizer states, and compare.

    Three runs of a byte-level transformer on the source of Python's standard library, from the
    same parameters and on the same batches: torch's AdamW, bnbx's AdamW in 8 bits, and bnbx's with
    linear8 states, a type that suits optimizer states badly. Takes a few minutes on two CPU cores.
    """
    from bnbx.demo.compare import DemoInterruptedError, compare

    settings = Settings(size, steps, batch_size, seed, threads)
    try:
        compare(settings, output, json, Console())
    except DemoInterruptedError as stop:
        typer.echo(str(stop), err=True)
        raise typer.Exit(INTERRUPTED) from None
    except BnbxError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
