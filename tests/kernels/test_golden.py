"""Rendered sources, compared with files under tests/golden: a changed kernel is a change to see.

After a change that is meant, `pytest tests/kernels/test_golden.py --rewrite-golden` writes them
anew; read the difference before committing it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bnbx.kernels import cpu, cuda
from bnbx.kernels.source import render
from plans import Case, one_of_each

GOLDEN = Path(__file__).parent.parent / "golden"
CHOSEN = one_of_each()


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
@pytest.mark.parametrize("suffix", [".cpp", ".cu"])
def test_source_is_as_it_was(case: Case, suffix: str, request: pytest.FixtureRequest) -> None:
    text = cuda.source(case.plan) if suffix == ".cu" else render(case.plan, cpu.TEMPLATE)
    path = GOLDEN / f"{case.name}{suffix}"
    if request.config.getoption("--rewrite-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"{path.name} is not there yet; write it with --rewrite-golden"
    assert text == path.read_text(), f"{path.name} has changed; see this file's first lines"


def test_no_golden_file_is_left_over() -> None:
    known = {f"{each.name}{suffix}" for each in CHOSEN for suffix in (".cpp", ".cu")}
    assert {path.name for path in GOLDEN.iterdir()} == known


def test_rendering_does_not_depend_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNBX_CXX", "")
    for each in CHOSEN:
        assert str(Path.home()) not in cuda.source(each.plan) + render(each.plan, cpu.TEMPLATE)
