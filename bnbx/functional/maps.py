"""Tables by recipe: `create_dynamic_map` and its kin, equal to those of bitsandbytes to the bit.

Their numbers come from `bnbx.quant_types.grids`, as those of registered types do. A table of fewer
than 8 bits is filled up with zeros to 256 entries, in ascending order, as the functions that take a
table by bytes expect it.
"""

from __future__ import annotations

from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from bnbx.errors import InputError, OptionError
from bnbx.functional import checks
from bnbx.functional.statistics import estimate_quantiles
from bnbx.kernels.sent_once import sent_once
from bnbx.quant_types.grids import dynamic_map, linspace, minifloat
from bnbx.registry import quant_types

ENTRIES = 256
_numbers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
PLAIN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _default_numbers() -> tuple[float, ...]:
    return _default()


@lru_cache(maxsize=1)
def _default() -> tuple[float, ...]:
    found = quant_types().find(lambda t: t.scale_default)
    if found is None:
        raise OptionError("no registered quant type says scale_default; pass a table as `code`")
    return found.codebook(signed=True).levels


def default_table(device: torch.device | str | None = None) -> Tensor:
    """The signed table that is meant where none is given (256,), float32."""
    return table(_default_numbers(), device)


def table(numbers: tuple[float, ...], device: torch.device | str | None = None) -> Tensor:
    """These numbers in a tensor of the caller's own, float32."""
    if torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=torch.float32, device=device)
    found = _kept(numbers, torch.empty(0, dtype=torch.uint8, device=device).device).clone()
    if found.device.type != "cpu" and not found.is_inference():
        _numbers[found] = found._version, numbers
    return found


def numbers_in(table: Tensor) -> bytes | None:
    """The numbers of a table of `table()` on another device than the CPU, without asking it.

    To ask would be to wait for all that runs there. None where they are not known.
    """
    known: tuple[int, tuple[float, ...]] | None = _numbers.get(table)  # type: ignore[no-untyped-call]
    if known is None or known[0] != table._version:
        return None
    return np.asarray(known[1], np.float32).tobytes()


@sent_once
def _kept(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device="cpu").to(device)


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Tensor:
    """Evenly spaced numbers.

    Args:
        signed: from -1 to 1, else from 0.
        total_bits: 1 to 8.
        add_zero: whether zero is among signed numbers of 8 bits, twice, at the cost of one number;
            with fewer bits it always is.

    Returns:
        (256,), float32, ascending.

    Raises:
        OptionError: no such number of bits.
    """
    total_bits = _checked_bits(total_bits, 1)
    count = 1 << total_bits
    if signed and (add_zero or total_bits < 8):
        count -= 1
    values = linspace(-1.0 if signed else 0.0, 1.0, count)
    half = count // 2
    return torch.tensor([*values[:half], *_padding(values), *values[half:]], **PLAIN)


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """Quantiles of the normal distribution, with zero: NF4 (arXiv:2305.14314, appendix E).

    Args:
        offset: the quantile that becomes 1, between 0.5 and 1.
        use_extra_value: eight numbers on one side of zero and seven on the other, 16 in all; else
            seven on both.

    Returns:
        (256,), float32, ascending.

    Raises:
        OptionError: an offset out of range.
    """
    if not 0.5 < offset < 1.0:
        raise OptionError(f"offset={offset!r}; expected a number between 0.5 and 1")
    above = _normal_quantiles(offset, 9 if use_extra_value else 8)
    below = _normal_quantiles(offset, 8)
    return _filled([*above, *(-number for number in below)], normalize=True)


def _normal_quantiles(offset: float, count: int) -> list[float]:
    """Normal quantiles from `offset` down to, but without, the median.

    Their shares are float32 numbers, where `grids.normal_map`, for any width, rounds at the end.
    """
    normal = NormalDist()
    return [normal.inv_cdf(share) for share in linspace(offset, 0.5, count)[:-1]]


def create_fp8_map(
    signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8
) -> Tensor:
    """Numbers of a small floating-point format, over their largest.

    Args:
        signed: whether one bit is a sign.
        exponent_bits: of the exponent; zero is for numbers without the leading one.
        precision_bits: of the fraction.
        total_bits: all of these together, 2 to 8.

    Returns:
        (256,), float32, ascending.

    Raises:
        OptionError: the bits do not add up.
    """
    total_bits = _checked_bits(total_bits, 2)
    if exponent_bits + precision_bits + bool(signed) != total_bits or exponent_bits < 1:
        raise OptionError(
            f"{exponent_bits} exponent bits, {precision_bits} fraction bits and "
            f"{int(bool(signed))} sign bit do not make total_bits={total_bits}"
        )
    positive = minifloat(exponent_bits, precision_bits)[: 2 ** (exponent_bits + precision_bits)]
    # As in bitsandbytes: numbers without a leading one are a quarter of what IEEE 754 has.
    without = 2**precision_bits
    numbers = [v / (4 if code < without else 1) for code, v in enumerate(positive) if v is not None]
    if signed:
        numbers += [-number for number in numbers]
    return _filled(numbers, normalize=True)


def create_dynamic_map(
    signed: bool = True,
    max_exponent_bits: int = 7,
    total_bits: int = 8,
    *,
    n: int | None = None,
) -> Tensor:
    """Numbers with a dynamic exponent: the larger it is, the fewer bits has the fraction.

    Source: arXiv:1511.04561, section 2.1, and arXiv:2110.02861, section 2.2.

    Args:
        signed: whether one bit is a sign.
        max_exponent_bits: the most bits that tell the exponent.
        total_bits: of a code, 2 to 8.
        n: another name for max_exponent_bits, as in bitsandbytes 0.0.24.

    Returns:
        (256,), float32, ascending, from -1 (if signed) to 1.

    Raises:
        OptionError: no such number of bits.
    """
    total_bits = _checked_bits(total_bits, 2)
    most = max_exponent_bits if n is None else n
    most = checks.whole("max_exponent_bits", most, 1, 7)
    try:
        return _filled([*dynamic_map(bool(signed), most, total_bits)])
    except ValueError as error:
        raise OptionError(str(error)) from None


def create_quantile_map(
    A: Tensor,  # noqa: N803 - the name it has in bitsandbytes
    total_bits: int = 8,
) -> Tensor:
    """A table fitted to data: its quantiles, and zero.

    Args:
        A: the data; float32, bfloat16 or float16, any shape, at least 256 elements.
        total_bits: of a code, 2 to 8.

    Returns:
        (256,), float32, ascending; the largest magnitude is 1.

    Raises:
        InputError: too little data, or none but zeros.
        OptionError: no such number of bits.
    """
    total_bits = _checked_bits(total_bits, 2)
    checks.floats("A", A)
    quantiles = estimate_quantiles(A, num_quantiles=2**total_bits - 1).cpu()
    most = quantiles.abs().max()
    if not bool(most > 0) or not bool(most.isfinite()):
        raise InputError(f"A has quantiles up to {float(most)}; expected finite ones, not all zero")
    return _filled([*(quantiles / most).tolist(), 0.0])


def _filled(numbers: list[float], *, normalize: bool = False) -> Tensor:
    # Python's sort keeps zeros in their order, which tells -0.0 from 0.0 in the table.
    every = sorted([*sorted(numbers), *_padding(numbers)])
    found = torch.tensor(every, **PLAIN)
    return found / found.max() if normalize else found


def _padding(numbers: list[float]) -> list[float]:
    return [0.0] * (ENTRIES - len(numbers))


def _checked_bits(total_bits: object, least: int) -> int:
    return checks.whole("total_bits", total_bits, least, 8)
