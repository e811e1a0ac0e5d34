"""State dicts: what they hold, and how any of them becomes the states of an optimizer.

A state dict carries the tables of its quant types, so it can be read wherever bnbx is, whatever is
registered there. Dicts of other libraries are translated to ours first (`foreign`). States that
are not stored as the optimizer stores them are converted, with one warning that says which.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bnbx.errors import (
    BnbxError,
    BnbxWarning,
    CheckpointError,
    OptionError,
    SpecError,
    UnknownNameError,
)
from bnbx.kernels.plan import Storage
from bnbx.kernels.signature import RESIDUAL, absmax_name
from bnbx.optimizers import foreign, hooks
from bnbx.optimizers.clipping import HISTORY, NORMS
from bnbx.optimizers.matching import merged_groups, saved_numbers
from bnbx.optimizers.state import (
    ENGINE_KEYS,
    WHOLE,
    Entry,
    ParameterState,
    check_states,
    encoded,
    engine_entries,
    entries_of,
    label_of,
    maker,
    own_entry,
    rule_keys,
    storage_of,
    type_key,
    values_of,
)
from bnbx.registry import QuantType, optimizers, quant_types
from bnbx.registry.config import Resolved
from bnbx.registry.optimizer import STEP, State

if TYPE_CHECKING:
    from bnbx.optimizers.engine import Optimizer8bit

FORMAT = 2  # of state dicts; raised when their layout changes
HEADER = "bnbx"
# How states are stored is the business of the optimizer that loads them.
STORAGE_OPTIONS = frozenset("bits state_types min_8bit_size block_wise master paged".split())
# What the engine keeps beside the states of the rule, in either of the forms that it may have.
ENGINE_DTYPES = {
    RESIDUAL: (torch.int8, torch.bfloat16, torch.float16),
    NORMS: (torch.float32,),
}
MOST_STEPS = 2**53  # up to which float64 counts
MOST_LABEL = 1000  # bytes of the label of a quant type
MOST_JSON = 100_000  # characters of a quant type; a table of 8 bits takes a tenth
Groups = list[dict[str, Any]]
Loaded = tuple[Groups, dict[Tensor, ParameterState]]


def written(optimizer: Optimizer8bit, state_dict: dict[str, Any], save_as: str) -> dict[str, Any]:
    """A state dict of torch's with our header, or in the format of another library."""
    if save_as == HEADER:
        keys = [type_key(state.name) for state in optimizer.spec.states]
        found = {**state_dict, HEADER: header(optimizer)}
        if "state" in found:  # hooks may have made another dict of it
            found["state"] = {i: _with_labels(saved, keys) for i, saved in found["state"].items()}
        return found
    return foreign.written(optimizer, state_dict, save_as)


def _with_labels(saved: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The states of a parameter with labels of types as the tensors of their bytes.

    torch.distributed.checkpoint flattens tensors and numbers only, and reads into tensors in place.
    """
    labels = {key: list(saved[key].encode()) for key in keys if key in saved}
    made = {k: torch.tensor(v, dtype=torch.uint8, device="cpu") for k, v in labels.items()}
    return {**saved, **made}


def _text(label: str, value: Any) -> Any:
    """A label that `_with_labels` made a tensor, or what else is there."""
    if not isinstance(value, Tensor):
        return value
    _check_entry(label, value, Entry(value.shape, torch.uint8))
    return bytes(value.reshape(-1)[:MOST_LABEL].tolist()).decode(errors="replace")


def types_of(optimizer: Optimizer8bit) -> dict[str, str]:
    """The specs of the quant types of all states, by name, as JSON."""
    keys = [type_key(state.name) for state in optimizer.spec.states]
    labels = {saved[key] for saved in optimizer.state.values() for key in keys if key in saved}
    names = sorted({label.removesuffix(WHOLE) for label in labels})
    return {name: quant_types().get(name).to_json() for name in names}


def check_types(saved: Mapping[str, str]) -> None:
    """Raise CheckpointError if a type of `types_of` means other numbers here, by its codes."""
    for name, text in saved.items():
        here = quant_types().get(name)
        if _quant_type(name, text).meaning != here.meaning:
            raise CheckpointError(
                f"this optimizer was pickled with a quant type {name!r} that means other numbers "
                f"than the registered one, from {quant_types().package(name)}. Load it with the "
                "version of the package that wrote it and save its state_dict() there: that "
                "is converted when it is loaded"
            )


def header(optimizer: Optimizer8bit) -> dict[str, Any]:
    """What a state dict says of itself."""
    return {
        "format": FORMAT,
        "rule": optimizer.spec.name,
        "rule_digest": optimizer.spec.digest,
        "mode": optimizer.mode,
        "quant_types": types_of(optimizer),
    }


def read(optimizer: Optimizer8bit, state_dict: dict[str, Any]) -> Loaded:
    """The groups and states of a state dict, checked; nothing of the optimizer changes.

    Raises:
        CheckpointError: it does not fit.
    """
    state_dict = hooks.before_loading(optimizer, state_dict)
    try:
        return _Reading(optimizer, state_dict).result()
    except (BnbxError, torch.cuda.OutOfMemoryError):
        raise
    except (TypeError, LookupError, AttributeError, RuntimeError, ValueError, ArithmeticError) as e:
        raise CheckpointError(f"the state dict is malformed: {type(e).__name__}: {e}") from e


class _Reading:
    def __init__(self, optimizer: Optimizer8bit, state_dict: dict[str, Any]) -> None:
        ours = HEADER in state_dict or _has_our_groups(state_dict)
        if not ours:
            state_dict = foreign.translated(optimizer, state_dict)
            state_dict[HEADER]["format"] = FORMAT
        self.optimizer = optimizer
        self.state_dict = state_dict
        self.types = _check_header(optimizer, state_dict)
        header = state_dict.get(HEADER, {}).get("mode")
        self.mode = optimizer.modes.saved(state_dict["param_groups"], header)
        if ours:
            _check_groups(optimizer, state_dict)
        self.converted: dict[str, int] = {}

    def result(self) -> Loaded:
        saved_groups = self.state_dict["param_groups"]
        numbers = saved_numbers(self.optimizer.param_groups, saved_groups)
        groups = merged_groups(self.optimizer.param_groups, saved_groups, STORAGE_OPTIONS)
        _check_indices(saved_groups, self.state_dict["state"])
        loaded: dict[Tensor, ParameterState] = {}
        for number, (group, indices) in enumerate(zip(groups, numbers, strict=True)):
            for p, index in zip(group["params"], indices, strict=True):
                saved = None if index is None else self.state_dict["state"].get(index)
                label = f"state dict, group {number}, parameter {index}"
                resolved = self.resolved(label, p, group)
                if saved:
                    loaded[p] = self.states(label, p, saved, resolved)
        if self.converted:
            what = ", ".join(f"{n} x {words}" for words, n in sorted(self.converted.items()))
            warnings.warn(
                f"states of the checkpoint are converted to what this optimizer asks for: {what}",
                BnbxWarning,
                stacklevel=foreign.user_level(),
            )
        self.optimizer.modes.put(groups, self.mode)
        return groups, loaded

    def resolved(self, label: str, p: Tensor, group: Mapping[str, Any]) -> Resolved:
        try:
            return self.optimizer.resolution.values_in(group)(p)
        except (OptionError, UnknownNameError) as error:
            raise CheckpointError(f"{label}: {error}") from None

    def states(self, label: str, p: Tensor, saved: Any, resolved: Resolved) -> ParameterState:
        """The states of one parameter, on its device, stored as it asks for."""
        if not isinstance(saved, Mapping):
            raise CheckpointError(f"{label}: {saved!r}; expected a dict of states")
        found: ParameterState = {STEP: saved.get(STEP)}
        if isinstance(found[STEP], int) and found[STEP] >= MOST_STEPS:
            raise CheckpointError(
                f"{label}: 'step' is {MOST_STEPS} or more; expected what float64 can count"
            )
        rest = set(saved) - ENGINE_KEYS
        for state in self.optimizer.spec.states:
            keys = {state.name, absmax_name(state.name), type_key(state.name)}
            if state.name in saved:
                found |= self.state(label, p, state, saved, resolved)
            rest -= keys if state.name in saved else set()
        found |= self.engine_states(label, p, saved, resolved)
        found |= {key: self.own(label, key, saved[key], p) for key in rest}
        check_states(label, p, found, self.optimizer.spec, resolved)
        return {key: found[key] for key in (*saved, *found) if key in found}  # in saved order

    def state(
        self, label: str, p: Tensor, state: State, saved: Mapping[str, Any], resolved: Resolved
    ) -> ParameterState:
        held = self.held(label, state, saved)
        wanted = storage_of(state, resolved, p.numel())
        entries = entries_of(held, p.shape)
        for key, entry in entries.items():
            _check_entry(f"{label}: {key!r}", saved.get(key), entry)
        if _same(held, wanted):
            tensors = {key: saved[key] for key in entries}
        else:
            self.note(f"{state.name} from {label_of(held)} to {label_of(wanted)}")
            tensors = encoded(wanted, values_of(held, saved, p.shape))
        found = {key: self.placed(tensor, p, resolved) for key, tensor in tensors.items()}
        if wanted.quant_type is not None:
            found[type_key(state.name)] = label_of(wanted)  # type: ignore[assignment]
        return found

    def held(self, label: str, state: State, saved: Mapping[str, Any]) -> Storage:
        """How a state lies in the state dict."""
        keys = absmax_name(state.name), type_key(state.name)
        if not any(key in saved for key in keys):
            return Storage(state, None)
        for key in keys:
            if key not in saved:
                raise CheckpointError(f"{label}: {key!r} is missing; there are {sorted(saved)}")
        text = _text(f"{label}: {keys[1]!r}", saved[keys[1]])
        name = str(text).removesuffix(WHOLE)
        known = set(quant_types().names() if self.types is None else self.types)
        if name not in known:
            where = "registered" if self.types is None else "in the state dict"
            raise CheckpointError(
                f"{label}: state {state.name!r} is of quant type {text!r}, which is not {where}; "
                f"there are {', '.join(sorted(known)) or '(none)'}"
            )
        quant_type = quant_types().get(name) if self.types is None else self.types[name]
        return Storage(state, quant_type, not str(text).endswith(WHOLE))

    def engine_states(
        self, label: str, p: Tensor, saved: Mapping[str, Any], resolved: Resolved
    ) -> ParameterState:
        """Residual and norms: taken over where they fit, else begun anew."""
        found: ParameterState = {}
        entries = engine_entries(p, resolved)
        shapes = {RESIDUAL: p.shape, NORMS: torch.Size([HISTORY])}
        for key, dtypes in ENGINE_DTYPES.items():
            value, entry = saved.get(key), entries.get(key)
            if value is not None:
                dtype = getattr(value, "dtype", None)
                kept = Entry(shapes[key], dtype if dtype in dtypes else dtypes[0])
                _check_entry(f"{label}: {key!r}", value, kept)
            if value is not None and entry == Entry(value.shape, value.dtype):
                # These stay with the parameter, wherever its states are.
                found[key] = value.to(p.device, copy=True, memory_format=torch.contiguous_format)
                continue
            if entry is not None:
                found[key] = torch.zeros(entry.shape, dtype=entry.dtype, device=p.device)
            if value is not None and key == RESIDUAL:
                self.note("residual dropped")
        return found

    def own(self, label: str, key: Any, value: Any, p: Tensor) -> Any:
        """An entry that is no state's: somebody's own, unless the name is that of another rule."""
        spec = self.optimizer.spec
        if key not in rule_keys(spec):
            for other in optimizers():
                if key in rule_keys(other):
                    raise CheckpointError(
                        f"{label}: unexpected {key!r}, a state of {other.name!r}; {spec.name!r} "
                        f"has {sorted(state.name for state in spec.states)}. An entry of your own "
                        "needs a name that no rule has"
                    )
        if isinstance(value, Tensor) and value.layout is torch.strided:
            _check_memory(f"{label}: {key!r}", value)
        return own_entry(value, p)

    def placed(self, tensor: Tensor, p: Tensor, resolved: Resolved) -> Tensor:
        """A copy, contiguous, where the states of `p` live."""
        make = maker(p, resolved, self.optimizer.pages)
        return make(Entry(tensor.shape, tensor.dtype), 0).copy_(tensor)

    def note(self, words: str) -> None:
        self.converted[words] = self.converted.get(words, 0) + 1


def _check_header(
    optimizer: Optimizer8bit, state_dict: Mapping[str, Any]
) -> dict[str, QuantType] | None:
    """The quant types that a state dict brings along; None for those that are registered."""
    about = state_dict.get(HEADER)
    if about is None:
        return None  # torch.distributed.checkpoint keeps states and groups only
    if not isinstance(about, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise CheckpointError(
            f"the state dict has the keys {sorted(map(str, state_dict))}; expected 'state', "
            f"'param_groups' and {HEADER!r}"
        )
    if about.get("format") != FORMAT:
        raise CheckpointError(
            f"the state dict has format {about.get('format')!r}; this version of bnbx reads "
            f"format {FORMAT}. Load it with the version that wrote it."
        )
    spec = optimizer.spec
    if about.get("rule") != spec.name:
        raise CheckpointError(
            f"the state dict is of rule {about.get('rule')!r}, this optimizer is {spec.name!r}"
        )
    if about.get("rule_digest", spec.digest) != spec.digest:
        warnings.warn(
            f"the rule {spec.name!r} has changed since the checkpoint was written: its states "
            "are taken over as they are",
            BnbxWarning,
            stacklevel=foreign.user_level(),
        )
    tables = about.get("quant_types", {})
    if not isinstance(tables, Mapping):
        raise CheckpointError(f"the quant types of the state dict are malformed: {tables!r:.200}")
    return {name: _quant_type(name, text) for name, text in tables.items()}


def _quant_type(name: Any, text: Any) -> QuantType:
    """A quant type that a state dict brings along."""
    try:
        if not isinstance(text, str) or len(text) > MOST_JSON:
            raise SpecError(f"expected JSON of at most {MOST_JSON} characters")
        found = QuantType.from_json(text)
        if found.name != name:
            raise SpecError(f"it calls itself {found.name!r}")
    except SpecError as error:
        raise CheckpointError(f"quant type {name!r} of the state dict: {error}") from None
    return found


def _check_groups(optimizer: Optimizer8bit, state_dict: Mapping[str, Any]) -> None:
    """Groups of the same rule have all of its arguments; those of a changed one may not."""
    spec, about = optimizer.spec, state_dict.get(HEADER, {})
    if about.get("rule_digest", spec.digest) != spec.digest:
        return
    for number, group in enumerate(state_dict["param_groups"]):
        missing = [name for name in ("params", *spec.arguments) if name not in group]
        if missing:
            raise CheckpointError(f"state dict, group {number}: {', '.join(missing)} missing")


def _check_indices(groups: Groups, state: Any) -> None:
    """Each parameter has a number, and states belong to these numbers."""
    if not isinstance(state, Mapping):
        raise CheckpointError(f"'state' of the state dict is {type(state).__name__}, not a dict")
    indices = [index for group in groups for index in group["params"]]
    if len(set(indices)) < len(indices):
        raise CheckpointError("the state dict has a parameter twice in its groups")
    for index in state.keys() - set(indices):
        raise CheckpointError(
            f"the state dict has states of parameter {index!r}, which is in none of its groups"
        )


def _check_entry(label: str, value: Any, entry: Entry) -> None:
    """Raise CheckpointError if `value` is no tensor like this, or has no memory for it."""
    if not isinstance(value, Tensor) or value.shape != entry.shape:
        shape = tuple(value.shape) if isinstance(value, Tensor) else value
        raise CheckpointError(
            f"{label} is {shape!r:.200}; expected a tensor of {tuple(entry.shape)}"
        )
    if value.dtype != entry.dtype:
        raise CheckpointError(f"{label} has dtype {value.dtype}; expected {entry.dtype}")
    if value.layout is not torch.strided or value.device.type == "meta":
        raise CheckpointError(f"{label} is {value.layout} on {value.device}; expected values")
    _check_memory(label, value)


def _check_memory(label: str, value: Tensor) -> None:
    """Raise CheckpointError if there is no memory for all elements."""
    last = sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
    room = value.untyped_storage().nbytes() // value.itemsize - value.storage_offset()
    if value.numel() and last >= room:
        raise CheckpointError(f"{label} has memory for {room} of {value.numel()} elements")


def _same(held: Storage, wanted: Storage) -> bool:
    """Whether the tensors of one storage are those of the other, whatever its type is called."""
    if held.quant_type is None or wanted.quant_type is None:
        return held.quant_type is wanted.quant_type
    return (
        held.quant_type.bits == wanted.quant_type.bits
        and held.codebook.values == wanted.codebook.values
        and held.codebook.unit == wanted.codebook.unit
        and held.whole == wanted.whole
        and (held.whole or held.block_size == wanted.block_size)
    )


def _has_our_groups(state_dict: Mapping[str, Any]) -> bool:
    """Whether every group has options that only bnbx writes."""
    groups = state_dict.get("param_groups") or []
    ours = STORAGE_OPTIONS - {"paged"}
    return "state" in state_dict and all(ours <= set(g) for g in groups) and bool(groups)
