"""Steps in forked, spawned and loader processes, and on any number of threads.

The OpenMP pool of threads does not survive a fork: a child that enters it waits forever. These
tests would hang there, so each has a time limit.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx.kernels import threads as kernel_threads
from bnbx.optim import create
from compiled import shared_cache

# Python 3.12 and later warn of what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

SECONDS = 60
# Enough work for several threads of bnbx, in tensors too small for torch to use its threads: its
# own operations on large tensors do hang in forked children.
SHAPES = [(10_000,)] * 30


@pytest.fixture(scope="module", autouse=True)
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_cache(tmp_path_factory):
        yield


@pytest.fixture(autouse=True)
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def result(steps: int = 3) -> list[Tensor]:
    """What some steps of an optimizer give: parameters and states."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]
    optimizer = create("adamw", params, lr=1e-2)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    states = [value for p in params for value in optimizer.state[p].values()]
    return [p.detach() for p in params] + [s for s in states if isinstance(s, Tensor)]


def as_bytes(tensors: list[Tensor]) -> bytes:
    """To compare across processes without sharing memory."""
    return b"".join(t.numpy().tobytes() for t in tensors)


def in_forked_child(work: Callable[[], bytes]) -> bytes:
    """What `work` returns in a child made by os.fork; a child that hangs is killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # nothing of pytest may run here: no exception, no clean-up
        status = 1
        try:
            os.close(reading)
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(work())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    killer = threading.Timer(SECONDS, os.kill, (child, signal.SIGKILL))
    killer.start()
    with os.fdopen(reading, "rb") as pipe:
        found = pipe.read()
    _, status = os.waitpid(child, 0)
    killer.cancel()
    killer.join()
    assert status == 0, "the child hung or failed"
    return found


# ---- threads


def test_results_do_not_depend_on_the_number_of_threads(
    threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = kernel_threads.threads_for

    def seen(elements: int) -> tuple[int, int | None]:
        asked.append(real(elements)[0])
        return real(elements)

    monkeypatch.setattr(kernel_threads, "threads_for", seen)
    found = []
    for count in (1, 2, 4):
        threads(count)
        found.append(as_bytes(result()))
    assert found[0] == found[1] == found[2]
    assert asked == [1] * 3 + [2] * 3 + [4] * 3, "the runs did not use the threads"


def test_many_threads_may_step_at_once(threads: Callable[[int], None]) -> None:
    """Python threads, each with an optimizer of its own."""
    from concurrent.futures import ThreadPoolExecutor

    threads(2)
    expected = as_bytes(result())
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: as_bytes(result()), range(8)))
    assert found == [expected] * 8


# ---- processes


def test_a_forked_child_steps(threads: Callable[[int], None]) -> None:
    threads(2)
    expected = as_bytes(result())  # the pool runs now
    assert in_forked_child(lambda: as_bytes(result())) == expected
    assert as_bytes(result()) == expected


def test_a_forked_child_goes_on_with_an_optimizer(threads: Callable[[int], None]) -> None:
    threads(2)
    params = [torch.ones(shape, requires_grad=True) for shape in SHAPES]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = create("lion", params)
    optimizer.step()

    def go_on() -> bytes:
        optimizer.step()
        return as_bytes([p.detach() for p in params])

    before = as_bytes([p.detach() for p in params])
    found = in_forked_child(go_on)
    assert as_bytes([p.detach() for p in params]) == before != found
    assert go_on() == found


def test_a_grandchild_steps(threads: Callable[[int], None]) -> None:
    threads(2)
    expected = as_bytes(result())
    assert in_forked_child(grandchild) == expected


def grandchild() -> bytes:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply_async(compute).get(timeout=SECONDS)


def compute() -> bytes:
    return as_bytes(result())


class Steps(torch.utils.data.Dataset[bytes]):
    """A data set whose items are made by an optimizer, as in learned augmentation."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> bytes:
        return pickle.dumps([os.getpid(), compute()])


def test_a_worker_of_a_data_loader_steps(threads: Callable[[int], None]) -> None:
    threads(2)
    expected = compute()
    loader: Any = torch.utils.data.DataLoader(
        Steps(),
        num_workers=1,
        batch_size=None,
        timeout=SECONDS,
        multiprocessing_context="fork",
    )
    for item in loader:
        pid, found = pickle.loads(item)
        assert pid != os.getpid()
        assert found == expected


def test_a_spawned_process_steps(threads: Callable[[int], None]) -> None:
    threads(2)
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert pool.apply_async(compute).get(timeout=SECONDS) == compute()


@pytest.mark.skipif(sys.platform != "linux", reason="other OpenMP runtimes may survive a fork")
def test_the_children_were_forked_with_a_running_pool(threads: Callable[[int], None]) -> None:
    """Guards this module: without the precaution, a forked child would indeed hang."""
    threads(2)
    result()

    def forget() -> bytes:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(3)
        kernel_threads._forked = False
        return as_bytes(result())

    with pytest.raises(AssertionError, match="hung"):
        in_forked_child(forget)


def test_a_forked_child_makes_states_of_a_large_parameter(threads: Callable[[int], None]) -> None:
    """Torch fills large tensors in parallel, which a forked child cannot: it must not try."""
    threads(2)
    p = torch.nn.Parameter(torch.zeros(1_000_000))
    p.grad = torch.ones(1_000_000)
    result()

    def first_step() -> bytes:
        create("adamw", [p], lr=0.5).step()
        return bytes([round(float(p.detach()[0] * -100)), torch.get_num_threads()])

    assert in_forked_child(first_step) == bytes([50, 2])
