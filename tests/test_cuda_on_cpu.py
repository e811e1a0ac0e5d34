"""The harness that runs CUDA on the CPU: correct kernels, launches, arguments, memory, faults.

How source is read, compiled and kept is tested by test_cuda_on_cpu_build.py; that bugs are found,
by test_cuda_on_cpu_bugs.py; that intrinsics compute the right thing, by
test_cuda_on_cpu_semantics.py.
"""

import ctypes
import platform
import threading
from typing import Any

import numpy as np
import pytest
import torch

from cuda_on_cpu import SCHEDULES, CudaOnCpuError, compile_source
from cuda_on_cpu.build import MODES, Mode
from cuda_on_cpu.samples import SAMPLES, read

# Takes one parameter of every kind; where it is launched matters only to the tests of arguments.
EVERY_KIND = """
struct Pair { float a; int b; };
extern "C" __global__ void every_kind(float* f, const unsigned short* h, const void* v, bool flag,
                                      signed char small, unsigned u, long long wide, float x,
                                      double y, Pair pair, double* out) {
  out[0] = flag; out[1] = small; out[2] = u; out[3] = wide; out[4] = x; out[5] = y;
  out[6] = pair.a; out[7] = pair.b; out[8] = f == nullptr; out[9] = h[0]; out[10] = v != nullptr;
}
"""


class Pair(ctypes.Structure):
    """As in the kernel above."""

    _fields_ = (("a", ctypes.c_float), ("b", ctypes.c_int))


def one_thread(body: str, mode: Mode) -> torch.Tensor:
    """Runs statements that may write `out[0..7]`; `zero` is an integer that the compiler doubts."""
    source = f'extern "C" __global__ void k(float* out, int zero) {{\n{body}\n}}'
    out = torch.zeros(8)
    compile_source(source, mode).kernel("k")(1, 1, [out, 0])
    return out


# ---- correct kernels -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SAMPLES)
def test_correct_kernel_passes_everywhere(name: str, mode: Mode) -> None:
    sample = SAMPLES[name]
    module = compile_source(sample.source, mode)
    assert module.names == (name,)
    for schedule in SCHEDULES:
        assert sample.run(module, schedule), f"schedule {schedule}"


def test_architecture_is_selectable() -> None:
    """The sample shuffles where the hardware has no warp reductions."""
    sample = SAMPLES["row_max"]
    assert sample.run(compile_source(sample.source, cuda_arch=750), 0)
    with pytest.raises(CudaOnCpuError, match="__reduce_max_sync"):
        compile_source(sample.source.replace("__CUDA_ARCH__ >= 800", "1"), cuda_arch=750)


# ---- schedules -----------------------------------------------------------------------------------


def orders(schedule: int) -> torch.Tensor:
    """Three rows: when every thread started, left a barrier, and left __syncwarp."""
    order, counter = torch.zeros(3, 4 * 64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    kernel = compile_source(read("thread_order")).kernel("thread_order")
    kernel(4, 64, [order, counter], schedule=schedule)
    assert sorted(order.flatten().tolist()) == list(range(3 * 4 * 64))
    return order


def test_schedules_differ_at_every_scheduling_point() -> None:
    """In the order of the threads within a block, and in that of the blocks."""
    for point in range(3):
        by_block = [orders(schedule)[point].view(4, 64) for schedule in SCHEDULES]
        threads = {tuple(order[0].argsort().tolist()) for order in by_block}
        blocks = {tuple(order[:, 0].argsort().tolist()) for order in by_block}
        assert len(threads) == len(blocks) == len(SCHEDULES)


def test_schedules_repeat_themselves() -> None:
    for schedule in (*SCHEDULES, 12345):
        assert torch.equal(orders(schedule), orders(schedule))


def test_forward_and_reverse_are_what_they_say() -> None:
    """Threads start in order; blocks one after the other, as if the grid filled one at a time."""
    forward, reverse = orders(0)[0].view(4, 64), orders(1)[0].view(4, 64)
    assert (forward.diff(dim=1) == 1).all()
    assert (forward[:, 0].diff() > 0).all()
    assert torch.equal(reverse, forward.flip(0, 1))


# ---- launches ------------------------------------------------------------------------------------


def test_indices_in_three_dimensions() -> None:
    source = """
    extern "C" __global__ void k(int* out) {
      const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
      const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
      out[block * blockDim.x * blockDim.y * blockDim.z + thread] += block * 1000 + thread;
    }"""
    out = np.zeros((24, 30), np.int32)
    compile_source(source).kernel("k")((2, 3, 4), (5, 3, 2), [out])
    np.testing.assert_array_equal(out, 1000 * np.arange(24)[:, None] + np.arange(30))


@pytest.mark.parametrize(
    ("grid", "block", "options", "message"),
    [
        (1, 129, {}, "129 threads; __launch_bounds__ allows 128"),
        (1, (32, 33), {}, "1056 threads; the limit is 1024"),
        (0, 1, {}, "grid is 0; expected sizes from 1"),
        ((1, 65536), 1, {}, "grid is .*; expected sizes from 1"),
        (1, (1, 1, 65), {}, "block is .*; expected sizes from 1"),
        ((1, 1, 1, 1), 1, {}, "grid is .*; expected one to three sizes"),
        (1, 1, {"shared_bytes": 300_000}, "shared_bytes is 300000; expected 0 to 232448"),
        (1, 1, {"schedule": -1}, "schedule is -1; expected 0 or more"),
    ],
)
def test_impossible_launch_is_refused(
    grid: Any, block: Any, options: dict[str, Any], message: str
) -> None:
    kernel = compile_source(SAMPLES["copy_vectors"].source).kernel("copy_vectors")
    with pytest.raises(ValueError, match=f"copy_vectors: .*{message}"):
        kernel(grid, block, [torch.zeros(4), torch.zeros(4), 4], **options)


def test_exited_lanes_do_not_hold_up_a_collective() -> None:
    source = """
    extern "C" __global__ void k(int* out) {
      if (threadIdx.x % 2) return;
      out[threadIdx.x] = __any_sync(0xffffffffu, threadIdx.x == 4);
    }"""
    for schedule in SCHEDULES:
        out = torch.zeros(40, dtype=torch.int32)
        compile_source(source).kernel("k")(1, 40, [out], schedule=schedule)
        assert out.tolist() == [1, 0] * 16 + [0] * 8


def test_launches_from_several_threads_do_not_mix() -> None:
    sample = SAMPLES["block_absmax"]
    module = compile_source(sample.source)
    right: list[bool] = []

    def work() -> None:
        right.extend(sample.run(module, schedule) for schedule in SCHEDULES)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 4 * len(SCHEDULES)


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_argument_arrives(mode: Mode) -> None:
    out = np.zeros(11)
    half = torch.tensor([1.0], dtype=torch.bfloat16)
    arguments = [None, half, half, True, -3, 2**32 - 1, np.int64(-(2**40)), 0.5, 1 / 3]
    kernel = compile_source(EVERY_KIND, mode).kernel("every_kind")
    kernel(1, 1, [*arguments, Pair(1.5, -7), out])
    assert out.tolist() == [1, -3, 2**32 - 1, -(2**40), 0.5, 1 / 3, 1.5, -7, 1, 0x3F80, 1]


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        (0, torch.zeros(1, dtype=torch.float64), TypeError, r"takes float\*.*torch.float64"),
        (0, torch.zeros(1, dtype=torch.int32), TypeError, r"takes float\*.*torch.int32"),
        (0, 3.0, TypeError, r"takes float\*, so a CPU tensor, an array or None; got 3.0"),
        (0, torch.zeros(1, device="meta"), TypeError, "on meta; kernels run on CPU tensors here"),
        (0, np.zeros(2, np.float32)[::-1], ValueError, "runs backwards in memory"),
        (1, np.zeros(1, np.uint32), TypeError, r"takes unsigned 16-bit integer\*.*uint32"),
        (3, 1, TypeError, "takes bool, so a bool; got 1"),
        (4, 128, ValueError, "is 128, which does not fit 8-bit integer"),
        (5, -1, ValueError, "is -1, which does not fit unsigned 32-bit integer"),
        (6, 1.0, TypeError, "takes 64-bit integer, so a number of that kind; got 1.0"),
        (7, torch.ones(1), TypeError, "takes float, so a number of that kind; got an array"),
        (8, None, TypeError, "takes double, so a number of that kind; got None"),
        (9, ctypes.c_int(1), TypeError, r"8-byte struct, so a ctypes.Structure; got c_int"),
    ],
)
def test_argument_that_does_not_fit(
    place: int, value: Any, error: type[Exception], message: str
) -> None:
    half = torch.zeros(1, dtype=torch.bfloat16)
    arguments = [None, half, None, True, 0, 0, 0, 0.0, 0.0, Pair(), torch.zeros(11).double()]
    arguments[place] = value
    kernel = compile_source(EVERY_KIND).kernel("every_kind")
    with pytest.raises(error, match=f"every_kind: argument {place}.*{message}"):
        kernel(1, 1, arguments)


def test_number_of_arguments_is_checked() -> None:
    kernel = compile_source(SAMPLES["difference"].source).kernel("difference")
    expected = r"takes 2 arguments, 1 were given; it takes \(float\*, float\*\)"
    with pytest.raises(TypeError, match=expected):
        kernel(1, 64, [torch.zeros(64)])


def test_overlapping_arguments_are_one_memory() -> None:
    """In place, or shifted: the checker must see one history per byte."""
    kernel = compile_source(SAMPLES["copy_vectors"].source, "check").kernel("copy_vectors")
    x = torch.arange(64.0)
    kernel(1, 16, [x, x, 64])
    with pytest.raises(CudaOnCpuError, match=r"race: .* of argument . and argument .,"):
        kernel(1, 16, [x[4:], x[:60], 60])


# ---- memory --------------------------------------------------------------------------------------


def test_shared_memory_starts_as_nan_in_every_block() -> None:
    source = """extern "C" __global__ void k(float* out) {
      __shared__ float left_behind;
      out[blockIdx.x] = left_behind;
      left_behind = 1.0f;
    }"""
    out = torch.zeros(3)
    compile_source(source).kernel("k")(3, 1, [out])
    assert out.isnan().all()


@pytest.mark.parametrize(
    "table",
    [
        "__constant__ float table[4] = {1, 2, 3, 4};",
        "__device__ const float table[4] = {1, 2, 3, 4};",
        "static constexpr float table[4] = {1, 2, 3, 4};",
    ],
)
def test_constant_tables_may_be_read(table: str) -> None:
    source = f"""{table}
    extern "C" __global__ void k(float* out, int n) {{ *out = table[n - 1]; }}"""
    out = torch.zeros(1)
    compile_source(source, "check").kernel("k")(1, 1, [out, 4])
    assert out.item() == 4.0


def test_copies_by_memcpy_are_checked() -> None:
    source = """extern "C" __global__ void k(float* to, const float* from, long long bytes) {
      memcpy(to, from, bytes);
    }"""
    kernel = compile_source(source, "check").kernel("k")
    to = torch.zeros(9)
    kernel(1, 1, [to, torch.ones(9), 36])
    assert to.tolist() == [1.0] * 9
    with pytest.raises(CudaOnCpuError, match=r"(?s)ends 4 past argument 1, .*:2: memcpy"):
        kernel(1, 1, [to, torch.ones(8), 36])


# ---- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "body", "message"),
    [
        pytest.param(
            "plain",
            "out[7 % zero] = 1;",
            "integer division by zero",
            marks=pytest.mark.skipif(
                platform.machine() != "x86_64", reason="other processors do not trap"
            ),
        ),
        (
            "plain",
            "float* p = out + zero; p = zero ? p : nullptr; *p = 1;",
            "invalid memory access",
        ),
        ("plain", "__trap();", r"__trap\(\) was reached"),
        (
            "plain",
            "volatile char big[1 << 17]; for (int i = 0; i < 1 << 17; ++i) big[i] = zero;",
            "the thread's stack overflowed",
        ),
        ("check", "out[8] = 1;", "ends 4 past argument 0, .* has 32 bytes"),
        ("check", "out[-1] = 1;", "starts 4 before argument 0, .* has 32 bytes"),
        ("check", "*(float*)64 = 1;", "at 0x40: no argument, buffer or shared memory is near"),
        ("ubsan", "out[1 / zero] = 1;", "division by zero or overflow in type 'int'"),
        (
            "ubsan",
            "float* p = zero ? out : nullptr; *p = 1;",
            "type 'float' through a null pointer",
        ),
        ("ubsan", "out[0] = 1 << (zero + 32);", "shift of 1 by 32 is undefined for type 'int'"),
        ("ubsan", "out[0] = 1 << (zero - 1);", "shift of 1 by -1 is undefined for type 'int'"),
        (
            "ubsan",
            "out[0] = (unsigned char)(out[1] + 256.5f);",
            "256.5 is out of range for type 'unsigned char'",
        ),
        (
            "ubsan",
            "float local[4] = {}; local[zero - 1] = 1; out[0] = local[zero];",
            r"index -1 is out of bounds for type 'float \[4\]'",
        ),
        (
            "plain",
            "__shfl_xor_sync(1u << threadIdx.x, zero, 1, 24);",
            "__shfl_xor_sync: width 24 is not a power of two",
        ),
        ("plain", "__shfl_sync(1u, zero, 7);", "lane 0 reads lane 7, which does not take part"),
    ],
)
def test_fault_becomes_an_error_and_not_a_crash(mode: Mode, body: str, message: str) -> None:
    with pytest.raises(CudaOnCpuError, match=rf"{message}(.|\n)*at kernel.cu:2: "):
        one_thread(body, mode)
    assert one_thread("out[zero] = 1;", mode)[0] == 1  # and the harness goes on
