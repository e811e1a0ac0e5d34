"""Breaks correct kernels on purpose: each bug has to be found in the mode that promises to.

A finding is an error with the expected text, or `WRONG`: under some schedule the plain build
computes something else. Without these tests a harness that finds nothing would pass as well.
"""

import re
from typing import NamedTuple

import pytest
import torch

from cuda_on_cpu import SCHEDULES, CudaOnCpuError, compile_source
from cuda_on_cpu.build import Mode
from cuda_on_cpu.samples import SAMPLES, random_floats

WRONG = "wrong result"


class Bug(NamedTuple):
    """A change to a sample and, for each mode that finds it, a pattern of what it says."""

    sample: str
    name: str
    old: str
    new: str
    found: dict[Mode, str]


ABSMAX_LOAD = "partial[tid] = i < n ? fabsf(x[i]) : 0.0f;"
ABSMAX_LOOP_BODY = """[tid + half]);
    __syncthreads();"""
COPY_CONDITION = "first + 4 <= n"

BUGS = (
    Bug(
        "block_absmax",
        "no barrier after the load",
        f"{ABSMAX_LOAD}\n  __syncthreads();",
        ABSMAX_LOAD,
        {"plain": WRONG, "check": r"uninitialized shared memory.*\n.*partial\[tid \+ half\]"},
    ),
    Bug(
        "block_absmax",
        "no barrier in the loop",
        ABSMAX_LOOP_BODY,
        "[tid + half]);",
        {"plain": WRONG, "check": r"race: .* static shared memory"},
    ),
    Bug(
        "block_absmax",
        "barrier in a branch",
        "if (tid < half) partial[tid] = fmaxf(partial[tid], partial[tid + half]);\n"
        "    __syncthreads();",
        "if (tid < half) { partial[tid] = fmaxf(partial[tid], partial[tid + half]);\n"
        "    __syncthreads(); }",
        {
            "plain": r"divergent barrier: .* threads of the block have exited",
            "check": r"divergent barrier",
        },
    ),
    Bug(
        "block_absmax",
        "two barriers instead of one",
        f"{ABSMAX_LOAD}\n  __syncthreads();",
        f"{ABSMAX_LOAD}\n  if (tid < 32) __syncthreads();\n  else\n  __syncthreads();",
        {"plain": r"divergent barrier: waits .* while thread \d+ waits at the one in line \d+"},
    ),
    Bug(
        "block_absmax",
        "early return before a barrier",
        ABSMAX_LOAD,
        f"if (i >= n) return;\n  {ABSMAX_LOAD}",
        {"plain": r"divergent barrier: .* 255 of 256 threads of the block have exited"},
    ),
    Bug(
        "block_absmax",
        "index past a shared array",
        "partial[tid] = i < n",
        "partial[tid + 1] = i < n",
        {
            "check": r"out of bounds write of 4 bytes: ends past static shared memory, "
            r"which has 1024 bytes, by 4",
            "ubsan": r"index 256 is out of bounds for type 'float \[256\]'",
        },
    ),
    Bug(
        "block_absmax",
        "blocks write one address",
        "absmax[blockIdx.x] =",
        "absmax[0] =",
        {"plain": WRONG, "check": r"race: .* argument 1, is not ordered after the write by another"},
    ),
    Bug(
        "block_absmax",
        "every thread writes the result",
        "if (tid == 0) absmax",
        "absmax",
        {"check": r"race: write of 4 bytes, offset 0 of argument 1, .* the write by thread"},
    ),
    Bug(
        "block_absmax",
        "load past the end",
        "i < n ? fabsf(x[i]) : 0.0f",
        "fabsf(x[i])",
        {"check": r"out of bounds read of 4 bytes: ends past argument 0, which has 4 bytes, by 4"},
    ),
    Bug(
        "difference",
        "no barrier, harmless in the order of threads",
        "  __syncthreads();\n",
        "",
        {"plain": WRONG, "check": r"race: read of 4 bytes|uninitialized shared memory"},
    ),
    Bug(
        "difference",
        "shared memory that nobody wrote",
        "window[tid] - window[tid - 1]",
        "window[tid] - window[tid - 1]; window[tid] = extra[tid]",
        {"plain": r"cannot compile"},
    ),
    Bug(
        "row_max",
        "mask without the calling lane",
        "0xffffffffu",
        "0x0000ffffu",
        {"plain": r"__reduce_max_sync: lane 16 is not in its own mask 0x0000ffff"},
    ),
    Bug(
        "row_max",
        "collective in a branch",
        "value = warp_max(value);\n  if (lane == 0)",
        "if (lane < 16) value = warp_max(value);\n  if (lane == 0)",
        {
            "plain": r"deadlock: .*; lanes 0x0000ffff of warp 0 wait in __reduce_max_sync line 12 "
            r"with mask 0xffffffff"
        },
    ),
    Bug(
        "row_max",
        "no barrier between the warps",
        "of_warps[warp] = value;\n  __syncthreads();",
        "of_warps[warp] = value;",
        {"plain": WRONG, "check": r"uninitialized shared memory|race"},
    ),
    Bug(
        "row_max",
        "barrier in one warp",
        "if (warp == 0) {\n",
        "if (warp == 0) {\n    __syncthreads();\n",
        {"plain": r"divergent barrier"},
    ),
    Bug(
        "row_max",
        "one warp too many",
        "lane < blockDim.x / 32",
        "lane <= blockDim.x / 32",
        {"check": r"out of bounds read of 4 bytes: ends past dynamic shared memory"},
    ),
    Bug(
        "copy_vectors",
        "vector load at the tail",
        COPY_CONDITION,
        "first < n",
        {"check": r"out of bounds read of \d+ bytes: ends past argument 0, which has 4 bytes, by 12"},
    ),
    Bug(
        "copy_vectors",
        "tail store off by one",
        "i < n; ++i) to[i] = from[i]",
        "i < n; ++i) to[i + 1] = from[i]",
        {"check": r"out of bounds write of 4 bytes: ends past argument 1, which has 4 bytes, by 4"},
    ),
    Bug(
        "copy_vectors",
        "misaligned vectors",
        f"{COPY_CONDITION}) {{",
        f"{COPY_CONDITION}) {{ ++from;",
        {"ubsan": r"type 'const struct float4' at misaligned address 0x\w+, .* multiple of 16"},
    ),
    Bug(
        "scale_rows",
        "row one element too long",
        "i < row.length",
        "i <= row.length",
        {"check": r"out of bounds read of 4 bytes: ends past buffer \d, which has 12 bytes, by 4"},
    ),
    Bug(
        "grid_sum",
        "no fence before the counter",
        "__threadfence();",
        "",
        {"check": r"race: read of 4 bytes, .* argument 1, is not ordered after the write by another"},
    ),
    Bug(
        "grid_sum",
        "update that is not atomic",
        "atomicAdd(&sum, x[blockIdx.x * blockDim.x + threadIdx.x])",
        "sum += x[blockIdx.x * blockDim.x + threadIdx.x]",
        {"check": r"race: .* of 4 bytes, .* static shared memory"},
    ),
    Bug(
        "grid_sum",
        "sum never set",
        "if (threadIdx.x == 0) sum = 0;",
        "",
        {"plain": WRONG, "check": r"atomic update of uninitialized shared memory"},
    ),
    Bug(
        "warp_reverse",
        "no __syncwarp",
        "  __syncwarp();\n",
        "",
        {"plain": WRONG, "check": r"uninitialized shared memory|race"},
    ),
    Bug(
        "warp_reverse",
        "__syncwarp of half a warp",
        "__syncwarp();",
        "__syncwarp(lane < 16 ? 0xffffu : 0xffff0000u);",
        {"check": r"uninitialized shared memory|race"},
    ),
)
CASES = [
    pytest.param(bug, mode, id=f"{bug.sample}: {bug.name} ({mode})")
    for bug in BUGS
    for mode in bug.found
]


def finding(bug: Bug, mode: Mode) -> str:
    """What the harness says of the broken kernel under any schedule, empty if it is content."""
    sample = SAMPLES[bug.sample]
    assert sample.source.count(bug.old) == 1, "the sample has changed"
    try:
        module = compile_source(sample.source.replace(bug.old, bug.new), mode)
        right = [sample.run(module, schedule) for schedule in SCHEDULES]
    except CudaOnCpuError as error:
        return str(error)
    return "" if all(right) else WRONG


@pytest.mark.parametrize(("bug", "mode"), CASES)
def test_bug_is_found(bug: Bug, mode: Mode) -> None:
    said = finding(bug, mode)
    assert re.search(bug.found[mode], said), said
