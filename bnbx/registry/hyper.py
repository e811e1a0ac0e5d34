"""Hyperparameters: their defaults, and the values that they may take."""

from __future__ import annotations

import math
from typing import Annotated, Any

from bnbx.errors import OptionError
from bnbx.registry.spec import Frozen, NotText


class Hyper(Frozen):
    """A hyperparameter: its default (None: required) and the values it may take.

    An optional one may be None, which the rule text reads as 0. A flag is compiled into the
    kernel, as is the truth of any hyperparameter that the rule uses bare as a condition; all
    other values reach the kernel at launch.
    """

    default: Annotated[float | bool | None, NotText]
    minimum: Annotated[float | None, NotText] = None
    below: Annotated[float | None, NotText] = None
    positive: bool = False
    flag: bool = False
    optional: bool = False

    @classmethod
    def written(cls, value: object) -> str:
        """The function that makes one of this default; which one, only its author knows."""
        if isinstance(value, bool):
            return f"flag({value})"
        default = value if isinstance(value, (int, float)) else "1e-3"
        return f"rate({default}), or by the values it may take: fraction, positive, number, steps"

    @property
    def required(self) -> bool:
        """Whether users have to give it."""
        return self.default is None and not self.optional

    def check(self, name: str, value: Any) -> float | bool:
        """Return `value` as a number this hyperparameter can take.

        Raises:
            OptionError: saying what it can take.
        """
        if value is None and self.optional:
            return 0.0
        if self.flag:
            if not isinstance(value, bool):
                raise OptionError(f"{name}={value!r}: expected True or False")
            return value
        try:
            number = math.nan if isinstance(value, str) else float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise OptionError(f"{name}={value!r}: expected a number {self.range}") from None
        inside = (
            math.isfinite(number)
            and not (self.minimum is not None and number < self.minimum)
            and not (self.below is not None and number >= self.below)
            and not (self.positive and number <= 0)
        )
        if isinstance(value, bool) or not inside:
            raise OptionError(f"{name}={value!r}: expected a number {self.range}")
        return number

    @property
    def range(self) -> str:
        """The allowed values in words."""
        if self.flag:
            return "True or False"
        parts = [f">= {self.minimum:g}"] if self.minimum is not None else []
        parts += ["> 0"] if self.positive else []
        parts += [f"< {self.below:g}"] if self.below is not None else []
        return (" and ".join(parts) or "(finite)") + (", or None" if self.optional else "")


def rate(default: float | None = None) -> Hyper:
    """A number >= 0, such as a learning rate or a weight decay."""
    return Hyper(default=default, minimum=0.0)


def fraction(default: float | None = None) -> Hyper:
    """A number in [0, 1), such as a decay rate."""
    return Hyper(default=default, minimum=0.0, below=1.0)


def positive(default: float | None = None) -> Hyper:
    """A number > 0."""
    return Hyper(default=default, positive=True)


def number(default: float | None = None) -> Hyper:
    """Any finite number."""
    return Hyper(default=default)


def flag(default: bool) -> Hyper:
    """True or False, compiled into the kernel."""
    return Hyper(default=default, flag=True)


def steps() -> Hyper:
    """A number of steps >= 0, or None (the default) for none."""
    return Hyper(default=None, minimum=0.0, optional=True)
