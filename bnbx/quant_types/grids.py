"""Number grids in float32 arithmetic, from which tables are built.

The tables of some types are compatible with files other libraries wrote, so they must come out the
same to the last bit; those libraries build them with torch.linspace in float32. Families of types
(dynamic, linear, normal, minifloat) share a function here; a type's own file says which member it
is, and where it comes from.
"""

from __future__ import annotations

from itertools import pairwise
from statistics import NormalDist

from bnbx.registry.grid import float32
from bnbx.registry.quant_type import Values


def linspace(start: float, end: float, count: int) -> list[float]:
    """`count` evenly spaced float32 numbers, rounded as torch.linspace rounds them.

    It counts up from `start` in the first half and down from `end` in the second, each sum
    rounded once (a fused multiply-add).
    """
    start, end = float32(start), float32(end)
    if count == 1:
        return [start]
    step = float32(float32(end - start) / (count - 1))
    half = count // 2
    return [
        float32(start + step * i) if i < half else float32(end - step * (count - 1 - i))
        for i in range(count)
    ]


def midpoints(grid: list[float]) -> list[float]:
    """The float32 mid-points between neighbors."""
    return [float32(float32(low + high) / 2) for low, high in pairwise(grid)]


def dynamic_map(signed: bool, max_exponent_bits: int, total_bits: int) -> tuple[float, ...]:
    """The dynamic type: a run of zeros chooses a decade, the bits after it a linear fraction in it.

    What bitsandbytes' create_dynamic_map gives, ascending and without its padding.

    Args:
        signed: whether there are negative numbers.
        max_exponent_bits: how many decades there are, the uppermost from 0.1 to 1. A signed map
            has room for `total_bits` - 1; more change nothing.
        total_bits: width of a code; what decades leave of it makes fractions finer.

    Raises:
        ValueError: `max_exponent_bits` is below 1, or, for an unsigned map, not
            `total_bits` - 1: the rule then fills no whole table.
    """
    fitting = min(max_exponent_bits, total_bits - 1) if signed else max_exponent_bits
    spare = total_bits - 1 - fitting
    if fitting < 1 or (spare != 0 and not signed):
        allowed = "1 or more" if signed else f"{total_bits - 1}"
        raise ValueError(
            f"a dynamic map of {total_bits} bits with max_exponent_bits={max_exponent_bits}, "
            f"signed={signed}; expected {allowed}"
        )
    steps = [2 ** (decade + spare + (not signed)) for decade in range(fitting)]
    powers = [decade - fitting + 1 for decade in range(fitting)]
    if spare:  # the codes without an exponent, which refine the uppermost decade once more
        steps.append(2**spare - 1)
        powers.append(0)
    values = [0.0, 1.0]
    for count, power in zip(steps, powers, strict=True):
        grid = midpoints(linspace(0.1, 1.0, count + 1))
        fractions = [float32(float32(10**power) * fraction) for fraction in grid]
        values += fractions
        values += [-value for value in fractions] if signed else []
    return tuple(sorted(values))


def linear_map(signed: bool, total_bits: int, *, second_zero: bool = True) -> Values:
    """Evenly spaced numbers; what bitsandbytes' create_linear_map gives, without its padding.

    Args:
        signed: from -1 to 1 in an odd number of steps, symmetric about an exact zero; else from 0.
        total_bits: width of a code.
        second_zero: whether the code that is left over in a signed map holds what torch.linspace
            has in the middle, which is zero but for a rounding error; else it has no number.
    """
    if not signed:
        return tuple(linspace(0.0, 1.0, 2**total_bits))
    even = linspace(-1.0, 1.0, 2**total_bits - 1)
    half = len(even) // 2
    return (*even[:half], 0.0, even[half] if second_zero else None, *even[half + 1 :])


def normal_map(total_bits: int, offset: float | None = None) -> tuple[float, ...]:
    """Quantiles of the normal distribution on both sides of an exact zero, over the largest.

    The rule of arXiv:2305.14314 for any width: 2**(bits - 1) positive numbers and one fewer
    negative ones, at evenly spaced probabilities from `offset` down to 1/2.

    Args:
        total_bits: width of a code.
        offset: probability of the largest quantile; by default
            1 - (1 / 2**(bits + 1) + 1 / (2**(bits + 1) - 2)) / 2, the mean of what either
            side would take, which for 4 bits is the paper's 0.9677083.
    """
    count = 2**total_bits
    top = 1 - (1 / (2 * count) + 1 / (2 * count - 2)) / 2 if offset is None else offset
    quantile = NormalDist().inv_cdf

    def side(numbers: int) -> list[float]:
        steps = [top + (0.5 - top) * i / numbers for i in range(numbers)]
        return [quantile(probability) / quantile(top) for probability in steps]

    negative = [-value for value in side(count // 2 - 1)]
    return tuple(map(float32, [*negative, 0.0, *reversed(side(count // 2))]))


def minifloat(
    exponent_bits: int, fraction_bits: int, *, infinity: bool = False, nan: int = 0
) -> Values:
    """Numbers of a small float with a sign bit, in code order: bias 2**(exponent_bits - 1) - 1.

    Args:
        exponent_bits: width of the exponent; zero there means a subnormal number.
        fraction_bits: width of the fraction.
        infinity: whether the largest exponent stands for infinity and NaN, as in IEEE 754.
        nan: if not `infinity`, how many of each sign's last codes are NaN.
    """
    fractions = 2**fraction_bits
    bias = 2 ** (exponent_bits - 1) - 1
    half: list[float | None] = []
    for code in range(2**exponent_bits * fractions):
        exponent, fraction = divmod(code, fractions)
        whole = fraction + (fractions if exponent else 0)
        half.append(whole * 2.0 ** (max(exponent, 1) - bias - fraction_bits))
    missing = fractions if infinity else nan
    half = half[: len(half) - missing] + [None] * missing
    return (*half, *(None if value is None else -value for value in half))
