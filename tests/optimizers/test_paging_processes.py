"""Page files when the process ends, forks, shares them among threads, or is short of memory."""

from __future__ import annotations

import gc
import multiprocessing
import platform
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bnbx.errors import PagingError
from bnbx.optimizers.paging import SMALLEST, Pages

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux about the process")
# Python 3.12 and later warn of what is tested here.
forks = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture
def pages(tmp_path: Path) -> Pages:
    return Pages(tmp_path / "pages")


def in_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# ---- the end of the process

END = """
import os, signal, sys, torch
from bnbx.optimizers.paging import Pages
pages = Pages(sys.argv[1])
held = [pages.zeros((1_000_000,), torch.float32, 1) for _ in range(3)]
pages.prepare()
print(os.listdir(sys.argv[1]), flush=True)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
elif sys.argv[2] == "exits at once":
    os._exit(3)
elif sys.argv[2] == "fails":
    raise SystemExit(4)
"""
STATUS = {"killed": -9, "exits at once": 3, "fails": 4, "ends": 0}


@linux
@pytest.mark.parametrize("how", STATUS)
def test_no_trace_remains_however_the_process_ends(tmp_path: Path, how: str) -> None:
    ended = in_python(END, tmp_path / "pages", how)
    assert ended.returncode == STATUS[how], ended.stderr
    assert ended.stderr == ""
    assert ended.stdout == "[]\n", "the file has a name while it is used"
    assert not list((tmp_path / "pages").iterdir())


AT_EXIT = """
import atexit, sys
held = []
atexit.register(lambda: print(int(held[0].sum())))
import torch
from bnbx.optimizers.paging import Pages
held.append(Pages(sys.argv[1]).zeros((1_000_000,), torch.int32, 1))
"""


def test_states_can_be_read_until_the_very_end(tmp_path: Path) -> None:
    """A checkpoint may be written by an exit handler."""
    ended = in_python(AT_EXIT, tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "1000000\n", "")


# ---- threads and forks


def test_threads_share_pages(pages: Pages) -> None:
    def make(k: int) -> list[Tensor]:
        return [pages.zeros((SMALLEST + k,), torch.uint8, k) for _ in range(40)]

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(make, range(8)))
    assert all(bool((t == k).all()) for k, tensors in enumerate(made) for t in tensors)


def in_child(work: Callable[[], None]) -> None:
    """Run it in a forked process, which ends as those of multiprocessing do."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == 0


@forks
@linux
def test_a_child_that_lets_go_of_states_leaves_those_of_its_parent(pages: Pages) -> None:
    held = [pages.zeros((100_000,), torch.float32, 1)]

    def let_go() -> None:
        held.clear()
        gc.collect()
        assert pages.nbytes == 0

    in_child(let_go)
    assert bool((held[0] == 1).all())
    assert pages.nbytes == 400_000


@forks
@linux
def test_a_child_and_its_parent_take_different_pages(pages: Pages) -> None:
    """Both go on with the same object; the parent's file has room for more."""
    first = pages.zeros((100_000,), torch.float32, 1)
    of_child: list[Tensor] = []

    def take() -> None:
        of_child.append(pages.zeros((100_000,), torch.float32, 2))
        assert bool((of_child[0] == 2).all())
        assert bool((first == 1).all())

    in_child(take)
    second = pages.zeros((100_000,), torch.float32)
    assert not bool(second.any()), "the child wrote into pages that its parent took later"


@forks
@linux
def test_a_child_may_not_step_on_the_states_of_its_parent(pages: Pages) -> None:
    empty = Pages(pages.directory)
    held = [pages.zeros((100_000,), torch.float32, 1)]

    def check() -> None:
        empty.check_process()
        with pytest.raises(PagingError, match=r"forked from process \d+.*'spawn'"):
            pages.check_process()
        own = empty.zeros((100_000,), torch.float32)
        empty.check_process()
        held.clear()
        pages.check_process()
        del own

    in_child(check)
    pages.check_process()
    assert bool((held[0] == 1).all())


# ---- memory

PAGEOUT = 21  # MADV_PAGEOUT of Linux 5.4: what the system does when memory is short


@linux
def test_the_system_evicts_pages_and_nothing_is_lost(pages: Pages) -> None:
    if tuple(map(int, platform.release().split(".")[:2])) < (5, 4):
        pytest.skip("this Linux cannot be asked to evict")

    def resident() -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in status if line.startswith("RssFile")) * 1024

    tensor = pages.zeros((30_000_000,), torch.uint8, 5)
    tensor[::1000] = 6
    before = resident()
    assert pages._file is not None
    pages._file.map.madvise(PAGEOUT)
    if before - resident() < 10_000_000:
        pytest.skip("this file system does not evict when asked")
    assert before - resident() > 25_000_000
    expected = torch.full((30_000_000,), 5, dtype=torch.uint8)
    expected[::1000] = 6
    assert torch.equal(tensor, expected)
