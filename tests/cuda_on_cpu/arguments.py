"""Matches Python values to the parameters of a kernel, and says what memory they make reachable."""

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cuda_on_cpu import abi

Array = Tensor | NDArray[Any]
Number = bool | int | float | np.generic
Argument = Array | Number | ctypes.Structure | None

_SCALARS: dict[tuple[bytes, int], Any] = {
    (b"b", 1): ctypes.c_bool,
    (b"f", 4): ctypes.c_float,
    (b"f", 8): ctypes.c_double,
    (b"i", 1): ctypes.c_int8,
    (b"i", 2): ctypes.c_int16,
    (b"i", 4): ctypes.c_int32,
    (b"i", 8): ctypes.c_int64,
    (b"u", 1): ctypes.c_uint8,
    (b"u", 2): ctypes.c_uint16,
    (b"u", 4): ctypes.c_uint32,
    (b"u", 8): ctypes.c_uint64,
}


class Memory(NamedTuple):
    """The bytes of one array, from the first element to the last."""

    begin: int
    size: int
    label: str


def memory_of(array: Array, label: str) -> Memory:
    """Where the array lies; only what its elements span belongs to it, not the whole storage."""
    if isinstance(array, Tensor):
        if array.device.type != "cpu":
            raise TypeError(
                f"{label} is a tensor on {array.device}; kernels run on CPU tensors here"
            )
        begin, count, item = array.data_ptr(), array.numel(), array.element_size()
        strides = [stride * item for stride in array.stride()]
    else:
        begin, count, item = array.ctypes.data, array.size, array.itemsize
        strides = list(array.strides)
    if any(stride < 0 for stride in strides):
        raise ValueError(f"{label} runs backwards in memory; pass a contiguous copy")
    if count == 0:
        return Memory(begin, 0, label)
    span = sum((size - 1) * stride for size, stride in zip(array.shape, strides, strict=True))
    return Memory(begin, span + item, label)


def pack(
    parameters: Sequence[abi.Parameter], arguments: Sequence[Argument]
) -> tuple[list[Any], list[Memory]]:
    """One ctypes value per parameter, and the memory of those that are pointers."""
    if len(parameters) != len(arguments):
        raise TypeError(
            f"the kernel takes {len(parameters)} arguments, {len(arguments)} were given; "
            f"it takes ({', '.join(map(describe, parameters))})"
        )
    values: list[Any] = []
    memory: list[Memory] = []
    for index, (parameter, argument) in enumerate(zip(parameters, arguments, strict=True)):
        label = f"argument {index}"
        if parameter.kind == b"p":
            reached = _pointed_at(parameter, argument, label)
            memory.extend(reached)
            values.append(ctypes.c_void_p(reached[0].begin if reached else 0))
        else:
            values.append(_by_value(parameter, argument, label))
    return values, memory


def disjoint(memory: Iterable[Memory]) -> list[Memory]:
    """The same bytes by address, every one of them once: what overlaps becomes one."""
    result: list[Memory] = []
    for item in sorted(item for item in memory if item.size):
        if result and item.begin < result[-1].begin + result[-1].size:
            last = result.pop()
            end = max(last.begin + last.size, item.begin + item.size)
            label = last.label if item.label in last.label else f"{last.label} and {item.label}"
            item = Memory(last.begin, end - last.begin, label)
        result.append(item)
    return result


def describe(parameter: abi.Parameter) -> str:
    """The C++ type, as far as it is known."""
    if parameter.kind == b"p":
        return f"{_type_name(parameter.pointee, parameter.pointee_size)}*"
    return _type_name(parameter.kind, parameter.size)


def _type_name(kind: bytes, size: int) -> str:
    names = {b"v": "void", b"b": "bool", b"p": "pointer", b"s": f"{size}-byte struct"}
    if kind == b"f":
        return "float" if size == 4 else "double"
    if kind in names:
        return names[kind]
    return f"{'unsigned ' if kind == b'u' else ''}{size * 8}-bit integer"


def _pointed_at(parameter: abi.Parameter, argument: Argument, label: str) -> list[Memory]:
    if argument is None:
        return []
    if not isinstance(argument, (Tensor, np.ndarray)):
        raise _mismatch(parameter, argument, label, "a CPU tensor, an array or None")
    if isinstance(argument, Tensor):
        item, floating = argument.element_size(), argument.dtype.is_floating_point
    else:
        item, floating = argument.itemsize, argument.dtype.kind == "f"
    # Bytes, structures and void may be seen in anything; floats may be seen as integers.
    fits = {
        b"f": floating and item == parameter.pointee_size,
        b"i": parameter.pointee_size in {1, item},
        b"u": parameter.pointee_size in {1, item},
        b"b": item == 1,
        b"p": item == parameter.pointee_size,
    }
    if not fits.get(parameter.pointee, True):
        raise _mismatch(parameter, argument, label, "elements of that type")
    return [memory_of(argument, label)]


def _by_value(parameter: abi.Parameter, argument: Argument, label: str) -> Any:
    if parameter.kind == b"s":
        if not isinstance(argument, ctypes.Structure):
            raise _mismatch(parameter, argument, label, "a ctypes.Structure")
        if ctypes.sizeof(argument) != parameter.size:
            raise _mismatch(parameter, argument, label, f"{parameter.size} bytes")
        return argument
    value = argument.item() if isinstance(argument, np.generic) else argument
    make = _SCALARS[parameter.kind, parameter.size]
    if parameter.kind == b"b":
        if not isinstance(value, bool):
            raise _mismatch(parameter, argument, label, "a bool")
        return make(value)
    accepted = (int, float) if parameter.kind == b"f" else int
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise _mismatch(parameter, argument, label, "a number of that kind")
    packed = make(value)
    if parameter.kind != b"f" and packed.value != value:
        raise ValueError(f"{label} is {value}, which does not fit {describe(parameter)}")
    return packed


def _mismatch(parameter: abi.Parameter, argument: Argument, label: str, expected: str) -> TypeError:
    if isinstance(argument, (Tensor, np.ndarray)):
        got = f"an array of {argument.dtype}"
    elif isinstance(argument, ctypes.Structure):
        got = f"a structure of {ctypes.sizeof(argument)} bytes"
    else:
        got = repr(argument)
    return TypeError(f"{label}: the kernel takes {describe(parameter)}, so {expected}; got {got}")
