"""The checker's notion of order: which synchronization makes an access safe, and which does not.

Every case is run with what it needs, which must be silent, and with less, which must be a race;
both under every schedule.
"""

from typing import NamedTuple

import pytest
import torch

from cuda_on_cpu import SCHEDULES, CudaOnCpuError, compile_source

BARRIER = "__syncthreads();"
WARP = "__syncwarp();"


class Case(NamedTuple):
    """Two accesses of threads `t` to `s` (shared) or `x` (global), and what stands between them."""

    name: str
    before: str
    after: str
    enough: str
    too_little: str


CASES = (
    Case("write, read by another warp", "s[t] = t;", "out[t] = s[t ^ 32];", BARRIER, WARP),
    Case(
        "write, read by another lane",
        "s[t] = t;",
        "out[t] = s[t ^ 1];",
        WARP,
        "__shfl_sync(~0u, t, 0);",
    ),
    Case("read, write by another warp", "v = s[t ^ 32];", "s[t] = v;", BARRIER, WARP),
    Case("read, write by another lane", "v = s[t ^ 1];", "s[t] = v;", WARP, ""),
    Case(
        "read by all, write by one",
        "v = s[0];",
        "if (t == 0) s[0] = v;",
        BARRIER,
        # At the shuffle other warps get their turn, so that theirs are the last reads.
        "__shfl_sync(~0u, t, 0); __syncwarp();",
    ),
    Case("read by one warp, write by another", "if (t > 31) v = s[0];", "s[t] = v;", BARRIER, WARP),
    Case(
        "read by two lanes, write by a third",
        "if (t == 1 || t == 2) v = s[0];",
        "if (t == 0) s[0] = v;",
        "if (t < 3) __syncwarp(7);",
        "if (t == 0 || t == 2) __syncwarp(5);",
    ),
    Case(
        "write, read by a lane outside of the mask",
        "if (t == 20) s[20] = 1;",
        "out[t] = t < 32 ? s[20] : 0;",
        WARP,
        "__syncwarp(t % 32 < 16 ? 0x0000ffff : 0xffff0000);",
    ),
    Case(
        "write, read by a lane that knows from another lane",
        "if (t == 0) s[0] = 1; if (t < 2) __syncwarp(3);",
        "if (t == 2) out[t] = s[0];",
        "if (t == 1 || t == 2) __syncwarp(6);",
        "",
    ),
    Case("write, write", "if (t == 0) s[0] = 1;", "if (t == 32) s[0] = 2;", BARRIER, WARP),
    Case("global write, read", "x[t] = t;", "out[t] = x[t ^ 32];", BARRIER, WARP),
    Case("write, atomic", "if (t == 0) x[0] = 5;", "atomicAdd(x, 1);", BARRIER, ""),
    Case("atomic, write", "atomicAdd(x, 1);", "if (t == 0) x[0] = 5;", BARRIER, WARP),
    Case("atomic, read", "atomicAdd(x, 1);", "out[t] = x[0];", BARRIER, WARP),
    Case("read, atomic", "v = x[0];", "atomicAdd(x, v);", BARRIER, WARP),
)


def run(between: str, case: Case, schedule: int) -> None:
    source = f"""extern "C" __global__ void k(int* x, int* out) {{
      __shared__ int s[64];
      const int t = threadIdx.x;
      int v = 0;
      s[t] = 0;
      __syncthreads();
      {case.before}
      {between}
      {case.after}
      if (v == 12345) out[t] = v;
    }}"""
    x, out = torch.zeros(2, 64, dtype=torch.int32)
    compile_source(source, "check").kernel("k")(1, 64, [x, out], schedule=schedule)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_enough_synchronization_is_silent(case: Case) -> None:
    for schedule in SCHEDULES:
        run(case.enough, case, schedule)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_too_little_synchronization_is_a_race(case: Case) -> None:
    for schedule in SCHEDULES:
        with pytest.raises(CudaOnCpuError, match=r"k: race: "):
            run(case.too_little, case, schedule)


@pytest.mark.parametrize("last", ["x[0] = v + 1;", "atomicAdd(x, 1);"])
def test_blocks_are_not_ordered(last: str) -> None:
    """One block changes what all have read; its own read is the last, and must not hide others."""
    source = f"""extern "C" __global__ void k(int* x, int* out) {{
      const int v = x[0];
      out[blockIdx.x] = v;
      if (blockIdx.x == 2) {last}
    }}"""
    kernel = compile_source(source, "check").kernel("k")
    for schedule in SCHEDULES:
        x, out = torch.zeros(2, 4, dtype=torch.int32)
        with pytest.raises(CudaOnCpuError, match=r"race: .* of argument 0, .* by another"):
            kernel(3, 1, [x, out], schedule=schedule)


def test_launches_are_ordered() -> None:
    """What one launch wrote, the next may read."""
    source = """extern "C" __global__ void k(int* x) {
      x[(threadIdx.x + x[32]) % 32] += 1;
      if (threadIdx.x == 0 && blockDim.x == 1) x[32] += 1;
    }"""
    kernel = compile_source(source, "check").kernel("k")
    x = torch.zeros(33, dtype=torch.int32)
    for threads in (32, 1, 32):
        kernel(1, threads, [x])
    assert x.tolist() == [3] + [2] * 31 + [1]
