"""The states of a parameter: how they are made, told apart, and checked when loaded.

A quantized state is three entries of `optimizer.state[p]`: the codes under the state's name (uint8,
of the parameter's shape), `<name>_absmax` (float32, one per block) and `<name>_type`, the quant
type's name. A state without these is a float32 tensor of the parameter's shape. `step` is a Python
int, 1 after the first step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bnbx.errors import CheckpointError, OptionError
from bnbx.kernels.signature import absmax_name
from bnbx.registry import QuantType, quant_types
from bnbx.registry.config import Resolved
from bnbx.registry.optimizer import STEP, State
from bnbx.registry.quant_type import FLOAT32

ParameterState = dict[str, Any]


def type_key(state: str) -> str:
    """Key of the name of the quant type that holds a state."""
    return f"{state}_type"


def quantized_type(name: str) -> QuantType | None:
    """The quant type of this name, None for "float32"."""
    return None if name == FLOAT32 else quant_types().get(name)


def new_state(p: Tensor, state: State, resolved: Resolved) -> ParameterState:
    """The entries of a fresh state of `p`: zero, before the first step."""
    quant_type = quantized_type(resolved.state_types[state.name])
    if quant_type is None or p.numel() < resolved.min_8bit_size:
        return {state.name: torch.zeros(p.shape, dtype=torch.float32, device=p.device)}
    zero = quant_type.codebook(signed=state.signed).zero_code
    blocks = -(-p.numel() // quant_type.block_size)
    return {
        state.name: torch.full(p.shape, zero, dtype=torch.uint8, device=p.device),
        absmax_name(state.name): torch.zeros(blocks, dtype=torch.float32, device=p.device),
        type_key(state.name): quant_type.name,
    }


def storage_types(
    saved: Mapping[str, Any], states: tuple[State, ...], resolved: Resolved, numel: int
) -> dict[str, QuantType | None]:
    """How the states of a parameter of `numel` elements are stored.

    Raises:
        OptionError: a state has another type than its group asks for by now.
    """
    types: dict[str, QuantType | None] = {}
    for state in states:
        held = saved.get(type_key(state.name), FLOAT32)
        wanted = resolved.state_types[state.name] if numel >= resolved.min_8bit_size else FLOAT32
        if held != wanted:
            raise OptionError(
                f"state {state.name!r} is held in {held}, but its group now asks for {wanted}; "
                "bits, state_types and min_8bit_size cannot change during a run"
            )
        types[state.name] = quantized_type(held)
    return types


def tensor_names(types: Mapping[str, QuantType | None]) -> tuple[str, ...]:
    """Keys of the state tensors in the order of a kernel's columns."""
    names: list[str] = []
    for name, quant_type in types.items():
        names += [name] if quant_type is None else [name, absmax_name(name)]
    return tuple(names)


def describe(value: Any) -> str:
    """A tensor's dtype, shape, strides and device, or the value itself."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return repr(value)[:200]
    strides = value.stride()
    return f"{value.dtype} of shape {tuple(value.shape)}, strides {strides}, on {value.device}"


def check_states(
    label: str, p: Tensor, saved: Mapping[str, Any], states: tuple[State, ...], resolved: Resolved
) -> None:
    """Raise CheckpointError if `saved` cannot be the states of `p`: a kernel trusts their sizes.

    A state that does not exist with these hyperparameters may be there all the same, since they
    can change during a run.
    """
    step = saved.get(STEP)
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise CheckpointError(f"{label}: 'step' is {step!r}; expected a whole number >= 0")
    types = {STEP}  # entries that are no tensors
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for state in states:
        shape = tuple(p.shape)
        if state.name not in saved and not resolved.active(state):
            continue
        if absmax_name(state.name) not in saved:
            expected[state.name] = (shape, torch.float32)
            continue
        quant_type = quantized_type(resolved.state_types[state.name])
        if quant_type is None:
            raise CheckpointError(
                f"{label}: state {state.name!r} is quantized, but its group says float32; "
                "bits and state_types cannot change during a run"
            )
        expected[state.name] = (shape, torch.uint8)
        blocks = -(-p.numel() // quant_type.block_size)
        expected[absmax_name(state.name)] = ((blocks,), torch.float32)
        types.add(type_key(state.name))
        if saved.get(type_key(state.name)) != quant_type.name:
            raise CheckpointError(
                f"{label}: state {state.name!r} is held in {saved.get(type_key(state.name))!r}, "
                f"but its group says {quant_type.name!r}"
            )
    for key in expected.keys() - saved.keys():
        raise CheckpointError(f"{label}: {key!r} is missing; there are {sorted(saved)}")
    for key in saved.keys() - expected.keys() - types:
        raise CheckpointError(f"{label}: unexpected {key!r}; expected {sorted(expected)}")
    for key, (shape, dtype) in expected.items():
        value = saved[key]
        fits = isinstance(value, Tensor) and tuple(value.shape) == shape and value.dtype == dtype
        if not fits or value.device != p.device or not value.is_contiguous():
            got = describe(value)
            raise CheckpointError(
                f"{label}: {key!r} is {got}; expected {dtype} of shape {shape}, "
                f"contiguous, on {p.device}"
            )
