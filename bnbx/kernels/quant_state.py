"""What is kept beside the codes of one quantized tensor: `QuantState`.

Functions and layers share it, and so do files: attribute names, state-dict keys and the bytes
behind them are those of bitsandbytes, for any registered type and not only its two. A state dict
may come from a stranger, so everything in it is checked against what the quant type and the shape
demand before a kernel reads it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bnbx.errors import QuantizedDataError
from bnbx.kernels.encoding import (
    Encoding,
    check_parts,
    comes_with_bnbx,
    from_label,
    intern,
    make_encoding,
    type_named,
)
from bnbx.kernels.memory import check_memory, moved
from bnbx.kernels.state_checks import check_sizes, check_table, checked_encoding
from bnbx.kernels.state_dict import (
    PACKED,
    alone,
    checked_fields,
    checked_keys,
    dtype_name,
    dtype_of,
    pack_json,
    packed_entry,
    scales_entry,
    spec_entry,
    tensor_entry,
)
from bnbx.kernels.table_types import type_of_table
from bnbx.registry import QuantType

TENSORS = ("absmax", "code", "offset", "center", "tensor_scale")
"""The attributes that are tensors, besides those of `state2`."""


class QuantState:
    """Scales, shape and type of a quantized tensor.

    Attributes:
        absmax: one scale per block; their codes (uint8), if they are quantized too.
        shape: of the tensor, torch.Size; None if it is not known.
        code: the table of numbers (2**bits,), float32, in code order, over the type's unit.
        blocksize: elements that share a scale; 0 where a row or the tensor does.
        quant_type: name of the type; None where only `code` says what it is.
        dtype: that the tensor had, and gets when it is dequantized.
        offset: mean of the scales (0-d float32), if they are quantized too.
        state2: of the scales, if they are quantized too.
        center: mid-points of blocks, in types that have them.
        tensor_scale: what all scales are multiplied by, in types that have it.
        signed: False for the table of numbers that are never negative.
    """

    def __init__(
        self,
        absmax: Tensor,
        shape: torch.Size | None = None,
        code: Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        state2: QuantState | None = None,
        *,
        center: Tensor | None = None,
        tensor_scale: Tensor | None = None,
        signed: bool = True,
    ) -> None:
        self.absmax = absmax
        self.shape = None if shape is None else torch.Size(shape)
        self.code = code
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.dtype = dtype
        self.offset = offset
        self.state2 = state2
        self.center = center
        self.tensor_scale = tensor_scale
        self.signed = signed
        self._labeled: tuple[Any, str] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if labeled := self.__dict__.setdefault("_labeled"):  # not in what bitsandbytes pickled
            found = from_label(labeled[1])  # an error if such a type has other numbers here
            for each in filter(None, (found.quant_type, found.second)):
                intern(each)  # it may be unknown here

    @classmethod
    def from_parts(
        cls, encoding: Encoding, parts: list[Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> tuple[Tensor, QuantState]:
        """The codes, and the state of what `bnbx.kernels.coding.encode` gave for a tensor."""
        named = dict(zip(encoding.parts, map(alone, parts), strict=True))
        device = parts[0].device
        second = None
        if encoding.second is not None:
            second = cls(
                absmax=named["second_scale"],
                code=_levels(make_encoding(encoding.second, encoding.second_block), device),
                blocksize=encoding.second_block,
                quant_type=intern(encoding.second),
                dtype=torch.float32,
            )
        state = cls(
            absmax=named["scale"],
            shape=shape,
            code=_levels(encoding, device),
            blocksize=encoding.block_size,
            quant_type=intern(encoding.quant_type),
            dtype=dtype,
            offset=named["mean"].reshape(()) if second is not None else None,
            state2=second,
            center=named.get("center"),
            tensor_scale=named.get("tensor_scale"),
            signed=encoding.signed,
        )
        state.label  # noqa: B018 - made now, for torch.compile to find it
        return named["codes"], state

    # ---- what kernels need

    @property
    def nested(self) -> bool:
        """Whether the scales are quantized too."""
        return self.state2 is not None

    @property
    def encoding(self) -> Encoding:
        """The encoding that these attributes describe.

        Raises:
            UnknownNameError: no such quant type.
            OptionError: a block size that it cannot have.
            QuantizedDataError: there is neither a type nor a table.
        """
        return _described(*self._description())

    def _description(self) -> tuple[Any, ...]:
        """What tells the encoding: the arguments of `_described`."""
        second = self.state2
        own = (_told_by(self), self.blocksize, self.signed)
        return own if second is None else (*own, _told_by(second), second.blocksize, True)

    @property
    def label(self) -> str:
        """The label of `encoding`; kept, since a product with a few rows would feel its making."""
        key = self._description()
        if self._labeled is None or not _same(self._labeled[0], key):
            self._labeled = key, _label(*key)
        return self._labeled[1]

    def parts(self, codes: Tensor) -> list[Tensor]:
        """All parts, in the order of `Encoding.parts`; codes may be stored in any dtype."""
        if codes.dtype != torch.uint8:
            codes = codes.view(torch.uint8)
        found = [codes, self.absmax]
        if self.center is not None:
            found.append(self.center)
        if self.tensor_scale is not None:
            found.append(self.tensor_scale)
        if self.state2 is not None:
            found.append(self.state2.absmax)
            if self.offset is not None:
                found.append(self.offset.reshape(1))
        return found

    def check(self, codes: Tensor) -> Encoding:
        """The encoding, if codes and state fit one another.

        Raises:
            QuantizedDataError: they do not; the message says which part, and what was expected.
        """
        encoding = self.encoding
        if self.shape is None:
            raise QuantizedDataError(f"{encoding.describe()}: the shape of the tensor is not known")
        if codes.dtype != torch.uint8 and not (codes.is_contiguous() and codes.dim()):
            about = f"codes are {codes.dtype} of shape {tuple(codes.shape)}"
            raise QuantizedDataError(f"{encoding.describe()}: {about}, not a contiguous matrix")
        check_parts(encoding, self.shape, self.parts(codes))
        return encoding

    def to(self, device: torch.device | str | int | None) -> QuantState:
        """Move all tensors, in place; returns itself."""
        for name in TENSORS:
            found = getattr(self, name)
            if found is not None:
                setattr(self, name, found.to(device))
        if self.state2 is not None:
            self.state2.to(device)
        return self

    def on(self, device: torch.device) -> QuantState:
        """Another one on a device; from the meta device comes only room for its numbers."""
        new = copy.copy(self)
        for name in TENSORS:
            found = getattr(self, name)
            if found is not None:
                setattr(new, name, moved(found, device))
        new.state2 = None if self.state2 is None else self.state2.on(device)
        return new

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        own: list[Tensor | None] = [getattr(self, name) for name in TENSORS]
        mine = sum(tensor.nbytes for tensor in own if tensor is not None)
        return mine + (self.state2.nbytes if self.state2 is not None else 0)

    # ---- files

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The state by the names that bitsandbytes gives to its entries.

        Args:
            packed: tensors only, as safetensors wants them: what is no tensor goes, as JSON, into
                one uint8 tensor under "quant_state.bitsandbytes__" and the name of the type.
        """
        if self.state2 is not None:
            check_memory((self.offset, self.state2.code))  # which are read, not handed on
        found: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": dtype_name(self.dtype),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.state2 is not None and self.state2.code is not None:
            found["nested_absmax"] = self.state2.absmax
            found["nested_blocksize"] = self.state2.blocksize
            found["nested_quant_map"] = self.state2.code.clone()  # safetensors refuses shared ones
            found["nested_dtype"] = dtype_name(self.state2.dtype)
            mean = self.offset
            found["nested_offset"] = 0.0 if mean is None or mean.is_meta else mean.item()
        if self.center is not None:
            found["center"] = self.center
        if self.tensor_scale is not None:
            found["tensor_scale"] = self.tensor_scale
        if not self.signed:
            found["signed"] = False
        if self.quant_type is not None:
            spec = type_named(self.quant_type)
            if not comes_with_bnbx(spec):
                found["spec"] = spec.to_json()  # so that the file says all that there is to know
        if not packed or self.quant_type is None:
            return found
        tensors = {key: value for key, value in found.items() if isinstance(value, Tensor)}
        others = {key: value for key, value in found.items() if not isinstance(value, Tensor)}
        return {**tensors, PACKED + self.quant_type: pack_json(others)}

    @classmethod
    def from_dict(
        cls, qs_dict: Mapping[str, Any], device: torch.device | str | int | None
    ) -> QuantState:
        """The state that `as_dict` gave, packed or not; keys may have a prefix up to a dot.

        Raises:
            QuantizedDataError: something is missing, of the wrong kind or size, or contradicts the
                quant type.
            UnknownNameError: no such quant type is registered.
        """
        given = {key: qs_dict[key] for key in checked_keys(qs_dict) if PACKED not in key}
        entries = {key.rpartition(".")[2]: value for key, value in given.items()}
        fields = {**entries, **packed_entry(qs_dict)}
        found = checked_fields(fields)
        what = f"quantization state of {found['quant_type']!r}"
        spec = spec_entry(found, what)
        second = offset = None
        if "nested_absmax" in fields:
            number = torch.tensor(found["nested_offset"], dtype=torch.float32, device="cpu")
            offset = number.to(device)
            second = cls(
                absmax=scales_entry(what, fields, "nested_absmax", torch.float32, device),
                code=tensor_entry(what, fields, "nested_quant_map", torch.float32, device),
                blocksize=found["nested_blocksize"],
                dtype=dtype_of(found["nested_dtype"]),
            )
            second.quant_type = intern(type_of_table(second.code))
        state = cls(
            absmax=torch.empty(0, dtype=torch.float32, device="cpu"),
            shape=found["shape"],
            code=tensor_entry(what, fields, "quant_map", torch.float32, device),
            blocksize=found["blocksize"],
            quant_type=found["quant_type"] if spec is None else intern(spec),
            dtype=dtype_of(found["dtype"]),
            offset=offset,
            state2=second,
            signed=found["signed"],
        )
        encoding = checked_encoding(state, what)
        shapes = encoding.shapes(state.shape or ())
        for key, name in (("absmax", "scale"), ("center",) * 2, ("tensor_scale",) * 2):
            if name in shapes:
                setattr(state, key, scales_entry(what, fields, key, shapes[name][1], device))
        check_table(state, encoding, what)
        check_sizes(state, encoding, what)
        state.label  # noqa: B018 - made now, for torch.compile to find it
        return state

    # ---- what Python code does with states

    def __getitem__(self, index: int) -> Any:
        """Entries by number, as states were lists once: absmax, shape, dtype, blocksize, ..."""
        nested = [self.offset, self.state2] if self.nested else None
        found = [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type]
        return found[index]

    def __getattr__(self, name: str) -> Any:
        """FSDP looks entries of state dicts up as attributes: "bitsandbytes__nf4"."""
        prefix, _, key = PACKED.rpartition(".")
        if name.startswith(key) and "quant_type" in self.__dict__:
            found = self.as_dict(packed=True)
            if f"{prefix}.{name}" in found:
                return found[f"{prefix}.{name}"]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return False
        plain = ("shape", "dtype", "blocksize", "quant_type", "signed", "state2")
        return all(getattr(self, name) == getattr(other, name) for name in plain) and all(
            _close(getattr(self, name), getattr(other, name)) for name in TENSORS
        )

    __hash__ = None  # type: ignore[assignment] # tensors inside may change

    def __repr__(self) -> str:
        second = f", scales in blocks of {self.state2.blocksize}" if self.state2 else ""
        shape = None if self.shape is None else tuple(self.shape)
        return (
            f"QuantState({self.quant_type}, shape={shape}, {dtype_name(self.dtype)}, "
            f"blocksize={self.blocksize}{second})"
        )


def _same(these: tuple[Any, ...], those: tuple[Any, ...]) -> bool:
    """Equality, by identity where there are tensors."""
    if len(these) != len(those):
        return False
    for a, b in zip(these, those, strict=True):
        if a is not b and (isinstance(a, Tensor) or isinstance(b, Tensor) or a != b):
            return False
    return True


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    check_memory((a, b))
    same = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return same and torch.allclose(a.float(), b.float(), atol=1e-6, equal_nan=True)


def _levels(encoding: Encoding, device: torch.device) -> Tensor:
    return torch.tensor(encoding.codebook.levels, dtype=torch.float32, device=device)


@lru_cache(maxsize=1024, typed=True)  # 64.0 is not 64
def _encoding(
    quant_type: QuantType | str,
    block_size: int | None,
    signed: bool,
    second: QuantType | str | None,
    second_block: int,
) -> Encoding:
    if isinstance(quant_type, str):
        quant_type = type_named(quant_type)
    if isinstance(second, str):
        second = type_named(second)
    if quant_type.scale.per != "block":
        block_size = None
    return make_encoding(
        quant_type, block_size, signed=signed, second=second, second_block=second_block
    )


def _described(
    quant_type: str | Tensor | None,
    block_size: int | None,
    signed: bool,
    second: str | Tensor | None = None,
    second_block: int | None = None,
    nested: bool = False,
) -> Encoding:
    """The encoding of a state: its type by name or by table, and the same of its scales."""
    scales = _type_of(second) if nested else None
    block = 256 if second_block is None else second_block
    return _encoding(_type_of(quant_type), block_size or None, signed, scales, block)


def _label(*description: Any) -> str:
    """The label of an encoding; torch.compile cannot trace what the registry does for it."""
    return _described(*description).label


# All that torch.compiler.assume_constant_result does, but that it imports the compiler for it.
_label._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _told_by(state: QuantState) -> str | Tensor | None:
    return state.code if state.quant_type is None else state.quant_type


def _type_of(named: str | Tensor | None) -> QuantType | str:
    return named if isinstance(named, str) else type_of_table(named)
