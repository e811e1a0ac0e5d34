"""Block sizes and counts are whole numbers, Python's or numpy's; what equals one is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import bnbx
from bnbx import functional
from bnbx.errors import OptionError
from bnbx.kernels.encoding import make_encoding
from bnbx.registry import QuantType
from same_bits import same_bits

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
NO_SIZES = [64.0, True, np.float32(64), torch.tensor(64), "64", [64], None]
DOORS: dict[str, Callable[[Any], object]] = {
    "quantize": lambda size: bnbx.quantize(X, "nf4", block_size=size),
    "fake_quantize": lambda size: functional.fake_quantize(X, "nf4", block_size=size),
    "quantize_4bit": lambda size: functional.quantize_4bit(X, blocksize=size),
    "quantize_blockwise": lambda size: functional.quantize_blockwise(X, blocksize=size),
    "make_encoding": lambda size: make_encoding("nf4", size),
    "second": lambda size: make_encoding("nf4", double=True, second_block=size),
    "layer": lambda size: bnbx.nn.Params4bit(X, blocksize=size, quant_type="nf4"),
}


@pytest.mark.parametrize("bad", NO_SIZES, ids=repr)
@pytest.mark.parametrize("door", DOORS)
def test_what_is_no_whole_number(door: str, bad: Any) -> None:
    if (bad is None and door != "second") or (
        isinstance(bad, torch.Tensor) and door == "quantize_blockwise"  # there it is `out`
    ):
        return
    DOORS[door](64)  # what is kept of it must not answer
    with pytest.raises((ValueError, TypeError), match=r"block ?size.*expected one of 16"):
        DOORS[door](bad)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint16])
def test_numbers_of_numpy(door: str, kind: type[Any]) -> None:
    DOORS[door](kind(128))


def test_a_bad_size_spoils_nothing() -> None:
    """Once, 64.0 was kept as the block size of a type, and answered for 64 ever after."""
    spec = QuantType(
        name="never_met_before",
        summary="a table",
        bits=2,
        block_size=64,
        values=(-1, -0.25, 0.25, 1),
    )
    with pytest.raises(OptionError, match=r"block size 64\.0"):
        bnbx.quantize(X, spec, block_size=64.0)
    found = bnbx.quantize(X, spec)
    assert type(found.encoding.block_size) is int
    assert found.dequantize().shape == X.shape
    assert bnbx.quantize(X, spec, block_size=np.int64(64)) == found
    assert type(make_encoding(spec, np.int64(32)).block_size) is int  # type: ignore[arg-type]


def test_numbers_of_numpy_are_kept_as_our_own() -> None:
    """Files hold them as JSON, which numpy's are not."""
    codes, state = functional.quantize_4bit(X, blocksize=np.int64(64))  # type: ignore[arg-type]
    again = functional.QuantState.from_dict(state.as_dict(packed=True), "cpu")
    assert again == state
    plain, _ = functional.quantize_4bit(X, blocksize=64)
    assert same_bits(codes, plain)


def test_counts_of_numpy() -> None:
    x = torch.randn(999)
    expected = functional.estimate_quantiles(x, num_quantiles=16)
    found = functional.estimate_quantiles(x, num_quantiles=np.int64(16))  # type: ignore[arg-type]
    assert torch.equal(found, expected)
    assert functional.create_linear_map(total_bits=np.int64(4)).shape == (256,)  # type: ignore[arg-type]
    for bad in (True, 16.0):
        with pytest.raises(OptionError, match="whole number"):
            functional.estimate_quantiles(x, num_quantiles=bad)  # type: ignore[arg-type]


def test_tables_that_are_equal_but_for_the_sign_of_zero() -> None:
    codes = torch.ones(4, dtype=torch.uint8)
    for zero in (0.0, -0.0):
        table = torch.tensor([-1.0, zero, 0.5, 1.0])
        found = functional.dequantize_blockwise(codes, absmax=torch.ones(1), code=table)
        assert torch.equal(found.signbit(), table[1].signbit().expand(4))
