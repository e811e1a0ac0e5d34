"""Times optimizers, quantizing and products on a GPU, beside torch and bitsandbytes.

`python benchmarks/gpu.py` prints a table with two figures a call: what the GPU works (its kernels
and copies, by torch's profiler) and what passes on the wall, which is more where the host is too
slow to keep the GPU busy, as in products of one row.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROUNDS, WARM_UP = 5, 3
LAYERS = 8  # that products of a few rows go through, so that weights come from memory
Call = Callable[[], object]

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@dataclass(frozen=True)
class Case:
    """Something that several libraries do: `make` gives the call of each, when it is its turn.

    `times` is how often a call does the thing.
    """

    name: str
    make: dict[str, Callable[[], Call]]
    times: int = 1


def cases(device: str, elements: int, side: int, rows: tuple[int, ...]) -> Iterator[Case]:
    """What is timed.

    Args:
        device: where.
        elements: of the parameter that is stepped, and of the tensor that is quantized.
        side: of the square weight of products.
        rows: of their input.
    """
    for dtype in ("float32", "bfloat16"):
        yield from _steps(device, elements, dtype)
    for dtype in ("float32", "bfloat16"):
        yield from _coding(device, elements, dtype)
    for count in rows:
        yield _products(device, side, count)


def _libraries() -> dict[str, Any]:
    import bnbx

    found: dict[str, Any] = {"bnbx": bnbx}
    try:
        import bitsandbytes
    except ImportError:
        return found
    return found | {"bitsandbytes": bitsandbytes}


def _steps(device: str, elements: int, dtype: str) -> Iterator[Case]:
    import torch

    def step(make: Callable[[Any], Any]) -> Callable[[], Call]:
        def ready() -> Call:
            p = torch.nn.Parameter(torch.randn(elements, device=device).to(getattr(torch, dtype)))
            p.grad = torch.randn_like(p) * 1e-3
            step: Call = make([p]).step
            return step

        return ready

    def fused(params: Any) -> Any:
        return torch.optim.AdamW(params, fused=True)

    def eight_bits(library: Any, name: str) -> Callable[[Any], Any]:
        return lambda params: getattr(library.optim, name)(params, lr=1e-3)

    for name in ("AdamW8bit", "Lion8bit", "LAMB8bit"):
        make = {each: step(eight_bits(library, name)) for each, library in _libraries().items()}
        yield Case(f"{name}, {elements:,} {dtype}", make | {"torch AdamW": step(fused)})


def _coding(device: str, elements: int, dtype: str) -> Iterator[Case]:
    import torch

    def numbers() -> Any:
        return torch.randn(elements, device=device).to(getattr(torch, dtype))

    def there(library: Any, kind: str) -> Callable[[], Call]:
        def ready() -> Call:
            x, run = numbers(), getattr(library.functional, f"quantize_{kind}")
            return lambda: run(x)

        return ready

    def back(library: Any, kind: str) -> Callable[[], Call]:
        def ready() -> Call:
            made = getattr(library.functional, f"quantize_{kind}")(numbers())
            run = getattr(library.functional, f"dequantize_{kind}")
            return lambda: run(*made)

        return ready

    for kind in ("blockwise", "nf4"):
        for name, make in ((f"quantize_{kind}", there), (f"dequantize_{kind}", back)):
            every = {each: make(library, kind) for each, library in _libraries().items()}
            yield Case(f"{name}, {elements:,} {dtype}", every)


def _products(device: str, side: int, count: int) -> Case:
    import torch

    def through(make: Callable[[], Any]) -> Callable[[], Call]:
        def ready() -> Call:
            x = torch.randn(count, side, device=device).bfloat16()
            layers = [make().to(device) for _ in range(LAYERS)]

            def run() -> None:
                with torch.no_grad():
                    for layer in layers:
                        layer(x)

            return run

        return ready

    def dense() -> Any:
        return torch.nn.Linear(side, side, bias=False, dtype=torch.bfloat16)

    def nf4(library: Any) -> Callable[[], Any]:
        given = dict(bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        return lambda: library.nn.Linear4bit(side, side, **given)

    make = {each: through(nf4(library)) for each, library in _libraries().items()}
    name = f"Linear4bit nf4, {side} x {side}, {count} rows bfloat16"
    return Case(name, make | {"dense": through(dense)}, LAYERS)


def wall(run: Call, seconds: float) -> float:
    """Seconds of a call, the median of rounds that end when the GPU is done."""
    import torch

    found = []
    for _ in range(WARM_UP):
        run()
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start, calls = time.perf_counter(), 0
        while calls == 0 or time.perf_counter() - start < seconds / ROUNDS:
            run()
            calls += 1
        torch.cuda.synchronize()
        found.append((time.perf_counter() - start) / calls)
    return median(found)


def on_device(run: Call) -> float:
    """Seconds that the GPU works for a call."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(ROUNDS):
            run()
        torch.cuda.synchronize()
    return float(sum(each.self_device_time_total for each in found.key_averages())) / ROUNDS / 1e6


def _table(every: list[Case], figures: dict[tuple[str, str], tuple[float, float]]) -> Table:
    table = Table(box=SIMPLE_HEAD, title="microseconds: the GPU's work / on the wall")
    names = list(dict.fromkeys(name for case in every for name in case.make))
    for column in ("", *names):
        table.add_column(column, justify="right" if column else "left")
    for case in every:
        cells = []
        for name in names:
            both = figures.get((case.name, name))
            cells.append("" if both is None else " / ".join(f"{1e6 * x:.1f}" for x in both))
        table.add_row(case.name, *cells)
    return table


@app.command()
def main(
    rows: Annotated[
        str, typer.Option(metavar="LIST", help="Rows of the input of products.")
    ] = "1,4,16,512",
    elements: Annotated[int, typer.Option(min=1, help="Of the stepped and quantized tensors.")] = 1
    << 27,
    side: Annotated[int, typer.Option(min=64, help="Of the square weight of products.")] = 4096,
    seconds: Annotated[float, typer.Option(min=0.01, help="For each figure.")] = 0.3,
) -> None:
    """Time bnbx on this machine's GPU, beside torch and bitsandbytes."""
    import torch

    wanted = rows.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in wanted):
        raise typer.BadParameter(f"{rows!r}: expected whole numbers.", param_hint="--rows")
    console = Console()
    if not torch.cuda.is_available():
        console.print("torch sees no CUDA device; the other benchmarks run on a CPU.")
        raise typer.Exit(1)
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    every = list(cases("cuda", elements, side, tuple(dict.fromkeys(map(int, wanted)))))
    jobs = [(case, name) for case in every for name in case.make]
    walls: dict[tuple[str, str], float] = {}
    for case, name in track(jobs, "on the wall ...", console=console, transient=True):
        walls[case.name, name] = wall(case.make[name](), seconds) / case.times
    # After all of them: a profiler that has run once slows each launch that comes later.
    figures = {}
    for case, name in track(jobs, "the GPU's work ...", console=console, transient=True):
        run = case.make[name]()
        for _ in range(WARM_UP):
            run()
        figures[case.name, name] = on_device(run) / case.times, walls[case.name, name]
    console.print(_table(every, figures))


if __name__ == "__main__":
    app()
