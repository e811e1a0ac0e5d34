"""Arithmetic that carries a proven bound on what float32 rounding can do to a result.

A `Bounded` is the exact value, in float64, and a bound on how far the same value computed in
float32 may lie from it. `OPERATIONS` is a table for `bnbx.kernels.evaluate.evaluate`, so a rule's
own text, evaluated with it, says what a correct kernel may return. No tolerance is chosen.

The bounds are the usual ones of running error analysis. A float32 operation returns its exact
result r, of the inputs it got, with an error of at most UNIT * |r| + TINY (none where r is 0); an
error of an input is
carried along by the operation's derivative, or by its worst case where there is none. Kernels run
the lowered text, in which factors that are the same for all elements are gathered in float64 and
rounded once: that takes roundings away and adds none, so a bound for the text as it is written
holds for them too. What runs once a tensor, in float64, has `WIDE_OPERATIONS`, whose own roundings
are as far below those of float32 as the ones in which all of this is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

# Half the distance of neighboring float32 numbers near 1. The little more covers the rounding of
# float64 (2**-53 for each operation), in which values and bounds are computed.
UNIT = 2.0**-24 * (1 + 2.0**-10)
TINY = 2.0**-149  # likewise where the result is subnormal
WIDE_UNIT = 2.0**-53


@dataclass(frozen=True)
class Bounded:
    """An exact value and a bound on the error of its float32 counterpart, both float64."""

    value: Tensor
    error: Tensor

    @property
    def low(self) -> Tensor:
        return self.value - self.error

    @property
    def high(self) -> Tensor:
        return self.value + self.error


@dataclass(frozen=True)
class Condition:
    """The outcome of a comparison, and whether float32 is certain to have the same."""

    truth: Tensor
    sure: Tensor


def exact(value: Any) -> Bounded:
    """A value that the kernel has exactly."""
    tensor = torch.as_tensor(value).to(torch.float64)
    return Bounded(tensor, torch.zeros_like(tensor))


def scalar(value: float) -> Bounded:
    """A number of the host, which the kernel gets rounded to float32."""
    return rounded(torch.tensor(float(value), dtype=torch.float64), torch.zeros(()).double())


def number(value: float) -> Bounded:
    """A literal of the text: float32 has many of them exactly."""
    rounded = float(torch.tensor(value, dtype=torch.float32))
    return exact(value) if rounded == value else scalar(value)


def rounded(value: Tensor, error: Tensor) -> Bounded:
    """The result of one float32 operation whose inputs alone allow `error`."""
    most = value.abs() + error
    return Bounded(value, torch.where(most == 0, 0.0, error + UNIT * most + TINY))


def widened(value: Tensor, error: Tensor) -> Bounded:
    """The same of a float64 operation; `value` itself has its rounding, hence the factor 2."""
    most = value.abs() + error
    return Bounded(value, error + 2 * WIDE_UNIT * most)


def norm(a: Bounded) -> Bounded:
    """The Euclidean norm over a tensor: squares and sums in float64, in any order.

    By the triangle inequality an error of the elements moves it by the norm of the errors at most.
    """
    value, error = a.value.square().sum().sqrt(), a.error.square().sum().sqrt()
    return widened(value, error + a.value.numel() * WIDE_UNIT * (value + error))


Rounded = Callable[[Tensor, Tensor], Bounded]


def _multiply(to: Rounded, a: Bounded, b: Bounded) -> Bounded:
    error = a.value.abs() * b.error + b.value.abs() * a.error + a.error * b.error
    return to(a.value * b.value, error)


def _divide(to: Rounded, a: Bounded, b: Bounded) -> Bounded:
    quotient = a.value / b.value
    room = b.value.abs() - b.error
    error = (a.error + quotient.abs() * b.error) / room
    return to(quotient, torch.where(room > 0, error, torch.inf))


def _sqrt(to: Rounded, a: Bounded) -> Bounded:
    # |sqrt(a + d) - sqrt(a)| = |d| / (sqrt(a + d) + sqrt(a)) is at most either of these.
    root = a.value.sqrt()
    return to(root, torch.minimum(a.error / root.clamp(min=1e-300), a.error.sqrt()))


def _sign(a: Bounded) -> Bounded:
    sign = a.value.sign()
    sure = (a.value.abs() > a.error) | (a.error == 0)
    return Bounded(sign, torch.where(sure, 0.0, 1.0 + sign.abs()))


def _choice(choose: Callable[[Tensor, Tensor], Tensor], a: Bounded, b: Bounded) -> Bounded:
    """The smaller or larger of two: no rounding, and it never falls where an argument rises."""
    value = choose(a.value, b.value)
    low, high = choose(a.low, b.low), choose(a.high, b.high)
    return Bounded(value, torch.maximum(value - low, high - value))


def _comparison(compare: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Condition]:
    def outcome(a: Bounded, b: Bounded) -> Condition:
        error = a.error + b.error
        sure = ((a.value - b.value).abs() > error) | (error == 0)
        return Condition(compare(a.value, b.value), sure)

    return outcome


def _where(condition: Bounded | Condition, a: Bounded, b: Bounded) -> Bounded:
    if isinstance(condition, Bounded):  # a hyperparameter, bare: compiled in, so always sure
        condition = Condition(condition.value != 0, torch.tensor(True))
    error = torch.where(condition.truth, a.error, b.error)
    either = (a.value - b.value).abs() + torch.maximum(a.error, b.error)
    value = torch.where(condition.truth, a.value, b.value)
    return Bounded(value, torch.where(condition.sure, error, either))


def _arithmetic(to: Rounded) -> dict[str, Callable[..., Any]]:
    return {
        "+": lambda a, b: to(a.value + b.value, a.error + b.error),
        "-": lambda a, b: to(a.value - b.value, a.error + b.error),
        "*": partial(_multiply, to),
        "/": partial(_divide, to),
        "sqrt": partial(_sqrt, to),
    }


OPERATIONS: dict[str, Callable[..., Any]] = {
    **_arithmetic(rounded),
    "number": number,
    "negate": lambda a: Bounded(-a.value, a.error),
    "abs": lambda a: Bounded(a.value.abs(), a.error),
    "sign": _sign,
    "min": partial(_choice, torch.minimum),
    "max": partial(_choice, torch.maximum),
    "where": _where,
    "<": _comparison(torch.lt),
    "<=": _comparison(torch.le),
    ">": _comparison(torch.gt),
    ">=": _comparison(torch.ge),
    "==": _comparison(torch.eq),
    "!=": _comparison(torch.ne),
}
WIDE_OPERATIONS = {**OPERATIONS, **_arithmetic(widened), "number": exact}
