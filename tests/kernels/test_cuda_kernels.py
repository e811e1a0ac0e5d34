"""CUDA kernels without a GPU: machine code for every architecture, and the same bits as torch."""

from __future__ import annotations

import pytest
import torch

import emulated
import nvrtc
from bnbx.kernels import cuda, reference
from bnbx.kernels.cuda_module import OPTIONS
from cuda_on_cpu import SCHEDULES
from plans import (
    SIZES,
    Case,
    assert_equal_bits,
    cases,
    copy,
    feature_cases,
    make_batch,
    mixed_cases,
)

DTYPES = ("float32", "bfloat16", "float16")
FLOAT32_CASES = [*cases(), *mixed_cases()]
ALL_CASES = [*cases(DTYPES), *mixed_cases(), *feature_cases()]
CHECKED_CASES = [*cases()[::2], *mixed_cases()[::3], *feature_cases()]
# Every case for one architecture in turn, and a few of all kinds for each of them.
COMPILED = [
    (case, arch)
    for number, case in enumerate(ALL_CASES)
    for turn, arch in enumerate(nvrtc.ARCHITECTURES)
    if turn == number % len(nvrtc.ARCHITECTURES) or number % 10 == 0
]
# Two resident blocks of 256 threads on the smallest multiprocessor: 65536 registers, 64 KiB.
MOST_REGISTERS = 128
MOST_SHARED_BYTES = 32 * 1024


def ids(case: Case) -> str:
    return case.name


@pytest.mark.parametrize(
    ("case", "arch"), COMPILED, ids=[f"{case.name}-sm_{arch}" for case, arch in COMPILED]
)
def test_compiles_to_machine_code_without_spills(case: Case, arch: int) -> None:
    if reason := nvrtc.available():
        pytest.skip(reason)
    cubin = nvrtc.compile_cubin(cuda.source(case.plan), arch, options=OPTIONS)
    assert (cubin.spill_stores, cubin.spill_loads, cubin.stack_bytes) == (0, 0, 0), cubin.log
    assert cubin.registers <= MOST_REGISTERS, cubin.log
    assert cubin.shared_bytes <= MOST_SHARED_BYTES, cubin.log


@pytest.mark.parametrize("case", ALL_CASES, ids=ids)
def test_emulated_kernel_equals_the_reference(case: Case) -> None:
    expected = make_batch(case)
    start = copy(expected)
    reference.run([expected])
    for schedule in SCHEDULES:
        batch = copy(start)
        emulated.run([batch], schedule=schedule)
        assert_equal_bits(batch, expected)


@pytest.mark.parametrize("arch", [750, 800])
def test_either_way_to_the_largest_lane_gives_the_same(arch: int) -> None:
    case = FLOAT32_CASES[0]
    expected = make_batch(case)
    batch = copy(expected)
    reference.run([expected])
    emulated.run([batch], arch=arch)
    assert_equal_bits(batch, expected)


@pytest.mark.parametrize(
    ("case", "mode"),
    [(case, ("check", "ubsan")[number % 2]) for number, case in enumerate(CHECKED_CASES)],
    ids=[case.name for case in CHECKED_CASES],
)
def test_no_access_is_out_of_bounds_racing_or_misaligned(case: Case, mode: str) -> None:
    expected = make_batch(case, sizes=(1, 255, 257, 600))
    batch = copy(expected)
    reference.run([expected])
    emulated.run([batch], mode=mode)  # type: ignore[arg-type]
    assert_equal_bits(batch, expected)


def test_unaligned_tensors_go_element_by_element() -> None:
    """Parameters may be views into a flat buffer, at any offset."""
    case = next(c for c in ALL_CASES if c.plan.parameter == "bfloat16" and c.plan.quantized)
    expected = make_batch(case, sizes=(700, 259))

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        room = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
        room[1:] = tensor
        return room[1:]

    batch = copy(expected)
    batch.tensors = [tuple(shifted(t) for t in row) for row in batch.tensors]
    reference.run([expected])
    emulated.run([batch], mode="ubsan")
    assert_equal_bits(batch, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("case", FLOAT32_CASES, ids=ids)
def test_bad_gradients_do_the_same_everywhere(case: Case, bad: float) -> None:
    expected = make_batch(case, sizes=(1000,))
    expected.tensors[0][1][300] = bad
    batch = copy(expected)
    reference.run([expected])
    emulated.run([batch])
    assert_equal_bits(batch, expected)


def test_many_small_tensors_share_a_launch() -> None:
    case = FLOAT32_CASES[0]
    expected = make_batch(case, sizes=[*range(1, 40), *SIZES])
    batch = copy(expected)
    reference.run([expected])
    emulated.run([batch], grid=3, schedule=2)
    assert_equal_bits(batch, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ALL_CASES, ids=ids)
def test_on_a_gpu_the_bits_are_the_same(case: Case) -> None:
    expected = make_batch(case)
    batch = copy(expected)
    batch.tensors = [tuple(t.cuda() for t in row) for row in batch.tensors]
    reference.run([expected])
    cuda.run([batch])
    batch.tensors = [tuple(t.cpu() for t in row) for row in batch.tensors]
    assert_equal_bits(batch, expected)
