"""A quantized tensor that looks dense, and is decoded no further than it has to be.

Models keep the weights of all experts of a mixture in one parameter, (experts, out, in), and use
one after the other: `linear(x, self.weight[expert])`. `Stacked` is what they get instead of that
parameter: an entry of it is in codes still, a product with a matrix reads the codes, and whatever
else is done with it is done with the dense numbers, which then are made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from bnbx.kernels.coding import decode
from bnbx.kernels.encoding import Encoding
from bnbx.kernels.quant_state import QuantState
from bnbx.kernels.rows import take
from bnbx.layers import ops
from bnbx.layers.products import autocast_dtype

_LINEAR = torch.nn.functional.linear
_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
_TURNS = (Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]
_SWAPS = (Tensor.transpose, torch.transpose)
_READS = (Tensor.numpy, Tensor.tolist, Tensor.__array__)  # memory, and nothing asks the dispatcher


class Stacked(Tensor):
    """See this module's text. It is frozen.

    Attributes:
        encoding, parts: of the quantized tensor.
        size_in_codes: its shape.
        turned: whether it stands for the transposed matrix.
    """

    encoding: Encoding
    parts: list[Tensor]
    size_in_codes: tuple[int, ...]
    turned: bool

    @staticmethod
    def __new__(
        cls: type[Stacked],
        encoding: Encoding,
        parts: list[Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        turned: bool = False,
    ) -> Stacked:
        """A tensor of `shape`, or of the transposed shape."""
        seen = (shape[1], shape[0]) if turned else shape
        make: Any = torch.Tensor._make_wrapper_subclass
        self: Stacked = make(cls, seen, dtype=dtype, device=parts[0].device)
        self.encoding = encoding
        self.parts = parts
        self.size_in_codes = shape
        self.turned = turned
        return self

    @classmethod
    def of(cls, codes: Tensor, state: QuantState) -> Stacked:
        """A tensor from its codes."""
        encoding = state.check(codes)
        parts = [part.reshape(-1) for part in state.parts(codes)]
        return cls(encoding, parts, tuple(state.shape or ()), state.dtype or torch.float32)

    def dense(self) -> Tensor:
        """The dense numbers."""
        found = decode(self.encoding, self.parts, self.size_in_codes, self.dtype)
        return found.t() if self.turned else found

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        del tensor_contents
        return f"Stacked({self.encoding.describe()}, shape={tuple(self.shape)}, {self.dtype})"

    # ---- copies: of these codes alone, which may be a view of all of a mixture's

    def __deepcopy__(self, memo: dict[int, Any]) -> Stacked:
        if id(self) not in memo:
            memo[id(self)] = _rebuilt(*self._told())
        found: Stacked = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        del protocol
        return _rebuilt, self._told()

    def _told(self) -> tuple[Any, ...]:
        encoding = [getattr(self.encoding, each.name) for each in fields(self.encoding)]
        parts = [part.detach().clone() for part in self.parts]
        return encoding, parts, self.size_in_codes, self.dtype, self.turned

    # ---- what is done with it

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """What is done in codes; all else comes to `__torch_dispatch__`."""
        named = kwargs or {}
        found = None
        if func is _LINEAR:
            found = _linear(*args, **named)
        elif func in _MATMULS and not named:
            found = _matmul(*args)
        elif func is Tensor.__getitem__:
            found = args[0]._entry(args[1]) if isinstance(args[0], Stacked) else None
        elif func in _TURNS or func in _SWAPS:
            found = args[0]._turn(*args[1:], **named)
        if found is not None:
            return found
        if func in _READS:
            return func(*tree_map(_dense, args), **named)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **named)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch calls it with the function first
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Any operation, on the dense numbers."""
        return func(*tree_map(_dense, args), **tree_map(_dense, kwargs or {}))

    def _entry(self, index: Any) -> Tensor | None:
        """An entry along the first dimension; None if it cannot be had in codes."""
        if isinstance(index, tuple) and len(index) == 1:
            (index,) = index
        whole = isinstance(index, Tensor) and index.dim() == 0 and index.dtype.itemsize > 1
        if isinstance(index, bool) or not (isinstance(index, int) or whole):
            return None
        if self.turned or self.dim() < 2:
            return None
        found = take(self.encoding, self.parts, self.size_in_codes, int(index))
        if found is None:
            return None
        encoding, parts = found
        return Stacked(encoding, parts, self.size_in_codes[1:], self.dtype)

    def _turn(self, *dims: int, **named: int) -> Tensor | None:
        """The transposed matrix; None if this is none, or if dimensions stay as they are."""
        if self.dim() != 2:
            return None
        given = [d % 2 for d in (*dims, *named.values())]
        if given and set(given) != {0, 1}:
            return None
        return Stacked(self.encoding, self.parts, self.size_in_codes, self.dtype, not self.turned)


def _rebuilt(encoding: list[Any], *others: Any) -> Stacked:
    return Stacked(Encoding(*encoding), *others)


def _dense(value: Any) -> Any:
    return value.dense() if isinstance(value, Stacked) else value


def _linear(input: Any, weight: Any, bias: Tensor | None = None) -> Tensor | None:  # noqa: A002 - torch's name
    if isinstance(input, Stacked) or not isinstance(weight, Stacked) or weight.dim() != 2:
        return None
    return _product(input, weight, not weight.turned, bias)


def _matmul(x: Any, weight: Any) -> Tensor | None:
    if isinstance(x, Stacked) or not isinstance(weight, Stacked) or weight.dim() != 2:
        return None
    return _product(x, weight, weight.turned, None)


def _product(x: Tensor, weight: Stacked, forward: bool, bias: Tensor | None) -> Tensor:
    """The product with the transposed codes where `forward`, else with the codes."""
    dtype = autocast_dtype(x) or x.dtype
    x, label, size = x.to(dtype), weight.encoding.label, weight.size_in_codes
    bias = None if bias is None else bias.to(dtype)
    found: Tensor
    if forward:
        found = ops.linear_product(x, weight.parts, bias, label, size)
    else:
        found = ops.linear_grad_input(x, weight.parts, label, size)
        found = found if bias is None else found + bias
    return found
