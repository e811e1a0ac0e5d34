"""Breaks correct kernels on purpose: each bug has to be found in the mode that promises to.

A finding is an error with the expected text, or `WRONG`: under some schedule the plain build
computes something else. Without these tests a harness that finds nothing would pass as well.
"""

import re
from typing import NamedTuple

import pytest
import torch

from cuda_on_cpu import SCHEDULES, CudaOnCpuError, Module, compile_source
from cuda_on_cpu.build import Mode
from cuda_on_cpu.samples import SAMPLES, Sample, Scale, random_floats

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
        {"plain": WRONG, "check": r"uninitialized shared memory|race: "},
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
            "check": r"write of 4 bytes: ends 4 past static shared memory, .* has 1024 bytes",
            "ubsan": r"index 256 is out of bounds for type 'float \[256\]'",
        },
    ),
    Bug(
        "block_absmax",
        "blocks write one address",
        "absmax[blockIdx.x] =",
        "absmax[0] =",
        {
            "plain": WRONG,
            "check": r"race: .* argument 1, is not ordered after the write by another",
        },
    ),
    Bug(
        "block_absmax",
        "every thread writes the result",
        "if (tid == 0) absmax",
        "absmax",
        {"check": r"race: write of 4 bytes, offset 0 of argument 1, .* another thread"},
    ),
    Bug(
        "block_absmax",
        "load past the end",
        "i < n ? fabsf(x[i]) : 0.0f",
        "fabsf(x[i])",
        {"check": r"out of bounds read of 4 bytes: ends \d+ past argument"},
    ),
    Bug(
        "difference",
        "no barrier, harmless in the order of threads",
        "  __syncthreads();\n",
        "",
        {"plain": WRONG, "check": r"race: read of 4 bytes|uninitialized shared memory"},
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
            "plain": r"deadlock: .*; lanes 0x0000ffff of warp 0 wait in __reduce_max_sync line 9 "
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
        {"check": r"out of bounds read of 4 bytes: ends 4 past dynamic shared memory"},
    ),
    Bug(
        "copy_vectors",
        "vector load at the tail",
        COPY_CONDITION,
        "first < n",
        {"check": r"out of bounds read of \d+ bytes: ends \d+ past argument 0, .* has 4 bytes"},
    ),
    Bug(
        "copy_vectors",
        "tail store off by one",
        "i < n; ++i) to[i] = from[i]",
        "i < n; ++i) to[i + 1] = from[i]",
        {"check": r"out of bounds write of 4 bytes: ends 4 past argument 1, .* has 4 bytes"},
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
        {"check": r"out of bounds read of 4 bytes: ends 4 past buffer \d, .* has \d+ bytes"},
    ),
    Bug(
        "grid_sum",
        "no fence before the counter",
        "__threadfence();",
        "",
        {"check": r"race: read of 4 bytes, .* argument 1, .* the write by another block"},
    ),
    Bug(
        "grid_sum",
        "store after the fence",
        "partial[blockIdx.x] = sum;\n    __threadfence();",
        "__threadfence();\n    partial[blockIdx.x] = sum;",
        {"check": r"race: read of 4 bytes, .* argument 1, .* the write by another block"},
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


def finding(sample: Sample, module: Module, schedule: int) -> str:
    """What the harness says of a kernel under a schedule, empty if it is content."""
    try:
        return "" if sample.run(module, schedule) else WRONG
    except CudaOnCpuError as error:
        return str(error)


def findings(bug: Bug, mode: Mode) -> list[str]:
    """What the harness says of the broken kernel, schedule by schedule."""
    sample = SAMPLES[bug.sample]
    assert sample.source.count(bug.old) == 1, "the sample has changed"
    module = compile_source(sample.source.replace(bug.old, bug.new), mode)
    return [finding(sample, module, schedule) for schedule in SCHEDULES]


@pytest.mark.parametrize(("bug", "mode"), CASES)
def test_bug_is_found(bug: Bug, mode: Mode) -> None:
    said = findings(bug, mode)
    found = [re.search(bug.found[mode], text) is not None for text in said]
    # The instrumented builds do not depend on luck.
    assert any(found) if mode == "plain" else all(found), said


def test_race_that_one_order_hides_is_found_by_another() -> None:
    (bug,) = (bug for bug in BUGS if bug.name == "no barrier, harmless in the order of threads")
    said = findings(bug, "plain")
    assert said[:2] == ["", WRONG]


def test_report_names_both_sides_of_a_race() -> None:
    (bug,) = (bug for bug in BUGS if bug.name == "blocks write one address")
    assert findings(bug, "check")[1] == (
        "block_absmax: race: write of 4 bytes, offset 0 of argument 1, is not ordered after the "
        "write by another block\n"
        "  at kernel.cu:15: if (tid == 0) absmax[0] = partial[0];\n"
        "  earlier at kernel.cu:15: if (tid == 0) absmax[0] = partial[0];\n"
        "  in block (0, 0, 0), thread (0, 0, 0), schedule 1, check mode"
    )


def test_dynamic_shared_memory_is_checked_at_the_size_of_the_launch() -> None:
    kernel = compile_source(SAMPLES["row_max"].source, "check").kernel("row_max")
    x, result = random_floats(1, 40), torch.zeros(1)
    kernel(1, 96, [x, result, 40], shared_bytes=12)
    with pytest.raises(CudaOnCpuError, match="write of 4 bytes: ends 4 past dynamic shared memory"):
        kernel(1, 96, [x, result, 40], shared_bytes=8)


def test_arrays_are_checked_at_their_exact_size() -> None:
    """What lies beside a view is out of bounds, though the storage goes on."""
    kernel = compile_source(SAMPLES["copy_vectors"].source, "check").kernel("copy_vectors")
    storage, result = random_floats(64), torch.zeros(64)
    kernel(1, 32, [storage[8:24], result[16:32], 16])
    assert torch.equal(result[16:32], storage[8:24])
    with pytest.raises(CudaOnCpuError, match=r"ends 4 past argument 0, .* has 60 bytes"):
        kernel(1, 32, [storage[8:23], result[16:32], 16])
    with pytest.raises(CudaOnCpuError, match=r"ends 4 past argument 1, .* has 60 bytes"):
        kernel(1, 32, [storage[8:24], result[16:31], 16])


def test_memory_behind_a_stored_pointer_has_to_be_registered() -> None:
    kernel = compile_source(SAMPLES["scale_rows"].source, "check").kernel("scale_rows")
    tensor = random_floats(8)
    table = torch.tensor([[tensor.data_ptr(), 8]])
    kernel(1, 32, [table, Scale(2.0, 0)], buffers=[tensor])
    with pytest.raises(CudaOnCpuError, match="out of bounds read of 4 bytes"):
        kernel(1, 32, [table, Scale(2.0, 0)])


def test_misaligned_argument_is_found() -> None:
    kernel = compile_source(SAMPLES["copy_vectors"].source, "ubsan").kernel("copy_vectors")
    with pytest.raises(CudaOnCpuError, match=r"reference to type .* at misaligned address"):
        kernel(1, 32, [random_floats(17)[1:], torch.zeros(16), 16])
