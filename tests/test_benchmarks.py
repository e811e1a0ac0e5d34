"""The benchmark's own logic: whom it times when, what it compares, and that it runs at all."""

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import quality_report, rule_report
from benchmarks.cases import CASES
from benchmarks.contenders import CONTENDERS, REFERENCE, Contender
from benchmarks.process import ProcessError, call
from benchmarks.report import table
from benchmarks.results import Job, Measurement, Row
from benchmarks.rule_contenders import PEERS, contenders, hyper, rules, widths
from benchmarks.rule_results import (
    IN_FLOAT32,
    ONE_PASS,
    OWN,
    Moved,
    RuleJob,
    RuleMeasurement,
)
from benchmarks.rule_worker import plan_of
from benchmarks.rules import app as rules_app
from benchmarks.timing import MIN_TIMES, periods, ratios, run_rounds
from benchmarks.traffic import Traffic, in_float32, reference_bytes, traffic
from benchmarks.worker import measure, state_bytes
from bnbx.demo.settings import Settings
from bnbx.demo.train import Result
from bnbx.optim import create
from bnbx.registry import quant_types

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


RULES_SCRIPT = str(ROOT / "benchmarks" / "rules.py")
QUALITY_SCRIPT = str(ROOT / "benchmarks" / "quality.py")


def planned(rule: str, bits: int, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """An optimizer of a rule over one tensor of whole blocks, with its states made."""
    p = torch.nn.Parameter(torch.zeros(8192, dtype=dtype))
    p.grad = torch.zeros_like(p)
    optimizer = create(rule, [p], bits=bits, **hyper(rule), **options)
    optimizer._states_of(p, optimizer.resolved(p))
    return optimizer


@pytest.mark.parametrize("bits", widths())
@pytest.mark.parametrize("rule", rules())
def test_traffic_is_that_of_the_tensors_that_a_step_touches(rule: str, bits: int) -> None:
    optimizer = planned(rule, bits)
    (p,) = optimizer.state
    plan = plan_of(optimizer)
    states = state_bytes(optimizer) / p.numel()
    found = traffic(plan)
    assert found.update == pytest.approx(2 * 4 + 4 + 2 * states, abs=1e-12)
    assert found.measure == (pytest.approx(4 + 4 + states, abs=1e-12) if plan.measured else 0)
    assert traffic(in_float32(plan)) == traffic(plan_of(planned(rule, 32)))


def test_traffic_of_16_bits_has_the_residual_and_no_second_pass_without_need() -> None:
    plain = traffic(plan_of(planned("adamw", 8, torch.bfloat16)))
    kahan = traffic(plan_of(planned("adamw", 8, torch.bfloat16, master="kahan")))
    whole = traffic(plan_of(planned("adamw", 8, torch.bfloat16, block_wise=False)))
    assert plain == Traffic(update=2 * 2 + 2 + 2 * 2 * (1 + 4 / 256), measure=0)
    assert kahan.update - plain.update == 2 * 2
    assert whole == Traffic(update=2 * 2 + 2 + 2 * 2, measure=2 + 2 + 2)
    assert (reference_bytes("float32"), reference_bytes("bfloat16")) == (28, 14)


def test_every_rule_and_width_is_timed_and_peers_where_they_have_it() -> None:
    everyone = ("torch", "bnbx", "bitsandbytes", "torchao")
    assert list(contenders("adamw", (8, 4, 32), everyone)) == [
        "torch", "bnbx-8", "bitsandbytes-8", "torchao-8", "bnbx-4", "torchao-4", "bnbx-32",
    ]  # fmt: skip
    assert list(contenders("adopt", (8,), everyone)) == ["torch", "bnbx-8"]
    assert list(contenders("adamw", (8,), ("bnbx",))) == ["bnbx-8"]
    assert widths() == (8, 4, 32)
    for classes in PEERS.values():  # a rule that is renamed here would lose its peers unseen
        assert {rule for rule, _ in classes} <= set(rules())
    assert hyper("sgd") == {"lr": 1e-3, "momentum": 0.9}
    assert hyper("adamw") == {"lr": 1e-3}


def test_classes_of_peers_exist() -> None:
    code = (
        "import importlib, sys; library, names = sys.argv[1], sys.argv[2:]\n"
        "module = importlib.import_module(library + '.optim')\n"
        "sys.exit(' '.join(name for name in names if not hasattr(module, name)) or None)"
    )
    for library, classes in PEERS.items():
        if CONTENDERS[library].installed():
            command = [sys.executable, "-c", code, library, *classes.values()]
            subprocess.run(command, check=True, capture_output=True)


def rule_measurement(two_pass: bool = False, **job: Any) -> RuleMeasurement:
    """Times torch: 0.8 in 8 bits, 2 in 4 bits. Bytes: 14, 7 or 28 of torch's 28."""
    asked: dict[str, Any] = dict(dtype="float32", threads=1, numel=1000, seconds=1.0) | job
    rows = [
        Row("torch", times=dict.fromkeys(range(4), 0.01)),
        Row("bnbx-8", state_bytes=2000, times=dict.fromkeys(range(4), 0.008)),
        Row("bnbx-4", state_bytes=1000, period=2, times={0: 0.02, 2: 0.02}),
        Row("bitsandbytes-8", problem="RuntimeError: no kernel\nand a trace"),
    ]
    moved = Moved(own=14.0, one_pass=7.0 if two_pass else 14.0, float32=28.0, two_pass=two_pass)
    only = ("torch", "bnbx", "bitsandbytes")
    job_done = RuleJob("lamb", (8, 4), only, **asked)
    return RuleMeasurement(job_done, 0.0, 0.0, 0, rows, 28.0, {"bnbx-8": moved, "bnbx-4": moved})


def test_factors_are_times_over_bytes_and_aims_depend_on_passes() -> None:
    one, two = rule_measurement(), rule_measurement(two_pass=True)
    found = [one.factor("bnbx-8", reading) for reading in (OWN, ONE_PASS, IN_FLOAT32)]
    assert found == pytest.approx([1.6, 1.6, 0.8])
    assert two.factor("bnbx-8", ONE_PASS) == pytest.approx(3.2)
    assert [one.meets(8, reading) for reading in (OWN, ONE_PASS, IN_FLOAT32)] == [
        False, False, True,
    ]  # fmt: skip
    assert [two.meets(8, reading) for reading in (OWN, ONE_PASS, IN_FLOAT32)] == [
        True, False, True,
    ]  # fmt: skip
    assert one.narrow_ratio() == 2.5
    assert one.narrow_meets() is False
    assert one.meets(4, OWN) is None
    for other in (rule_measurement(threads=2), rule_measurement(dtype="bfloat16")):
        assert other.meets(8, OWN) is None
        assert other.narrow_meets() is None
    one.rows = one.rows[1:]  # torch was left out
    assert one.factor("bnbx-8", OWN) is None
    assert one.narrow_ratio() == 2.5


def test_table_of_rules_has_a_row_a_rule_and_marks_what_misses_its_aim() -> None:
    console = Console(width=120)
    with console.capture() as capture:
        for each in rule_report.tables([rule_measurement(), rule_measurement(two_pass=True)]):
            console.print(each)
    lines = [line.split() for line in capture.get().splitlines() if line.strip(" ").startswith("l")]
    times, cells = ["8000.00", "0.80", "0.80-0.80"], ["2.00", "-"]
    assert lines[0] == ["lamb", *times, "14.00", "1.60!", "1.60!", "0.80", *cells]
    assert lines[1] == ["lamb", "(2)", *times, "14.00", "1.60", "3.20!", "0.80", *cells]
    assert lines[2][-2:] == ["2.50!", "1.00"]
    assert list(rule_report.problems([rule_measurement()])) == [
        "bitsandbytes-8 (lamb): RuntimeError: no kernel"
    ]
    assert "8 bits, over own: 0 of 1 rules as aimed for; not lamb" in list(
        rule_report.verdicts([rule_measurement()])
    )


def test_importing_the_other_scripts_is_light() -> None:
    for script in ("rules", "quality"):
        code = f"import sys, benchmarks.{script}; sys.exit('torch' in sys.modules)"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_small_run_of_rules_prints_tables_and_writes_json(tmp_path: Path) -> None:
    results = tmp_path / "rules.json"
    options = "--rules sgd,lamb --bits 8,4 --only bnbx,torch --numel 8192 --seconds 0.05"
    done = subprocess.run(
        [sys.executable, RULES_SCRIPT, *options.split(), "--json", str(results)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "4-bit states, float32, 1 thread, 8,192 parameters" in done.stdout
    sgd, lamb = json.loads(results.read_text())["rules"]
    assert (sgd["two_pass"], lamb["two_pass"]) == (False, True)
    rows = {row["key"]: row for row in sgd["rows"]}
    assert list(rows) == ["torch", "bnbx-8", "bnbx-4"]
    assert rows["bnbx-4"]["state_bytes_per_parameter"] == 0.5 + 4 / 128
    moved = 2 * 4 + 4 + 2 * (1 + 4 / 256)
    assert sgd["moved"]["bnbx-8"]["own"] == moved
    factors = rows["bnbx-8"]["factors"]
    assert factors["own_traffic"] == pytest.approx(rows["bnbx-8"]["ratio_to_torch"] * 28 / moved)
    assert factors["float32_traffic"] == pytest.approx(rows["bnbx-8"]["ratio_to_torch"] * 28 / 20)


def test_a_rule_that_fails_costs_its_row_and_the_exit_status(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failed = rule_measurement()
    failed.rows[1] = Row("bnbx-8", problem="CompileError: no compiler")
    monkeypatch.setattr("benchmarks.rules._measure", lambda *_: failed)
    done = CliRunner().invoke(rules_app, ["--rules", "lamb", "--bits", "8,4"])
    assert done.exit_code == 1
    assert "bnbx-8 (lamb): CompileError: no compiler" in done.stdout


def test_an_interrupted_run_of_rules_keeps_what_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answers = [rule_measurement()]

    def measure_one(*_: object) -> RuleMeasurement:
        if not answers:
            raise KeyboardInterrupt
        return answers.pop()

    monkeypatch.setattr("benchmarks.rules._measure", measure_one)
    path = tmp_path / "rules.json"
    done = CliRunner().invoke(rules_app, ["--rules", "lamb,lion", "--json", str(path)])
    assert done.exit_code == 130
    assert "8-bit states" in done.stdout
    assert [m["job"]["rule"] for m in json.loads(path.read_text())["rules"]] == ["lamb"]


def test_naive_type_differs_from_the_default_in_its_zero_only() -> None:
    from benchmarks.quality_runs import WithZero

    naive = WithZero().quant_type
    default = quant_types().find(lambda t: t.state_default and t.bits == 4)
    assert default is not None
    assert naive.values == default.values
    before, after = (set(t.codebook(signed=False).levels) for t in (default, naive))
    assert before ^ after == {0.0, min(before)}
    assert 0.0 not in before
    assert not naive.state_default


def trained(key: str, losses: list[float], diverged_at: int | None = None) -> Result:
    """A result as `train` makes it."""
    steps = [10 * i for i in range(len(losses))]
    made = Result(key, key, 100, losses, steps, losses, state_bytes=200)
    made.diverged_at = diverged_at
    return made


RESULTS = {
    0: [trained("a", [5.0, 2.0]), trained("b", [5.0, 2.5]), trained("c", [5.0, 1e9], 12)],
    1: [trained("a", [5.0, 3.0]), trained("b", [5.0, 2.75])],
}


def test_quality_is_compared_seed_by_seed() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(quality_report.table(RESULTS))
    rows = {
        line.split()[0]: line.split()[1:] for line in capture.get().splitlines() if line.split()
    }
    assert rows["seed"] == ["1", "3.000", "2.750"]
    assert rows["mean"] == ["2.500", "2.625", "diverged"]
    assert rows["difference"] == ["+0.125", "diverged"]
    assert rows["least"] == ["-0.250", "diverged"]
    assert rows["most"] == ["+0.500", "diverged"]
    assert rows["state,"] == ["B/param.", "2.00", "2.00", "2.00"]
    assert list(quality_report.diverged(RESULTS)) == [
        "c, seed 0: the loss of step 12 is not finite"
    ]


def test_picture_and_json_stand_a_training_that_diverged(tmp_path: Path) -> None:
    from benchmarks.quality_plot import draw

    picture, results = tmp_path / "q.png", tmp_path / "q.json"
    draw(RESULTS, picture, "title")
    assert picture.read_bytes().startswith(b"\x89PNG")
    quality_report.write_json(results, RESULTS, Settings())
    written = json.loads(results.read_text())
    means = {s["key"]: s["mean_difference"] for s in written["summaries"]}
    assert means == {"a": 0.0, "b": 0.125, "c": None}
    assert [seed["settings"]["seed"] for seed in written["seeds"]] == [0, 1]


def test_a_small_run_of_quality(tmp_path: Path) -> None:
    results, picture = tmp_path / "q.json", tmp_path / "q.png"
    options = f"--seeds 3 --steps 5 --threads 1 --json {results} -o {picture}"
    done = subprocess.run(
        [sys.executable, QUALITY_SCRIPT, *options.split()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert picture.exists()
    (seed,) = json.loads(results.read_text())["seeds"]
    bytes_of = {run["key"]: run["state_bytes_per_parameter"] for run in seed["runs"]}
    assert list(bytes_of) == ["torch-32bit", "bnbx-8bit", "bnbx-4bit", "naive-4bit"]
    assert bytes_of["bnbx-4bit"] == bytes_of["naive-4bit"] < bytes_of["bnbx-8bit"] < 2.1
    losses = {run["key"]: run["validation_losses"][0] for run in seed["runs"]}
    assert len(set(losses.values())) == 1  # all begin with the same parameters


@pytest.mark.parametrize(
    ("script", "options", "told"),
    [
        (RULES_SCRIPT, "--rules adamw,adamm", "'adamm' is none of adagrad"),
        (RULES_SCRIPT, "--bits 16", "'16' is none of 8, 4, 32"),
        (RULES_SCRIPT, "--dtype float64", "'float64' is none of float32"),
        (QUALITY_SCRIPT, "--seeds 0,x", "expected whole numbers"),
        (QUALITY_SCRIPT, "-o curves.pdf", "ends in .png"),
    ],
)
def test_words_that_the_other_scripts_do_not_know(script: str, options: str, told: str) -> None:
    done = subprocess.run(
        [sys.executable, script, *options.split()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert told in " ".join(done.stderr.replace("│", " ").split())
