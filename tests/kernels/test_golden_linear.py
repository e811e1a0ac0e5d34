"""Rendered sources of products, as `test_golden.py` keeps those of optimizers.

`pytest tests/kernels/test_golden_linear.py --rewrite-golden` writes them anew.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bnbx.kernels import linear_cpu, linear_cuda
from bnbx.kernels.encoding import make_encoding
from bnbx.kernels.linear_source import plan_for, render_linear

GOLDEN = Path(__file__).parent.parent / "golden_linear"
CHOSEN = {
    "nf4-double-bfloat16": plan_for(make_encoding("nf4", double=True), "bfloat16"),
    "dynamic8-float32": plan_for(make_encoding("dynamic8"), "float32"),
}
TEMPLATES = {".cpp": linear_cpu.TEMPLATE, ".cu": linear_cuda.TEMPLATE}


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("suffix", TEMPLATES)
def test_source_is_as_it_was(name: str, suffix: str, request: pytest.FixtureRequest) -> None:
    text = render_linear(CHOSEN[name], TEMPLATES[suffix])
    path = GOLDEN / f"{name}{suffix}"
    if request.config.getoption("--rewrite-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"{path.name} is not there yet; write it with --rewrite-golden"
    assert text == path.read_text(), f"{path.name} has changed; see this file's first lines"


def test_no_golden_file_is_left_over() -> None:
    known = {f"{name}{suffix}" for name in CHOSEN for suffix in TEMPLATES}
    assert {path.name for path in GOLDEN.iterdir()} == known


def test_types_that_keep_codes_and_scales_alike_share_a_kernel() -> None:
    plans = {plan_for(make_encoding(name, 64), "float32") for name in ("nf4", "fp4", "linear4")}
    assert len(plans) == 1
    assert len({plan_for(make_encoding("nf4", size), "float32") for size in (64, 128)}) == 2
