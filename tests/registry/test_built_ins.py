"""What comes with bnbx is registered, one short file a spec, by the hooks that plugins use."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import bnbx.optimizers.rules
import bnbx.quant_types
from bnbx.registry import Catalog, Optimizer, QuantType, optimizers, quant_types
from bnbx.registry.spec import Spec

PACKAGES: dict[type[Spec], ModuleType] = {
    Optimizer: bnbx.optimizers.rules,
    QuantType: bnbx.quant_types,
}


def modules() -> Iterator[tuple[type[Spec], ModuleType]]:
    for kind, package in PACKAGES.items():
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            yield kind, importlib.import_module(found.name)


def calls_in(module: ModuleType) -> dict[str, ast.expr]:
    """What is assigned to the module's own names, as source: specs, and helpers around them."""
    found = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
    return found


def specs_in(module: ModuleType) -> list[Spec]:
    """The specs that a module makes, not those that it imports."""
    own = calls_in(module)
    return [spec for name, spec in vars(module).items() if name in own and isinstance(spec, Spec)]


def catalog(kind: type[Spec]) -> Catalog[Optimizer] | Catalog[QuantType]:
    return optimizers() if kind is Optimizer else quant_types()


DEFINED = [(kind, module) for kind, module in modules() if specs_in(module)]


@pytest.mark.parametrize(("kind", "module"), DEFINED, ids=lambda value: value.__name__)
def test_a_spec_that_a_module_defines_is_registered(kind: type[Spec], module: ModuleType) -> None:
    (spec,) = specs_in(module)
    assert type(spec) is kind
    assert module.__name__.rsplit(".", 1)[-1] == spec.name
    found = catalog(kind)
    assert found.get(spec.name) is spec
    assert found.package(spec.name) == PACKAGES[kind].__name__


def test_every_built_in_is_defined_in_a_module_of_its_own() -> None:
    for kind, package in PACKAGES.items():
        found = catalog(kind)
        registered = {name for name in found.names() if found.package(name) == package.__name__}
        defined = {spec.name for k, module in DEFINED if k is kind for spec in specs_in(module)}
        assert registered == defined
        assert len(registered) >= 2


def test_every_module_that_defines_none_only_helps_others() -> None:
    others = [module for _, module in modules() if not specs_in(module)]
    assert {module.__name__ for module in others} <= {"bnbx.quant_types.grids"}


def lines_of(node: ast.expr) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


# Rules that the reference library lacks: what a new rule costs.
BEYOND = ("adopt", "schedule_free_adamw", "cautious_adamw", "cautious_lion")


def test_the_rules_beyond_the_reference_are_there() -> None:
    assert set(BEYOND) <= set(optimizers().names())


@pytest.mark.parametrize(
    "module", [m for k, m in DEFINED if k is Optimizer], ids=lambda value: value.__name__
)
def test_a_rule_takes_a_page(module: ModuleType) -> None:
    (spec,) = specs_in(module)
    call = calls_in(module)[spec.name]
    assert isinstance(call, ast.Call)
    # How other libraries write it down is no part of the rule.
    formats = sum(lines_of(k.value) for k in call.keywords if k.arg == "saved_as")
    assert 10 <= lines_of(call) - formats <= (40 if spec.name in BEYOND else 45)
    assert len(inspect.getsource(module).splitlines()) <= 65
    assert spec.source
    assert spec.summary
    assert Path(inspect.getfile(module)).name == f"{spec.name}.py"
