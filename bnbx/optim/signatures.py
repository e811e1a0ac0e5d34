"""Signatures of the familiar classes: made from specs, and found out for calls in older orders.

A class takes the arguments of its rule in their order, then a tail in the order of bitsandbytes
0.50.2, then everything else by keyword. Up to the tail torch.optim, bitsandbytes and the specs
agree. Two older or other orders share its places with values of other types, which tells them
apart:

- bitsandbytes before 0.50 had percentile_clipping (a whole number, such as 100) and block_wise
  (True or False) after min_8bit_size, where max_unorm or is_paged is now;
- torch.optim.RMSprop and Adagrad go on with capturable and foreach (None, True or False), where
  optim_bits is.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from inspect import Parameter, Signature
from typing import Any

import torch

from bnbx.errors import BnbxWarning, UnknownNameError
from bnbx.optimizers import engine
from bnbx.registry import Optimizer as OptimizerSpec
from bnbx.registry.names import nearest
from bnbx.registry.options import ALIASES, options_of

SIZE, CLIPPING, BLOCKS = "min_8bit_size", "percentile_clipping", "block_wise"
ARGS = "args"
# What the engine's constructor takes by keyword, such as overrides and foreach.
ENGINE: Mapping[str, Parameter] = {
    name: parameter
    for name, parameter in inspect.signature(engine.Optimizer8bit.__init__).parameters.items()
    if parameter.kind is Parameter.KEYWORD_ONLY
}
TYPES: Mapping[str, str] = {
    "params": "ParamsT",
    ARGS: "object",
    "bits": "int",
    "state_types": "str | Mapping[str, str] | None",
    SIZE: "int",
    BLOCKS: "bool",
    CLIPPING: "int",
    "skip_zeros": "bool",
    "max_unorm": "float",
    "master": "str",
    "maximize": "bool",
    "paged": "bool | str",
}


def signature_of(
    spec: OptimizerSpec, tail: Sequence[str], defaults: Mapping[str, Any], extra: Iterable[str]
) -> Signature:
    """(params, *arguments of the rule, *tail, *, all other options).

    Args:
        spec: the rule.
        tail: what follows the rule's arguments by position.
        defaults: those that are not the rule's or the option's own.
        extra: names of further keywords, False by default.
    """
    known = {**{a: spec.default(a) for a in spec.arguments}, **options_of(spec), ARGS: None}
    known |= {name: parameter.default for name, parameter in ENGINE.items()}
    known |= dict.fromkeys(extra, False)
    known |= defaults
    known |= {alias: known[name] for alias, name in ALIASES.items()}
    first = [name for name in spec.arguments if name not in tail]
    rest = [name for name in known if name not in first and name not in tail]
    made = [Parameter("params", Parameter.POSITIONAL_OR_KEYWORD, annotation=TYPES["params"])]
    for names, kind in (
        ((*first, *tail), Parameter.POSITIONAL_OR_KEYWORD),
        (rest, Parameter.KEYWORD_ONLY),
    ):
        for name in names:
            required = name in spec.arguments and known[name] is None and spec.required(name)
            default = Parameter.empty if required else known[name]
            made.append(Parameter(name, kind, default=default, annotation=type_of(spec, name)))
    return Signature(made)


def type_of(spec: OptimizerSpec, name: str) -> str:
    """The type of an argument, as Python source."""
    if name in spec.packs:
        return "Sequence[float] | str"
    if name in spec.hyper:
        hyper = spec.hyper[name]
        return "bool" if hyper.flag else "float | None" if hyper.optional else "float | Tensor"
    if name in ENGINE:
        return str(ENGINE[name].annotation)
    return TYPES.get(ALIASES.get(name, name), "bool")


def bound(
    label: str,
    signature: Signature,
    args: Sequence[Any],
    keywords: Mapping[str, Any],
    like: str = "",
) -> dict[str, Any]:
    """What a call gives, by name.

    Args:
        label: the class, for errors.
        signature: its arguments.
        args: what is given by position.
        keywords: what is given by name.
        like: name of the class in torch.optim whose calls are to work, if there is such a class.

    Raises:
        TypeError: too many arguments, one given twice, or a required one missing.
        UnknownNameError: a keyword that is no argument; with the nearest that is.
    """
    check_names(label, keywords, list(signature.parameters))
    order = _order(label, signature, args, like)
    try:
        return dict(order.bind(*args, **keywords).arguments)
    except TypeError as error:
        raise TypeError(f"{label}{order}: {error}") from None


def check_names(label: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Raise UnknownNameError for a name that is not known."""
    for name in names:
        if name not in known:
            raise UnknownNameError(
                f"{label} has no argument {name!r}{nearest(name, known)}; "
                f"it has: {', '.join(known)}"
            )


def _order(label: str, signature: Signature, args: Sequence[Any], like: str) -> Signature:
    """The signature in the order that a call's arguments by position are meant in."""
    by_place = [p.name for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]
    where = by_place.index(SIZE) + 1 if SIZE in by_place else len(args)
    if where < len(args) and _is_percentile(args[where]):
        blocks = where + 1 < len(args) and isinstance(args[where + 1], bool)
        added = [CLIPPING, BLOCKS] if blocks else [CLIPPING]
        warnings.warn(
            f"{label}: {args[where]!r} after {SIZE} is taken for {CLIPPING}, as in the argument "
            f"order of bitsandbytes before 0.50; pass what follows {SIZE} by keyword",
            BnbxWarning,
            stacklevel=4,
        )
        return _reordered(signature, [*by_place[:where], *added, *by_place[where:]])
    theirs = _torch_order(like)
    parted = _common(by_place, theirs)
    if theirs[parted:] and parted < len(args) and _is_switch(args[parted]):
        return _reordered(signature, theirs)
    return signature


def _is_percentile(value: Any) -> bool:
    """Whether it can be a percentile but hardly a max_unorm, and no is_paged."""
    return isinstance(value, int) and not isinstance(value, bool) and 2 <= value <= 100


def _is_switch(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _torch_order(name: str) -> list[str]:
    """Names, in order, of torch.optim's optimizer of this name; none if there is no such."""
    found = getattr(torch.optim, name, None)
    if not isinstance(found, type):
        return []
    parameters = inspect.signature(found).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def _common(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """How many names two orders begin with alike."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


def _reordered(signature: Signature, names: Sequence[str]) -> Signature:
    """These by position, all others by keyword."""
    parameters = signature.parameters
    first = [parameters[name].replace(kind=Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    rest = [
        parameter.replace(kind=Parameter.KEYWORD_ONLY)
        for name, parameter in parameters.items()
        if name not in names
    ]
    return Signature([*first, *rest])
