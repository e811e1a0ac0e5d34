"""Rendered sources, compared with files under tests/golden: a changed kernel is a change to see.

After a change that is meant, `pytest tests/kernels/test_golden.py --rewrite-golden` writes them
anew; read the difference before committing it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bnbx.kernels import cpu, cuda
from bnbx.kernels.source import render
from bnbx.registry import optimizers
from bnbx.registry.quant_type import FLOAT32
from plans import FEATURES, Case, case, cases, feature_case, pairwise_settings

PLAIN = {name: values[0] for name, values in FEATURES.items()}
SHAPES = ("dynamic3", "mxfp4")  # codes of an odd width; a table in its own unit, in short blocks
GOLDEN = Path(__file__).parent.parent / "golden"


def chosen() -> list[Case]:
    """One kernel for each way in which sources differ; all rules are in, in their default type."""
    adam = optimizers().get("adam")
    types = {"m": "dynamic8", "v": "linear8", "v_max": FLOAT32}
    mixed = case(pairwise_settings(adam)[0], adam, types, "float32")
    wide = [feature_case(optimizers().get("adamw"), {**PLAIN, "type": name}) for name in SHAPES]
    found = [cases(("bfloat16",))[0], mixed, *wide]
    for spec in optimizers():
        every = pairwise_settings(spec)
        for resolved in (every[0], every[-1]):
            types = dict.fromkeys((s.name for s in spec.states), "dynamic8")
            found.append(case(resolved, spec, types, "float32"))
    for name, values in FEATURES.items():
        found += [feature_case(optimizers().get("adamw"), {**PLAIN, name: v}) for v in values[1:]]
    return list({each.name: each for each in found}.values())


CHOSEN = chosen()


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
