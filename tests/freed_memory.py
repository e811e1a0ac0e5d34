"""Frees each tensor that a function takes, and calls it: an error, before anything is read.

A script, since a read of freed memory ends the process; `test_freed_memory.py` runs it. It prints
the name of each call before it is made, and what took freed memory as if it were there.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bnbx import functional as F
from bnbx.errors import BnbxError
from bnbx.functional import QuantState, QuantTensor

Call = tuple[Callable[..., Any], dict[str, Any]]
SHAPE = (64, 64)
# The type is known by its name, or the tensor is handed on as it is.
UNREAD = ("quant_state.code", "state.code", "tensor.absmax", "tensor.code", "tensor.state2.absmax")


def _x(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE).to(dtype)


def _bytes() -> Tensor:
    return torch.zeros(SHAPE, dtype=torch.uint8)


def _table() -> Tensor:
    return F.create_dynamic_map()


def _integers() -> Tensor:
    return torch.ones(SHAPE, dtype=torch.int8)


def _four(nested: bool) -> tuple[Tensor, QuantState]:
    return F.quantize_4bit(_x(), quant_type="nf4", compress_statistics=nested)


def _eight(nested: bool) -> tuple[Tensor, QuantState]:
    return F.quantize_blockwise(_x(), blocksize=64, nested=nested)


def _old(state: QuantState) -> list[Any]:
    """The list that bitsandbytes 0.39 had for states of bytes."""
    second = None if state.state2 is None else _old(state.state2)
    nested = second is not None
    return [state.absmax, state.code, state.blocksize, nested, state.dtype, state.offset, second]


def _quantized(**named: Any) -> Call:
    return F.quantize_blockwise, dict(A=_x(), out=_bytes(), blocksize=64, **named)


def _step(name: str) -> Call:
    """One step of lion, in each of three forms."""
    named: dict[str, Any] = dict(optimizer_name="lion", g=_x(), p=_x(), step=1, lr=torch.ones(1))
    named |= dict(beta1=0.9, eps=0.0, gnorm_scale=torch.ones(1))
    if name == "32bit":
        named |= dict(state1=_x(), unorm_vec=torch.ones(1), max_unorm=1.0)
        return F.optimizer_update_32bit, named
    named |= dict(state1=_bytes(), state2=None, qmap1=_table(), qmap2=None, beta2=0.9)
    if name == "8bit":
        named |= dict(max1=torch.ones(1), max2=None, new_max1=torch.ones(1), new_max2=None)
        return F.optimizer_update_8bit, named
    named |= dict(absmax1=torch.ones(16), absmax2=None, beta3=0.0, alpha=0.0)
    return F.optimizer_update_8bit_blockwise, named


def _with_state(function: Callable[..., Any], made: tuple[Tensor, Any], **named: Any) -> Call:
    codes, state = made
    return function, dict(A=codes, quant_state=state, **named)


def _saved(packed: bool) -> Call:
    _, state = _four(nested=True)
    return _read, dict(qs_dict=state.as_dict(packed=packed))


def _read(qs_dict: Mapping[str, Any]) -> QuantState:
    return QuantState.from_dict(qs_dict, "cpu")


def _dequantized(tensor: QuantTensor) -> Tensor:
    return tensor.dequantize()


def _entries(tensor: QuantState) -> dict[str, Any]:
    return tensor.as_dict(packed=True)


def _equal(one: object, other: object) -> bool:
    return one == other


def _twice(state: QuantState) -> dict[str, Any]:
    return dict(one=state, other=copy.deepcopy(state))


def _encoding(tensor: QuantState) -> object:
    return tensor.encoding


def _ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


CALLS: dict[str, Callable[[], Call]] = {
    "quantize": lambda: (F.quantize, dict(A=_x(), code="nf4", double=True)),
    "quantize, a table": lambda: (F.quantize, dict(A=_x(), code=_table(), out=_bytes())),
    "quantize, fitted": lambda: (F.quantize, dict(A=_x(), code="nf4", fit="mse")),
    "dequantize": lambda: (F.dequantize, dict(A=F.quantize(_x(), "nf4", double=True))),
    "dequantize, into": lambda: (F.dequantize, dict(A=F.quantize(_x(), "nvfp4"), out=_x())),
    "dequantize, a table": lambda: (
        F.dequantize,
        dict(A=_bytes(), quant_state=(_ones(1), _table()), out=_x()),
    ),
    "fake_quantize": lambda: (F.fake_quantize, dict(x=_x(), quant_type="nf4")),
    "quantize_no_absmax": lambda: (
        F.quantize_no_absmax,
        dict(A=_x(), code=_table(), out=_bytes()),
    ),
    "dequantize_no_absmax": lambda: (
        F.dequantize_no_absmax,
        dict(A=_bytes(), code=_table(), out=_x()),
    ),
    "quantize_4bit": lambda: (
        F.quantize_4bit,
        dict(A=_x(), absmax=_ones(64), out=_ones(2048, 1, dtype=torch.uint8)),
    ),
    "quantize_4bit, nested": lambda: (
        F.quantize_4bit,
        dict(A=_x(), absmax=_ones(64, dtype=torch.uint8), compress_statistics=True),
    ),
    "dequantize_4bit": lambda: _with_state(F.dequantize_4bit, _four(nested=False)),
    "dequantize_4bit, nested": lambda: _with_state(F.dequantize_4bit, _four(nested=True), out=_x()),
    "dequantize_4bit, no state": lambda: (
        F.dequantize_4bit,
        dict(A=_four(nested=False)[0], absmax=_ones(64), out=_x(torch.float16)),
    ),
    "gemv_4bit": lambda: (
        F.gemv_4bit,
        dict(
            zip(("B", "state"), _four(nested=True), strict=True), A=_ones(1, 64), out=_ones(1, 64)
        ),
    ),
    "quantize_blockwise": lambda: _quantized(code=_table(), absmax=_ones(64)),
    "quantize_blockwise, rand": lambda: _quantized(rand=torch.rand(100)),
    "quantize_blockwise, nested": lambda: _quantized(
        absmax=_ones(64, dtype=torch.uint8), nested=True
    ),
    "quantize_blockwise, any table": lambda: _quantized(code=_table() * 3),
    "dequantize_blockwise": lambda: _with_state(F.dequantize_blockwise, _eight(nested=False)),
    "dequantize_blockwise, nested": lambda: _with_state(
        F.dequantize_blockwise, _eight(nested=True), out=_x()
    ),
    "dequantize_blockwise, a list": lambda: _with_state(
        F.dequantize_blockwise,
        (_eight(nested=True)[0], _old(_eight(nested=True)[1])),
    ),
    "dequantize_blockwise, a pair": lambda: _with_state(
        F.dequantize_blockwise, (_bytes(), (_ones(1), _table()))
    ),
    "dequantize_blockwise, any table": lambda: (
        F.dequantize_blockwise,
        dict(A=_bytes(), absmax=_ones(64), code=_table() * 3, out=_x(), blocksize=64),
    ),
    "int8_vectorwise_quant": lambda: (F.int8_vectorwise_quant, dict(A=_x(), threshold=2.0)),
    "int8_vectorwise_dequant": lambda: (
        F.int8_vectorwise_dequant,
        dict(A=_integers(), stats=_ones(64)),
    ),
    "int8_double_quant": lambda: (
        F.int8_double_quant,
        dict(
            A=_x(),
            col_stats=_ones(64),
            row_stats=_ones(64),
            out_col=_integers(),
            out_row=_integers(),
        ),
    ),
    "int8_linear_matmul": lambda: (
        F.int8_linear_matmul,
        dict(A=_integers(), B=_integers(), out=_x().to(torch.int32)),
    ),
    "int8_mm_dequant": lambda: (
        F.int8_mm_dequant,
        dict(
            A=_x().to(torch.int32),
            row_stats=_ones(64),
            col_stats=_ones(64),
            out=_x(),
            bias=_ones(64),
        ),
    ),
    "fit_quantiles": lambda: (F.fit_quantiles, dict(x=_x(), bits=4)),
    "estimate_quantiles": lambda: (F.estimate_quantiles, dict(A=_x(), out=_ones(256))),
    "create_quantile_map": lambda: (F.create_quantile_map, dict(A=_x())),
    "histogram_scatter_add_2d": lambda: (
        F.histogram_scatter_add_2d,
        dict(
            histogram=_x(),
            index1=_ones(64, dtype=torch.int64),
            index2=_ones(64, dtype=torch.int64),
            source=_ones(64),
        ),
    ),
    "percentile_clipping": lambda: (
        F.percentile_clipping,
        dict(grad=_x(), gnorm_vec=_ones(100), step=2),
    ),
    "optimizer_update_32bit": lambda: _step("32bit"),
    "optimizer_update_8bit": lambda: _step("8bit"),
    "optimizer_update_8bit_blockwise": lambda: _step("blockwise"),
    "QuantState.from_dict": lambda: _saved(packed=False),
    "QuantState.from_dict, packed": lambda: _saved(packed=True),
    "QuantState.as_dict": lambda: (_entries, dict(tensor=_four(nested=True)[1])),
    "QuantState.__eq__": lambda: (_equal, _twice(_four(nested=True)[1])),
    "QuantState.encoding": lambda: (_encoding, dict(tensor=QuantState(_ones(1), code=_table()))),
    "QuantTensor.__eq__": lambda: (
        _equal,
        dict(one=F.quantize(_ones(64), "nf4"), other=F.quantize(_ones(64), "nf4")),
    ),
    "QuantTensor.from_state_dict": lambda: (
        QuantTensor.from_state_dict,
        dict(state_dict=F.quantize(_x(), "nf4", double=True).state_dict()),
    ),
    "QuantTensor.dequantize": lambda: (_dequantized, dict(tensor=F.quantize(_x(), "nvfp4"))),
}


def tensors_in(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors of an argument, in the same order each time, by name."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for number, each in enumerate(value):
            yield from tensors_in(f"{name}[{number}]", each)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from tensors_in(f"{name}.{key}" if name else str(key), each)
    elif isinstance(value, (QuantState, QuantTensor)):
        yield from tensors_in(name, vars(value))


def refused(function: Callable[..., Any], arguments: Mapping[str, Any]) -> bool:
    """Whether the call ends in an error of bnbx's."""
    try:
        function(**arguments)
    except BnbxError:
        return True
    return False


def say(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()  # before the process may end


def main() -> None:
    """Every tensor of every call, freed and cut short."""
    taken = []
    for name, make in CALLS.items():
        function, arguments = make()
        function(**arguments)  # which is good as it is
        places = [place for place, _ in tensors_in("", arguments)]
        for number, place in enumerate(places):
            for share in (0, 2):
                function, arguments = make()
                arguments = copy.deepcopy(arguments)  # what numpy has seen cannot be freed
                _, tensor = [*tensors_in("", arguments)][number]
                storage = tensor.untyped_storage()
                left = storage.nbytes() // share if share else 0
                say(f"{name}: {place}, {left} of {storage.nbytes()} bytes")
                storage.resize_(left)
                if not refused(function, arguments) and place not in UNREAD:
                    taken.append(f"{name}: {place}")
    say("taken:", *taken)
    sys.exit(bool(taken))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
