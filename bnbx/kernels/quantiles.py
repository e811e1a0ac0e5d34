"""A quant type fitted to data: its numbers are quantiles of what blocks scaled by absmax hold.

-1, 0 and 1 are among them: zero is to be exact, and absmax always is an end. The others start as
dense as the square root of the data is, which is best where there are many (Panter and Dite's rule,
for absolute errors), and move until each is the median of the elements that are nearest to it: then
no other numbers close by have a smaller mean absolute error, the aim of AbnormalFloat
(arXiv:2306.06965). Quantile quantization was proposed in arXiv:2110.02861, section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnbx.errors import OptionError, UnsupportedTensorError
from bnbx.kernels.coding import check_numbers
from bnbx.kernels.memory import check_memory
from bnbx.registry import QuantType
from bnbx.registry.quant_type import BLOCK_SIZES

MOST = 1 << 22  # elements to sort; of more, blocks at even distances
BINS = 4096
ROUNDS = 100


def fit_quantiles(
    x: Tensor, bits: int, *, block_size: int = 64, name: str | None = None
) -> QuantType:
    """A type of `bits` whose numbers suit tensors that are distributed as `x` is.

    It is not registered: pass it where a quant type is wanted, or let a plugin register it.

    Args:
        x: float32, bfloat16 or float16, any shape, at least 2**bits finite elements. Where none is
            negative the table for unsigned numbers is fitted, and mirrored for signed ones.
        bits: width of a code, 2 to 8.
        block_size: elements that will share a scale; the type's block size.
        name: of the type; "quantile4" for 4 bits by default.

    Raises:
        UnsupportedTensorError: x has another dtype or layout, holds NaN or infinity, has too few
            elements, or nothing but zeros.
        OptionError: no such number of bits, or block size.
    """
    check_numbers("x", x)
    check_memory((x,))
    if type(bits) is not int or not 2 <= bits <= 8:
        raise OptionError(f"bits={bits!r}; expected a whole number from 2 to 8")
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        raise OptionError(f"block_size={block_size!r}; expected one of {BLOCK_SIZES}")
    if x.numel() < 2**bits:
        raise UnsupportedTensorError(
            f"x has {x.numel()} elements; {2**bits} quantiles need at least as many"
        )
    ordered = _scaled(x.detach(), block_size).sort().values.cpu()
    half = 2 ** (bits - 1)
    unsigned = None
    if float(ordered[0]) >= 0:
        unsigned = tuple(_medians(ordered, [0.0, *_start(ordered, 2**bits - 1)]))
        ordered = torch.cat([-ordered.flip(0), ordered])
    start = [-value for value in reversed(_start(-ordered[ordered < 0], half - 1))]
    start += [0.0, *_start(ordered[ordered > 0], half)]
    return QuantType(
        name=f"quantile{bits}" if name is None else name,
        summary=f"{2**bits} quantiles of a tensor of shape {tuple(x.shape)}",
        source="arXiv:2110.02861, section 2, arXiv:2306.06965",
        bits=bits,
        values=tuple(_medians(ordered, start)),
        unsigned_values=unsigned,
        block_size=block_size,
    )


def _scaled(x: Tensor, block_size: int) -> Tensor:
    """Elements (float32, flat) over the absmax of their blocks, of at most MOST elements."""
    flat = x.reshape(-1)
    blocks = -(-flat.numel() // block_size)
    stride = -(-flat.numel() // MOST)
    rows = torch.nn.functional.pad(flat, (0, blocks * block_size - flat.numel()))
    rows = rows.view(blocks, block_size)[::stride].float()
    absmax = rows.abs().amax(1, keepdim=True)
    if not bool(absmax.isfinite().all()):
        raise UnsupportedTensorError("x holds NaN or infinity, which have no place among quantiles")
    rows = rows[absmax.view(-1) > 0] / absmax[absmax > 0].view(-1, 1)
    if not len(rows):
        raise UnsupportedTensorError("x holds nothing but zeros; there is nothing to fit")
    return rows.reshape(-1)


def _start(magnitudes: Tensor, count: int) -> list[float]:
    """`count` magnitudes, ascending, as dense as the root of these are; the last is 1."""
    none = not len(magnitudes)
    found = magnitudes.new_ones(BINS) if none else torch.histc(magnitudes, BINS, 0, 1)
    below = found.double().sqrt().cumsum(0)
    shares = torch.arange(1, count, dtype=torch.float64, device="cpu") / count * below[-1]
    places = torch.searchsorted(below, shares).float()
    return [*((places + 0.5) / BINS).tolist(), 1.0]


def _medians(ordered: Tensor, start: list[float]) -> list[float]:
    """Numbers, but for the ends and zero, moved to the medians of the elements nearest to them."""
    numbers = torch.tensor(start, dtype=torch.float32, device="cpu")
    free = (numbers.abs() < 1) & (numbers != 0)
    free[0] = free[-1] = False
    for _ in range(ROUNDS):
        middles = (numbers[:-1] + numbers[1:]) / 2
        ends = torch.searchsorted(ordered, middles, right=True)
        first = torch.nn.functional.pad(ends, (1, 0))
        last = torch.nn.functional.pad(ends, (0, 1), value=len(ordered))
        found = ordered[((first + last) // 2).clamp(max=len(ordered) - 1)]
        moved = torch.where(free & (last > first), found, numbers)
        if torch.equal(moved, numbers):
            break
        numbers = moved
    return [float(number) for number in numbers.tolist()]
