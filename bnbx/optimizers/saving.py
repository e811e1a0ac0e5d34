"""State dicts: what they hold, and how any of them becomes the states of an optimizer.

A state dict carries the tables of its quant types, so it can be read wherever bnbx is, whatever is
registered there. Dicts of other libraries are translated to ours first (`foreign`). States that
are not stored as the optimizer stores them are converted, with one warning that says which.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bnbx.errors import BnbxWarning, CheckpointError, OptionError, SpecError, UnknownNameError
from bnbx.kernels.plan import Storage
from bnbx.kernels.signature import RESIDUAL, absmax_name
from bnbx.optimizers import foreign
from bnbx.optimizers.clipping import NORMS
from bnbx.optimizers.state import (
    WHOLE,
    Entry,
    ParameterState,
    check_states,
    encoded,
    engine_entries,
    entries_of,
    label_of,
    storage_of,
    type_key,
    values_of,
)
from bnbx.registry import QuantType, quant_types
from bnbx.registry.config import Resolved
from bnbx.registry.optimizer import STEP, State

if TYPE_CHECKING:
    from bnbx.optimizers.engine import Optimizer8bit

FORMAT = 2  # of state dicts; raised when their layout changes
HEADER = "bnbx"
# How states are stored is the business of the optimizer that loads them.
STORAGE_OPTIONS = frozenset("bits state_types min_8bit_size block_wise master paged".split())
Groups = list[dict[str, Any]]
Loaded = tuple[Groups, dict[Tensor, ParameterState]]


def written(optimizer: Optimizer8bit, state_dict: dict[str, Any], save_as: str) -> dict[str, Any]:
    """torch's state dict with our header, or in the format of another library."""
    if save_as == HEADER:
        return {**state_dict, HEADER: header(optimizer)}
    return foreign.written(optimizer, state_dict, save_as)


def header(optimizer: Optimizer8bit) -> dict[str, Any]:
    """What a state dict says of itself."""
    labels = {
        value
        for saved in optimizer.state.values()
        for key, value in saved.items()
        if key.endswith("_type")
    }
    names = sorted({label.removesuffix(WHOLE) for label in labels})
    return {
        "format": FORMAT,
        "rule": optimizer.spec.name,
        "rule_digest": optimizer.spec.digest,
        "mode": optimizer.mode,
        "quant_types": {name: quant_types().get(name).to_json() for name in names},
    }


def read(optimizer: Optimizer8bit, state_dict: dict[str, Any]) -> Loaded:
    """The groups and states of a state dict, checked; nothing of the optimizer changes.

    Raises:
        CheckpointError: it does not fit.
    """
    try:
        state_dict = dict(state_dict)
        for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():  # noqa: SLF001
            state_dict = hook(optimizer, state_dict) or state_dict
        return _Reading(optimizer, state_dict).result()
    except (TypeError, KeyError, AttributeError, IndexError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"the state dict is malformed: {type(error).__name__}: {error}"
        ) from error


class _Reading:
    def __init__(self, optimizer: Optimizer8bit, state_dict: dict[str, Any]) -> None:
        if HEADER not in state_dict and not _has_our_groups(state_dict):
            state_dict = foreign.translated(optimizer, state_dict)
        self.optimizer = optimizer
        self.state_dict = state_dict
        self.types = _check_header(optimizer, state_dict)
        self.converted: dict[str, int] = {}

    def result(self) -> Loaded:
        saved_groups = self.state_dict["param_groups"]
        groups = _merged_groups(self.optimizer.param_groups, saved_groups)
        loaded: dict[Tensor, ParameterState] = {}
        for number, (group, entry) in enumerate(zip(groups, saved_groups, strict=True)):
            for p, index in zip(group["params"], entry["params"], strict=True):
                saved = self.state_dict["state"].get(index)
                label = f"state dict, group {number}, parameter {index}"
                resolved = self.resolved(label, p, group)
                if saved:
                    loaded[p] = self.states(label, p, saved, resolved)
        if self.converted:
            what = ", ".join(f"{n} x {words}" for words, n in sorted(self.converted.items()))
            warnings.warn(
                f"states of the checkpoint are converted to what this optimizer asks for: {what}",
                BnbxWarning,
                stacklevel=5,
            )
        return groups, loaded

    def resolved(self, label: str, p: Tensor, group: Mapping[str, Any]) -> Resolved:
        try:
            resolution = self.optimizer.resolution
            return resolution.of(p, group, resolution.of_group(group))
        except (OptionError, UnknownNameError) as error:
            raise CheckpointError(f"{label}: {error}") from None

    def states(self, label: str, p: Tensor, saved: Any, resolved: Resolved) -> ParameterState:
        """The states of one parameter, on its device, stored as it asks for."""
        if not isinstance(saved, Mapping):
            raise CheckpointError(f"{label}: {saved!r}; expected a dict of states")
        found: ParameterState = {STEP: saved.get(STEP)}
        rest = set(saved) - {STEP}
        for state in self.optimizer.spec.states:
            keys = {state.name, absmax_name(state.name), type_key(state.name)}
            if state.name in saved:
                found |= self.state(label, p, state, saved, resolved)
            rest -= keys if state.name in saved else set()
        found |= self.engine_states(p, saved, resolved)
        found |= {key: saved[key] for key in rest - {RESIDUAL, NORMS}}
        check_states(label, p, found, self.optimizer.spec, resolved)
        return found

    def state(
        self, label: str, p: Tensor, state: State, saved: Mapping[str, Any], resolved: Resolved
    ) -> ParameterState:
        held = self.held(label, state, saved)
        wanted = storage_of(state, resolved, p.numel())
        entries = entries_of(held, p.shape)
        for key, entry in entries.items():
            value = saved.get(key)
            if not isinstance(value, Tensor) or value.shape != entry.shape:
                shape = tuple(value.shape) if isinstance(value, Tensor) else value
                raise CheckpointError(
                    f"{label}: {key!r} is {shape!r}; expected a tensor of {tuple(entry.shape)}"
                )
            if value.dtype != entry.dtype:
                raise CheckpointError(
                    f"{label}: {key!r} has dtype {value.dtype}; expected {entry.dtype}"
                )
        if held == wanted:
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
        if absmax_name(state.name) not in saved:
            return Storage(state, None)
        text = saved.get(type_key(state.name))
        name = str(text).removesuffix(WHOLE)
        if name not in self.types and name not in quant_types():
            raise CheckpointError(
                f"{label}: state {state.name!r} is of quant type {text!r}, which is neither in "
                "the state dict nor registered"
            )
        quant_type = self.types.get(name) or quant_types().get(name)
        return Storage(state, quant_type, not str(text).endswith(WHOLE))

    def engine_states(
        self, p: Tensor, saved: Mapping[str, Any], resolved: Resolved
    ) -> ParameterState:
        """Residual and norms: taken over where they fit, else begun anew."""
        found: ParameterState = {}
        entries = engine_entries(p, resolved)
        for key in (RESIDUAL, NORMS):
            value, entry = saved.get(key), entries.get(key)
            if isinstance(value, Tensor) and entry == Entry(value.shape, value.dtype):
                found[key] = self.placed(value, p, resolved)
                continue
            if entry is not None:
                found[key] = torch.zeros(entry.shape, dtype=entry.dtype, device=p.device)
            if value is not None and key == RESIDUAL:
                self.note("residual dropped")
        return found

    def placed(self, tensor: Tensor, p: Tensor, resolved: Resolved) -> Tensor:
        """A copy, contiguous, where the states of `p` live."""
        if resolved.options["paged"]:
            return self.optimizer.pages.copy_of(tensor)
        return tensor.to(p.device, copy=True, memory_format=torch.contiguous_format)

    def note(self, words: str) -> None:
        self.converted[words] = self.converted.get(words, 0) + 1


def _check_header(
    optimizer: Optimizer8bit, state_dict: Mapping[str, Any]
) -> dict[str, QuantType]:
    """The quant types that a state dict brings along."""
    about = state_dict.get(HEADER)
    if about is None:
        return {}  # torch.distributed.checkpoint keeps states and groups only
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
            stacklevel=6,
        )
    try:
        tables = dict(about.get("quant_types", {}))
        return {name: QuantType.from_json(text) for name, text in tables.items()}
    except (SpecError, TypeError, ValueError) as error:
        raise CheckpointError(f"a quant type of the state dict is malformed: {error}") from None


def _has_our_groups(state_dict: Mapping[str, Any]) -> bool:
    """Whether every group has options that only bnbx writes."""
    groups = state_dict.get("param_groups") or []
    ours = STORAGE_OPTIONS - {"paged"}
    return "state" in state_dict and all(ours <= set(g) for g in groups) and bool(groups)


def _merged_groups(current: Groups, saved: Groups) -> Groups:
    """The saved groups' hyperparameters with the current groups' parameters and storage."""
    sizes = [[len(g["params"]) for g in groups] for groups in (current, saved)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"the state dict has groups of {sizes[1]} parameters, the optimizer has {sizes[0]}"
        )
    kept = {"params", "param_names", *STORAGE_OPTIONS}
    return [
        {**old, **copy.deepcopy({k: v for k, v in new.items() if k not in kept})}
        for old, new in zip(current, saved, strict=True)
    ]


def mode_of(state_dict: Mapping[str, Any]) -> str:
    """The mode that the parameters were in."""
    about = state_dict.get(HEADER)
    return str(about.get("mode", "train")) if isinstance(about, Mapping) else "train"

