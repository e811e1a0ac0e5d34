"""Functions that take their arguments in one of several orders, as versions of a library had them.

A call is meant in the first order in which it makes sense: every required argument is there, none
twice, tensors stand where tensors belong and numbers where numbers do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])
Order = Sequence[str]


def orders(
    *others: str, tensors: str, either: str = "", optional: Collection[str] = ()
) -> Callable[[F], F]:
    """Lets a function be called in other orders than its own.

    Args:
        others: names of arguments in another order, with spaces between.
        tensors: names of those that are tensors, or None.
        either: names of those that may be tensors or numbers.
        optional: names of those that a call may leave out; the default is the function's, else 0.
    """
    of_tensors, of_either = set(tensors.split()), set(either.split())

    def decorate(function: F) -> F:
        code = function.__code__
        own = code.co_varnames[: code.co_argcount]
        every = (own, *(tuple(other.split()) for other in others))
        without_default = own[: len(own) - len(function.__defaults__ or ())]
        missing = {name: 0.0 for name in optional if name in without_default}

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for order in every:
                if _fits(order, args, kwargs, of_tensors, of_either, optional):
                    named = dict(zip(order, args, strict=False))
                    return function(**{**missing, **named, **kwargs})
            return function(*args, **kwargs)  # which says what is missing

        return call  # type: ignore[return-value]

    return decorate


def _fits(
    order: Order,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tensors: Collection[str],
    either: Collection[str],
    optional: Collection[str],
) -> bool:
    placed = order[: len(args)]
    if len(args) > len(order) or any(name in kwargs for name in placed):
        return False
    given = [*placed, *kwargs]
    if not all(name in given or name in optional for name in order):
        return False
    for name, value in zip(placed, args, strict=False):
        if name in either:
            continue
        if name in tensors:
            if not (value is None or isinstance(value, Tensor)):
                return False
        elif value is None or isinstance(value, Tensor):
            return False
    return True
