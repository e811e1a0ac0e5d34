"""The benchmark's own logic: whom it times when, what it compares, and that it runs at all."""

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks.cases import CASES
from benchmarks.contenders import CONTENDERS, REFERENCE, Contender
from benchmarks.process import ProcessError, call
from benchmarks.report import table
from benchmarks.results import Job, Measurement, Row
from benchmarks.timing import MIN_TIMES, periods, ratios, run_rounds
from benchmarks.worker import measure, state_bytes

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "benchmarks" / "optimizer_step.py")


class Clock:
    """Time that only passes when a step takes it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def take(self, name: str, seconds: float) -> None:
        self.calls.append(name)
        self.now += seconds


def run(clock: Clock, costs: dict[str, float], seconds: float) -> dict[str, dict[int, float]]:
    every = periods(costs, 0.25, reference="b")
    return run_rounds(
        {name: partial(clock.take, name, cost) for name, cost in costs.items()},
        every,
        partial(clock.take, "renew", 0.25),
        seconds,
        lambda _done: None,
        clock,
    )


def test_contenders_take_turns_and_gradients_change_after_each_round() -> None:
    clock = Clock()
    times = run(clock, {"a": 0.5, "b": 0.25}, seconds=4.0)
    assert clock.calls == ["a", "b", "renew"] * 4
    assert times == {"a": dict.fromkeys(range(4), 0.5), "b": dict.fromkeys(range(4), 0.25)}


def test_slow_contenders_run_in_every_kth_round_but_often_enough() -> None:
    clock = Clock()
    times = run(clock, {"a": 0.5, "b": 0.25, "slow": 4.0}, seconds=0.01)
    assert list(times["slow"]) == [0, 4, 8]
    assert len(times["slow"]) == MIN_TIMES
    assert list(times["a"]) == list(times["b"]) == list(range(9))


def test_reference_runs_in_every_round_however_slow() -> None:
    assert periods({"a": 0.1, "b": 9.0, "c": 0.1, "d": 9.0}, 0.0, reference="b") == {
        "a": 1,
        "b": 1,
        "c": 1,
        "d": 45,
    }


def test_ratios_are_of_rounds_that_both_ran_in() -> None:
    assert ratios({0: 6.0, 4: 8.0, 5: 7.0}, {0: 2.0, 1: 9.0, 4: 4.0}) == [3.0, 2.0]


def test_cases_have_the_sizes_that_the_page_states() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    sizes = {name: case.parameters for name, case in CASES.items()}
    assert sizes["large"] == 33_554_432
    assert sizes["single"] == 16_777_216
    assert sizes["transformer"] == 86_039_040
    assert len(CASES["transformer"].shapes) == 148
    for name in ("large", "single", "transformer"):
        assert f"{sizes[name]:,} elements" in page
    assert "148 tensors" in page


def test_advice_for_missing_peers_has_the_version_of_the_extra() -> None:
    peers = ", ".join(f'"{c.requirement}"' for c in CONTENDERS.values() if c.optional)
    assert f"\npeers = [{peers}]\n" in (ROOT / "pyproject.toml").read_text()


def test_state_bytes_count_shared_storage_once_and_open_wrappers() -> None:
    class Wrapper(torch.Tensor):
        codes = torch.zeros(5, dtype=torch.uint8)

        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return ["codes"], None

    shared, wrapper = torch.zeros(10), torch.zeros(1).as_subclass(Wrapper)
    states = {0: {"m": shared, "v": wrapper, "step": 3}, 1: {"m": shared[2:]}}
    assert state_bytes(SimpleNamespace(state=states)) == 45  # type: ignore[arg-type]


@pytest.fixture
def torch_threads() -> Iterator[None]:
    """Puts the thread count back that a measurement sets."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.mark.usefixtures("torch_threads")
def test_peers_that_cannot_run_are_said_in_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(_params: object) -> torch.optim.Optimizer:
        raise RuntimeError("no kernel for this machine")

    monkeypatch.setenv("BNBX_CACHE_DIR", str(tmp_path))
    absent = Contender("absent", "a_package_that_is_not_there", "absent==1", fail, optional=True)
    failing = Contender("failing", "torch", "failing==1", fail, optional=True)
    both = {**CONTENDERS, "a": absent, "f": failing}
    monkeypatch.setattr("benchmarks.worker.CONTENDERS", both)
    monkeypatch.setattr("benchmarks.report.CONTENDERS", both)
    done = measure(Job("tiny", "float32", 1, ("bnbx", "torch", "a", "f"), 0.01), lambda *_: None)
    shown = rendered(done)
    assert "not installed: pip install absent==1" in shown
    assert "RuntimeError: no kernel for this machine" in shown
    assert [len(row.times) >= MIN_TIMES for row in done.rows] == [True, True, False, False]


def rendered(measurement: Measurement) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table(measurement))
    return capture.get()


def test_table_has_the_ratio_of_shared_rounds() -> None:
    job = Job("large", "float32", 1, ("bnbx", REFERENCE), 1.0)
    rows = [
        Row("bnbx", period=2, state_bytes=2000, times={0: 0.003, 2: 0.005, 4: 0.004, 6: 0.004}),
        Row(REFERENCE, state_bytes=8000, times=dict.fromkeys(range(6), 0.002)),
    ]
    shown = rendered(Measurement(job, 2, 1000, 0.0, 0.0, 0, rows))
    (line,) = (line for line in shown.splitlines() if "bnbx" in line)
    assert line.split() == "bnbx 4 /2 4.00 3.00 4000.00 2.00 1.50-2.50 0.00 2.00".split()


CHILD = """
import os

def answer(argument, report):
    report("half of it", 0.5)
    return os.environ["GREETING"], argument

def fail(argument, report):
    raise ValueError(argument)

def die(argument, report):
    print("the last words", flush=True)
    os._exit(argument)
"""


def test_process_returns_result_error_or_last_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "benchmark_child.py").write_text(CHILD)
    monkeypatch.syspath_prepend(tmp_path)
    reports: list[tuple[str, float]] = []

    def report(what: str, done: float) -> None:
        reports.append((what, done))

    def run_child(function: str, argument: object) -> object:
        return call("benchmark_child", function, argument, {"GREETING": "hello"}, report)

    assert run_child("answer", (1, 2)) == ("hello", (1, 2))
    assert reports == [("half of it", 0.5)]
    with pytest.raises(ProcessError, match="ValueError: too odd"):
        run_child("fail", "too odd")
    with pytest.raises(ProcessError, match=r"status 7 and no result(?s:.*)the last words"):
        run_child("die", 7)


def test_importing_the_script_is_light() -> None:
    code = "import sys, benchmarks.optimizer_step; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_small_run_prints_tables_and_writes_json(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    options = "--case tiny,startup --dtype bfloat16 --threads 1 --only bnbx,torch --seconds 0.05"
    done = subprocess.run(
        [sys.executable, SCRIPT, *options.split(), "--repeats", "1", "--json", str(results)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "tiny, bfloat16, 1 thread (3 tensors, 12,416 parameters)" in done.stdout
    report = json.loads(results.read_text())
    (measurement,) = report["measurements"]
    rows = {row["key"]: row for row in measurement["rows"]}
    assert rows["torch"]["ratio_to_torch"] == 1
    assert rows["torch"]["state_bytes"] / measurement["parameters"] == pytest.approx(4, abs=0.01)
    assert rows["bnbx"]["state_bytes"] / measurement["parameters"] == pytest.approx(2.1, abs=0.1)
    assert len(rows["bnbx"]["seconds"]) == len(rows["bnbx"]["rounds"]) >= MIN_TIMES
    assert report["machine"]["packages"]["torch"] == torch.__version__
    assert report["startup"]["compile"]["in all"] > report["startup"]["load"]["in all"]


def test_unknown_words_are_refused_with_those_known() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--only", "bnbx,apex"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "'apex' is none of bnbx, torch" in done.stderr
