"""A built-in spec is one file: it is found by being there, and refused under another name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from bnbx import quant_types as types
from bnbx.errors import SpecError
from bnbx.optimizers import rules
from bnbx.registry import Optimizer, QuantType, optimizers, quant_types
from bnbx.registry.built_in import specs_in

RULE = """
from bnbx.registry import Optimizer, rate

{variable} = Optimizer(
    name="{name}", summary="plain descent", hyper=dict(lr=rate(0.1)), element_code="p = p - lr * g"
)
"""
Package = Callable[[dict[str, str]], str]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """Makes a package of these files, and gives its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(files: dict[str, str]) -> str:
        folder = tmp_path / f"package_of_{tmp_path.name}"
        folder.mkdir()
        for name, text in {"__init__": "", **files}.items():
            (folder / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return folder.name

    return make


def test_all_of_ours_are_found() -> None:
    assert [spec.name for spec in specs_in(rules.__name__, Optimizer)] == list(optimizers().names())
    assert [t.name for t in specs_in(types.__name__, QuantType)] == list(quant_types().names())


def test_a_new_file_is_a_new_spec(package: Package) -> None:
    own = RULE.format(variable="descent", name="descent")
    helper = "SHARED = 3\n"
    user = f"from bnbx.optimizers.rules.adam import adam\n{RULE.format(variable='b', name='b')}"
    name = package({"descent": own, "shared": helper, "b": user})
    assert [spec.name for spec in specs_in(name, Optimizer)] == ["b", "descent"]
    assert specs_in(name, QuantType) == ()


@pytest.mark.parametrize(("variable", "called"), [("mine", "descent"), ("descent", "descend")])
def test_a_spec_has_the_name_of_its_file(package: Package, variable: str, called: str) -> None:
    name = package({"descent": RULE.format(variable=variable, name=called)})
    with pytest.raises(SpecError, match=f"named {called}; expected one named 'descent', in a var"):
        specs_in(name, Optimizer)
