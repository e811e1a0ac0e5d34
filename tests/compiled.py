"""Where a test run keeps its kernels: each is compiled once, none is taken from outside.

And C++ of a test's own, compiled as kernels are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from bnbx.errors import CompileError
from bnbx.kernels.compiler import find_compiler


def compiled(source: Path, binary: Path, flags: tuple[str, ...]) -> Path:
    """The library made of a source with these flags more; skips where there is no compiler."""
    try:
        compiler = find_compiler()
    except CompileError as error:
        pytest.skip(f"needs a C++ compiler: {error}")
    replace(compiler, command=(*compiler.command, *flags)).compile(source, binary)
    return binary


@contextmanager
def shared_cache(factory: pytest.TempPathFactory) -> Iterator[None]:
    """Point BNBX_CACHE_DIR at a directory that all processes of this test run share."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a base of its own, side by side
        base = base.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BNBX_CACHE_DIR", str(base / "kernels"))
        yield
