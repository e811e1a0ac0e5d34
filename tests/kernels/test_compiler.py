"""Which compiler is found, what its key holds, and what an error of it tells."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bnbx.errors import CompileError
from bnbx.kernels import compiler
from bnbx.kernels.compiler import Compiler, find_compiler


@pytest.fixture(autouse=True)
def looked_for_anew() -> Iterator[None]:
    """A process looks for its compiler once; these tests, each time."""
    compiler._find.cache_clear()
    yield
    compiler._find.cache_clear()


# ---- the key


def test_key_holds_all_that_reaches_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Compiler(("g++",), "one").key()
    assert {"g++", "one", *compiler.FLAGS, *compiler.cpu_flags()} <= set(parts)
    assert Compiler(("g++", "-O1"), "one").key() != parts
    assert Compiler(("g++",), "two").key() != parts
    monkeypatch.setattr(compiler, "FLAGS", (*compiler.FLAGS, "-g"))
    assert Compiler(("g++",), "one").key() != parts


def test_key_changes_with_the_compiler_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "c++"
    keys = set()
    for content in ("#!/bin/sh\n", "#!/bin/sh\n# a newer release\n"):
        script.write_text(content)
        script.chmod(0o755)
        compiler._find.cache_clear()
        monkeypatch.setenv("BNBX_CXX", str(script))
        keys.add(find_compiler().key())
    assert len(keys) == 2


# ---- finding one


def test_an_empty_bnbx_cxx_means_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNBX_CXX", "")
    with pytest.raises(CompileError, match="is switched off: BNBX_CXX is set, but empty"):
        find_compiler()
    assert compiler.how_to() == "unset BNBX_CXX"
    monkeypatch.setenv("BNBX_CXX", "missing-compiler")
    assert compiler.how_to().startswith("install g++")


def test_compilers_are_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BNBX_CXX", raising=False)
    for name in ("mine", "g++", "clang++", "c++"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "mine -m64")
    assert find_compiler().command == (str(tmp_path / "mine"), "-m64")
    monkeypatch.delenv("CXX")
    for name in ("g++", "clang++", "c++"):
        assert find_compiler().command == (str(tmp_path / name),)
        (tmp_path / name).unlink()
        compiler._find.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CompileError, match=r"tried g\+\+, clang\+\+, c\+\+, ziglang"):
        find_compiler()


def test_a_compile_error_shows_the_command_the_words_and_the_source(tmp_path: Path) -> None:
    source = tmp_path / "kernel.cpp"
    source.write_text('extern "C" int first() { return 1; }\nint second() { return nonsense; }\n')
    with pytest.raises(CompileError) as caught:
        find_compiler().compile(source, tmp_path / "kernel.so")
    message = str(caught.value)
    assert f"-shared {source}" in message
    assert "kernel.cpp:2" in message
    assert "nonsense" in message
    assert '\n   1 extern "C" int first() { return 1; }\n   2 int second()' in message


# ---- without one


def test_no_compiler_means_the_reference_and_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BNBX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("BNBX_CXX", "missing-compiler")
    step = """
import warnings
import torch
from bnbx.optim import create

params = [torch.ones(5000, requires_grad=True), torch.ones(9, requires_grad=True)]
for p in params:
    p.grad = torch.ones_like(p)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for rule in ("lion", "adamw"):
        create(rule, params, lr=0.5, weight_decay=0).step()
    create("lion", params, lr=0.5).step()
assert all(abs(p[0].item() + 0.5) < 1e-6 for p in params)
for warning in caught:
    print(warning.category.__name__, warning.message)
"""
    done = subprocess.run([sys.executable, "-c", step], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    output = done.stdout
    assert output.count("BnbxWarning") == 1
    assert "BNBX_CXX='missing-compiler' is not a command on PATH" in output
    assert "install g++ or clang++" in output
    assert not (tmp_path / "cache").exists()
