"""The weight of an int8 layer: `Int8Params`, floats until it moves to a device, then codes.

Its `__dict__` holds `CB`, `SCB` and `has_fp16_weights` and nothing else, as constructor arguments,
because libraries rebuild parameters from it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from typing_extensions import Self

from bnbx.errors import QuantizedDataError
from bnbx.kernels.coding import FLOATS
from bnbx.kernels.int8 import dequantize_rows, quantize_rows
from bnbx.kernels.memory import moved
from bnbx.layers import int8_ops
from bnbx.layers.arithmetic import SETS_DATA, Coded, in_numbers, kind_of
from bnbx.layers.moving import Moving


class Int8Params(Moving, Coded, torch.nn.Parameter):
    """A weight that is quantized, row by row, when it moves to a device, `.to("cpu")` included.

    Products and reductions by torch's own functions are of the numbers, not the codes, see
    `bnbx.layers.arithmetic`; but users decode by hand, `weight * SCB[:, None] / 127`, so these
    two are of the codes.

    Attributes:
        CB: the codes, (out, in) int8: the parameter's own memory; None until it is quantized.
        SCB: absmax of the rows, (out,) float32; None until then.
        has_fp16_weights: if True, it stays as floats wherever it goes, and the layer quantizes it
            anew in each forward pass.
    """

    CB: Tensor | None
    SCB: Tensor | None
    has_fp16_weights: bool

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: Tensor | None = None,  # noqa: N803 - the name it has in bitsandbytes
        SCB: Tensor | None = None,  # noqa: N803
        **others: Any,
    ) -> Self:
        """A parameter of floats, or of codes.

        Args:
            data: floats (out, in), or their codes (int8).
            requires_grad: for floats only: codes have no gradient.
            has_fp16_weights: see the class.
            CB: see the class.
            SCB: see the class.
            others: what other libraries mark parameters with, found in `__dict__` and passed on;
                is dropped, as by bitsandbytes.
        """
        del others
        data = torch.empty(0) if data is None else data
        requires_grad = requires_grad and data.is_floating_point()
        self = torch.Tensor._make_subclass(cls, data.detach(), requires_grad)
        self.CB = CB
        self.SCB = SCB
        self.has_fp16_weights = has_fp16_weights
        return self

    @property
    def quantized(self) -> bool:
        """Whether the memory is codes."""
        return self.dtype == torch.int8

    def quantize(self, device: torch.device | str | None = None) -> Self:
        """Quantize in place; returns itself.

        The codes are those of the floats as they are: nothing is rounded to float16 before.

        Args:
            device: where to; where it is, by default.

        Raises:
            UnsupportedTensorError: it is not float32, bfloat16 or float16.
        """
        codes, absmax, _ = quantize_rows(self.detach().to(device))
        self.adopt(codes, absmax)
        return self

    def adopt(self, codes: Tensor, absmax: Tensor | None) -> None:
        """Become these codes, in place, so that all who share the parameter share them."""
        self.requires_grad_(False)
        self.data = codes
        self.CB = self.data
        self.SCB = absmax

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers that the codes stand for, (out, in); the floats, if it is not quantized."""
        if not self.quantized or self.SCB is None:
            return self.detach().to(dtype)
        return dequantize_rows(self.detach(), self.SCB, dtype)

    # ---- arithmetic

    scaled_by_hand = True

    @property
    def in_codes(self) -> bool:
        """Whether the memory is codes, and what they stand for is known."""
        return self.SCB is not None and self.quantized

    def numbers(self, dtype: torch.dtype | None) -> Tensor:
        """The dense numbers, in this dtype if it is one of weights, else in float32."""
        wanted = dtype if dtype in FLOATS else torch.float32
        found: Tensor = int8_ops.dequantize(self.detach(), self.SCB, wanted)
        return found

    def entries(self, index: Any) -> NoReturn:
        """Raise: whether codes are meant, to be decoded by hand, or numbers, nobody can tell.

        Raises:
            QuantizedDataError: always.
        """
        del index
        raise QuantizedDataError(
            "weight[...] of an int8 layer: the weight holds codes. Index "
            "layer.dequantized_weight() for the numbers, or weight.data for the codes"
        )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """What means numbers is done with numbers; all else as ever.

        That there is such a method keeps torch's fast paths, which know only dense numbers, away.
        """
        mine = in_numbers(func, args, kwargs)
        if mine is not None:
            return mine()
        if kind_of(func) == SETS_DATA and isinstance(args[0], Int8Params):
            args = args[0], args[0]._in_place_of_codes(args[1])
        # In one expression: a `super()` by itself is more than torch 2.11 compiles on Python 3.12.
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]

    def _in_place_of_codes(self, data: Tensor) -> Tensor:
        """What becomes the memory when somebody sets `data`.

        Codes that were converted to a float dtype become codes again, for they mean what they
        meant. Other floats are numbers: what belonged to the codes is forgotten.
        """
        if not self.in_codes or not data.is_floating_point():
            return data
        self.CB = self.codes_again(data)
        if self.CB is None:
            self.SCB = None
            return data
        return self.CB

    # ---- moving

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As `torch.Tensor.to`, but floats are quantized where a device is named.

        Codes keep their bytes, whatever dtype is named. Floats on the meta device have nothing to
        be quantized, and those with `has_fp16_weights` only move.
        """
        parsed: tuple[Any, ...] = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype, non_blocking, *_ = parsed
        moves = device is not None and device.type != "meta"
        if moves and not (self.quantized or self.has_fp16_weights or self.is_meta):
            return self.quantize(device)
        kept = None if self.quantized else dtype
        data = self.detach().to(device=device, dtype=kept, non_blocking=non_blocking)
        return self.in_memory(data)

    def in_memory(self, data: Tensor) -> Self:
        """Another memory with the same settings, and the absmax beside it."""
        return self._like(data, None if self.SCB is None else moved(self.SCB, data.device))

    # ---- copies

    def _settings(self) -> dict[str, Any]:
        # accelerate.init_empty_weights leaves requires_grad in __dict__; CB is the own memory.
        return {**self.__dict__, "CB": None, "requires_grad": self.requires_grad}

    def _like(self, data: Tensor, absmax: Tensor | None) -> Self:
        """Another memory with the same settings."""
        new = type(self)(data, **{**self._settings(), "SCB": absmax})
        if new.quantized:
            new.CB = new.data
        return new

    def __copy__(self) -> Self:
        return self._like(self.detach(), self.SCB)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if id(self) in memo:
            found: Self = memo[id(self)]
            return found
        new = self._like(copy.deepcopy(self.detach(), memo), copy.deepcopy(self.SCB, memo))
        memo[id(self)] = new
        return new

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuilt, (type(self), self.detach(), self._settings())


def _rebuilt(kind: type[Int8Params], data: Tensor, settings: dict[str, Any]) -> Int8Params:
    new = kind(data, **settings)
    if new.quantized:
        new.CB = new.data
    return new


def absmax_of(weight: Tensor, kept: Tensor | None, layer: str) -> Tensor:
    """Absmax of the rows of codes: the weight's own, or what its layer has kept.

    Libraries put plain parameters in the place of ours, and so does torch.export.

    Raises:
        QuantizedDataError: there is neither.
    """
    own: Tensor | None = getattr(weight, "SCB", None)
    absmax = kept if own is None else own
    if absmax is None:
        raise QuantizedDataError(
            f"the int8 weight of this {layer} has no absmax: set weight.SCB, float32 of shape "
            f"({len(weight)},)"
        )
    return absmax
