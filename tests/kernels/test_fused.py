"""a * b + c of kernels, with an instruction for it and without: the bits of the reference."""

from __future__ import annotations

import ctypes
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

from bnbx.kernels.evaluate import fused
from compiled import compiled

CODE = """
extern "C" void fuse(const float* a, const float* b, const float* c, float* to, long long count) {
  for (long long i = 0; i < count; ++i) to[i] = fused(a[i], b[i], c[i]);
}
"""
WITHOUT = ("-U__FMA__", "-U__FP_FAST_FMAF", "-U__aarch64__")
COUNT = 1 << 18


def numbers(seed: int) -> list[np.ndarray]:
    """Any bits; and sums that are halfway between two numbers, or just beside."""
    source = np.random.default_rng(seed)
    a, b, c = (source.integers(0, 2**32, COUNT, np.uint32).view(np.float32) for _ in range(3))
    near = source.integers(0, COUNT, COUNT // 2)
    ones = 1 + source.integers(-8, 8, (3, near.size)) * 2.0**-23
    halfway = ones * 2.0 ** source.integers(-30, 3, ones.shape)
    a[near], b[near], c[near] = halfway.astype(np.float32)
    c[near[::2]] *= -1
    return [a, b, c]


@pytest.mark.parametrize("flags", [(), WITHOUT], ids=["instruction", "none"])
def test_kernels_fuse_as_the_reference_does(flags: tuple[str, ...], tmp_path: Path) -> None:
    header = (files("bnbx.kernels") / "templates" / "cpu_target.h").read_text(encoding="utf-8")
    source, binary = tmp_path / "fused.cpp", tmp_path / "fused.so"
    source.write_text(header + CODE, encoding="utf-8")
    given = numbers(0)
    found = np.empty(COUNT, np.float32)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (*given, found)]
    ctypes.CDLL(str(compiled(source, binary, flags))).fuse(*pointers, ctypes.c_longlong(COUNT))
    expected = fused(*map(torch.from_numpy, given)).numpy()
    assert np.array_equal(found, expected, equal_nan=True)
    numeric = ~np.isnan(expected)
    assert np.array_equal(np.signbit(found[numeric]), np.signbit(expected[numeric]))
    with np.errstate(all="ignore"):
        twice = given[0] * given[1] + given[2]
    assert (twice != expected).sum() > COUNT // 100  # so it matters
