"""`bnbx demo --qlora`: like runs on two bases, honest figures, and losses within a hundredth."""

from __future__ import annotations

import copy
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from bnbx.demo import qlora_report as report
from bnbx.demo.adapters import (
    RANK,
    SCALING,
    Adapted,
    Kept16,
    adapt,
    adapters_of,
    base_bytes,
)
from bnbx.demo.corpus import Corpus, CorpusError, load_corpus, load_documentation
from bnbx.demo.model import build_model
from bnbx.demo.plot import draw_runs
from bnbx.demo.qlora import (
    BASES,
    FOUR,
    PRETRAINING,
    SIXTEEN,
    activations,
    adapt_on,
    adapter_steps,
    merge_all,
    run_all,
)
from bnbx.demo.qlora_report import Adaptation, Merge, Outcome
from bnbx.demo.settings import Settings, Size
from bnbx.demo.train import Result, validation_loss
from bnbx.kernels import processor
from bnbx.kernels.encoding import make_encoding

# After half of these steps a loss still falls so steeply that a rounding decides a tenth of it: the
# gap between bases was -0.17 to 0.01 over eight seeds, and after all of them -0.002 to 0.002.
TINY = Settings(size=Size.TINY, steps=240, batch_size=8)
WINDOW = TINY.shape.context


@lru_cache(maxsize=1)
def documentation() -> Corpus:
    return load_documentation(window=WINDOW)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, which a model this small is fastest on, and little text to validate on."""
    monkeypatch.setattr("bnbx.demo.train.VALIDATION_BYTES", 8192)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Silent:
    """Notes what it was told."""

    def __init__(self) -> None:
        self.started: list[tuple[str, int]] = []

    def start(self, label: str, steps: int) -> None:
        self.started.append((label, steps))

    def step(self, done: int, loss: float) -> None:
        """Nothing."""

    def diverged(self, step: int) -> None:
        raise AssertionError(step)


# ---- text


def test_documentation_is_english_and_splits_by_topic() -> None:
    found = documentation()
    assert set(found.train_files).isdisjoint(found.validation_files)
    assert "assignment" in found.train_files + found.validation_files
    text = bytes(found.train.tolist()).decode()
    assert text.count(" the ") > 1000
    assert 0.02 < len(found.validation) / len(found.train) < 0.5
    assert torch.equal(load_documentation(window=WINDOW).train, found.train)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file.*run it with a Python that has it"),
        ("topics = {", "run it with a Python that has it"),
        ("topics = {'a': print(1)}", "run it with a Python that has it"),
        ("import os", "0 topics"),
        ("topics = {'if': 'short'}", "1 topics, 5 bytes.*more than 64 of each"),
    ],
)
def test_documentation_that_is_not_there(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "topics.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CorpusError, match=message):
        load_documentation(path, window=WINDOW)
    assert not capsys.readouterr().out  # parsed, not run


# ---- adapters


def test_adapters_start_as_nothing_and_are_all_that_trains() -> None:
    model = build_model(TINY.shape, 0)
    text = torch.randint(256, (2, WINDOW))
    before = model(text)
    trained = adapt(model, 0)
    assert torch.equal(model(text), before)
    assert [id(p) for p in model.parameters() if p.requires_grad] == [id(p) for p in trained]
    torch.autograd.backward(model(text).square().mean())
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)
    assert any(p.grad is not None and bool(p.grad.any()) for p in trained)
    linear = [m for m in build_model(TINY.shape, 0).modules() if isinstance(m, nn.Linear)]
    assert len(list(adapters_of(model))) == len(linear) == 4 * TINY.shape.layers


def test_an_adapter_adds_a_low_rank_product() -> None:
    adapted = Adapted(nn.Linear(12, 7), torch.Generator().manual_seed(0))
    nn.init.normal_(adapted.b)
    x = torch.randn(3, 12)
    weight = adapted.base.weight + SCALING * adapted.b @ adapted.a
    assert torch.allclose(adapted(x), x @ weight.t() + adapted.base.bias, atol=1e-5)
    assert torch.linalg.matrix_rank(adapted.b @ adapted.a) <= RANK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_kept_in_16_bits_is_multiplied_in_the_dtype_of_its_input(
    dtype: torch.dtype,
) -> None:
    layer, x = nn.Linear(12, 7).to(dtype), torch.randn(3, 12, dtype=dtype)
    kept = Kept16.of(layer)
    assert kept.weight.dtype == torch.bfloat16
    rounded = layer.weight.to(torch.bfloat16).to(dtype)
    assert torch.equal(kept(x), torch.nn.functional.linear(x, rounded, layer.bias))
    assert kept(x.double()).dtype == torch.float64  # the bias goes along


@pytest.mark.parametrize("slow", [True, False])
def test_activations_are_what_the_processor_is_fast_with(
    slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "lacks_16_bits", lambda: slow)
    assert activations() == ("float32" if slow else "bfloat16")
    corpus = load_corpus(window=WINDOW)
    shown = report.introduction(corpus, documentation(), TINY, 5, activations())
    assert ("Activations are float32: this processor" in shown) is slow
    found = run_all(corpus, documentation(), replace(TINY, steps=10), Silent())
    assert found.activations == activations()
    for run in found.runs:
        assert run.validation_losses
        assert run.diverged_at is None


def test_bytes_of_the_bases() -> None:
    shapes = [
        m.weight.shape for m in build_model(TINY.shape, 0).modules() if isinstance(m, nn.Linear)
    ]
    found = {}
    for base in BASES:
        model = build_model(TINY.shape, 0).to(torch.bfloat16)
        base.freeze(model)
        adapt(model, 0)
        found[base.key] = base_bytes(model)
    encoding = make_encoding("nf4", double=True)
    assert found[SIXTEEN.key] == sum(2 * shape.numel() for shape in shapes)
    assert found[FOUR.key] == sum(encoding.bytes(shape) for shape in shapes)


# ---- runs


@lru_cache(maxsize=1)
def outcome() -> tuple[Outcome, Silent]:
    reporter = Silent()
    return run_all(load_corpus(window=WINDOW), documentation(), TINY, reporter), reporter


def test_four_bits_end_within_a_hundredth_of_sixteen() -> None:
    found, _ = outcome()
    sixteen, four = found.runs
    for run in found.runs:
        assert run.validation_loss < 0.95 * run.validation_losses[0]  # they did learn
    assert abs(found.gap) < report.CLOSE
    assert found.gap == four.validation_loss / sixteen.validation_loss - 1
    assert four.base_bytes < sixteen.base_bytes / 3.8
    assert four.bits_per_weight == pytest.approx(4.127, abs=0.01)


def test_runs_are_alike_but_for_the_base() -> None:
    found, reporter = outcome()
    sixteen, four = found.runs
    steps = adapter_steps(TINY)
    assert reporter.started == [
        (PRETRAINING, TINY.steps),
        (SIXTEEN.label, steps),
        (FOUR.label, steps),
    ]
    assert steps == TINY.steps // 2
    assert len(sixteen.train_losses) == len(four.train_losses) == steps
    assert four.train_losses[0] == pytest.approx(sixteen.train_losses[0], rel=0.02)  # same batch
    assert four.train_losses[0] != sixteen.train_losses[0]
    assert (four.parameters, four.state_bytes) == (sixteen.parameters, sixteen.state_bytes)
    assert four.state_bytes < 3 * four.parameters  # two states of 8 bits, and their scales


def test_merging_keeps_most_of_what_was_learned() -> None:
    found, _ = outcome()
    four, merge = found.runs[1], found.merge
    assert merge is not None
    learned = four.validation_losses[0] - four.validation_loss
    assert merge.loss - four.validation_loss < 0.25 * learned
    assert 0.5 < merge.survived <= 1.1


def test_merging_leaves_the_adapted_model_alone() -> None:
    model = build_model(TINY.shape, 0).to(torch.bfloat16)
    settings = replace(TINY, steps=5)
    adapt_on(FOUR, model, documentation(), settings, Silent())
    before = validation_loss(model, documentation().validation, WINDOW)
    kept = copy.deepcopy(model.state_dict())
    merge_all(model, documentation(), WINDOW)
    assert validation_loss(model, documentation().validation, WINDOW) == before
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())


# ---- report


def measured(key: str, losses: list[float], size: int, diverged: bool = False) -> Adaptation:
    return Adaptation(
        key=key,
        label=key,
        parameters=100,
        train_losses=losses,
        validation_steps=list(range(len(losses))),
        validation_losses=losses,
        step_seconds=[0.001] * len(losses),
        state_bytes=206,
        seconds=1.5,
        diverged_at=1 if diverged else None,
        base_bytes=size,
        base_parameters=1000,
    )


def made(four: float, diverged: bool = False) -> Outcome:
    runs = [measured("16", [2.0, 1.0], 2000), measured("4", [2.0, four], 500, diverged)]
    return Outcome(Result("p", "p", 1000), "float32", runs, Merge(1.1, 1.3, 0.42))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (made(1.002), r"ended \+0.20 % .*\(within 1%\), on 4.0 x fewer bytes"),
        (made(0.998), r"ended -0.20 % .*\(within 1%\)"),
        (made(1.02), r"ended \+2.00 % .*\(Warning: not within 1%\)"),
        (made(1.0, diverged=True), "Warning: a loss stopped being finite"),
    ],
)
def test_verdict_says_what_was_seen(found: Outcome, expected: str) -> None:
    lines = report.verdict(found).splitlines()
    assert re.search(expected, lines[0])
    assert re.search(r"give 1.100 \(1.300 with plain.*42% of the update fits", lines[1])


def test_table_picture_and_json(tmp_path: Path) -> None:
    for found in (made(1.002), made(math.inf, diverged=True)):
        console = Console(file=io.StringIO(), width=80)
        console.print(report.table(found))
        assert isinstance(console.file, io.StringIO)
        shown = console.file.getvalue()
        assert "16.00" in shown
        assert "4.00" in shown
        assert "…" not in shown
        saved = json.loads(report.as_json(found, TINY))
        assert [run["base_bytes"] for run in saved["runs"]] == [2000, 500]
        assert saved["merge"]["survived"] == 0.42
        assert saved["activations"] == "float32"
    found = made(1.002)
    draw_runs(found.runs, report.notes(found), tmp_path / "q.png", report.title(found, TINY))
    assert (tmp_path / "q.png").read_bytes().startswith(b"\x89PNG")
