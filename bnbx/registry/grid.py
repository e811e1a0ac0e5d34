"""Decision thresholds of a search that first rounds numbers to evenly spaced points.

Such a search looks up the code of the point nearest to x, so its code is still a step function of
x, and all that tells it from an exact search is where the steps are. They are found here by
bisection over the floats, with the float32 operations that programs of this kind use:
round((x + 1) * (points - 1) / 2), halves away from zero.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_right


def float32(value: float) -> float:
    """Round to the nearest float32, as a Python float."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def point(index: int, points: int) -> float:
    """The point number `index` of [-1, 1]."""
    return float32(-1.0 + float32(2.0 * index / (points - 1)))


def index_of(x: float, points: int) -> int:
    """The number of the point that the float32 number x is rounded to."""
    place = float32(float32(x + 1.0) * float32((points - 1) / 2))
    return min(max(math.floor(place + 0.5), 0), points - 1)


def grid_threshold(middle: float, points: int) -> float:
    """The largest float32 number whose point is not above `middle`."""
    first = bisect_right(range(points), middle, key=lambda index: point(index, points))
    low, high = _order(-2.0), _order(2.0)
    while high - low > 1:
        half = (low + high) // 2
        if index_of(_number(half), points) < first:
            low = half
        else:
            high = half
    return _number(low)


def _order(x: float) -> int:
    """The place of a float32 number among all of them; 0 for zero."""
    bits = int(struct.unpack("<i", struct.pack("<f", x))[0])
    return bits if bits >= 0 else -(bits & 0x7FFFFFFF)


def _number(order: int) -> float:
    """The number at a place."""
    return math.copysign(float(struct.unpack("<f", struct.pack("<i", abs(order)))[0]), order)
