"""The linear benchmark runs, says who is faster, and refuses what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from benchmarks.linear import app, table
from benchmarks.linear_worker import Job, Row, measure

ROWS = (1, 3)


def job(*, crossover: bool = False, backward: bool = False) -> Job:
    return Job("nf4", "float32", 1, ROWS, 64, 0.01, crossover, backward)


@pytest.mark.parametrize("options", [{}, {"crossover": True}, {"backward": True}])
def test_every_contender_is_timed(options: dict[str, bool]) -> None:
    told: list[float] = []
    found = measure(job(**options), lambda _, fraction: told.append(fraction))
    assert [row.rows for row in found] == list(ROWS)
    names = {"codes", "panels"} if options.get("crossover") else {"bnbx", "dense"}
    assert all(names <= set(row.times) for row in found)
    assert all(len(times) >= 3 for row in found for times in row.times.values())
    assert all(s > 0 for row in found for times in row.times.values() for s in times.values())
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_table_says_how_many_times_faster() -> None:
    row = Row(1, "bnbx", {"bnbx": {0: 0.001, 1: 0.002}, "dense": {0: 0.004, 1: 0.008}})
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table(job(), [row]))
    line = next(line for line in captured.get().splitlines() if "1.50" in line)
    assert [cell.strip() for cell in line.strip("│ ").split("│")] == [
        *("1", "1.50", "6.00", "-", "4.00", "-")
    ]


def test_command_writes_what_it_measured(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    options = ["--rows", "2", "--dtype", "bfloat16", "--threads", "1", "--side", "64"]
    done = CliRunner().invoke(app, [*options, "--seconds", "0.01", "--json", str(path)])
    assert done.exit_code == 0, done.output
    assert "nf4, 64 x 64, bfloat16, 1 thread" in done.output
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["type"], row["dtype"], row["rows"], row["backward"]) == (
        "nf4",
        "bfloat16",
        2,
        False,
    )
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
