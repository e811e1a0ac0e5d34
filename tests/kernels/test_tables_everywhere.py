"""Tables of every kind give the same bits on every target and with every set of instructions.

Tables in numbers of their own (whole numbers, floats of 4 and 8 bits), with codes that are only
read or stand for no number, in every width and in blocks of every length.
"""

from __future__ import annotations

import platform
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import emulated
import nvrtc
from bnbx.kernels import cpu, cuda, reference
from bnbx.kernels.cuda_module import OPTIONS
from bnbx.kernels.plan import Storage
from bnbx.registry import QuantType
from bnbx.registry.grid import float32
from bnbx.registry.quant_type import BLOCK_SIZES, Values
from cuda_on_cpu.build import Mode
from plans import Case, assert_equal_bits, cases, copy, make_batch

SIZES = (1, 3, 257, 1000, 4097)


def table(name: str, values: Any, block_size: int, **more: Any) -> QuantType:
    bits = (len(values) - 1).bit_length()
    return QuantType(
        name=name, summary="a table", bits=bits, values=values, block_size=block_size, **more
    )


def float8(exponent_bits: int) -> Values:
    """All floats of 8 bits; None for those that are not finite."""
    dtype = torch.float8_e4m3fn if exponent_bits == 4 else torch.float8_e5m2
    numbers = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype).double()
    return tuple(x if np.isfinite(x) else None for x in numbers.tolist())


def even(bits: int) -> Values:
    return tuple(float32(x) for x in np.linspace(-1, 1, 2**bits))


def random(bits: int, seed: int = 0, *, ordered: bool = False, lowest: float = -1.0) -> Values:
    """A table without a form that makes its search easy."""
    values = [float32(x) for x in np.random.default_rng(seed).uniform(lowest, 1, 2**bits)]
    values[0] = 1.0
    return tuple(sorted(values) if ordered else values)


WHOLE = tuple(float(x) for x in np.arange(256, dtype=np.uint8).view(np.int8))
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
INT8 = tuple(None if x == -128 else x for x in WHOLE)
# Two by two, as the states of a rule whose second state is never negative.
PAIRS = [
    (
        table("int8", INT8, 256, unit=127.0, ties="even"),
        table("int8_read", WHOLE, 64, unit=127.0, decode_only=(128,)),
    ),
    (
        table("e2m1_16", E2M1, 16, unit=6.0, ties="even", decode_only=(8,)),
        table("e2m1_32", E2M1, 32, unit=6.0, decode_only=(8,)),
    ),
    (
        table("e4m3", float8(4), 32, unit=448.0, ties="even", decode_only=(128,)),
        table("e5m2", float8(5), 256, unit=57344.0, ties="even", decode_only=(128,)),
    ),
    (table("even3", even(3), 128), table("even5", even(5), 64)),
    (table("even6", even(6), 16, ties="even"), table("even7", even(7), 32)),
    (table("symmetric2", (-0.5, 0.5, 1.0, -1.0), 64, ties="even"), table("even8", even(8), 16)),
    (table("random3", random(3), 16), table("random5", random(5), 512)),
    (table("random6", random(6), 4096), table("random7", random(7), 32)),
    (table("ordered5", random(5, ordered=True), 32), table("random2", random(2), 1024)),
    (table("ordered8", random(8, ordered=True), 2048), table("random8", random(8), 16)),
    (
        table("both8", random(8), 512, unsigned_values=random(8, 1, lowest=0.0)),
        table("both4", random(4), 128, unsigned_values=random(4, 1, lowest=0.0)),
    ),
]
INSTRUCTIONS = {
    "all": "",
    "without AVX-512": "-mno-avx512f",
    "without AVX2": "-mno-avx512f -mno-avx2 -mno-fma",
}


def made(pair: tuple[QuantType, QuantType], *, block_wise: bool = True) -> Case:
    case = next(c for c in cases() if len(c.plan.quantized) == 2)
    first, second = case.plan.storages
    storages = (
        Storage(first.state, pair[0], block_wise),
        Storage(second.state, pair[1], block_wise),
    )
    return replace(case, plan=replace(case.plan, storages=storages))


def name_of(pair: tuple[QuantType, QuantType]) -> str:
    return "-".join(t.name for t in pair)


def test_every_width_and_every_length_of_a_block_is_there() -> None:
    every = [quant_type for pair in PAIRS for quant_type in pair]
    assert {t.bits for t in every} == set(range(2, 9))
    assert {t.block_size for t in every} == set(BLOCK_SIZES)


# The narrower sets have every other pair each.
COMPILED = [("all", pair) for pair in PAIRS]
COMPILED += [("without AVX-512", pair) for pair in PAIRS[::2]]
COMPILED += [("without AVX2", pair) for pair in PAIRS[1::2]]


@pytest.mark.parametrize(
    ("instructions", "pair"), COMPILED, ids=[f"{name}-{name_of(pair)}" for name, pair in COMPILED]
)
def test_on_a_cpu(
    instructions: str, pair: tuple[QuantType, QuantType], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = made(pair)
    if flags := INSTRUCTIONS[instructions]:
        if platform.machine().lower() not in ("x86_64", "amd64") or not shutil.which("g++"):
            pytest.skip("needs g++ for x86")
        monkeypatch.setenv("BNBX_CXX", f"g++ {flags}")
    cpu.kernel.cache_clear()
    try:
        for seed in range(3):
            expected = make_batch(case, SIZES, seed=seed)
            native = copy(expected)
            reference.run([expected])
            cpu.run([native])
            assert_equal_bits(native, expected)
    finally:
        cpu.kernel.cache_clear()


@pytest.mark.parametrize("pair", PAIRS, ids=name_of)
def test_on_cuda(pair: tuple[QuantType, QuantType]) -> None:
    case = made(pair)
    modes: tuple[Mode, ...] = ("check", "ubsan")
    for mode in modes:
        expected = make_batch(case, SIZES)
        batch = copy(expected)
        reference.run([expected])
        emulated.run([batch], mode=mode, schedule=1)
        assert_equal_bits(batch, expected)


@pytest.mark.parametrize("pair", PAIRS[::4], ids=name_of)
def test_with_one_scale_for_a_tensor(pair: tuple[QuantType, QuantType]) -> None:
    case = made(pair, block_wise=False)
    expected = make_batch(case, SIZES)
    native, batch = copy(expected), copy(expected)
    reference.run([expected])
    cpu.run([native])
    emulated.run([batch])
    assert_equal_bits(native, expected)
    assert_equal_bits(batch, expected)


ARCHITECTURES = [
    (pair, nvrtc.ARCHITECTURES[number % len(nvrtc.ARCHITECTURES)])
    for number, pair in enumerate(PAIRS)
]


@pytest.mark.parametrize(
    ("pair", "arch"), ARCHITECTURES, ids=[f"{name_of(pair)}-{arch}" for pair, arch in ARCHITECTURES]
)
def test_machine_code_spills_nothing(pair: tuple[QuantType, QuantType], arch: int) -> None:
    if reason := nvrtc.available():
        pytest.skip(reason)
    cubin = nvrtc.compile_cubin(cuda.source(made(pair).plan), arch, options=OPTIONS)
    assert (cubin.spill_stores, cubin.spill_loads, cubin.stack_bytes) == (0, 0, 0), cubin.log
    assert cubin.registers <= 65536 // 512, cubin.log


@pytest.mark.parametrize("target", [reference.run, cpu.run, emulated.run])
def test_a_block_without_a_finite_inverse_is_zero(target: Any) -> None:
    """A unit of 448 over an absmax near the smallest normal number is beyond float32."""
    for gradient in (1e-36, 1e-30):  # of which the first moment keeps a tenth
        batch = make_batch(made(PAIRS[2]), (64,))
        p, g, m, m_absmax, v, v_absmax, _ = batch.tensors[0]
        for tensor in (p, m, m_absmax, v, v_absmax):
            tensor.zero_()
        g.fill_(gradient)
        target([batch])
        zero = gradient * 0.1 < 448 / 2**128
        assert (m == (0 if zero else 126)).all()  # 126 is the code of 448
        assert (m_absmax == 0).all() == zero
