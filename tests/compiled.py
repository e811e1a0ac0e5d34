"""Where a test run keeps its kernels: each is compiled once, none is taken from outside."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def shared_cache(factory: pytest.TempPathFactory) -> Iterator[None]:
    """Point BNBX_CACHE_DIR at a directory that all processes of this test run share."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a base of its own, side by side
        base = base.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BNBX_CACHE_DIR", str(base / "kernels"))
        yield
