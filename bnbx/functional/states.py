"""Quantization states as functions take them: ours, those of bitsandbytes, tuples and lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bnbx.errors import InputError, QuantizedDataError
from bnbx.functional import checks, coded
from bnbx.functional.maps import default_table
from bnbx.kernels.quant_state import QuantState

ATTRIBUTES = ("absmax", "shape", "code", "blocksize", "quant_type", "dtype", "offset", "state2")
SECOND_BLOCK = 256
OF_HALVES = (6, 7)  # entries of a list of quantize_4bit: until 0.40, and in 0.41


def state_of(given: Any, codes: Tensor, block_size: int = 4096) -> QuantState:
    """A state, whatever form it comes in.

    Args:
        given: a QuantState; one of bitsandbytes; the pair (absmax, table) of its version 0.0.24
            (in either order, where sizes tell); or a list of its versions 0.39 to 0.41. Of
            quantize_4bit that is [absmax, shape, dtype, blocksize, [offset, state2] or None,
            quant_type] and a table that the type says anyway; of quantize_blockwise [absmax,
            table, blocksize, nested, dtype, offset, state2], state2 being such a list too.
        codes: that it belongs to.
        block_size: of a pair, which does not say.

    Raises:
        InputError: it is none of these.
    """
    if isinstance(given, QuantState):
        return given
    if isinstance(given, (tuple, list)):
        return _of_list(given, codes, block_size)
    if all(hasattr(given, name) for name in ATTRIBUTES):
        return QuantState(*(getattr(given, name) for name in ATTRIBUTES))
    raise InputError(
        f"quant_state is {type(given).__name__}; expected a QuantState, as the quantize functions "
        "return it, or (absmax, code)"
    )


def _of_list(given: Sequence[Any], codes: Tensor, block_size: int) -> QuantState:
    if len(given) == 2:
        return _of_pair(given, codes, block_size)
    if _is_of_bytes(given):
        absmax, code, size, nested, dtype, offset, state2 = given
        if not nested:
            return QuantState(absmax, None, code, size, dtype=dtype)
        return QuantState(
            absmax, None, code, size, dtype=dtype, offset=offset, state2=_second(state2, absmax)
        )
    if len(given) not in OF_HALVES:
        raise InputError(
            f"quant_state is a list of {len(given)} entries; expected a QuantState, (absmax, code) "
            "or a list of bitsandbytes 0.39 to 0.41, which has 6 or 7"
        )
    absmax, shape, dtype, size, nested, quant_type = given[:6]
    if nested is not None and not (isinstance(nested, (tuple, list)) and len(nested) == 2):
        raise InputError(f"quant_state is a list with {nested!r:.200}; expected [offset, state2]")
    offset, state2 = nested or (None, None)
    size_of = None if shape is None else checks.shape_of("quant_state", shape)
    second = None if state2 is None else _second(state2, absmax)
    return QuantState(absmax, size_of, None, size, quant_type, dtype, offset, second)


def _is_of_bytes(given: Any) -> bool:
    """Whether it is a list as quantize_blockwise returned it, by the place of the table."""
    listed = isinstance(given, (tuple, list)) and len(given) == 7
    return listed and (given[1] is None or isinstance(given[1], Tensor))


def _second(given: Any, codes: Any) -> QuantState:
    """The state of scales that are quantized too, of which there is one level."""
    pair = isinstance(given, (tuple, list)) and len(given) == 2
    if pair or (_is_of_bytes(given) and not given[3]):
        return state_of(given, checks.dense("quant_state: absmax", codes))
    known = all(hasattr(given, name) for name in ("absmax", "code", "blocksize"))
    if not known or getattr(given, "state2", None) is not None:
        raise InputError(
            f"quant_state has {given!r:.200} as state2; expected a state or list of "
            "quantize_blockwise, whose own scales are not quantized"
        )
    found: QuantState = given
    return found


def _of_pair(given: Any, codes: Tensor, block_size: int) -> QuantState:
    absmax, code = given
    if not isinstance(absmax, Tensor) or not isinstance(code, Tensor):
        raise InputError("quant_state is a pair; expected two tensors, absmax and table")
    count = checks.blocks(codes.numel(), block_size)
    if absmax.numel() != count and code.numel() == count:
        absmax, code = code, absmax
    return QuantState(absmax=absmax, code=code, blocksize=block_size, dtype=torch.float32)


def second_of(state: QuantState) -> coded.Second:
    """What operations take of scales that are quantized too.

    Raises:
        QuantizedDataError: it is not all there.
    """
    second: Any = state.state2
    if second is None:
        return coded.NO_SECOND
    if not isinstance(second.absmax, Tensor) or not isinstance(state.offset, Tensor):
        raise QuantizedDataError("a state with state2 needs state2.absmax and offset, both tensors")
    size = SECOND_BLOCK if second.blocksize is None else checks.block_size(second.blocksize)
    table = second.code
    if table is None:
        table = default_table(second.absmax.device)
    return second.absmax, table, state.offset, size


def check_state(what: str, codes: Tensor, state: QuantState) -> None:
    """Raise InputError unless a state has what every operation needs, where the codes are."""
    if not isinstance(state.absmax, Tensor):
        raise InputError(f"{what}: absmax is {type(state.absmax).__name__}; expected a tensor")
    quantized = state.state2 is not None
    if quantized != (state.absmax.dtype == torch.uint8):
        held = "quantized scales" if quantized else "no state2"
        raise QuantizedDataError(
            f"{what}: a state with {held}, but absmax is {state.absmax.dtype}: expected "
            f"{'uint8 codes' if quantized else 'float32 numbers'}"
        )
    if not quantized and not state.absmax.is_floating_point():
        raise InputError(f"{what}: absmax is {state.absmax.dtype}; expected float32")
    second: Any = state.state2
    named = [("A", codes), ("absmax", state.absmax), ("offset", state.offset)]
    named += [("state2.absmax", second.absmax)] if second is not None else []
    checks.together(named)
