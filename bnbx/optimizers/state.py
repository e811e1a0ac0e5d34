"""The states of a parameter: how they are made, told apart, and checked when loaded.

A quantized state is three entries of `optimizer.state[p]`: the codes under the state's name
(uint8, of the parameter's shape; one-dimensional where codes have fewer bits than a byte),
`<name>_absmax` (float32, one per block, or one in all) and `<name>_type`, the quant type's name (in
a state dict, the bytes of it, since flattened checkpoints hold no text). A state without these is
a float32 tensor of the parameter's shape. `residual` is what a 16-bit parameter's master keeps
beside it, `gnorm_vec` the last 100 gradient norms. `step` is a Python int, 1 after the first step.
Entries under other names are somebody's own: they are left alone.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnbx.errors import BnbxWarning, CheckpointError, OptionError
from bnbx.kernels.master import master_that_keeps, residual_dtype
from bnbx.kernels.memory import lost
from bnbx.kernels.packing import filled_with, packed_size, unpack
from bnbx.kernels.plan import DTYPES, Plan, Storage, make_plan
from bnbx.kernels.reference import decode, encode
from bnbx.kernels.signature import RESIDUAL, absmax_name
from bnbx.optimizers.clipping import HISTORY, NORMS
from bnbx.optimizers.paging import Pages, managed_zeros
from bnbx.registry import Optimizer as OptimizerSpec
from bnbx.registry import quant_types
from bnbx.registry.config import Resolved
from bnbx.registry.optimizer import PARAMETER, STEP, State
from bnbx.registry.quant_type import FLOAT32, QuantType

ParameterState = dict[str, Any]
DTYPE_NAMES: Mapping[torch.dtype, str] = {getattr(torch, name): name for name in DTYPES}
Make = Callable[["Entry", float], Tensor]
WHOLE = "/tensor"  # ends the type's label where one absmax serves the whole tensor
HALF_DTYPES = (torch.bfloat16, torch.float16)
ENGINE_KEYS = frozenset({STEP, RESIDUAL, NORMS})  # kept for any rule


@dataclass(frozen=True)
class Entry:
    """A tensor that is kept for a parameter."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.shape.numel() * self.dtype.itemsize


def type_key(state: str) -> str:
    """Key of the label of the quant type that holds a state."""
    return f"{state}_type"


def rule_keys(spec: OptimizerSpec) -> set[str]:
    """All keys that states of a rule may have, however they are stored."""
    names = [state.name for state in spec.states]
    return {key for name in names for key in (name, absmax_name(name), type_key(name))}


def label_of(storage: Storage) -> str:
    """What is written under `type_key`; "float32" for a state that is not quantized."""
    if storage.quant_type is None:
        return FLOAT32
    return storage.quant_type.name + (WHOLE if storage.whole else "")


def storage_of(state: State, resolved: Resolved, numel: int) -> Storage:
    """How a state of a parameter with `numel` elements is to be stored."""
    name = resolved.state_types[state.name]
    if name == FLOAT32 or numel < resolved.min_8bit_size:
        return Storage(state, None)
    return Storage(state, quant_types().get(name), bool(resolved.options["block_wise"]))


def master_of(p: Tensor, resolved: Resolved) -> str:
    """The master of a parameter; only 16-bit ones need any."""
    return str(resolved.options["master"]) if p.dtype in HALF_DTYPES else "none"


def plan_for(
    spec: OptimizerSpec,
    p: Tensor,
    gradient: torch.dtype,
    resolved: Resolved,
    *,
    decoded: bool = False,
) -> Plan:
    """The plan of a parameter with these values; `decoded` where its states come as float32."""
    active = spec.active_states(resolved.switches)
    types = {s.name: storage_of(s, resolved, p.numel()).quant_type for s in active}
    return make_plan(
        spec.clipped if resolved.clip else spec,
        resolved.switches,
        DTYPE_NAMES[p.dtype],
        DTYPE_NAMES[gradient],
        dict.fromkeys(types) if decoded else types,
        block_wise=bool(resolved.options["block_wise"]),
        master=master_of(p, resolved),
        skip_zeros=bool(resolved.options["skip_zeros"]),
    )


def blocks_of(storage: Storage, numel: int) -> int:
    """How many absmax a quantized state has."""
    return min(numel, 1) if storage.whole else -(-numel // storage.block_size)


def warn_of_signed_tables(spec: OptimizerSpec, resolved: Resolved) -> None:
    """Warn of states that are never negative in a type that has no table for such.

    Half of its codes are of no use then, and what is small becomes zero: an update that is divided
    by the root of it explodes.
    """
    for state in spec.active_states(resolved.switches):
        name = resolved.state_types[state.name]
        if state.signed or name == FLOAT32 or quant_types().get(name).unsigned_values is not None:
            continue
        known = [t for t in quant_types() if t.unsigned_values is not None]
        _warn_once(
            f"{spec.name}: state {state.name!r} is never negative, and quant type {name!r} has no "
            "table for such states: half of its codes are wasted, and small values become zero. "
            f"Types that have one: {', '.join(t.name for t in known)}; choose by state: "
            f"state_types={{{state.name!r}: {_made_for_states(known, name).name!r}, ...}}"
        )


def _made_for_states(types: list[QuantType], name: str) -> QuantType:
    """Of these types, the one that widths of states stand for, of the width nearest to a type's."""
    bits = quant_types().get(name).bits
    return min(types, key=lambda t: (not t.state_default, abs(t.bits - bits), -t.bits))


@lru_cache(maxsize=64)
def _warn_once(message: str) -> None:
    warnings.warn(message, BnbxWarning, stacklevel=2)


def entries_of(storage: Storage, shape: torch.Size) -> dict[str, Entry]:
    """The tensors of one state, by key."""
    name, quant_type = storage.state.name, storage.quant_type
    if quant_type is None:
        return {name: Entry(shape, torch.float32)}
    numel = shape.numel()
    packed = torch.Size([packed_size(quant_type, numel)])
    codes = shape if quant_type.bits == 8 else packed
    blocks = torch.Size([blocks_of(storage, numel)])
    return {
        name: Entry(codes, torch.uint8),
        absmax_name(name): Entry(blocks, torch.float32),
    }


def engine_entries(p: Tensor, resolved: Resolved) -> dict[str, Entry]:
    """The tensors that the engine keeps beside the rule's states, by key."""
    found = {}
    dtype = residual_dtype(master_of(p, resolved), p.dtype)
    if dtype is not None:
        found[RESIDUAL] = Entry(p.shape, dtype)
    if resolved.options["percentile_clipping"] < 100:
        found[NORMS] = Entry(torch.Size([HISTORY]), torch.float32)
    return found


def layout(p: Tensor, spec: OptimizerSpec, resolved: Resolved) -> dict[str, Entry]:
    """All tensors that `p` has or will have, by key."""
    found: dict[str, Entry] = {}
    for state in spec.active_states(resolved.switches):
        found |= entries_of(storage_of(state, resolved, p.numel()), p.shape)
    return found | engine_entries(p, resolved)


def state_bytes(p: Tensor, spec: OptimizerSpec, resolved: Resolved) -> dict[str, int]:
    """Bytes of each tensor that `p` has or will have, by key."""
    return {key: entry.bytes for key, entry in layout(p, spec, resolved).items()}


def maker(p: Tensor, resolved: Resolved, pages: Pages) -> Make:
    """What allocates the states of `p`: ordinary memory, page files, or managed memory."""
    paged = resolved.options["paged"]
    if paged == "managed":
        return partial(_managed, p.device)
    if paged:
        return lambda entry, fill: pages.zeros(entry.shape, entry.dtype, fill)
    return lambda entry, fill: torch.full(entry.shape, fill, dtype=entry.dtype, device=p.device)


def prepare(p: Tensor, resolved: Resolved, pages: Pages) -> None:
    """Try what `maker` will use, so that a mistake shows before the first step.

    Raises:
        PagingError: page files cannot be made.
        TargetError: there is no managed memory for the parameter's device.
    """
    paged = resolved.options["paged"]
    if paged == "managed":
        managed_zeros((0,), torch.uint8, p.device)
    elif paged:
        pages.prepare()


def _managed(device: torch.device, entry: Entry, fill: float) -> Tensor:
    return managed_zeros(entry.shape, entry.dtype, device, fill)


def new_state(p: Tensor, state: State, resolved: Resolved, make: Make) -> ParameterState:
    """The entries of a fresh state of `p`, before the first step."""
    storage = storage_of(state, resolved, p.numel())
    name, entries = state.name, entries_of(storage, p.shape)
    if state.initial == PARAMETER:
        return {name: make(entries[name], 0).copy_(p.detach())}
    number = float(resolved.hyper[state.initial]) if state.initial else 0.0
    if storage.quant_type is None:
        return {name: make(entries[name], number)}
    values = torch.tensor([number], dtype=torch.float32, device="cpu")
    codes, absmax = encode(storage, values)
    code = int(unpack(codes, storage.quant_type, 1))
    period = filled_with(code, storage.quant_type)
    made = make(entries[name], period[0])
    for place in range(1, len(period)):
        made[place :: len(period)] = period[place]
    key = absmax_name(name)
    return {
        name: made,
        key: make(entries[key], float(absmax[0])),
        type_key(name): label_of(storage),
    }


def values_of(storage: Storage, saved: Mapping[str, Any], shape: torch.Size) -> Tensor:
    """The values of a state of a parameter of `shape`, in float32."""
    name = storage.state.name
    if storage.quant_type is None:
        value: Tensor = saved[name]
        return value
    packed, absmax = saved[name].reshape(-1), saved[absmax_name(name)]
    return decode(storage, packed, absmax, shape.numel()).view(shape)


def encoded(storage: Storage, values: Tensor) -> dict[str, Tensor]:
    """The tensors of a state with these values (float32), by key."""
    name = storage.state.name
    if storage.quant_type is None:
        return {name: values}
    codes, absmax = encode(storage, values.reshape(-1))
    shape = entries_of(storage, values.shape)[name].shape
    return {name: codes.view(shape), absmax_name(name): absmax}


def own_entry(value: Any, p: Tensor) -> Any:
    """A copy of an entry that is no rule's, on the device of `p`; no dtype is changed."""
    if isinstance(value, Tensor):
        return value.detach().to(p.device, copy=True, memory_format=torch.preserve_format)
    if type(value) is dict:
        return {key: own_entry(item, p) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(own_entry(item, p) for item in value)
    return copy.deepcopy(value)


def new_engine_state(p: Tensor, key: str, resolved: Resolved) -> ParameterState:
    """A fresh tensor of `engine_entries`."""
    entry = engine_entries(p, resolved)[key]
    return {key: torch.zeros(entry.shape, dtype=entry.dtype, device=p.device)}


def whole_step(step: Any) -> int:
    """A step count as an int, from a number of any kind or a tensor of one.

    Raises:
        CheckpointError: it is no whole number.
    """
    if isinstance(step, Tensor):
        if step.numel() != 1 or step.is_meta:
            where = f"shape {tuple(step.shape)}, on {step.device}"
            raise CheckpointError(f"'step' has {where}; expected one number")
        step = step.item()
    step = step.item() if isinstance(step, np.generic) else step
    if isinstance(step, (int, float)) and not isinstance(step, bool) and step == step // 1:
        return int(step)
    raise CheckpointError(f"'step' is {step!r}; expected a whole number")


def settle(p: Tensor, saved: ParameterState, resolved: Resolved) -> None:
    """Bring what a user may have changed to the form that it has here, or leave it to the checks.

    That is the count of steps, a tensor in torch.optim, and the dtype of the parameter.
    """
    with suppress(CheckpointError):
        saved[STEP] = whole_step(saved.get(STEP))
    held, entry = saved.get(RESIDUAL), engine_entries(p, resolved).get(RESIDUAL)
    if not isinstance(held, Tensor) or entry is None or held.dtype is entry.dtype or lost(held):
        return
    if held.dtype in HALF_DTYPES and entry.dtype in HALF_DTYPES:  # as of model.half()
        saved[RESIDUAL] = held.to(entry.dtype)


def check_held(
    p: Tensor, saved: Mapping[str, Any], storages: tuple[Storage, ...], resolved: Resolved
) -> None:
    """Raise OptionError if a state is stored in another way than its parameter asks for by now."""
    kept, master = saved.get(RESIDUAL), master_of(p, resolved)
    if isinstance(kept, Tensor) and residual_dtype(master, p.dtype) is not None:
        of_master = master_that_keeps(kept.dtype)
        if of_master != master:
            raise OptionError(
                f"{RESIDUAL!r} is {kept.dtype}, as master={of_master!r} keeps it, but its "
                f"parameter now asks for master={master!r}; what one keeps is of no use to the "
                "other. Set it back, or load_state_dict into a new optimizer, which begins without"
            )
    for storage in storages:
        held = saved.get(type_key(storage.state.name), FLOAT32)
        if held != label_of(storage):
            raise OptionError(
                f"state {storage.state.name!r} is held in {held}, but its parameter now asks for "
                f"{label_of(storage)}; bits, state_types, block_wise and min_8bit_size cannot "
                "change during a run (load_state_dict into a new optimizer converts)"
            )


def tensor_names(storages: tuple[Storage, ...]) -> tuple[str, ...]:
    """Keys of the state tensors in the order of a kernel's columns."""
    names: list[str] = []
    for storage in storages:
        name = storage.state.name
        names += [name] if storage.quant_type is None else [name, absmax_name(name)]
    return tuple(names)


def describe(value: Any) -> str:
    """A tensor's dtype, shape, strides and device, or the value itself."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return repr(value)[:200]
    strides = value.stride()
    return f"{value.dtype} of shape {tuple(value.shape)}, strides {strides}, on {value.device}"


def check_states(
    label: str, p: Tensor, saved: Mapping[str, Any], spec: OptimizerSpec, resolved: Resolved
) -> None:
    """Raise CheckpointError if `saved` cannot be the states of `p`: a kernel trusts their sizes.

    A state that does not exist with these hyperparameters may be there all the same, since they
    can change during a run; so may entries that are no state's.
    """
    step = saved.get(STEP)
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise CheckpointError(f"{label}: 'step' is {step!r}; expected a whole number >= 0")
    types: dict[str, str] = {}
    expected = engine_entries(p, resolved)
    for state in spec.states:
        if state.name in saved or resolved.active(state):
            storage = storage_of(state, resolved, p.numel())
            expected |= entries_of(storage, p.shape)
            if storage.quant_type is not None:
                types[type_key(state.name)] = label_of(storage)
    known = expected.keys() | types.keys()
    for key in (expected.keys() | types.keys()) - saved.keys():
        there = sorted(map(str, saved))
        raise CheckpointError(f"{label}: {key!r} is missing; there are {there}")
    for key in (saved.keys() & rule_keys(spec)) - known:
        raise CheckpointError(f"{label}: unexpected {key!r}; expected {sorted(expected)}")
    for key, held in types.items():
        if saved[key] != held:
            raise CheckpointError(
                f"{label}: {key!r} is {saved[key]!r}, but its parameter asks for {held!r}"
            )
    for key, entry in expected.items():
        # The pages of a paged run lie in the memory of the host; what the engine keeps never does.
        paged = bool(resolved.options["paged"]) and key not in (RESIDUAL, NORMS)
        _check_tensor(f"{label}: {key!r}", saved[key], entry, p, paged)


def _check_tensor(label: str, value: Any, entry: Entry, p: Tensor, paged: bool) -> None:
    fits = (
        isinstance(value, Tensor)
        and value.shape == entry.shape
        and value.dtype == entry.dtype
        and value.is_contiguous()
    )
    near = fits and (value.device == p.device or paged)
    if not near:
        raise CheckpointError(
            f"{label} is {describe(value)}; expected {entry.dtype} of shape "
            f"{tuple(entry.shape)}, contiguous, on {p.device}"
        )
