"""Tables by recipe: those of bitsandbytes to the bit, and of this package's own types."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bnbx import functional
from bnbx.registry import quant_types
from oracles import bitsandbytes_functional
from same_bits import same_bits


@pytest.fixture(scope="module")
def theirs() -> Any:
    return bitsandbytes_functional()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_linear(theirs: Any, bits: int, signed: bool) -> None:
    for zero in (False, True):
        expected = theirs.create_linear_map(signed, bits, zero)
        assert same_bits(functional.create_linear_map(signed, bits, zero), expected)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_dynamic(theirs: Any, bits: int, signed: bool) -> None:
    """Where bitsandbytes makes a table; where it asserts, we say what is wrong."""
    made = 0
    for most in range(1, 8):
        try:
            expected = theirs.create_dynamic_map(signed, most, bits)
        except AssertionError:
            with pytest.raises(ValueError, match="expected"):
                functional.create_dynamic_map(signed, most, bits)
            continue
        made += 1
        assert same_bits(functional.create_dynamic_map(signed, most, bits), expected)
        assert same_bits(functional.create_dynamic_map(signed, total_bits=bits, n=most), expected)
    assert made >= 1


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_float(theirs: Any, bits: int, signed: bool) -> None:
    for exponent in range(1, bits + 1 - signed):
        kind = (signed, exponent, bits - exponent - signed, bits)
        assert same_bits(functional.create_fp8_map(*kind), theirs.create_fp8_map(*kind))


def test_normal() -> None:
    """Without scipy, which bitsandbytes needs for it; the sixteen numbers are NF4."""
    table = functional.create_normal_map()
    assert table.shape == (256,)
    assert table.tolist() == sorted(table.tolist())
    numbers = table[table != 0].tolist()
    assert numbers == [v for v in quant_types().get("nf4").values if v]
    symmetric = functional.create_normal_map(use_extra_value=False)
    assert int((symmetric != 0).sum()) == 14
    assert torch.equal(symmetric, -symmetric.flip(0))
    assert functional.create_normal_map(0.99).unique().numel() == 16  # type: ignore[no-untyped-call]


def test_tables_of_types() -> None:
    """The registered types and these functions tell the same numbers."""
    for name, signed, table in [
        ("dynamic8", True, functional.create_dynamic_map()),
        ("dynamic8", False, functional.create_dynamic_map(signed=False)),
        ("linear8", True, functional.create_linear_map()),
        ("linear8", False, functional.create_linear_map(signed=False)),
    ]:
        values = quant_types().get(name).codebook(signed=signed).values
        assert table.tolist() == list(values), name


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantiles(bits: int) -> None:
    """Fitted to data, a table loses less of it than an evenly spaced one."""
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(0)) ** 3
    table = functional.create_quantile_map(x, bits)
    assert table.shape == (256,)
    assert float(table.abs().max()) == 1.0
    assert 0.0 in table.tolist()
    assert table.tolist() == sorted(table.tolist())
    assert int((table != 0).sum()) in (2**bits - 1, 2**bits - 2)
    errors = []
    for code in (table, functional.create_linear_map(total_bits=bits)):
        codes, state = functional.quantize_blockwise(x, code)
        found = functional.dequantize_blockwise(codes, state)
        errors.append(float((found - x).abs().mean()))
    assert errors[0] < errors[1]


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("create_linear_map", dict(total_bits=9), "1 to 8"),
        ("create_linear_map", dict(total_bits=2.5), "whole"),
        ("create_dynamic_map", dict(n=0), "1 to 7"),
        ("create_dynamic_map", dict(max_exponent_bits=True), "whole"),
        ("create_dynamic_map", dict(total_bits=1), "2 to 8"),
        ("create_fp8_map", dict(exponent_bits=6), "do not make"),
        ("create_fp8_map", dict(exponent_bits=0, precision_bits=7), "do not make"),
        ("create_normal_map", dict(offset=0.5), "between"),
        ("create_normal_map", dict(offset=float("nan")), "between"),
        ("create_quantile_map", dict(A=torch.randn(100)), "at least"),
        ("create_quantile_map", dict(A=torch.zeros(300)), "not all zero"),
        ("create_quantile_map", dict(A=torch.full((300,), float("nan"))), "finite"),
    ],
)
def test_mistakes(name: str, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        getattr(functional, name)(**arguments)


@pytest.mark.parametrize("name", ["nf4", "fp4", "af4"])
def test_numbers_of_4_bit_types(theirs: Any, name: str) -> None:
    expected = theirs.get_4bit_type(name, device="cpu")
    assert same_bits(functional.get_4bit_type(name, device="cpu"), expected)
    assert same_bits(functional.get_4bit_type(name, "cpu", 128), expected)


def test_numbers_of_other_types() -> None:
    assert functional.get_4bit_type("mxfp4").abs().max() == 1
    with pytest.raises(ValueError, match="'nf3' has 3 bits; expected a type of 4 bits"):
        functional.get_4bit_type("nf3")
    with pytest.raises(ValueError, match="no quant type 'nf44'"):
        functional.get_4bit_type("nf44")
    with pytest.raises(ValueError, match="block"):
        functional.get_4bit_type("nf4", blocksize=63)


# What docs/functional.md says is not here: handles and memory of CUDA, bare integer products.
ABSENT = set(
    """CUBLAS_Context GlobalPageManager get_paged prefetch_tensor fill elementwise_func igemm
    batched_igemm check_matmul""".split()
)


def test_what_the_functional_of_bitsandbytes_has(theirs: Any) -> None:
    own = {
        name
        for name, value in vars(theirs).items()
        if getattr(value, "__module__", "") == theirs.__name__ and not name.startswith("_")
    }
    assert len(own) > 30
    assert own - set(dir(functional)) == ABSENT
