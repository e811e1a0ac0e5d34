"""One quantized parameter, for any registered type: `QuantParameter`.

It begins as the dense numbers and is quantized when it moves to a device, `.to("cpu")` included;
from then on its memory is the packed codes, (n, 1) of `quant_storage`, and everything else is in
`quant_state`. Its `__dict__` holds its settings and nothing else, as constructor arguments, because
libraries rebuild parameters from it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import Self

from bnbx.errors import OptionError, UnsupportedTensorError
from bnbx.kernels.coding import FLOATS, decode, encode
from bnbx.kernels.encoding import Encoding, intern, make_encoding, type_named
from bnbx.kernels.fit import fit_scales
from bnbx.kernels.quant_state import QuantState
from bnbx.kernels.state_dict import plain_tensor
from bnbx.layers.arithmetic import SETS_DATA, Coded, in_numbers, kind_of
from bnbx.layers.moving import Moving
from bnbx.layers.products import dense, entries, in_place_of
from bnbx.layers.stacked import Stacked
from bnbx.layers.state_names import StateNames
from bnbx.registry import QuantType

if TYPE_CHECKING:
    from torch.nn import Module

SETTINGS = (
    "blocksize",
    "compress_statistics",
    "quant_type",
    "quant_state",
    "quant_storage",
    "bnb_quantized",
    "module",
)
"""The attributes, which are the constructor's arguments too, besides data and requires_grad."""

_CHUNKS = (torch.chunk, torch.split, Tensor.chunk, Tensor.split)


class QuantParameter(StateNames, Moving, Coded, torch.nn.Parameter):
    """A parameter that is quantized when it moves to a device, and frozen.

    Attributes:
        blocksize: elements that share a scale; 0 where a row or the tensor does.
        compress_statistics: whether scales are quantized too.
        quant_type: name of the type.
        quant_state: scales, type and shape; None until it is quantized.
        quant_storage: dtype of the codes' memory; FSDP wants that of the other parameters.
        bnb_quantized: whether the memory is codes.
        module: the layer that gets `quant_state` too, for when a library takes it from here.
    """

    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_state: QuantState | None
    quant_storage: torch.dtype
    bnb_quantized: bool
    module: Module | None

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = False,
        quant_type: str | QuantType = "nf4",
        quant_storage: torch.dtype = torch.uint8,
        module: Module | None = None,
        bnb_quantized: bool = False,
        **others: Any,
    ) -> Self:
        """A parameter of these settings.

        Args:
            data: dense numbers, or codes where `bnb_quantized`; nothing by default.
            requires_grad: whether the dense numbers train until they are quantized.
            quant_state: of the codes.
            blocksize: see the class; the type's own by default.
            compress_statistics: see the class.
            quant_type: a name, or a spec.
            quant_storage: see the class.
            module: see the class.
            bnb_quantized: whether data is codes. Dense numbers of the shape that `quant_state` has
                are taken for what they are all the same: adapters are merged by rebuilding a
                parameter from its own settings, this one left as it was.
            others: what other libraries mark parameters with, found in `__dict__` and passed on;
                is dropped, as by bitsandbytes: `__dict__` holds the settings and nothing else.

        Raises:
            UnknownNameError: no such quant type.
            OptionError: a block size or storage that the type cannot have.
        """
        del others
        if data is None:
            data = torch.empty(0)
        name = intern(quant_type) if isinstance(quant_type, QuantType) else quant_type
        spec = type_named(name)
        if bnb_quantized and _is_dense(data, quant_state):
            bnb_quantized, quant_state = False, None
        self = torch.Tensor._make_subclass(cls, data.detach(), requires_grad)
        self.blocksize = _block_size(spec, blocksize)
        self.compress_statistics = bool(compress_statistics)
        self.quant_type = name
        self.quant_state = quant_state
        self.quant_storage = _storage(quant_storage)
        self.bnb_quantized = bnb_quantized
        self.module = module
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: Mapping[str, Any] | QuantState,
        requires_grad: bool = False,
        device: torch.device | str | int | None = None,
        module: Module | None = None,
        **others: Any,
    ) -> Self:
        """A parameter from codes and what a state dict says of them.

        Args:
            data: the codes, of any dtype that they are stored in.
            quantized_stats: the entries beside them, as `QuantState.as_dict` gives them.
            requires_grad: for floating storage only; codes have no gradient.
            device: where to; where data is, by default.
            module: the layer, which gets the quantization state too.
            others: see the constructor.

        Raises:
            QuantizedDataError: codes and entries do not fit one another.
            UnknownNameError: the quant type is not registered.
        """
        device = data.device if device is None else device
        if isinstance(quantized_stats, QuantState):
            state = quantized_stats.to(device)
        else:
            state = QuantState.from_dict(quantized_stats, device)
        codes = plain_tensor("the weight", data, meta=True).to(device).contiguous()
        encoding = state.encoding if codes.is_meta else state.check(codes)
        self = cls(
            codes,
            requires_grad=requires_grad,
            quant_state=state,
            blocksize=encoding.block_size or None,
            compress_statistics=state.nested,
            quant_type=intern(encoding.quant_type),
            quant_storage=data.dtype,
            module=module,
            bnb_quantized=True,
            **others,
        )
        self._tell_module()
        return self

    # ---- quantizing

    @property
    def encoding(self) -> Encoding:
        """How it is, or will be, quantized."""
        if self.quant_state is not None:
            return self.quant_state.encoding
        spec = type_named(self.quant_type)
        return make_encoding(spec, self.blocksize or None, double=self.compress_statistics)

    def quantize(self, device: torch.device | str | None = None, fit: str | None = None) -> Self:
        """Quantize in place; returns itself.

        Args:
            device: where to; where it is, by default.
            fit: how scales are chosen, see `bnbx.kernels.fit`; None for absmax.

        Raises:
            UnsupportedTensorError: it is not float32, bfloat16 or float16.
            OptionError: its bytes do not fill elements of `quant_storage`.
        """
        dense = self.detach()
        if dense.dtype not in FLOATS:
            raise UnsupportedTensorError(
                f"a {type(self).__name__} of {dense.dtype} cannot be quantized; expected float32, "
                "bfloat16 or float16"
            )
        dense = dense.to(device)
        encoding = self.encoding
        parts = encode(encoding, dense) if fit is None else fit_scales(encoding, dense, fit)
        codes, state = QuantState.from_parts(encoding, parts, dense.shape, dense.dtype)
        self.adopt(stored(codes, self.quant_storage), state)
        return self

    def adopt(self, data: Tensor, state: QuantState) -> None:
        """Become these codes, in place, so that all who share the parameter share them."""
        encoding = state.encoding
        self.requires_grad_(False)
        self.data = data
        self.quant_state = state
        self.blocksize = encoding.block_size
        self.compress_statistics = state.nested
        self.quant_type = intern(encoding.quant_type)
        self.quant_storage = data.dtype
        self.bnb_quantized = True
        self._tell_module()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense numbers, in the dtype that they had or in another."""
        state = self.quant_state
        if state is None:
            return self.detach() if dtype is None else self.detach().to(dtype)
        codes = self.detach()
        state.check(codes)
        wanted = dtype or state.dtype or torch.float32
        return decode(state.encoding, state.parts(codes), state.shape or (), wanted)

    def _tell_module(self) -> None:
        if self.module is not None:
            self.module.quant_state = self.quant_state  # type: ignore[assignment]

    # ---- moving

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As `torch.Tensor.to`, but dense numbers are quantized where a device is named.

        Codes keep their bytes: a dtype is what those of the result are dequantized to.
        """
        parsed: tuple[Any, ...] = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype, non_blocking, *_ = parsed
        if not self.bnb_quantized:
            numbers = (
                self.dtype.is_floating_point
            )  # else codes, whose settings somebody has dropped
            if numbers and device is not None and device.type != "meta":
                if dtype is not None and dtype in FLOATS:
                    self.data = self.detach().to(dtype)
                return self.quantize(device, getattr(self.module, "fit", None))
            data = self.detach().to(device=device, dtype=dtype, non_blocking=non_blocking)
            return self._like(data)
        new = self._like(self.detach().to(device=device, non_blocking=non_blocking))
        state = self.quant_state
        if state is not None:
            # Its own: who looks at a weight in another dtype does not change that of the layer.
            stays = device is None or device.type == "meta"
            new.quant_state = state = copy.copy(state) if stays else state.on(new.device)
            state.dtype = dtype if dtype in FLOATS else state.dtype
        return new

    def in_memory(self, data: Tensor) -> Self:
        """Another memory with the same settings, and a quantization state beside it."""
        new = self._like(data)
        if self.quant_state is not None:
            new.quant_state = self.quant_state.on(data.device)
        return new

    def half(self, memory_format: torch.memory_format = torch.preserve_format) -> Any:
        """As `to(torch.float16)`."""
        return self.to(torch.float16, memory_format=memory_format)

    def bfloat16(self, memory_format: torch.memory_format = torch.preserve_format) -> Any:
        """As `to(torch.bfloat16)`."""
        return self.to(torch.bfloat16, memory_format=memory_format)

    def float(self, memory_format: torch.memory_format = torch.preserve_format) -> Any:
        """As `to(torch.float32)`."""
        return self.to(torch.float32, memory_format=memory_format)

    def double(self, memory_format: torch.memory_format = torch.preserve_format) -> Any:
        """As `to(torch.float64)`; codes stay as they are."""
        return self.to(torch.float64, memory_format=memory_format)

    def settle(self) -> None:
        """Bring the quantization state to where the memory is."""
        state, device = self.quant_state, self.device
        if state is not None and "meta" not in (device.type, state.absmax.device.type):
            state.to(device)

    def _taken_over(self, data: Tensor) -> Tensor:
        """What becomes the memory when somebody sets `data`.

        Modules convert their parameters so, whichever modules they are: the quantization state
        follows, for all who share it. Codes in a float dtype become codes again.
        """
        state, theirs = self.quant_state, getattr(data, "quant_state", None)
        if state is not None and theirs is not None:
            state.__dict__.update(theirs.__dict__)
        again = None if state is None else self.codes_again(data)
        return data if again is None else again

    # ---- arithmetic

    @property
    def in_codes(self) -> bool:
        """Whether the memory is codes, and what they stand for is known."""
        return self.quant_state is not None

    def numbers(self, dtype: torch.dtype | None) -> Tensor:
        """The dense numbers, in the dtype that they had, decoded no further than need be."""
        del dtype
        state, codes = self.quant_state, self.detach()
        assert state is not None
        if codes.is_meta or torch.compiler.is_compiling():
            return dense(codes, state)
        return Stacked.of(codes, state)

    def entries(self, index: Any) -> Tensor:
        """What `[index]` gives of the dense numbers."""
        assert self.quant_state is not None
        return entries(index, self.detach(), self.quant_state)

    # ---- copies

    def _settings(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def _like(self, data: Tensor) -> Self:
        """Another memory with the same settings."""
        # accelerate.init_empty_weights leaves requires_grad among them.
        settings = {**self._settings(), "requires_grad": self.requires_grad}
        return type(self)(data, **settings)

    def __copy__(self) -> Self:
        return self._like(self.detach())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if id(self) in memo:
            found: Self = memo[id(self)]
            return found
        new = self._like(copy.deepcopy(self.detach(), memo))
        memo[id(self)] = new
        new.quant_state = copy.deepcopy(self.quant_state, memo)
        new.module = memo.get(id(self.module), self.module)
        return new

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The settings go last, as state: `module` leads back here.
        return _rebuilt, (type(self), self.detach(), self.requires_grad), self._settings()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """What means numbers is done with numbers, see `bnbx.layers.arithmetic`; all else as ever.

        A model may use the weight of its embedding as that of its last layer, by
        `torch.nn.functional.linear`; that and `torch.nn.functional.embedding` know codes. Parts of
        a parameter, which FSDP makes, keep its settings.
        """
        mine = in_place_of(func, args, kwargs) or in_numbers(func, args, kwargs)
        if mine is not None:
            return mine()
        if kind_of(func) == SETS_DATA and isinstance(args[0], QuantParameter):
            args = args[0], args[0]._taken_over(args[1])
        # In one expression: a `super()` by itself is more than torch 2.11 compiles on Python 3.12.
        found = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if func in _CHUNKS and isinstance(args[0], QuantParameter):
            return tuple(args[0]._like(part) for part in found)
        return found


def _rebuilt(kind: type[QuantParameter], data: Tensor, requires_grad: bool) -> QuantParameter:
    return torch.Tensor._make_subclass(kind, data, requires_grad)


def _is_dense(data: Tensor, state: QuantState | None) -> bool:
    return state is not None and data.is_floating_point() and data.shape == state.shape


def _block_size(spec: QuantType, blocksize: int | None) -> int:
    if spec.scale.per != "block" and not blocksize:
        return 0
    return make_encoding(spec, blocksize).block_size


def _storage(dtype: Any) -> torch.dtype:
    if not isinstance(dtype, torch.dtype) or dtype.is_complex or dtype == torch.bool:
        raise OptionError(f"quant_storage={dtype!r}; expected a dtype such as torch.uint8")
    return dtype


def stored(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes as memory of a dtype, (n, 1).

    Raises:
        OptionError: their bytes do not fill its elements.
    """
    flat = codes.reshape(-1)
    if dtype != torch.uint8:
        if flat.numel() % dtype.itemsize:
            raise OptionError(
                f"quant_storage={dtype}: {flat.numel()} bytes of codes do not fill elements of "
                f"{dtype.itemsize} bytes; use torch.uint8"
            )
        flat = flat.view(dtype)
    return flat.unsqueeze(1)
