"""Rendered sources that quantize and dequantize, as `test_golden.py` keeps those of optimizers.

`pytest tests/kernels/test_golden_coding.py --rewrite-golden` writes them anew.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bnbx.kernels import coding_cpu, coding_cuda
from bnbx.kernels.coding_source import CodingPlan, render_coding
from bnbx.kernels.encoding import make_encoding

GOLDEN = Path(__file__).parent.parent / "golden_coding"
CHOSEN = {
    "nf4-double-bfloat16": CodingPlan(make_encoding("nf4", double=True), "bfloat16"),
    "dynamic8-float32-stochastic": CodingPlan(make_encoding("dynamic8"), "float32", True),
    "nvfp4-float32": CodingPlan(make_encoding("nvfp4"), "float32"),
}
TEMPLATES = {".cpp": coding_cpu.TEMPLATE, ".cu": coding_cuda.TEMPLATE}


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("suffix", TEMPLATES)
def test_source_is_as_it_was(name: str, suffix: str, request: pytest.FixtureRequest) -> None:
    text = render_coding(CHOSEN[name], TEMPLATES[suffix])
    path = GOLDEN / f"{name}{suffix}"
    if request.config.getoption("--rewrite-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"{path.name} is not there yet; write it with --rewrite-golden"
    assert text == path.read_text(), f"{path.name} has changed; see this file's first lines"


def test_no_golden_file_is_left_over() -> None:
    known = {f"{name}{suffix}" for name in CHOSEN for suffix in TEMPLATES}
    assert {path.name for path in GOLDEN.iterdir()} == known
