"""State dicts of bitsandbytes: `state1`, `state2`, and beside 8-bit ones `qmap1`, `absmax1`, ...

A qmap is the table of the codes, an absmax (float32) belongs to each block. Since 0.46 all of
these lie in a nested dict (to hide them from FSDP); bitsandbytes reads them either way, and older
versions read them flat, so that is how they are written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bnbx.errors import CheckpointError, SpecError
from bnbx.kernels.plan import Storage
from bnbx.kernels.signature import absmax_name
from bnbx.optimizers.clipping import NORMS
from bnbx.optimizers.foreign_torch import floats
from bnbx.optimizers.state import WHOLE, type_key, values_of, whole_step
from bnbx.registry import QuantType, quant_types
from bnbx.registry.config import Resolved
from bnbx.registry.formats import place_of
from bnbx.registry.optimizer import STEP, Optimizer, State
from bnbx.registry.options import CLIP
from bnbx.registry.quant_type import BLOCK_SIZES

LIBRARY = "bitsandbytes"
NEST = "__bnb_optimizer_quant_state__"
UPDATE_NORM = "unorm_vec"  # room for a norm while a step runs, where updates are clipped
BLOCK = 256  # what its kernels take; 2048 before 0.44
WITHOUT_EFFECT: frozenset[str] = frozenset()
# Keys of groups whether the rule has them or not; with these values they do nothing.
INERT: Mapping[str, Any] = {"eps": 0.0, "alpha": 0.0, "t_alpha": None, "t_beta3": None}
SHARED_OPTIONS: frozenset[str] = frozenset()
ELSEWHERE = frozenset({CLIP})  # what it keeps in the optimizer's `args`, and does not save


def flat(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """The states of one parameter, out of their nest."""
    nested = saved.get(NEST, {})
    if not isinstance(nested, Mapping):
        raise CheckpointError(f"{NEST!r} is {type(nested).__name__}; expected a dict")
    return {**{key: value for key, value in saved.items() if key != NEST}, **nested}


def state_keys(spec: Optimizer) -> set[str]:
    """All keys that a parameter's states may have."""
    keys = {STEP, UPDATE_NORM, NORMS}
    for state in spec.states:
        place = place_of(state, LIBRARY)
        if place is not None:
            keys |= {place[0], *_companions(place[0])}
    return keys


def _companions(key: str) -> tuple[str, str]:
    """Keys of the table and of the absmax that belong to a state."""
    return key.replace("state", "qmap"), key.replace("state", "absmax")


# ---- reading


def read(spec: Optimizer, saved: Mapping[str, Any], types: dict[str, str]) -> dict[str, Any]:
    """The states of one parameter in our format; `types` gets their tables.

    Raises:
        CheckpointError: they are not what they should be.
    """
    found: dict[str, Any] = {}
    if STEP in saved:
        found[STEP] = whole_step(saved[STEP])
    if NORMS in saved:
        found[NORMS] = saved[NORMS]
    for state in spec.states:
        place = place_of(state, LIBRARY)
        if place is not None and place[0] in saved:
            found |= _read_state(spec, state, saved, types)
    return found


def _read_state(
    spec: Optimizer, state: State, saved: Mapping[str, Any], types: dict[str, str]
) -> dict[str, Any]:
    key, index = place_of(state, LIBRARY) or ("", None)
    value = saved[key]
    if isinstance(value, Tensor) and not value.is_contiguous():
        raise CheckpointError(
            f"{key!r} is not contiguous: bitsandbytes made it like a parameter that was not, and "
            "what order its kernels then used cannot be told. Make it contiguous in that order "
            "(on CUDA, that of memory)"
        )
    count = _stacked(spec, key)
    value = _part(key, value, index, count)
    if not isinstance(value, Tensor) or value.dtype != torch.uint8:
        return {state.name: floats(key, value)}
    table_key, absmax_key = _companions(key)
    absmax = _part(absmax_key, saved.get(absmax_key), index, count)
    table = saved.get(table_key)
    if not isinstance(table, Tensor) or not isinstance(absmax, Tensor):
        raise CheckpointError(f"{key!r} is quantized; expected {table_key!r} and {absmax_key!r}")
    quant_type = _type_of(table_key, table, state, _block_size(value.numel(), absmax.numel()))
    types[quant_type.name] = quant_type.to_json()
    return {
        state.name: value,
        absmax_name(state.name): absmax,
        type_key(state.name): quant_type.name,
    }


def _stacked(spec: Optimizer, key: str) -> int:
    """How many states lie under a key."""
    places = [place_of(state, LIBRARY) for state in spec.states]
    return sum(place is not None and place[0] == key for place in places)


def _part(key: str, value: Any, index: int | None, count: int) -> Any:
    """One of the tensors that are stacked in another; the tensor itself if it is no stack."""
    if index is None or not isinstance(value, Tensor):
        return value
    if value.ndim == 0 or len(value) != count:
        raise CheckpointError(
            f"{key!r} has shape {tuple(value.shape)}; expected {count} in a stack"
        )
    return value[index]


def _block_size(numel: int, blocks: int) -> int:
    """The block size that gives so many blocks; the usual one if none does, as errors will say."""
    fitting = [size for size in (BLOCK, *BLOCK_SIZES) if -(-numel // size) == blocks]
    return fitting[0] if fitting else BLOCK


def _type_of(key: str, table: Tensor, state: State, block_size: int) -> QuantType:
    """The registered type with a table, or one made for it."""
    if not table.is_floating_point():
        raise CheckpointError(f"{key!r} is no table of 8 bits: it is {table.dtype}")
    values = tuple(table.detach().to("cpu", torch.float64).reshape(-1)[:257].tolist())
    found = quant_types().find(
        lambda t: (
            t.bits == 8
            and t.block_size == block_size
            and t.codebook(signed=state.signed).values == values
        )
    )
    if found is not None:
        return found
    digest = hashlib.sha256(repr((values, block_size)).encode()).hexdigest()[:8]
    try:
        return QuantType(
            name=f"qmap_{digest}",
            summary="a table of a bitsandbytes checkpoint",
            bits=8,
            values=values,
            block_size=block_size,
        )
    except SpecError as error:
        raise CheckpointError(f"{key!r} is no table of 8 bits: {error}") from None


# ---- writing


def write(
    spec: Optimizer, shape: torch.Size, saved: Mapping[str, Any], resolved: Resolved
) -> tuple[dict[str, Any], Sequence[str]]:
    """Our states of one parameter in its format, and what of them was converted."""
    active = [state for state in spec.active_states(resolved.switches) if state.name in saved]
    storages = [_storage(state, saved) for state in active]
    quantized = [storage.quant_type is not None for storage in storages]
    fits = all(map(_fits, storages)) and len(set(quantized)) <= 1
    by_key: dict[str, list[Storage]] = {}
    for storage in storages:
        place = place_of(storage.state, LIBRARY)
        if place is None:
            raise CheckpointError(
                f"{spec.name}: {LIBRARY} has no state {storage.state.name!r}; save_as='bnbx' "
                "holds everything"
            )
        by_key.setdefault(place[0], []).append(storage)
    fits = fits and all(len({_values(s) for s in stack}) == 1 for stack in by_key.values())
    found: dict[str, Any] = {key: saved[key] for key in (STEP, NORMS) if key in saved}
    for key, stack in by_key.items():
        found |= _written_stack(key, stack, saved, shape) if fits else {}
        if not fits:
            found[key] = _together([values_of(s, saved, shape) for s in stack], stack)
    if float(resolved.hyper.get(CLIP, 0)) > 0 and by_key:
        device = next(iter(found[key] for key in by_key)).device
        found[UPDATE_NORM] = torch.zeros(1, dtype=torch.float32, device=device)
    widened = any(quantized) and not fits
    note = f"it takes 8 bits in blocks of {BLOCK} for all states or none; others are in float32"
    return found, [note] if widened else []


def _storage(state: State, saved: Mapping[str, Any]) -> Storage:
    """How a state is stored."""
    label = saved.get(type_key(state.name))
    if label is None:
        return Storage(state, None)
    name = str(label).removesuffix(WHOLE)
    return Storage(state, quant_types().get(name), not str(label).endswith(WHOLE))


def _fits(storage: Storage) -> bool:
    """Whether its kernels can read it as it is."""
    quant_type = storage.quant_type
    if quant_type is None:
        return True
    return quant_type.bits == 8 and quant_type.block_size == BLOCK and not storage.whole


def _values(storage: Storage) -> tuple[float, ...]:
    return () if storage.quant_type is None else storage.codebook.levels


def _written_stack(
    key: str, stack: Sequence[Storage], saved: Mapping[str, Any], shape: torch.Size
) -> dict[str, Any]:
    """The states under a key, as they are."""
    names = [storage.state.name for storage in stack]
    found = {key: _together([saved[name].view(shape) for name in names], stack)}
    if stack[0].quant_type is not None:
        table_key, absmax_key = _companions(key)
        values = stack[0].codebook.values
        found[table_key] = torch.tensor(values, dtype=torch.float32, device=found[key].device)
        found[absmax_key] = _together([saved[absmax_name(name)] for name in names], stack)
    return found


def _together(tensors: list[Tensor], stack: Sequence[Storage]) -> Tensor:
    """Stacked, in order of their places, if the key holds a stack."""
    places = [place_of(storage.state, LIBRARY) for storage in stack]
    order = {place[1]: t for place, t in zip(places, tensors, strict=True) if place is not None}
    if None in order:
        return order[None]
    return torch.stack([order[index] for index in sorted(order, key=lambda i: i or 0)])
