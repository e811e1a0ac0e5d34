"""Threads of CPU kernels: torch's own pool, and one thread after a fork.

The OpenMP pool does not survive a fork: a child that enters it waits forever, in torch's operations
as in ours. A forked process therefore steps on one thread.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path

import torch

ELEMENTS_PER_THREAD = 32_768  # about 20 microseconds of work, what waking a thread may cost
_forked = False


def _after_fork() -> None:
    global _forked  # noqa: PLW0603 - a fact about the process
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def safe_after_fork() -> AbstractContextManager[None]:
    """Keep torch's own operations on one thread meanwhile, in a process that was forked."""
    return _one_thread() if _forked and torch.get_num_threads() > 1 else _AS_IT_IS


_AS_IT_IS = nullcontext()


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def threads_for(elements: int) -> tuple[int, int | None]:
    """How many threads to use for so many elements, and the address of the pool's entry."""
    wanted = min(torch.get_num_threads(), elements // ELEMENTS_PER_THREAD)
    parallel = _parallel() if wanted > 1 and not _forked else None
    return (wanted if parallel else 1), parallel


@lru_cache(maxsize=1)
def _parallel() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch has loaded; None without one.

    LLVM's libomp has that entry too, so this finds it on macOS as well.
    """
    bundled = Path(torch.__file__).parent / "lib"
    names = ["libgomp.so.1", *map(str, sorted(bundled.glob("lib*omp*")))]
    for name in names:
        try:
            entry = ctypes.CDLL(name).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(entry, ctypes.c_void_p).value
    return None
