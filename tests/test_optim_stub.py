"""`bnbx/optim/__init__.pyi`: that it says what the classes take, and that type checkers heed it.

`pytest tests/test_optim_stub.py --rewrite-golden` writes it anew.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from textwrap import fill

import pytest

from bnbx import optim

STUB = Path(optim.__file__).with_suffix(".pyi")
BY_HAND = ("Optimizer8bit", "RuleOptimizer")
HEAD = '''"""Types of `bnbx.optim`, from the classes' signatures.

Made by `pytest tests/test_optim_stub.py --rewrite-golden`; not to be edited.
"""
# fmt: off

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

'''


def classes() -> list[type]:
    """The classes whose signatures are computed, bases before those derived from them."""
    found = [getattr(optim, name) for name in optim.__all__ if name not in BY_HAND]
    types = [each for each in found if isinstance(each, type)]
    made = [each for each in types if issubclass(each, optim.Optimizer8bit)]
    return sorted(made, key=lambda each: (len(each.__mro__), each.__name__))


def keywords(made: type) -> dict[str, str]:
    """Types of what a class takes by keyword only."""
    parameters = inspect.signature(made).parameters.values()
    return {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}


def stub() -> str:
    """The text of the stub."""
    imports = {
        name: getattr(optim, name).__module__
        for name in optim.__all__
        if getattr(optim, name) not in classes()
    }
    lines = sorted(f"from {module} import {name} as {name}" for name, module in imports.items())
    common = set.intersection(*(set(keywords(made)) for made in classes()))
    types = {name: kind for made in classes() for name, kind in keywords(made).items()}
    lines += ["", "__all__: list[str]", "", "class Options(TypedDict, total=False):"]
    lines += [f"    {name}: {types[name]}" for name in types if name in common]
    bodies: dict[str, str] = {}  # name of the private class that holds a constructor, by its text
    heads = []
    for made in classes():
        engine = "RuleOptimizer" if issubclass(made, optim.RuleOptimizer) else "Optimizer8bit"
        body = f"({engine}):\n{constructor(made, common)}"
        holder = bodies.setdefault(body, f"_Takes{len(bodies)}")
        derived = f", {made.__mro__[1].__name__}" if made.__mro__[1] in classes() else ""
        heads.append(f"class {made.__name__}({holder}{derived}): ...")
    lines += [f"\nclass {holder}{body}" for body, holder in bodies.items()]
    return HEAD + "\n".join([*lines, "", *heads]) + "\n"


def constructor(made: type, common: set[str]) -> str:
    parts, star = ["self"], False
    for p in inspect.signature(made).parameters.values():
        if p.kind is p.KEYWORD_ONLY:
            if p.name in common:
                continue
            parts += [] if star else ["*"]
            star = True
        default = "" if p.default is p.empty else " = ..."
        parts.append(f"{p.name}: {p.annotation}{default}")
    whole = [part.replace(" ", "\0") for part in [*parts, "**options: Unpack[Options]"]]
    text = fill(", ".join(whole), 90, break_long_words=False, break_on_hyphens=False)
    inner = "\n".join(f"        {line}" for line in text.replace("\0", " ").splitlines())
    return f"    def __init__(\n{inner}\n    ) -> None: ..."


def test_stub_says_what_the_classes_take(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--rewrite-golden"):
        STUB.write_text(stub(), encoding="utf-8")
    assert STUB.read_text(encoding="utf-8") == stub()


def test_stub_has_every_public_name() -> None:
    tree = ast.parse(STUB.read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    names |= {
        alias.asname
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    assert {n for n in names if not n.startswith("_")} == {*optim.__all__, "Options"}


USE = """
import torch
from bnbx import optim
from bnbx.optim import AdamW8bit

params = [torch.zeros(3, requires_grad=True)]
reveal_type(AdamW8bit(params, lr=1e-3, betas=(0.9, 0.99), overrides={"x": {"bits": 32}}))
reveal_type(optim.AdamW8bit(params).optim_bits)
optim.LAMB(params, 1e-3, True, [0.9, 0.999], master="kahan")
optim.PytorchLARS(params, momentum=0.9, max_unorm=0.1)
optim.Optimizer2State("adam", params, 1e-3, (0.9, 0.99), 1e-8, 0.0, 8, None, 4096, 0.0, False)
isinstance(optim.create("adam", params), optim.AdEMAMix)


class Mine(AdamW8bit):
    def __init__(self) -> None:
        super().__init__(params, weight_decay=0.0)


AdamW8bit(params, learning_rate=1e-3)
AdamW8bit(params, lr="fast")
optim.LAMB8bit(params, centered=True)
optim.AdamW16bit
"""
TOLD = (
    (6, r'Revealed type is "bnbx\.optim\.AdamW8bit"'),
    (7, r'Revealed type is "(builtins\.)?int"'),
    (19, r'Unexpected keyword argument "learning_rate" for "AdamW8bit"'),
    (20, r'Argument "lr" to "AdamW8bit" has incompatible type "str"'),
    (21, r'Unexpected keyword argument "centered" for "LAMB8bit"'),
    (22, r'Module has no attribute "AdamW16bit"'),
)


def test_type_checkers_see_classes_and_arguments(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "use.py").write_text(USE.lstrip("\n"), encoding="utf-8")
    cache = ["--cache-dir", str(tmp_path / "cache"), "--follow-imports=silent", "--strict"]
    command = [sys.executable, "-m", "mypy", "--config-file=", *cache, "use.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    told = re.findall(r"use\.py:(\d+): (?:error|note): (.*)", done.stdout)
    lines = [(int(line), text) for line, text in told if " defined in " not in text]
    assert [line for line, _ in lines] == [line for line, _ in TOLD], done.stdout + done.stderr
    for (_, text), (_, expected) in zip(lines, TOLD, strict=True):
        assert re.search(expected, text)
