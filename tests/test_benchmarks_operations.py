"""The benchmarks of single operations run, say who is faster, and refuse what they cannot do."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import gpu, quantize
from benchmarks.coding_worker import OPERATIONS
from benchmarks.coding_worker import Job as CodingJob
from benchmarks.linear import app, table
from benchmarks.linear_worker import Job, measure
from benchmarks.side_by_side import Row
from benchmarks.timing import Times

ROWS = (1, 3)


def job(*, crossover: bool = False, backward: bool = False) -> Job:
    return Job("nf4", "float32", 1, ROWS, 64, 0.01, crossover, backward)


@pytest.mark.parametrize("options", [{}, {"crossover": True}, {"backward": True}])
def test_every_contender_is_timed(options: dict[str, bool]) -> None:
    told: list[float] = []
    found = measure(job(**options), lambda _, fraction: told.append(fraction))
    assert [row.label for row in found] == list(map(str, ROWS))
    names = {"codes", "panels"} if options.get("crossover") else {"bnbx", "dense"}
    assert all(names <= set(row.times) for row in found)
    assert all(len(times) >= 3 for row in found for times in row.times.values())
    assert all(s > 0 for row in found for times in row.times.values() for s in times.values())
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_table_says_how_many_times_faster() -> None:
    row = Row("1", "bnbx", {"bnbx": {0: 0.001, 1: 0.002}, "dense": {0: 0.004, 1: 0.008}})
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table(job(), [row]))
    line = next(line for line in captured.get().splitlines() if "1.50" in line)
    assert [cell.strip() for cell in line.strip("│ ").split("│")] == [
        *("1", "1.50", "6.00 (4.00 x)", "-", "-")
    ]


def test_command_writes_what_it_measured(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    options = ["--rows", "2", "--dtype", "bfloat16", "--threads", "1", "--side", "64"]
    done = CliRunner().invoke(app, [*options, "--seconds", "0.01", "--json", str(path)])
    assert done.exit_code == 0, done.output
    assert "nf4, 64 x 64, bfloat16, 1 thread" in done.output
    (row,) = json.loads(path.read_text())["rows"]
    assert row["job"] == "nf4, 64 x 64, bfloat16, 1 thread"
    assert (row["dtype"], row["threads"], row["label"]) == ("bfloat16", 1, "2")
    assert row["median_s"]["bnbx"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "1,x"], "expected whole numbers"),
        (["--rows", "0"], "expected whole numbers"),
        (["--quant-type", "nf99"], "'nf99' is none of"),
        (["--backward", "--crossover"], "one of them at a time"),
    ],
)
def test_options_that_make_no_sense(options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_quantizing_is_timed_beside_bitsandbytes_and_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    options = ["--dtype", "float32", "--threads", "1", "--side", "64", "--seconds", "0.01"]
    done = CliRunner().invoke(quantize.app, [*options, "--json", str(path)])
    assert done.exit_code == 0, done.output
    rows = {row["label"]: row["median_s"] for row in json.loads(path.read_text())["rows"]}
    assert set(rows) == set(OPERATIONS)
    for name, medians in rows.items():
        assert ("copy" in medians) == name.startswith("dequantize")
        assert all(seconds > 0 for seconds in medians.values())
        assert f"{medians['bnbx'] * 1e3:.2f}" in done.output


def test_a_table_of_quantizing_says_how_many_times_faster() -> None:
    times: dict[str, Times] = {"bnbx": {0: 0.001}, "bitsandbytes": {0: 0.02}, "copy": {0: 0.004}}
    job = CodingJob("float32", 1, ("dequantize_4bit",), 64, 1.0)
    console = Console(width=120)
    with console.capture() as captured:
        console.print(quantize.table(job, [Row("dequantize_4bit", "bnbx", times)]))
    line = next(line for line in captured.get().splitlines() if "dequantize_4bit" in line)
    assert line.split() == ["dequantize_4bit", "1.00", "20.00", "4.00", "20.0", "0.25"]


# ---- on a GPU


def test_what_is_timed_on_a_gpu_runs() -> None:
    """Each call of each library, on the CPU: all but the clock."""
    every = [*gpu.cases("cpu", 4096, 64, (1, 3))]
    assert len({case.name for case in every}) == len(every)
    for case in every:
        assert "bnbx" in case.make
        for ready in case.make.values():
            ready()()


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(gpu.app, [])
    assert result.exit_code == 1
    assert "no CUDA device" in result.output


def test_figures_of_a_gpu_are_a_table() -> None:
    case = gpu.Case("a step", {"bnbx": lambda: lambda: None, "torch": lambda: lambda: None})
    file = io.StringIO()
    Console(width=100, file=file).print(gpu._table([case], {("a step", "bnbx"): (2e-6, 3.25e-5)}))
    printed = file.getvalue()
    assert "2.0 / 32.5" in printed
    assert "torch" in printed
