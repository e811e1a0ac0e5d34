"""The `bnbx` command.

Torch and all that imports it load inside the commands, so that `bnbx --help` answers at once.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from json import dumps
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bnbx import __version__
from bnbx.demo.settings import MAX_SEED, MIN_STEPS, SHAPES, Settings, Size
from bnbx.errors import BnbxError

INTERRUPTED = 130
"""The exit status that shells give a program ended by Ctrl-C."""

MOST_PLOTTED = 8
"""Quant types in one picture: as many as there are colors to tell apart."""

app = typer.Typer(
    name="bnbx",
    help="Low-bit optimizers and quant types for PyTorch.",
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
    """Low-bit optimizers and quant types for PyTorch."""


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


@contextmanager
def _reported() -> Iterator[None]:
    """Print what bnbx refuses, without a traceback, and exit with 1."""
    try:
        yield
    except BnbxError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None


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
    qlora: Annotated[
        bool,
        typer.Option(
            "--qlora",
            help="Instead, compare adapters on 4-bit and on 16-bit weights, in half the steps.",
        ),
    ] = False,
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

    With --qlora: the model learns that text, then low-rank adapters teach it another, Python's
    language reference, on its weights frozen in NF4 (QLoRA) and on the same weights in bfloat16.
    """
    from bnbx.demo.compare import DemoInterruptedError, compare

    settings = Settings(size, steps, batch_size, seed, threads)
    try:
        with _reported():
            if qlora:
                from bnbx.demo.qlora import compare_bases

                compare_bases(settings, output, json, Console())
            else:
                compare(settings, output, json, Console())
    except DemoInterruptedError as stop:
        typer.echo(str(stop), err=True)
        raise typer.Exit(INTERRUPTED) from None


BlockSize = Annotated[
    int | None,
    typer.Option(help="Elements that share a scale; by default, what the type says."),
]


@app.command()
def types() -> None:
    """List the quant types that are registered, those of plugins too."""
    from bnbx.describe.text import list_types
    from bnbx.registry import quant_types

    with _reported():
        list_types(quant_types(), Console())
        _say_what_is_absent()


@app.command()
def rules() -> None:
    """List the optimizers that are registered, those of plugins too."""
    from bnbx.describe.rules import list_rules
    from bnbx.registry import optimizers

    with _reported():
        list_rules(optimizers(), Console())
        _say_what_is_absent()


def _say_what_is_absent() -> None:
    """The plugins that a list lacks, and why: to stderr, since a list may be piped."""
    from bnbx.registry import plugins

    for line in plugins().absent():
        typer.echo(line, err=True)


@app.command()
def describe(
    name: Annotated[
        str, typer.Argument(metavar="TYPE", help="A quant type; `bnbx types` lists them.")
    ],
    block_size: BlockSize = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, with the whole table.")] = False,
) -> None:
    """Say what a quant type is: its table, its scale, and its error on data.

    Errors are those of normal and Laplace numbers, and of weights that `bnbx demo` trained.
    """
    from bnbx.describe import text
    from bnbx.describe.facts import as_json, facts_of

    with _reported():
        facts = facts_of(name, block_size)
        if json:
            typer.echo(dumps(as_json(facts), indent=2))
        else:
            text.describe(facts, Console())


@app.command()
def plot(
    names: Annotated[
        list[str], typer.Argument(metavar="TYPES...", help=f"At most {MOST_PLOTTED} quant types.")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", callback=_writable_png, help="Where to write the picture."),
    ],
    block_size: BlockSize = None,
) -> None:
    """Draw quant types: where their numbers lie, and their error by magnitude and on data."""
    if len(names) > MOST_PLOTTED:
        raise typer.BadParameter(f"{len(names)} quant types; at most {MOST_PLOTTED} fit a picture.")
    if importlib.util.find_spec("matplotlib") is None:
        typer.echo("Error: matplotlib draws it; install it: pip install 'bnbx[demo]'", err=True)
        raise typer.Exit(1)
    from bnbx.describe.facts import facts_of

    with _reported():
        found = [facts_of(name, block_size) for name in names]
        from bnbx.describe.plot import draw

        draw(found, output)
        typer.echo(f"Picture: {output}")
