"""What keeps the bits that a 16-bit parameter loses: unbiased, or exact to a derived bound.

These are statements about `bnbx.kernels.master`, the torch text; that the C text has the same bits
on every target, extreme values included, is in test_targets_agree.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bnbx.kernels import master
from bnbx.kernels.batch import seed_of
from bnbx.registry.options import MASTERS

UNIT = 2.0**-24
HALVES = (torch.bfloat16, torch.float16)
# Half a step relative to the number, and half of the smallest step.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}


def test_the_options_are_those_that_kernels_know() -> None:
    assert MASTERS == master.MASTERS


def stored(name: str, x: Tensor, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor | None]:
    """What is kept of `x`: the parameter, and its residual."""
    p = torch.zeros(x.numel(), dtype=dtype)
    kept = master.residual_dtype(name, dtype)
    residual = None if kept is None else torch.zeros(x.numel(), dtype=kept)
    master.store(name, x, p, residual, seed, 0)
    return p, residual


def many_values(dtype: torch.dtype, count: int = 200_000) -> Tensor:
    """Float32 values of every exponent that the dtype has, and random mantissas."""
    generator = torch.Generator().manual_seed(0)
    low, high = (-126, 127) if dtype is torch.bfloat16 else (-26, 15)
    exponent = torch.randint(low, high, (count,), generator=generator)
    mantissa = 1 + torch.rand(count, generator=generator, dtype=torch.float64)
    sign = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    return (sign * mantissa * 2.0**exponent).float()


# ---- noise


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("x", [1.0 + 2**-12, -0.3, 3.1415926, 1e-3, 6e-5, 1.3e-7, 3e-8, 60000.0])
def test_stochastic_rounding_is_unbiased(x: float, dtype: torch.dtype) -> None:
    """The mean of n results, each one of two numbers a step apart.

    It is off by more than step * sqrt(log(2 / d) / 2 n) with a probability below d (Hoeffding).
    """
    n, d = 1 << 16, 1e-9
    value = torch.full((n,), x, dtype=torch.float32)
    below, above = neighbors(float(value[0]), dtype)
    for seed in (0, 0xFFFFFFFF, seed_of(1, 0)):
        p, _ = stored("stochastic", value, dtype, seed)
        found = p.double()
        assert set(found.tolist()) <= {below, above}
        allowed = (above - below) * math.sqrt(math.log(2 / d) / (2 * n))
        assert abs(float(found.mean()) - float(value[0])) <= allowed


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("x", [1.0 + 2**-12, -0.3, 3.1415926, 1e-3, 6.2e-5, 60000.0])
def test_over_all_noise_there_is_no_bias_at_all(x: float, dtype: torch.dtype) -> None:
    """Of normal numbers each of the 2**16 (float16: 2**13) ways to round comes once in a cycle."""
    value = torch.full((1 << 16,), x, dtype=torch.float32)
    found = master.round_stochastically(value, torch.arange(1 << 16), dtype).double()
    assert float(found.mean()) == float(value[0])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("dtype", "halfway"), [(torch.bfloat16, (2 - 2**-8) * 2.0**127), (torch.float16, 65520.0)]
)
def test_only_what_nearest_rounding_makes_infinite_is_infinite(
    dtype: torch.dtype, halfway: float, sign: int
) -> None:
    """Over all noise: up to half a step beyond the largest number all become that number."""
    largest = torch.finfo(dtype).max
    for x in (largest, float(np.nextafter(np.float32(halfway), np.float32(0)))):
        value = torch.full((1 << 16,), sign * x, dtype=torch.float32)
        found = master.round_stochastically(value, torch.arange(1 << 16), dtype)
        assert set(found.double().tolist()) == {sign * largest}
    value = torch.full((1 << 16,), sign * halfway, dtype=torch.float32)
    found = master.round_stochastically(value, torch.arange(1 << 16), dtype)
    assert set(found.double().tolist()) == {sign * largest, sign * math.inf}


def neighbors(x: float, dtype: torch.dtype) -> tuple[float, float]:
    """The numbers of a dtype on both sides of x."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).double()
    return float(every[every <= x].max()), float(every[every >= x].min())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_needs_no_rounding_is_not_rounded(dtype: torch.dtype) -> None:
    """Every number of the dtype, NaN apart; so a step that moves nothing moves nothing."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    for name in MASTERS:
        p, residual = stored(name, every.float(), dtype, seed=77)
        assert torch.equal(p.view(torch.int16), every.view(torch.int16)), name
        assert residual is None or not bool(residual.any())


def test_noise_is_even_in_every_bit_and_unlike_its_neighbors() -> None:
    """Each bit is set in half of n places, within 6 sigma; so is the sum with its neighbor's."""
    n = 1 << 16
    sigma = 0.5 * math.sqrt(n)
    places = torch.arange(n)
    first = master.noise(seed_of(1, 0), places)
    others = [master.noise(seed_of(2, 0), places), master.noise(seed_of(1, 1), places)]
    others += [master.noise(seed_of(1, 0), places + shift) for shift in (1, n, 2**32, 2**40)]
    assert int(first.min()) >= 0
    assert int(first.max()) < 2**32
    for bits in [first, *(first ^ other for other in others)]:
        for bit in range(32):
            assert abs(int((bits >> bit & 1).sum()) - n / 2) < 6 * sigma, bit


def test_seeds_are_32_bits_and_far_apart() -> None:
    seeds = [seed_of(step, number) for step in range(1, 2000) for number in range(4)]
    assert len(set(seeds)) > 0.999 * len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert 0 <= seed_of(2**62, 10**6) < 2**32


# ---- what residuals keep


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_kahan_keeps_twice_the_bits(dtype: torch.dtype) -> None:
    """What is lost is at most half a step; of that the residual loses less than its own step."""
    x = many_values(dtype)
    p, residual = stored("kahan", x, dtype)
    assert residual is not None
    lost = (x.double() - p.double()).abs()
    allowed = 2 * (lost * ROUNDING[dtype] + SMALLEST[dtype]) + UNIT * x.double().abs()
    found = master.load("kahan", p, residual).double()
    finite = p.isfinite()
    assert bool(((found - x.double()).abs() <= allowed)[finite].all())
    assert float(finite.float().mean()) > 0.99


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_residual_keeps_eight_bits_more(dtype: torch.dtype) -> None:
    """With bfloat16's 16 bits that makes 24.

    There are 254 steps across the distance between two numbers: off by less than one, and by
    float32's roundings of a product or two and a sum.
    """
    x = many_values(dtype)
    x = x[x.abs() >= 2.0**-110]  # bfloat16 keeps no residual where its steps leave float32
    p, residual = stored("residual", x, dtype)
    assert residual is not None
    assert residual.dtype == torch.int8
    half = step_of(p) / 2
    allowed = half * (1 / 127 + 4 * UNIT) + UNIT * x.double().abs()
    found = master.load("residual", p, residual).double()
    finite = p.isfinite()
    assert bool(((found - x.double()).abs() <= allowed)[finite].all())
    assert float(finite.float().mean()) > 0.99
    assert int(residual.min()) == -127
    assert int(residual.max()) == 127


def step_of(p: Tensor) -> Tensor:
    """The distance from each number to the next larger magnitude, from its bits."""
    bits = p.view(torch.int16)
    magnitude = (bits & 0x7FFF).to(torch.int16)
    return (magnitude + 1).to(torch.int16).view(p.dtype).double() - magnitude.view(p.dtype).double()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["kahan", "residual"])
def test_storing_what_was_loaded_changes_nothing(name: str, dtype: torch.dtype) -> None:
    """So elements that are skipped do not creep.

    Residuals, in 127ths, cannot have the middle between a power of two and the number before it,
    and may change over to the other's steps once. 127ths are no float32 numbers: a last bit moves.
    A sum of parameter and error that needs more than 24 bits moves by a step of the error, which is
    then one or two of float32's.
    """
    p, residual = stored(name, many_values(dtype), dtype)
    assert residual is not None
    x = master.load(name, p, residual)
    for turn in range(3):
        p, residual = stored(name, x, dtype)
        assert residual is not None
        again = master.load(name, p, residual)
        allowed = 4 * UNIT * x.abs().double()
        if name == "residual":
            allowed = 2 * UNIT * x.abs().double() + (step_of(p) / 2 / 127 if turn == 0 else 0)
        assert bool(((again.double() - x.double()).abs() <= allowed)[x.isfinite()].all())
        x = again


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", MASTERS)
def test_extreme_values(name: str, dtype: torch.dtype) -> None:
    """Infinity and NaN stay what they are and leave residuals without harm."""
    big = torch.finfo(dtype).max
    x = torch.tensor([math.inf, -math.inf, math.nan, big, -big, 0.0, -0.0, 1e-45, -1e-45])
    p, residual = stored(name, x, dtype)
    found = master.load(name, p, residual) if residual is not None else p.float()
    assert found[:2].tolist() == [math.inf, -math.inf]
    assert bool(found[2].isnan())
    assert found[3:5].tolist() == [big, -big]
    assert found[5:7].tolist() == [0.0, 0.0]
    assert bool(found[7:].abs().max() <= torch.finfo(dtype).smallest_normal)
    if residual is not None:
        assert bool(residual.float().isfinite().all())
        assert not bool(residual[:3].any())
    # From there back to finite numbers, as a user who mends a parameter in place would.
    p[:3] = 1.0
    found = master.load(name, p, residual) if residual is not None else p.float()
    assert found[:3].tolist() == [1.0] * 3
