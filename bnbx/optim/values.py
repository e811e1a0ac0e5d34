"""Values as callers give them, made those that the engine takes.

An `args` object, betas in a string, and what a class fixes by its name.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from bnbx.errors import BnbxWarning, OptionError
from bnbx.optim.base import OptimizerArgs
from bnbx.optim.signatures import ARGS
from bnbx.registry import Optimizer as OptimizerSpec
from bnbx.registry.options import unaliased

FIELDS = tuple(OptimizerArgs.__annotations__)


def plain(label: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values by our names, those of an `args` object among them.

    Raises:
        OptionError: a value is given twice, by two names or in `args` too, and differs.
    """
    values = unaliased({name: value for name, value in given.items() if name != ARGS})
    if given.get(ARGS) is None:
        return values
    for name, value in unaliased(_fields(label, given[ARGS])).items():
        if name in values and values[name] != value:
            raise OptionError(
                f"{label}: {name} is {values[name]!r} by argument and {value!r} in args; "
                "give it once"
            )
        values[name] = value
    return values


def _fields(label: str, args: Any) -> dict[str, Any]:
    found = {name: getattr(args, name) for name in FIELDS if hasattr(args, name)}
    if not found:
        raise OptionError(
            f"{label}: args={args!r}: expected an object with any of the attributes "
            f"{', '.join(FIELDS)}, such as types.SimpleNamespace(optim_bits=8)"
        )
    return found


def with_numbers(spec: OptimizerSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with every pack that is text, such as "(0.9, 0.999)", as numbers.

    Raises:
        OptionError: the text holds something else.
    """
    packs = {name: values[name] for name in spec.packs if isinstance(values.get(name), str)}
    return {**values, **{name: numbers(name, text) for name, text in packs.items()}}


def numbers(name: str, text: str) -> tuple[float, ...]:
    """The numbers of a text such as "(0.9, 0.999)"."""
    try:
        return tuple(float(part) for part in text.strip("()[] ").split(",") if part.strip())
    except ValueError:
        raise OptionError(f"{name}={text!r}: expected numbers, such as (0.9, 0.999)") from None


def with_fixed(
    label: str, values: Mapping[str, Any], fixed: Mapping[str, Any], ignored: Mapping[str, Any]
) -> dict[str, Any]:
    """The values with what a class fixes.

    Args:
        label: the class.
        values: what was given.
        fixed: value by option.
        ignored: by option, the value that bitsandbytes demands here though it means nothing.

    Raises:
        OptionError: a value that contradicts the class.
    """
    for name, value in fixed.items():
        given = values.get(name, value)
        if given == value or (value is True and given == "managed"):
            continue
        if name in ignored and given == ignored[name]:
            warnings.warn(
                f"{label}: {name}={given!r}, the default that bitsandbytes has here, is not "
                f"followed: the class stands for {name}={value!r}; leave it out",
                BnbxWarning,
                stacklevel=3,
            )
            continue
        raise OptionError(
            f"{label}: {name}={given!r} contradicts the class, which stands for {name}={value!r}; "
            f"use the class without that in its name, or bnbx.optim.create(..., {name}={given!r})"
        )
    managed = {name: "managed" for name in fixed if values.get(name) == "managed"}
    return {**values, **fixed, **managed}
