"""The command line: it answers fast, refuses bad options before any work, and runs the demo."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import bnbx
from bnbx.cli import INTERRUPTED, app
from bnbx.demo import compare
from bnbx.demo.runs import RUNS

QUICK = ("demo", "--size", "tiny", "--steps", "5", "--batch-size", "2", "--threads", "1")


WIDTH = 80


def invoke(*arguments: str) -> tuple[int, str]:
    """Exit status and everything printed, without the colors that CI services ask for."""
    result = CliRunner().invoke(app, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, re.sub(r"\x1b\[[0-9;]*m", "", result.output)


def refusal(*arguments: str) -> str:
    """What a usage error says, as one line without the box around it."""
    status, output = invoke(*arguments)
    assert status == 2
    return " ".join(output.replace("│", " ").split())


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, so that no picture is left in the checkout, and a log's usual width."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(WIDTH))


def test_version() -> None:
    assert invoke("--version") == (0, f"bnbx {bnbx.__version__}\n")


def test_help_names_the_demo() -> None:
    status, output = invoke("--help")
    assert status == 0
    assert "demo" in output


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from bnbx.cli import app; app(['demo', '--help'], standalone_mode=False); "
        "sys.exit(bool({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "byte-level transformer" in done.stdout


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--steps", "4", "5"),
        ("--batch-size", "0", "1"),
        ("--threads", "0", "1"),
        ("--seed", "-1", "0"),
        ("--size", "huge", "'tiny', 'small', 'medium'"),
        ("--output", "curves.svg", "does not end in .png"),
        ("--output", "nowhere/curves.png", "does not exist; create it first"),
        ("--json", "nowhere/results.json", "does not exist; create it first"),
        ("--json", ".", "is a folder; give the name of a file"),
    ],
)
def test_bad_option_is_refused_by_name(option: str, value: str, expected: str) -> None:
    message = refusal("demo", option, value)
    assert option in message
    assert expected in message


def test_demo_end_to_end(tmp_path: Path) -> None:
    picture, results = tmp_path / "curves.png", tmp_path / "results.json"
    status, output = invoke(*QUICK, "--output", str(picture), "--json", str(results))
    assert status == 0
    rows = [line for line in output.splitlines() if line.startswith("│")]
    assert [any(run.label in row for row in rows) for run in RUNS] == [True, True, True]
    assert len(rows) == 3
    paths = (f"Curves: {picture}", f"Results: {results}")
    assert all(len(line) <= WIDTH for line in output.splitlines() if line not in paths)
    assert "linear8 states" in output
    assert "small second moments" in " ".join(output.split())
    assert_picture(picture)
    report = json.loads(results.read_text(encoding="utf-8"))
    assert [run["key"] for run in report["runs"]] == [run.key for run in RUNS]
    assert report["settings"]["steps"] == 5
    assert all(run["step_ms"] > 0 and run["first_step_ms"] > 0 for run in report["runs"])


def test_demo_writes_its_picture_to_the_current_folder() -> None:
    status, _ = invoke(*QUICK)
    assert status == 0
    assert [path.name for path in Path.cwd().iterdir()] == ["bnbx-demo.png"]


def test_demo_without_matplotlib_still_prints_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, output = invoke(*QUICK)
    assert status == 0
    assert "pip install 'bnbx[demo]'" in " ".join(output.split())
    assert RUNS[-1].label in output
    assert list(Path.cwd().iterdir()) == []


def test_ctrl_c_says_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "train", interrupt)
    status, output = invoke(*QUICK)
    assert status == INTERRUPTED
    assert f"Interrupted during {RUNS[0].label}: no file written." in output
    assert "Traceback" not in output
    assert list(Path.cwd().iterdir()) == []


def assert_picture(path: Path) -> None:
    """A PNG of the size that was asked for, with something drawn on it."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", data[16:24]) == (1350, 810)
    assert len(data) > 20_000
