"""The demo's parts: a corpus that repeats itself, a causal model, like runs, honest figures."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from bnbx.demo import report
from bnbx.demo.corpus import (
    Corpus,
    CorpusError,
    is_validation,
    load_corpus,
    source_files,
    training_starts,
    validation_starts,
    windows,
)
from bnbx.demo.model import build_model
from bnbx.demo.plot import draw, smoothed
from bnbx.demo.progress import Bars, Lines, reporting, short_loss
from bnbx.demo.runs import LOW_BIT, REFERENCE, RUNS, WARNING, Params, Run
from bnbx.demo.settings import SHAPES, Settings, Size
from bnbx.demo.train import Result, rate_share, state_bytes, train, validation_steps

TINY = Settings(size=Size.TINY, steps=5, batch_size=2)
SHAPE = TINY.shape
BLOCK = 256
QUANTIZED_FROM = 4096


@lru_cache(maxsize=1)
def corpus() -> Corpus:
    return load_corpus(window=SHAPE.context)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, which a model this small is fastest on, and little text to validate on."""
    monkeypatch.setattr("bnbx.demo.train.VALIDATION_BYTES", 4096)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ignore(done: int, loss: float) -> None:
    """Train without progress."""


# ---- text


def test_corpus_is_the_same_each_time() -> None:
    again = load_corpus(window=SHAPE.context)
    assert torch.equal(again.train, corpus().train)
    assert torch.equal(again.validation, corpus().validation)


def test_corpus_splits_by_file() -> None:
    train_files, validation_files = set(corpus().train_files), set(corpus().validation_files)
    assert train_files.isdisjoint(validation_files)
    assert "argparse.py" in train_files | validation_files
    assert 0.03 < len(corpus().validation) / len(corpus().train) < 0.3


def test_split_of_a_file_depends_on_its_name_alone() -> None:
    names = corpus().train_files + corpus().validation_files
    assert {name for name in names if is_validation(name)} == set(corpus().validation_files)


def test_source_files_are_sorted_and_skip_what_is_not_library(tmp_path: Path) -> None:
    kept = ["b.py", "a/z.py", "a/test.py"]
    skipped = ["test/a.py", "a/tests/b.py", "site-packages/c.py", "_sysconfigdata_x.py", "a/b.txt"]
    for name in kept + skipped:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in source_files(tmp_path)]
    assert found == sorted(kept)


def test_missing_source_is_explained(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="standard library; run it with a Python that has them"):
        load_corpus(tmp_path, window=SHAPE.context)


def test_targets_are_the_inputs_one_byte_later() -> None:
    text = torch.arange(100, dtype=torch.uint8)
    inputs, targets = windows(text, torch.tensor([0, 93]), 6)
    assert inputs.tolist() == [[0, 1, 2, 3, 4, 5], [93, 94, 95, 96, 97, 98]]
    assert torch.equal(targets, inputs + 1)


def test_windows_stay_inside_the_text() -> None:
    text = torch.zeros(9, dtype=torch.uint8)
    starts = training_starts(text, 6, steps=50, batch_size=4, seed=0)
    assert set(starts.flatten().tolist()) == {0, 1, 2}
    spread = validation_starts(text, 6, total=18)
    assert spread.tolist() == [0, 1, 2]


# ---- model


@pytest.mark.parametrize("size", Size)
def test_most_parameters_are_in_quantized_tensors(size: Size) -> None:
    counts = [p.numel() for p in build_model(SHAPES[size], 0).parameters()]
    assert sum(n for n in counts if n >= QUANTIZED_FROM) > 0.98 * sum(counts)


def test_default_model_has_one_to_four_million_parameters() -> None:
    parameters = build_model(Settings().shape, 0).parameters()
    assert 1e6 < sum(p.numel() for p in parameters) < 4e6


def test_model_is_causal() -> None:
    model = build_model(SHAPE, 0)
    for parameter in model.parameters():  # the blocks start as the identity, which hides attention
        nn.init.normal_(parameter, std=0.1)
    text = torch.randint(256, (2, SHAPE.context))
    place = SHAPE.context // 2
    changed = text.clone()
    changed[:, place] = (changed[:, place] + 1) % 256
    before, after = model(text), model(changed)
    assert torch.equal(before[:, :place], after[:, :place])
    moved = (before[:, place:] - after[:, place:]).abs().amax(dim=-1)
    assert (moved > 0).all()


def test_seed_decides_the_parameters_and_nothing_else_does() -> None:
    torch.manual_seed(1)
    first = build_model(SHAPE, 7)
    drawn = torch.rand(4)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(4))
    second, other = build_model(SHAPE, 7), build_model(SHAPE, 8)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


# ---- runs


class Standstill(torch.optim.SGD):
    """Never moves, so that a training loss depends on the first parameters and the batch alone."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Leave the parameters as they are."""


class Breaks(torch.optim.SGD):
    """Spoils the parameters at its second step."""

    steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Count, then spoil."""
        self.steps += 1
        if self.steps == 2:
            self.param_groups[0]["params"][0].fill_(math.nan)


def made_by(kind: Callable[..., torch.optim.Optimizer]) -> Run:
    def make(params: Params, lr: float) -> torch.optim.Optimizer:
        return kind(params, lr=lr)

    return Run("made", "made for a test", make)


def test_runs_see_the_same_parameters_and_batches() -> None:
    still = [train(made_by(Standstill), corpus(), TINY, ignore) for _ in range(2)]
    assert still[0].train_losses == still[1].train_losses
    assert len(set(still[0].train_losses)) == TINY.steps
    for run in RUNS:
        trained = train(run, corpus(), TINY, ignore)
        assert trained.train_losses[0] == still[0].train_losses[0]
        assert trained.train_losses[2] != still[0].train_losses[2]


def test_another_seed_draws_other_batches() -> None:
    first, second = (training_starts(corpus().train, 64, 5, 2, seed) for seed in (0, 1))
    assert not torch.equal(first, second)


def test_training_learns_and_repeats_itself() -> None:
    settings = Settings(size=Size.TINY, steps=40, batch_size=8)
    first, second = (train(LOW_BIT, corpus(), settings, ignore) for _ in range(2))
    assert first.train_losses == second.train_losses
    assert first.validation_losses[0] > 4.5
    assert first.validation_loss < 3.2
    assert first.validation_steps[-1] == settings.steps
    assert len(first.step_seconds) == settings.steps


def test_run_that_diverges_ends_there() -> None:
    result = train(made_by(Breaks), corpus(), TINY, ignore)
    assert result.diverged_at == 2
    assert len(result.step_seconds) == 2
    assert math.isnan(result.validation_loss)
    assert math.isnan(result.step_ms)


def test_rate_rises_to_its_peak_and_falls() -> None:
    shares = [rate_share(step, 100) for step in range(100)]
    assert max(shares) == shares[9] == 1.0
    assert shares[:10] == sorted(shares[:10])
    assert shares[9:] == sorted(shares[9:], reverse=True)
    assert min(shares) > 0


@pytest.mark.parametrize("steps", [5, 7, 400])
def test_first_and_last_step_are_validated(steps: int) -> None:
    assert {0, steps} <= validation_steps(steps)
    assert max(validation_steps(steps)) == steps


# ---- measurements


def stepped(run: Run) -> tuple[torch.optim.Optimizer, list[int]]:
    """An optimizer after a step, and the sizes of its parameters."""
    params = list(build_model(SHAPE, 0).parameters())
    optimizer = run.make(params, 1e-3)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer, [p.numel() for p in params]


def test_state_bytes_of_32_bits() -> None:
    optimizer, sizes = stepped(REFERENCE)
    assert state_bytes(optimizer) == sum(2 * 4 * n + 4 for n in sizes)  # 4 for torch's step count


@pytest.mark.parametrize("run", [LOW_BIT, WARNING], ids=lambda run: run.key)
def test_state_bytes_of_8_bits(run: Run) -> None:
    optimizer, sizes = stepped(run)
    expected = sum(
        2 * (n + 4 * math.ceil(n / BLOCK)) if n >= QUANTIZED_FROM else 2 * 4 * n for n in sizes
    )
    assert state_bytes(optimizer) == expected


def test_state_bytes_count_shared_storage_once() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(4))])
    whole = torch.zeros(100)
    optimizer.state[optimizer.param_groups[0]["params"][0]] = {
        "views": [whole[:10], whole[50:]],
        "nested": {"int8": torch.zeros(7, dtype=torch.int8)},
        "step": 3,
    }
    assert state_bytes(optimizer) == 400 + 7


def test_linear_states_round_second_moments_to_zero() -> None:
    """The demo tells its readers that this is why linear8 fails."""
    shares = {}
    for run in (LOW_BIT, WARNING):
        model = build_model(SHAPE, 0)
        optimizer = run.make(model.parameters(), 1e-3)
        torch.manual_seed(0)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        codes = torch.cat([s["v"].flatten() for s in optimizer.state.values() if "v_absmax" in s])
        shares[run.key] = (codes == 0).float().mean().item()
    assert shares[LOW_BIT.key] < 0.01
    assert shares[WARNING.key] > 5 * shares[LOW_BIT.key]


# ---- report


def measured(run: Run, losses: list[float], diverged_at: int | None = None) -> Result:
    """A result as if it had been measured, of 100 parameters."""
    return Result(
        key=run.key,
        label=run.label,
        parameters=100,
        train_losses=[*losses, math.nan] if diverged_at is not None else losses,
        validation_steps=list(range(len(losses))),
        validation_losses=losses,
        step_seconds=[0.5, *[0.001] * (len(losses) - 1)],
        state_bytes=206,
        diverged_at=diverged_at,
    )


def three(linear: list[float], diverged_at: int | None = None) -> list[Result]:
    return [
        measured(REFERENCE, [5.0, 4.0, 3.0, 2.0, 1.5]),
        measured(LOW_BIT, [5.0, 4.1, 3.1, 2.1, 1.51]),
        measured(WARNING, linear, diverged_at),
    ]


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        (three([5.0, 1e9], diverged_at=2), "Warning: .* stopped being finite at step 2"),
        (three([5.0, 4.0, 3.0, 2.5, 2.0]), r"Warning: .* worse, \+0\.500 .* 8 bits: \+0\.010"),
        (three([5.0, 4.0, 3.0, 2.5, 2e14]), r"Warning: .* worse, \+2\.0e\+14"),
        (three([5.0, 4.0, 3.0, 2.0, 1.49]), r"^linear8 states kept up .* -0\.010"),
    ],
    ids=["diverged", "worse", "exploded", "kept up"],
)
def test_verdict_says_what_was_seen(results: list[Result], expected: str) -> None:
    line = report.verdict(results)
    assert "\n" not in line
    assert re.search(expected, line)


def test_table_and_json_survive_a_diverged_run() -> None:
    results = three([5.0, 1e9], diverged_at=2)
    console = Console(file=io.StringIO(), width=80)
    console.print(report.table(results))
    assert isinstance(console.file, io.StringIO)
    assert "not finite" in console.file.getvalue()
    saved = json.loads(report.as_json(results, TINY))["runs"][2]
    assert saved["validation_loss"] is None
    assert saved["train_losses"] == [5.0, 1e9, None]
    assert saved["state_bytes_per_parameter"] == 2.06


@pytest.mark.parametrize(
    "results",
    [three([5.0, 1e30], diverged_at=2), three([5.0, 4.0, 3.0, 2.5, 2e14]), three([5.0] * 5)],
    ids=["diverged", "exploded", "flat"],
)
def test_picture_of_any_outcome(results: list[Result], tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    draw(results, path, "title")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_smoothing_starts_at_the_first_loss_and_lags_behind() -> None:
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    falling = smoothed([5.0, 4.0, 3.0])
    assert falling[0] == pytest.approx(5.0)
    assert 3.0 < falling[2] < 5.0


@pytest.mark.parametrize(
    ("loss", "shown"),
    [(1.23456, "1.235"), (3.2e10, "3.2e+10"), (math.nan, "not finite"), (math.inf, "not finite")],
)
def test_loss_is_shown_in_few_characters(loss: float, shown: str) -> None:
    assert short_loss(loss) == shown


# ---- progress


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        """Yes."""
        return True


def test_log_gets_four_lines_a_run() -> None:
    log = io.StringIO()
    # FORCE_COLOR, which CI services set, makes rich take their log for a terminal.
    console = Console(file=log, force_terminal=True, no_color=True, highlight=False, width=200)
    with reporting(console) as reporter:
        assert isinstance(reporter, Lines)
        reporter.start("some run", 40)
        for step in range(1, 41):
            reporter.step(step, 2.5)
        reporter.start("another run", 40)
        reporter.diverged(17)
    lines = log.getvalue().splitlines()
    assert len(lines) == 5
    assert lines[3] == "some run: step 40/40, training loss 2.500, 0 s left"
    assert lines[4] == "another run: stopped, the loss of step 17 is not finite"


def test_terminal_gets_one_bar_a_run() -> None:
    screen = Terminal()
    console = Console(file=screen, force_terminal=True, force_interactive=True, width=100)
    with reporting(console) as reporter:
        assert isinstance(reporter, Bars)
        reporter.start("some run", 40)
        reporter.step(40, 2.5)
        reporter.start("another run", 40)
        reporter.step(17, 9e9)
        reporter.diverged(17)
    shown = screen.getvalue()
    assert "loss 2.500" in shown
    assert "loss not finite" in shown
