"""Rendered sources that fit scales, as `test_golden.py` keeps those of optimizers.

`pytest tests/kernels/test_golden_fit.py --rewrite-golden` writes them anew.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bnbx.kernels import fit_cpu, fit_cuda
from bnbx.kernels.encoding import make_encoding
from bnbx.kernels.fit_cpu import render_fit

GOLDEN = Path(__file__).parent.parent / "golden_fit"
CHOSEN = {"nf4": make_encoding("nf4")}
TEMPLATES = {".cpp": fit_cpu.TEMPLATE, ".cu": fit_cuda.TEMPLATE}


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("suffix", TEMPLATES)
def test_source_is_as_it_was(name: str, suffix: str, request: pytest.FixtureRequest) -> None:
    text = render_fit(CHOSEN[name], TEMPLATES[suffix])
    path = GOLDEN / f"{name}{suffix}"
    if request.config.getoption("--rewrite-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"{path.name} is not there yet; write it with --rewrite-golden"
    assert text == path.read_text(), f"{path.name} has changed; see this file's first lines"


def test_no_golden_file_is_left_over() -> None:
    known = {f"{name}{suffix}" for name in CHOSEN for suffix in TEMPLATES}
    assert {path.name for path in GOLDEN.iterdir()} == known
