"""How other libraries write a rule's parameter groups and states: tables, read in both directions.

A library's class is known as "library.Class", such as "torch.SGD". Where its states lie is told by
`State.saved_as`, by library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field, PlainSerializer

from bnbx.registry.rule import Code, parse
from bnbx.registry.spec import Frozen

if TYPE_CHECKING:
    from bnbx.registry.optimizer import Optimizer, State

_PLACE = re.compile(r"(\w+?)(?:\[(\d+)\])?")
_CLASS = re.compile(r"\w+\.\w+")

Value = str | bool | float | None
Holds = Value | tuple[Value, ...]


def _frozen(table: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(dict(table))


Keys = Annotated[Mapping[str, Holds], AfterValidator(_frozen), PlainSerializer(dict)]
Only = Annotated[Mapping[str, Value], AfterValidator(_frozen), PlainSerializer(dict)]


class GroupFormat(Frozen):
    """The parameter groups of a class of another library that has the same rule.

    An argument that is not mentioned here lies under its own name.

    Attributes:
        keys: what a key of a group holds, or the parts of a key that is a tuple: an argument (its
            name), something without effect there (""), or always the same value (that value),
            which tells the class from others. A key that holds no argument may be missing.
        only: arguments that the class does not have, with the value that it is the same rule for.
        nonzero: arguments that are never zero there, which tells the class from others, too.
        counts: whether states have a `step`.
        called: what the library's optimizers and kernels call the rule, where they name it by a
            string.
        betas: the hyperparameters that its constructors take as `betas`, where these are not the
            rule's own.
        read_code: makes the rule's states of what lies in their places, where all of the states
            that it names are there; element by element, as eval_code does.
    """

    keys: Keys = Field(default_factory=dict, validate_default=True)
    only: Only = Field(default_factory=dict, validate_default=True)
    nonzero: tuple[str, ...] = ()
    counts: bool = True
    called: str = ""
    betas: tuple[str, ...] = ()
    read_code: str = ""

    @cached_property
    def read(self) -> Code:
        """Parsed `read_code`."""
        return parse(self.read_code, "read_code")

    @property
    def placed(self) -> set[str]:
        """The arguments that lie under another name than their own, or nowhere."""
        held = {part for holds in self.keys.values() for part in parts_of(holds)}
        named = (part for part in held if isinstance(part, str) and part)
        return {*self.only, *named}

    def keys_for(self, spec: Optimizer, elsewhere: Set[str]) -> dict[str, Holds]:
        """What each key of a group of this rule holds, but for arguments that lie elsewhere."""
        placed = self.placed | elsewhere
        packs = {pack for pack, members in spec.packs.items() if placed & {*members}}
        own = {name: name for name in spec.arguments if name not in placed | packs}
        return {**own, **self.keys}


FormatTable = Annotated[Mapping[str, GroupFormat], AfterValidator(_frozen), PlainSerializer(dict)]


def parts_of(holds: Holds) -> tuple[Value, ...]:
    """What a key holds, as a tuple."""
    return holds if isinstance(holds, tuple) else (holds,)


def place_of(state: State, library: str) -> tuple[str, int | None] | None:
    """The key of a state in a library's checkpoints, and its place in a stack; None for none."""
    found = _PLACE.fullmatch(state.saved_as.get(library, ""))
    if found is None:
        return None
    key, index = found.groups()
    return key, None if index is None else int(index)


def check_formats(spec: Optimizer) -> None:
    """Raise ValueError where formats name what `spec` does not have."""
    for name, form in spec.saved_as.items():
        if not _CLASS.fullmatch(name):
            raise ValueError(f"saved_as: {name!r}; expected 'library.Class'")
        named = {*form.placed, *form.nonzero, *form.betas}
        for argument in sorted(named - {*spec.arguments, *spec.hyper}):
            raise ValueError(
                f"saved_as[{name!r}] names {argument!r}; there are {', '.join(spec.arguments)}"
            )
        states = [state.name for state in spec.states]
        for state_name in (*form.read.reads, *form.read.writes):
            if state_name not in states:
                raise ValueError(
                    f"saved_as[{name!r}]: read_code names {state_name!r}; "
                    f"the states are {', '.join(states)}"
                )
    libraries = {name.partition(".")[0] for name in spec.saved_as}
    for state in spec.states:
        for library, place in state.saved_as.items():
            if library not in libraries:
                raise ValueError(
                    f"state {state.name!r}: saved_as has {library!r}, but the saved_as of the rule "
                    f"has no class of {library}, and its checkpoints would not be read; name the "
                    f"class too: Optimizer(saved_as={{'{library}.Class': GroupFormat()}}), or "
                    f"leave {library!r} out"
                )
            if place_of(state, library) is None:
                raise ValueError(
                    f"state {state.name!r}: saved_as[{library!r}] is {place!r}; expected a key, "
                    "or key[0] for the first of several states under one key"
                )
