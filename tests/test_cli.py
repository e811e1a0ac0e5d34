"""The command line: it answers fast, refuses bad options before any work, and runs the demo."""

from __future__ import annotations

import importlib.util
import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from typer.testing import CliRunner

import bnbx
from bnbx.cli import INTERRUPTED, app
from bnbx.demo import compare, qlora
from bnbx.demo.qlora import BASES
from bnbx.demo.runs import RUNS
from bnbx.registry import QuantType, hookimpl, optimizers, plugins, quant_types

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


def hide_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "matplotlib" else find(name, package)

    monkeypatch.setattr("importlib.util.find_spec", without)


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, so that no picture is left in the checkout, and a log's usual width."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(WIDTH))


def test_version() -> None:
    assert invoke("--version") == (0, f"bnbx {bnbx.__version__}\n")


def test_help_names_every_command() -> None:
    status, output = invoke("--help")
    assert status == 0
    assert all(command in output for command in ("demo", "types", "rules", "describe", "plot"))


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
    hide_matplotlib(monkeypatch)
    status, output = invoke(*QUICK)
    assert status == 0
    assert "pip install 'bnbx[demo]'" in " ".join(output.split())
    assert RUNS[-1].label in output
    assert list(Path.cwd().iterdir()) == []


def test_qlora_end_to_end(tmp_path: Path) -> None:
    picture, results = tmp_path / "curves.png", tmp_path / "results.json"
    status, output = invoke(*QUICK, "--qlora", "--output", str(picture), "--json", str(results))
    assert status == 0
    rows = [line for line in output.splitlines() if line.startswith("│")]
    assert [base.label in row for base, row in zip(BASES, rows, strict=True)] == [True, True]
    paths = (f"Curves: {picture}", f"Results: {results}")
    assert all(len(line) <= WIDTH for line in output.splitlines() if line not in paths)
    assert "fewer bytes of frozen weights" in " ".join(output.split())
    assert_picture(picture)
    report = json.loads(results.read_text(encoding="utf-8"))
    assert [run["key"] for run in report["runs"]] == [base.key for base in BASES]
    assert report["settings"]["steps"] == 5
    assert report["gap"] is not None


def test_ctrl_c_in_an_adapter_run_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(qlora, "adapt_on", interrupt)
    status, output = invoke(*QUICK, "--qlora")
    assert status == INTERRUPTED
    assert f"Interrupted during {BASES[0].label}: no file written." in output
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


# ---- quant types


def errors_of(*arguments: str) -> str:
    """What a command that ends with status 1 prints to stderr; nothing else, no traceback."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def test_types_lists_every_quant_type() -> None:
    status, output = invoke("types")
    assert status == 0
    listed = [line.split()[0] for line in output.splitlines() if re.match(r"[a-z]\w* +\d ", line)]
    assert tuple(listed) == quant_types().names()
    assert f"{len(listed)} types." in output
    assert all(len(line) <= WIDTH for line in output.splitlines())
    (row,) = [line for line in output.splitlines() if line.startswith("nf4 ")]
    assert row.split()[:4] == ["nf4", "4", "4.5", "64"]


def test_rules_lists_every_optimizer() -> None:
    status, output = invoke("rules")
    assert status == 0
    names = optimizers().names()
    listed = [line.split()[0] for line in output.splitlines() if line.split(" ")[0] in names]
    assert tuple(listed) == names
    assert f"{len(names)} rules." in output
    assert all(len(line) <= WIDTH for line in output.splitlines())
    (row,) = [line for line in output.splitlines() if line.startswith("adamw ")]
    assert row.split()[:4] == ["adamw", "m,", "v,", "(vmax)"]


@pytest.mark.parametrize("command", ["types", "rules"])
def test_a_list_is_followed_by_the_plugins_it_lacks(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(plugins().failures, "mine", "ValueError: no (from mine)")
    monkeypatch.setattr(plugins(), "left_out", ("yours",))
    monkeypatch.setattr(plugins(), "_chosen", "")
    result = CliRunner().invoke(app, [command])
    assert result.exit_code == 0
    assert "passed over" not in result.stdout
    passed, left = result.stderr.splitlines()
    assert passed == "plugin 'mine' was passed over: ValueError: no (from mine)"
    assert left.startswith("installed, but left out by BNBX_PLUGINS='': yours; ")


def test_types_names_the_package_of_a_plugin() -> None:
    spec = QuantType(name="mine", summary="two bits", bits=2, values=(-1.0, 0.0, 0.5, 1.0))

    class Plugin:
        @staticmethod
        @hookimpl
        def register_quant_types(register: Callable[[QuantType], None]) -> None:
            register(spec)

    plugins().load("my_package", Plugin())
    try:
        lines = invoke("types")[1].splitlines()
        (row,) = [n for n, line in enumerate(lines) if line.startswith("mine ")]
        assert "two bits (from my_package)" in " ".join(" ".join(lines[row : row + 2]).split())
        assert "registered by  my_package" in invoke("describe", "mine")[1]
    finally:
        plugins()._forget("my_package")


def test_describe_prints_table_and_errors() -> None:
    status, output = invoke("describe", "nf4")
    assert status == 0
    assert "nf4: quantiles of the normal distribution in 4 bits" in output
    assert "arXiv:2305.14314" in output
    assert "4 a code, 4.5 with scales" in output
    assert re.search(r"^1000 +0\.079580 +0\.039790", output, re.MULTILINE)
    assert len(re.findall(r"^[01]{4} ", output, re.MULTILINE)) == 16
    assert re.search(r"normal +9\.12 % +9\.21 % +20\.7", output)


@pytest.mark.parametrize("name", quant_types().names())
def test_describe_fits_the_terminal(name: str) -> None:
    status, output = invoke("describe", name)
    assert status == 0
    assert all(len(line) <= WIDTH for line in output.splitlines())
    assert len(output.splitlines()) < 46
    assert not re.search(r"\S…|…\S", output)  # a number that was cut short
    spec = quant_types().get(name)
    assert f"{name}: {spec.summary}" in " ".join(output.split())
    (header,) = [line for line in output.splitlines() if line.lstrip().startswith("code ")]
    assert ("number" in header) is (spec.unit != 1)


def test_describe_with_another_block_size() -> None:
    assert "4 a code, 6 with scales" in invoke("describe", "nf4", "--block-size", "16")[1]


def test_describe_in_json() -> None:
    status, output = invoke("describe", "mxfp4", "--json")
    assert status == 0
    found = json.loads(output)
    assert found["scale"]["dtype"] == "e8m0"
    assert found["bits_per_element"] == 4.25
    rows = {row["code"]: row for row in found["table"]}
    assert rows[7] == {
        "code": 7,
        "level": 1.0,
        "value": 6.0,
        "written_above": pytest.approx(5 / 6),
        "written": True,
    }
    assert rows[8]["written"] is False
    assert json.loads(invoke("describe", "linear2", "--json")[1])["unsigned"][0]["level"] == 0


def test_an_unknown_quant_type_is_answered_with_the_nearest() -> None:
    message = errors_of("describe", "nf44")
    assert message.startswith("Error: there is no quant type 'nf44'; did you mean 'nf4'?")
    assert errors_of("plot", "nf4", "fp44", "-o", "x.png").startswith("Error: there is no quant")
    assert list(Path.cwd().iterdir()) == []


def test_a_block_size_that_cannot_be_is_refused() -> None:
    message = errors_of("describe", "nf4", "--block-size", "100")
    assert "block size 100; expected one of 16, 32" in message
    assert "int8 has a scale per row" in errors_of("describe", "int8", "--block-size", "64")


def test_plot_writes_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "nf4.png"
    assert invoke("plot", "nf4", "-o", str(path)) == (0, f"Picture: {path}\n")
    assert_picture(path, (1500, 888))
    assert invoke("plot", "nf4", "fp4", "linear4", "--output", "three.png")[0] == 0
    assert_picture(Path("three.png"), (1500, 1074))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("nf4",), "Missing option '--output'"),
        (("-o", "x.png"), "Missing argument"),
        (("nf4", "-o", "x.svg"), "does not end in .png"),
        (("nf4", "-o", "nowhere/x.png"), "does not exist; create it first"),
        (("nf4",) * 9 + ("-o", "x.png"), "9 quant types; at most 8 fit a picture"),
    ],
)
def test_bad_arguments_of_plot(arguments: tuple[str, ...], expected: str) -> None:
    assert expected in refusal("plot", *arguments)


def test_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_matplotlib(monkeypatch)
    assert "pip install 'bnbx[demo]'" in errors_of("plot", "nf4", "-o", "x.png")


def assert_picture(path: Path, size: tuple[int, int] = (1350, 810)) -> None:
    """A PNG of the size that was asked for, with something drawn on it."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", data[16:24]) == size
    assert len(data) > 20_000
