"""What other libraries compute, for tests that hold bnbx against them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest


def bitsandbytes_functional() -> Any:
    """The module `bitsandbytes.functional`; skips the test where it is not installed."""
    return pytest.importorskip(
        "bitsandbytes.functional", reason="bitsandbytes, from the extra `peers`, is the oracle"
    )


def bitsandbytes_dynamic_map(*, signed: bool) -> list[float]:
    """The table of bitsandbytes' 8-bit optimizer states: 256 float32 numbers in code order."""
    table: list[float] = bitsandbytes_functional().create_dynamic_map(signed=signed).tolist()
    return table


def bitsandbytes_linear_map(*, signed: bool) -> list[float]:
    """The evenly spaced table of bitsandbytes: 256 float32 numbers in code order."""
    functional = bitsandbytes_functional()
    table: list[float] = functional.create_linear_map(signed=signed, total_bits=8).tolist()
    return table


def torchao_microscaling(module: str) -> Any:
    """The module `torchao.prototype.mx_formats.<module>`; skips the test where it is not there."""
    with warnings.catch_warnings():  # of torchao about itself
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            f"torchao.prototype.mx_formats.{module}",
            reason="torchao, from the extra `peers`, is the oracle",
        )
