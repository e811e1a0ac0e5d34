"""LLM.int8() by a processor's matrix unit: who may use it, what is read, and who else uses it.

That its products have the bits of all others, test_int8_processors.py says. The unit is emulated;
on a processor that has one it is tested as well.
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bnbx.kernels import int8_cpu, int8_reference
from bnbx.kernels.library import INTEGER, compiled
from compiled import shared_cache
from int8_libraries import EMULATED, REFUSED, library_for
from int8_numbers import numbers, weight
from same_bits import same_bits

TESTS = Path(__file__).resolve().parents[1]
UNITS = {"this processor's": "", "emulated": EMULATED}
ROWS, COLUMNS, OUTS = 40, 150, 43


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_cache(tmp_path_factory):
        yield


def product(library: ctypes.CDLL, x: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8_cpu, "library", lambda: library)
        return int8_cpu.linear(x, codes, absmax, None, 0.0)[0]


def is_right(library: ctypes.CDLL, codes: Tensor | None = None) -> bool:
    x, (made, absmax) = numbers(ROWS, COLUMNS, torch.float32), weight(OUTS, COLUMNS)
    expected = int8_reference.linear(x, made, absmax, None, 0.0)[0]
    if codes is None:
        codes = made
    return same_bits(product(library, x, codes.copy_(made), absmax), expected)


def at_the_end_of_memory() -> Tensor:
    """Room for a weight; who reads or writes past it is ended by the system."""
    size, page = OUTS * COLUMNS, mmap.PAGESIZE
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + room), page, 0) == 0
    return torch.frombuffer(memory, dtype=torch.int8, count=size, offset=room - size).view(
        OUTS, COLUMNS
    )


def in_a_process_of_its_own(statement: str) -> None:
    """Run a statement about this module's names; it may end its process."""
    code = f"import sys; sys.path[:0] = {[str(TESTS), str(TESTS / 'kernels')]}\n"
    code += f"from test_int8_tiles import *\n{statement}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_unit_is_used_with_leave_only() -> None:
    assert library_for(EMULATED).bnbx_int8_tiles() == 1
    assert library_for(f"{EMULATED} {REFUSED}").bnbx_int8_tiles() == 0
    assert library_for(REFUSED).bnbx_int8_tiles() == 0


def test_without_leave_vectors_do_the_same() -> None:
    """The emulated unit ends the process of who uses it without leave, as a processor does."""
    in_a_process_of_its_own(f"assert is_right(library_for({f'{EMULATED} {REFUSED}'!r}))")


@pytest.mark.skipif(sys.platform != "linux", reason="protects memory by Linux' own numbers")
@pytest.mark.parametrize("flags", UNITS.values(), ids=UNITS.keys())
def test_nothing_is_read_past_the_weight(flags: str) -> None:
    in_a_process_of_its_own(f"assert is_right(library_for({flags!r}), at_the_end_of_memory())")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("flags", UNITS.values(), ids=UNITS.keys())
def test_threads_have_tiles_of_their_own(flags: str, threads: int) -> None:
    """And a thread's earlier work leaves nothing behind."""
    library, before = library_for(flags), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows, columns, outs in ((67, 600, 600), (40, 150, 43), (300, 512, 530), (67, 600, 600)):
            x, made = numbers(rows, columns, torch.bfloat16), weight(outs, columns)
            expected = int8_reference.linear(x, *made, None, 0.0)[0]
            assert same_bits(product(library, x, *made), expected)
    finally:
        torch.set_num_threads(before)


IN_USE = """
extern "C" long long bnbx_in_use() {
  unsigned int low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(1));
  return low >> 17 & 3;  // what a thread has set up, and what its tiles hold
}
"""


def test_a_thread_holds_no_tiles_when_its_work_is_done() -> None:
    library = library_for("")
    if not library.bnbx_int8_tiles():
        pytest.skip("this processor has no matrix unit, or the system keeps it")
    in_use = compiled(IN_USE, {"bnbx_in_use": ((), INTEGER)}).bnbx_in_use
    assert is_right(library)
    assert in_use() == 0


@pytest.mark.parametrize("flags", UNITS.values(), ids=UNITS.keys())
def test_rows_without_columns_give_zeros(flags: str) -> None:
    x, codes = torch.empty(9, 0), torch.empty(5, 0, dtype=torch.int8)
    assert torch.equal(product(library_for(flags), x, codes, torch.zeros(5)), torch.zeros(9, 5))


def test_torch_s_products_by_the_same_unit_stay_as_they_are() -> None:
    library = library_for("")
    x, other = torch.randn(64, 512).bfloat16(), torch.randn(256, 512).bfloat16()
    codes, more = (torch.randint(-127, 128, (count, 512), dtype=torch.int8) for count in (64, 256))
    floats, sums = x @ other.t(), codes.int() @ more.int().t()
    for _ in range(3):
        assert is_right(library)
        assert same_bits(x @ other.t(), floats)
        assert is_right(library)
        assert torch.equal(torch._int_mm(codes, more.t()), sums)


SMALL_STACK = """
import threading, torch
from bnbx.kernels import int8, int8_cpu
codes, absmax = torch.randint(-127, 128, (96, 512), dtype=torch.int8), torch.ones(96)
def run():
    torch.set_num_threads(1)
    int8.linear(torch.randn(20, 512), codes, absmax, None, 0.0)
run()  # compiles
threading.stack_size(256 * 1024)
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


def test_a_thread_with_a_small_stack_is_enough() -> None:
    """Sums of long rows take 256 KiB of it; those of others, which are most, do not."""
    done = subprocess.run([sys.executable, "-c", SMALL_STACK], capture_output=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
