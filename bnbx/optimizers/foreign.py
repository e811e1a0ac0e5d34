"""State dicts of other libraries: translated to ours, and written in their format.

Where states and arguments lie in another library is data of the spec (`State.saved_as`,
`Optimizer.saved_as`); what holds for all optimizers of a library is in a module of its own. The
same keys do not prove the same rule, so a dict is taken only if its groups could be those of a
class that the spec names.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Container, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bnbx.errors import BnbxWarning, CheckpointError, OptionError
from bnbx.kernels.evaluate import evaluate, tensor_operations
from bnbx.kernels.signature import RESIDUAL
from bnbx.optimizers import foreign_bitsandbytes, foreign_torch
from bnbx.optimizers.resolution import TAGS
from bnbx.optimizers.state import ENGINE_KEYS, rule_keys
from bnbx.registry import optimizers
from bnbx.registry.formats import GroupFormat, Holds, parts_of, place_of
from bnbx.registry.optimizer import STEP, Optimizer
from bnbx.registry.options import OPTIONS

if TYPE_CHECKING:
    from bnbx.optimizers.engine import Optimizer8bit

LIBRARIES: Mapping[str, ModuleType] = {
    "torch": foreign_torch,
    "bitsandbytes": foreign_bitsandbytes,
}
OF_GROUPS = TAGS | {"params", "param_names"}


class Unfit(Exception):  # noqa: N818 - not an error: the next format may fit
    """Why a state dict is not of a format."""


def user_level() -> int:
    """The stack level, as a function that warns counts, of the first caller outside of bnbx."""
    level, frame = 1, inspect.currentframe()
    frame = frame and frame.f_back
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in ("bnbx", "torch"):
        level, frame = level + 1, frame.f_back
    return level


def translated(optimizer: Optimizer8bit, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict in our format.

    Raises:
        CheckpointError: it is of no class that is known to have the optimizer's rule.
    """
    if not {"state", "param_groups"} <= set(state_dict):
        raise CheckpointError(
            "this is no state dict of a bnbx optimizer, of torch.optim or of bitsandbytes: it has "
            f"the keys {sorted(map(str, state_dict))}; expected 'state', 'param_groups' and 'bnbx'"
        )
    dicts = _Dicts(state_dict, optimizer.param_groups, optimizer.resolution.names)
    reasons = []
    for name, form in optimizer.spec.saved_as.items():
        found = dicts.translated_or_reason(optimizer.spec, name, form)
        if not isinstance(found, str):
            return found
        reasons.append(f"{name}: {found}")
    raise CheckpointError(_no_format(optimizer.spec, dicts, reasons))


def _no_format(spec: Optimizer, dicts: _Dicts, reasons: list[str]) -> str:
    message = (
        f"the state dict has no 'bnbx' entry, and is none of another library that "
        f"{spec.name!r} can go on from. "
    )
    message += "; ".join(reasons) or "No other library is known to have this rule"
    fitting = [other.name for other in optimizers() if other is not spec and dicts.fit(other)]
    return message + (f". It fits the rule {' or '.join(fitting)}" if fitting else "")


class _Dicts:
    """A state dict of another library, and the groups that it is to be loaded into."""

    def __init__(
        self, state_dict: Mapping[str, Any], groups: list[dict[str, Any]], ours: Container[str]
    ) -> None:
        self.groups: list[Mapping[str, Any]] = list(state_dict["param_groups"])
        self.state: Mapping[Any, Any] = state_dict["state"]
        self.tags = {key for group in groups for key in group if key not in ours} | OF_GROUPS

    def fit(self, spec: Optimizer) -> bool:
        """Whether a rule can go on from it."""
        with contextlib.suppress(CheckpointError):
            tried = (self.translated_or_reason(spec, n, f) for n, f in spec.saved_as.items())
            return any(not isinstance(found, str) for found in tried)
        return False

    def translated_or_reason(
        self, spec: Optimizer, name: str, form: GroupFormat
    ) -> dict[str, Any] | str:
        """In our format, or why it is not of this one."""
        try:
            return self.translated(spec, name, form)
        except Unfit as why:
            return str(why)

    def translated(self, spec: Optimizer, name: str, form: GroupFormat) -> dict[str, Any]:
        """In our format, if it is of this one; else Unfit."""
        library = LIBRARIES.get(name.partition(".")[0])
        if library is None:
            raise Unfit("a library that is not known here")
        groups = [self._group(spec, form, library, group) for group in self.groups]
        types: dict[str, str] = {}
        state = {}
        for index, saved in self.state.items():
            if not isinstance(saved, Mapping):
                raise CheckpointError(f"state dict, parameter {index}: {saved!r}; expected a dict")
            flat = library.flat(saved)
            for key in sorted(set(map(str, flat)) - library.state_keys(spec)):
                raise Unfit(f"a state {key!r} is not its")
            for key in sorted(_needed(spec, name) - set(flat)) if flat else ():
                raise Unfit(f"its parameters have a state {key!r}")
            try:
                found = library.read(spec, flat, types)
            except CheckpointError as error:
                raise CheckpointError(f"state dict, parameter {index}: {error}") from None
            found |= _read(form, found)
            if not form.counts and found:
                found[STEP] = 1  # all that can be known: it is not the first
            if found:
                state[index] = found
        about = {"rule": spec.name, "quant_types": types}
        return {"state": state, "param_groups": groups, "bnbx": about}

    def _group(
        self, spec: Optimizer, form: GroupFormat, library: ModuleType, group: Mapping[str, Any]
    ) -> dict[str, Any]:
        keys = form.keys_for(spec, library.ELSEWHERE)
        found: dict[str, Any] = dict(form.only)
        for key, holds in keys.items():
            if key in group:
                found |= _held(form, key, holds, group[key])
            elif any(isinstance(part, str) and part for part in parts_of(holds)):
                raise Unfit(f"its groups have {key!r}")
        for pack, members in spec.packs.items():
            if pack in found and not _is_tuple(found[pack], len(members)):
                raise Unfit(f"its {pack} is {len(members)} numbers, not {found[pack]!r}")
        for name in form.nonzero:
            if name in found and not found[name]:
                raise Unfit(f"its {name} is never {found[name]!r}")
        for key in set(group) - set(keys):
            found |= self._other(spec, library, key, group[key])
        return _packed(spec, found)

    def _other(self, spec: Optimizer, library: ModuleType, key: str, value: Any) -> dict[str, Any]:
        """What a key adds to a group that the format says nothing about."""
        if key in library.WITHOUT_EFFECT:
            return {}
        if key in library.INERT:
            if value != library.INERT[key]:
                raise Unfit(f"its {key} is {library.INERT[key]!r}, not {value!r}")
            return {}
        if key in library.SHARED_OPTIONS:
            return {key: value}
        if key in spec.arguments or key in OPTIONS or key not in self.tags:
            raise Unfit(f"its groups have no {key!r}")
        return {key: value}


def _read(form: GroupFormat, found: Mapping[str, Any]) -> dict[str, Any]:
    """The states that are not what lies in their places."""
    code, values = form.read, dict(found)
    if not found.keys() >= {*code.reads, *code.writes}:
        return {}
    for statement in code.statements:
        target = values[statement.target]
        operations = tensor_operations(target.dtype, target.device)
        values[statement.target] = evaluate(statement.value, values, operations)
    return {name: values[name] for name in code.writes}


def _needed(spec: Optimizer, name: str) -> set[str]:
    """The states that are there whatever the values of hyperparameters."""
    places = (place_of(s, name.partition(".")[0]) for s in spec.states if s.when is None)
    return {place[0] for place in places if place}


def _held(form: GroupFormat, key: str, holds: Holds, value: Any) -> dict[str, Any]:
    """The arguments that a key of a group holds."""
    parts = parts_of(holds)
    if isinstance(holds, tuple) and not _is_tuple(value, len(parts)):
        raise Unfit(f"its {key} is {_words(holds)}, not {value!r}")
    values = value if isinstance(holds, tuple) else (value,)
    found = {}
    for part, one in zip(parts, values, strict=True):
        if isinstance(part, str):
            if part:
                found[part] = one
        elif one != part or isinstance(one, bool) != isinstance(part, bool):
            raise Unfit(f"its {key} is {_words(holds)}, not {value!r}")
    return found


def _is_tuple(value: Any, length: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == length


def _words(holds: Holds) -> str:
    words = [part or "(any)" if isinstance(part, str) else repr(part) for part in parts_of(holds)]
    return f"({', '.join(words)})" if isinstance(holds, tuple) else words[0]


def _packed(spec: Optimizer, found: dict[str, Any]) -> dict[str, Any]:
    """Hyperparameters that belong into a pack, in it."""
    for pack, members in spec.packs.items():
        if set(members) <= set(found):
            found[pack] = tuple(found.pop(member) for member in members)
    return found


# ---- writing


def written(optimizer: Optimizer8bit, state_dict: dict[str, Any], save_as: str) -> dict[str, Any]:
    """The state dict in the format of another library.

    States that it has no form for are written in float32, which loses nothing, with a warning.

    Raises:
        OptionError: `save_as` is no library that can be written for.
        CheckpointError: it has no such rule, or the rule not with these values.
    """
    library = LIBRARIES.get(str(save_as))
    if library is None or not hasattr(library, "write"):
        known = ["bnbx", *(name for name, each in LIBRARIES.items() if hasattr(each, "write"))]
        raise OptionError(f"save_as={save_as!r}: expected one of {', '.join(known)}")
    spec = optimizer.spec
    forms = [f for name, f in spec.saved_as.items() if name.partition(".")[0] == save_as]
    if not forms:
        raise CheckpointError(f"{save_as} has no {spec.name!r}; save_as='bnbx' holds everything")
    packed = state_dict["param_groups"]
    groups = [_written_group(spec, forms[0], library, save_as, group) for group in packed]
    state: dict[Any, Any] = {}
    notes: dict[str, None] = {}
    for group, entry in zip(optimizer.param_groups, packed, strict=True):
        values_of = optimizer.resolution.values_in(group)
        for p, index in zip(group["params"], entry["params"], strict=True):
            saved = state_dict["state"].get(index)
            if not saved:
                continue
            resolved = values_of(p)
            state[index], note = library.write(spec, p.shape, saved, resolved)
            notes |= dict.fromkeys(note)
            if RESIDUAL in saved:
                notes[f"{save_as} keeps no {RESIDUAL} of 16-bit parameters"] = None
            own = [repr(key) for key in saved if key not in rule_keys(spec) | ENGINE_KEYS]
            if own:
                notes[f"entries that are no state's are left out: {', '.join(own)}"] = None
    if notes:
        warnings.warn(
            f"save_as={save_as!r}: {'; '.join(notes)}", BnbxWarning, stacklevel=user_level()
        )
    return {"state": state, "param_groups": groups}


def _written_group(
    spec: Optimizer, form: GroupFormat, library: ModuleType, name: str, group: Mapping[str, Any]
) -> dict[str, Any]:
    """A group as the library has it."""
    values = {key: _plain(value) for key, value in group.items()}
    for pack, members in spec.packs.items():
        values |= dict(zip(members, values[pack], strict=True))
    refused = {**form.only, "maximize": False}
    for argument, only in refused.items():
        if values[argument] != only:
            raise CheckpointError(
                f"{spec.name}: {name} has the rule with {argument}={only!r} alone, and a group has "
                f"{argument}={values[argument]!r}; save_as='bnbx' holds everything"
            )
    ours = {*spec.arguments, *OPTIONS, *(m for members in spec.packs.values() for m in members)}
    found = {key: value for key, value in values.items() if key not in ours}
    for key, holds in form.keys_for(spec, library.ELSEWHERE).items():
        parts = tuple(
            (values[part] if part else 0.0) if isinstance(part, str) else part
            for part in parts_of(holds)
        )
        found[key] = parts if isinstance(holds, tuple) else parts[0]
    return {**library.INERT, **found}


def _plain(value: Any) -> Any:
    """A learning rate in a tensor as a number."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
