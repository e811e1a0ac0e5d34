"""Panels of float32 for numbers of 16 bits, on processors that torch is slow with them on.

They are tested on any processor: `processor.lacks_16_bits` is set.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bnbx.kernels import coding, linear, linear_cpu, linear_panels, processor
from bnbx.kernels.encoding import make_encoding
from compiled import shared_cache
from exact_weights import small_numbers


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_cache(tmp_path_factory):
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_16_bits_are_multiplied_as_floats_where_torch_is_slow_with_them(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By panels that are rounded to no 16 bits, and pieces of x: results are rounded once."""
    monkeypatch.setattr(processor, "lacks_16_bits", lambda: True)
    monkeypatch.setattr(linear_cpu, "has_tiles", lambda *_: False)  # as it is there
    monkeypatch.setattr(linear_panels, "LEAST_BYTES", 4096)
    monkeypatch.setattr(linear_panels, "PIECE_BYTES", 4096)
    monkeypatch.setattr(linear_panels, "MOST_ROWS", 48)
    shape, encoding = (150, 97), make_encoding("nf4")
    parts = coding.encode(encoding, torch.randn(shape, generator=torch.Generator().manual_seed(6)))
    dense = coding.decode(encoding, parts, shape).double()
    bias = small_numbers(1, 150, dtype, seed=2)[0]
    for count in (1, 47, 100):
        x, grad = small_numbers(count, 97, dtype), small_numbers(count, 150, dtype)
        for some in (None, bias):
            exact = x.double() @ dense.T + (0 if some is None else some.double())
            got = linear_panels.multiply(encoding, parts, shape, x, some)
            assert_rounded_once(got, exact)
        assert_rounded_once(linear.grad_input(encoding, parts, shape, grad), grad.double() @ dense)


def assert_rounded_once(got: Tensor, exact: Tensor) -> None:
    """Half a step of the dtype; float32 sums add much less."""
    half = torch.finfo(got.dtype).eps / 2
    assert ((got.double() - exact).abs() <= half * 1.01 * exact.abs() + 1e-4).all()


def test_panels_are_floats_on_cpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "lacks_16_bits", lambda: True)
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    assert linear_panels.dtype_of_panels(x) == torch.float32
    assert linear_panels.dtype_of_panels(x.to("meta")) == torch.bfloat16
    monkeypatch.setattr(processor, "lacks_16_bits", lambda: False)
    assert linear_panels.dtype_of_panels(x) == torch.bfloat16


@pytest.mark.parametrize(
    ("machine", "capability", "lacks"),
    [
        ("x86_64", "AVX2", True),
        ("AMD64", "DEFAULT", True),
        ("x86_64", "AVX512", False),
        ("aarch64", "DEFAULT", False),
    ],
)
def test_which_processors_are_slow_with_16_bits(
    machine: str, capability: str, lacks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert processor.lacks_16_bits.__wrapped__() is lacks
    monkeypatch.setattr(processor, "lacks_16_bits", lambda: lacks)
    encoding = make_encoding("nf4")
    assert (linear_cpu.few_rows(encoding, torch.float16, 64) < 100) is lacks
