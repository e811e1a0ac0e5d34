"""What functions ask of their arguments, asked before anything is read or written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from bnbx.errors import DeviceError, InputError, OptionError
from bnbx.kernels.coding import FLOATS
from bnbx.kernels.encoding import known_block_size
from bnbx.kernels.memory import lost
from bnbx.registry.quant_type import BLOCK_SIZES


def dense(what: str, tensor: Any) -> Tensor:
    """The argument, if it is a tensor with elements side by side, and has its memory.

    Raises:
        InputError: it is not; the message says what it is.
    """
    if not isinstance(tensor, Tensor):
        raise InputError(f"{what} is {type(tensor).__name__}; expected a torch.Tensor")
    if tensor.layout is not torch.strided:
        raise InputError(f"{what} is {tensor.layout}; expected a dense tensor")
    # What is traced has no memory; operations look again when they run.
    if not torch.compiler.is_compiling() and (wrong := lost(tensor)):
        raise InputError(f"{what}, {wrong}")
    return tensor


def of_dtype(what: str, tensor: Any, *dtypes: torch.dtype) -> Tensor:
    """The argument, if it is a dense tensor of one of these dtypes.

    Raises:
        InputError: it is not; the message says what it is, and what was expected.
    """
    found = dense(what, tensor)
    if found.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InputError(f"{what} is {found.dtype}; expected {names}: convert it first")
    return found


def floats(what: str, tensor: Any) -> Tensor:
    """The argument, if it is a dense tensor of a dtype that kernels compute with.

    Raises:
        InputError: it is not.
    """
    return of_dtype(what, tensor, *FLOATS)


def together(tensors: Iterable[tuple[str, Tensor | None]]) -> None:
    """Raise DeviceError unless all tensors are on one device; each comes with its name.

    Raises:
        InputError: one is no tensor.
    """
    found = [(name, dense(name, tensor).device) for name, tensor in tensors if tensor is not None]
    if len({device for _, device in found}) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in found)
        raise DeviceError(f"{places}: move them to one device")


def of_size(what: str, tensor: Tensor, numel: int, why: str) -> None:
    """Raise InputError unless a tensor has `numel` elements; `why` says so in words."""
    if tensor.numel() != numel:
        raise InputError(
            f"{what} has shape {tuple(tensor.shape)}, {tensor.numel()} elements; expected {numel}: "
            f"{why}"
        )


def of_shape(what: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raise InputError unless a tensor has this shape."""
    if tuple(tensor.shape) != tuple(shape):
        raise InputError(f"{what} has shape {tuple(tensor.shape)}; expected {tuple(shape)}")


def number(what: str, value: Any) -> float:
    """A number as Python's own.

    Raises:
        OptionError: it is none.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    raise OptionError(f"{what}={value!r:.200}; expected a number")


def one_number(what: str, value: Any, why: str) -> Tensor:
    """A number, or a tensor of one, as float32; `why` says in words that it is one.

    Raises:
        OptionError, InputError: it is none.
    """
    if not isinstance(value, Tensor):
        value = torch.tensor(number(what, value), dtype=torch.float32, device="cpu")
    elif dense(what, value).is_complex():
        raise InputError(f"{what} is {value.dtype}; expected a real number")
    found: Tensor = value.to(torch.float32)
    of_size(what, found, 1, why)
    return found


def whole(what: str, value: Any, least: int, most: int) -> int:
    """A whole number within bounds, as Python's own where it is numpy's.

    Raises:
        OptionError: it is none.
    """
    known = isinstance(value, (Integral, torch.SymInt)) and not isinstance(value, bool)
    if not known:
        raise OptionError(f"{what}={value!r:.200}; expected a whole number")
    if not least <= value <= most:
        raise OptionError(f"{what}={value}; expected {least} to {most}")
    found: int = int(value) if isinstance(value, Integral) else value
    return found


def block_size(value: Any) -> int:
    """A block size that kernels know.

    Raises:
        InputError: it is none.
    """
    found = known_block_size(value)
    if found is None:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise InputError(f"blocksize={value!r:.200}; expected one of {sizes}")
    return found


def blocks(numel: int, size: int) -> int:
    """Blocks of `size` that `numel` elements make."""
    return -(-numel // size)


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may share memory."""
    if a.device != b.device or not a.numel() or not b.numel():
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def shape_of(what: str, shape: Any) -> torch.Size:
    """A shape whose elements can be counted.

    Raises:
        InputError: it is none.
    """
    if isinstance(shape, torch.Size):
        return shape
    listed = isinstance(shape, (list, tuple))
    if not listed or not all(type(side) is int and side >= 0 for side in shape):
        raise InputError(f"{what} has the shape {shape!r:.200}; expected sizes >= 0")
    if prod(shape) >= 1 << 62:
        raise InputError(f"{what} has the shape {shape!r:.200}: no tensor is that large")
    return torch.Size(shape)
