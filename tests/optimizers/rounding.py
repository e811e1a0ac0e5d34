"""Arithmetic that carries a proven bound on what float32 rounding can do to a result.

A `Bounded` is the exact value, in float64, and a bound on how far the same value computed in
float32 may lie from it. `OPERATIONS` is a table for `bnbx.kernels.evaluate.evaluate`, so a rule's
own text, evaluated with it, says what a correct kernel may return. No tolerance is chosen.

The bounds are the usual ones of running error analysis. A float32 operation returns its exact
result r, of the inputs it got, with an error of at most UNIT * |r| + TINY; an error of an input is
carried along by the operation's derivative, or by its worst case where there is none. Kernels run
the lowered text, in which factors that are the same for all elements are gathered in float64 and
rounded once: that takes roundings away and adds none, so a bound for the text as it is written
holds for them too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Half the distance of neighboring float32 numbers near 1. The little more covers the rounding of
# float64 (2**-53 for each operation), in which values and bounds are computed.
UNIT = 2.0**-24 * (1 + 2.0**-10)
TINY = 2.0**-149  # likewise where the result is subnormal


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
    tensor = torch.tensor(float(value), dtype=torch.float64)
    return Bounded(tensor, UNIT * tensor.abs() + TINY)


def number(value: float) -> Bounded:
    """A literal of the text: float32 has many of them exactly."""
    rounded = float(torch.tensor(value, dtype=torch.float32))
    return exact(value) if rounded == value else scalar(value)


def rounded(value: Tensor, error: Tensor) -> Bounded:
    """The result of one float32 operation whose inputs alone allow `error`."""
    return Bounded(value, error + UNIT * (value.abs() + error) + TINY)


def _multiply(a: Bounded, b: Bounded) -> Bounded:
    error = a.value.abs() * b.error + b.value.abs() * a.error + a.error * b.error
    return rounded(a.value * b.value, error)


def _divide(a: Bounded, b: Bounded) -> Bounded:
    quotient = a.value / b.value
    room = b.value.abs() - b.error
    error = (a.error + quotient.abs() * b.error) / room
    return rounded(quotient, torch.where(room > 0, error, torch.inf))


def _sqrt(a: Bounded) -> Bounded:
    # |sqrt(a + d) - sqrt(a)| = |d| / (sqrt(a + d) + sqrt(a)) is at most either of these.
    root = a.value.sqrt()
    return rounded(root, torch.minimum(a.error / root.clamp(min=1e-300), a.error.sqrt()))


def _sign(a: Bounded) -> Bounded:
    sign = a.value.sign()
    sure = (a.value.abs() > a.error) | (a.error == 0)
    return Bounded(sign, torch.where(sure, 0.0, 1.0 + sign.abs()))


def _least(a: Bounded, b: Bounded) -> Bounded:
    return Bounded(torch.minimum(a.value, b.value), torch.maximum(a.error, b.error))


def _greatest(a: Bounded, b: Bounded) -> Bounded:
    return Bounded(torch.maximum(a.value, b.value), torch.maximum(a.error, b.error))


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


OPERATIONS: dict[str, Callable[..., Any]] = {
    "number": number,
    "negate": lambda a: Bounded(-a.value, a.error),
    "+": lambda a, b: rounded(a.value + b.value, a.error + b.error),
    "-": lambda a, b: rounded(a.value - b.value, a.error + b.error),
    "*": _multiply,
    "/": _divide,
    "sqrt": _sqrt,
    "abs": lambda a: Bounded(a.value.abs(), a.error),
    "sign": _sign,
    "min": _least,
    "max": _greatest,
    "where": _where,
    "<": _comparison(torch.lt),
    "<=": _comparison(torch.le),
    ">": _comparison(torch.gt),
    ">=": _comparison(torch.ge),
    "==": _comparison(torch.eq),
    "!=": _comparison(torch.ne),
}
