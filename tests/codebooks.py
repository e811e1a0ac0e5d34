"""Hypothesis strategies: codebooks of awkward shapes, and the numbers that try their search."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from bnbx.registry.quant_type import Codebook, Ties

F32 = npt.NDArray[np.float32]
Values = tuple[float, ...]
TIES: tuple[Ties, ...] = ("low", "even")


# ---- codebooks


def _signed(random: np.random.Generator, magnitudes: F32) -> F32:
    signs = random.choice([-1.0, 1.0], magnitudes.size).astype(np.float32)
    return np.copysign(magnitudes, signs)


def _uniform(random: np.random.Generator, count: int) -> F32:
    return random.uniform(-1, 1, count).astype(np.float32)


def _logarithmic(random: np.random.Generator, count: int) -> F32:
    """Magnitudes from the smallest subnormal number up to 1, all equally likely."""
    return _signed(random, np.exp2(random.uniform(-149, 0, count)).astype(np.float32))


def _clustered(random: np.random.Generator, count: int) -> F32:
    """A few units in the last place apart, around a few centers."""
    centers = np.abs(_logarithmic(random, 5)).view(np.int32)
    bits = random.choice(centers, count) + random.integers(-40, 40, count)
    return _signed(random, np.clip(bits, 0, 0x3F800000).astype(np.int32).view(np.float32))


def _repeated(random: np.random.Generator, count: int) -> F32:
    return random.choice(np.append(_uniform(random, max(2, count // 3)), np.float32(0)), count)


def _subnormal(random: np.random.Generator, count: int) -> F32:
    bits = random.integers(0, 1 << random.integers(3, 24), count)
    return _signed(random, bits.astype(np.int32).view(np.float32))


def _even(random: np.random.Generator, count: int) -> F32:
    low, high = random.choice([-1.0, -0.5, 0.0, 1e-6, 0.9]), random.choice([1.0, 0.95])
    return np.linspace(low, high, count, dtype=np.float32)


def _pieces(random: np.random.Generator, count: int) -> F32:
    """Evenly spaced within each decade, as dynamic types are, with zero or without."""
    base = random.choice([2.0, 4.0, 8.0, 10.0])
    found = [0.0] if random.random() < 0.7 else []
    low, steps = 1.0, max(1, count // 4)
    while len(found) < count:
        grid = np.linspace(low / base, low, steps + 1)
        found += [float(x) for x in (grid[1:] + grid[:-1]) / 2]
        low, steps = low / base, max(1, steps // 2)
    return np.array(found[:count], np.float32)


SHAPES: dict[str, Callable[[np.random.Generator, int], F32]] = {
    "uniform": _uniform,
    "logarithmic": _logarithmic,
    "clustered": _clustered,
    "repeated": _repeated,
    "subnormal": _subnormal,
    "even": _even,
    "pieces": _pieces,
}


SIGNS = ["as it is", "unsigned", "mirrored", "mirrored about zero"]
ORDERS = ["as it is", "ascending", "ascending", "shuffled"]


def _made(shape: str, seed: int, bits: int, sign: str, order: str, one: bool) -> Values:
    random = np.random.default_rng(seed)
    values = SHAPES[shape](random, 2**bits)
    if one:
        values[-1] = 1
    if sign == "unsigned":
        values = np.abs(values)
    elif sign == "mirrored":
        half = np.sort(np.abs(values))[values.size // 2 :]
        values = np.concatenate([-half, half])
    elif sign == "mirrored about zero":  # with one value more on the positive side
        half = np.sort(np.abs(values))[values.size // 2 :]
        values = np.concatenate([-half[:-1], np.zeros(1, np.float32), half])
    if order == "ascending":
        values = np.sort(values)
    elif order == "shuffled":
        random.shuffle(values)
    return tuple(float(value) for value in values)


def _lists(bits: int) -> st.SearchStrategy[Values]:
    value = st.floats(-1, 1, width=32)
    return st.lists(value, min_size=2**bits, max_size=2**bits).map(tuple)


def codebooks() -> st.SearchStrategy[Values]:
    """Values in code order: 4 to 256 float32 numbers in [-1, 1], not all equal, in many shapes."""
    made = st.builds(
        _made,
        shape=st.sampled_from(sorted(SHAPES)),
        seed=st.integers(0, 2**32 - 1),
        bits=st.sampled_from([2, 3, 4, 6, 8, 8]),
        sign=st.sampled_from(SIGNS),
        order=st.sampled_from(ORDERS),
        one=st.booleans(),
    )
    return (made | _lists(2) | _lists(3)).filter(lambda values: len(set(values)) > 1)


UNITS = (1.0, 1.0, 6.0, 127.0, 448.0, 2.0**-16, 2.0**16)


def full_codebooks() -> st.SearchStrategy[Codebook]:
    """Codebooks with units, ties of either kind, and codes that are not written."""
    return st.builds(
        _full,
        codebooks(),
        st.sampled_from(UNITS),
        st.sampled_from(TIES),
        st.sampled_from([0, 0, 1, 2]),
        st.booleans(),
    )


def _full(values: Values, unit: float, ties: Ties, unwritten: int, read: bool) -> Codebook:
    table: list[float | None] = [float(np.float32(value * unit)) for value in values]
    places = [place * (len(values) - 1) // 2 for place in range(unwritten)]
    rest = {value for place, value in enumerate(table) if place not in places}
    if len(rest) < 2:
        return Codebook(tuple(table), ties, unit=unit)
    if read:
        return Codebook(tuple(table), ties, tuple(places), unit)
    for place in places:
        table[place] = None
    return Codebook(tuple(table), ties, unit=unit)


def probes(thresholds: Values, seed: int = 0, unit: float = 1.0) -> F32:
    """Numbers of both signs that try a search: around every threshold, and of every magnitude.

    They are at most a little larger than `unit`, which is what scaled numbers may be.
    """
    random = np.random.default_rng(seed)
    edges = np.array(thresholds, np.float32)
    up = down = edges
    around = [edges]
    most, far = np.float32(unit), np.float32(2 * unit)
    for _ in range(8):
        up, down = np.nextafter(up, far), np.nextafter(down, -far)
        around += [up, down]
    ends = np.array([0.0, most, np.nextafter(most, far), np.nextafter(most, np.float32(0)),
                     1e-45, 1.1754944e-38], np.float32)  # fmt: skip
    spread = np.concatenate([_logarithmic(random, 200), _uniform(random, 200)]) * most
    found = np.concatenate([*around, ends, spread])
    found = np.clip(found, -ends[2], ends[2])
    return np.concatenate([found, -found])
