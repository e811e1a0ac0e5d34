"""How a tensor is kept in codes: a quant type, who shares a scale, and how scales are kept.

An `Encoding` is all that the source of a quantize, dequantize or linear kernel depends on besides
the dtype of its numbers. A tensor in an encoding is a tuple of tensors, its parts, in the order
of `Encoding.parts`:

    codes         uint8, packed (see `packing.py`): (bytes,), or (rows, bytes) where scales are per
                  row, or the tensor's own shape where a code is a byte
    scale         one per block: float32, bfloat16, or uint8 (e4m3, e8m0, or codes of `second`)
    center        float32, one per block: the mid-point of its range (`Scale.centered`)
    tensor_scale  float32 (1,): what all scales are multiplied by (`Scale.tensor_scale`)
    second_scale  float32, one per `second_block` scales: their absmax, less the mean
    mean          float32 (1,): of all scales

The number of code c in block b is level(c) * factor(b) + center(b), with factor(b) the scale as a
float, times `tensor_scale`; or level2(scale(b)) * second_scale(b // second_block) + mean.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnbx.errors import BnbxError, OptionError, QuantizedDataError
from bnbx.kernels.codebook import Tables, tables
from bnbx.kernels.packing import packed_size
from bnbx.registry import QuantType, quant_types
from bnbx.registry.quant_type import BLOCK_SIZES, Codebook

LONGEST = 1 << 16  # bytes of a spec in a label: that of a table of 256 numbers has some 5,000
SCALE_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "e4m3": torch.uint8,
    "e8m0": torch.uint8,
}


@dataclass(frozen=True)
class Encoding:
    """See this module's text.

    Attributes:
        quant_type: the table of numbers, and its scale.
        block_size: elements that share a scale; 0 where a row or the tensor does.
        signed: False for the table of numbers that are never negative.
        second: the type that the scales themselves are quantized to (double quantization,
            arXiv:2305.14314 section 3), less their mean, in blocks of `second_block`; None if
            they are not.
    """

    quant_type: QuantType
    block_size: int
    signed: bool = True
    second: QuantType | None = None
    second_block: int = 256

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:  # without what is kept, a hash of this process
        own = (self.quant_type, self.block_size, self.signed, self.second, self.second_block)
        return Encoding, own

    @cached_property
    def _hash(self) -> int:
        """Kept, since every product looks up what belongs to an encoding."""
        return hash((self.quant_type, self.block_size, self.signed, self.second, self.second_block))

    @property
    def per(self) -> str:
        """What shares a scale: "block", "row" or "tensor"."""
        return self.quant_type.scale.per

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.quant_type.bits

    @property
    def keeps_step(self) -> bool:
        """Whether scales are steps: then levels are the table's own numbers."""
        return self.quant_type.scale.keeps_step

    @property
    def codebook(self) -> Codebook:
        """The table of the codes."""
        return self.quant_type.codebook(signed=self.signed)

    @cached_property
    def tables(self) -> Tables:
        """What kernels read of the codebook."""
        found = tables(self.codebook)
        if not self.keeps_step:
            return found
        natural = [np.nan if v is None else v for v in self.codebook.values]
        return replace(found, levels=np.resize(np.asarray(natural, np.float32), 256))

    @cached_property
    def second_tables(self) -> Tables | None:
        """What kernels read of the second codebook."""
        return tables(self.second.codebook(signed=True)) if self.second else None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts, in order."""
        scale = self.quant_type.scale
        names = ["codes", "scale"]
        names += ["center"] if scale.centered else []
        names += ["tensor_scale"] if scale.tensor_scale else []
        names += ["second_scale", "mean"] if self.second else []
        return tuple(names)

    @property
    def label(self) -> str:
        """A name from which `from_label` makes this encoding again.

        Graphs, pickles and exported programs keep it, and nothing but it. So it tells which numbers
        a registered type has, for another process may know others by this name; and of any other
        type it tells the whole spec, for nobody may know that any more.
        """
        sign = "" if self.signed else "/unsigned"
        second = f"/{_told(self.second)}:{self.second_block}" if self.second else ""
        return f"{_told(self.quant_type)}/{self.block_size}{sign}{second}"

    def grid(self, shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of a tensor as kernels see it: blocks never cross rows."""
        numel = prod(shape)
        if self.per != "row":
            return 1, numel
        columns = shape[-1] if len(shape) else 1
        return (numel // columns if columns else 0), columns

    def blocks(self, shape: Sequence[int]) -> int:
        """How many scales a tensor of this shape has."""
        rows, columns = self.grid(shape)
        return (
            rows
            if self.per == "row"
            else 1
            if self.per == "tensor"
            else -(-columns // self.block_size)
        )

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each part of a tensor of this shape."""
        rows, columns = self.grid(shape)
        blocks = self.blocks(shape)
        size = packed_size(self.quant_type, columns)
        codes = (rows, size) if self.per == "row" else (size,)
        scale = torch.uint8 if self.second else SCALE_DTYPES[self.quant_type.scale.dtype]
        every = {
            "codes": (tuple(shape) if self.bits == 8 else codes, torch.uint8),
            "scale": ((blocks,), scale),
            "center": ((blocks,), torch.float32),
            "tensor_scale": ((1,), torch.float32),
            "second_scale": ((-(-blocks // self.second_block),), torch.float32),
            "mean": ((1,), torch.float32),
        }
        return {name: every[name] for name in self.parts}

    def bytes(self, shape: Sequence[int]) -> int:
        """Bytes of all parts of a tensor of this shape."""
        return sum(prod(size) * dtype.itemsize for size, dtype in self.shapes(shape).values())

    def empty(
        self, shape: Sequence[int], device: torch.device, out: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """Parts to be filled, for a tensor of this shape: those in `out`, and new ones."""
        sizes = [*self.shapes(shape).values()][len(out) :]
        return [*out, *(torch.empty(size, dtype=dtype, device=device) for size, dtype in sizes)]

    def describe(self) -> str:
        """One line."""
        what = f"blocks of {self.block_size}" if self.block_size else f"a scale per {self.per}"
        found = f"{self.quant_type.name}, {what}"
        found += "" if self.signed else ", unsigned"
        return found + (f", scales in {self.second.name}" if self.second else "")


def make_encoding(
    quant_type: QuantType | str,
    block_size: int | None = None,
    *,
    signed: bool = True,
    double: bool = False,
    second: QuantType | str | None = None,
    second_block: int = 256,
) -> Encoding:
    """The encoding for a quant type, or the name of one.

    Args:
        quant_type: a spec or a registered name.
        block_size: elements that share a scale, one of `BLOCK_SIZES`; the type's own by default.
        signed: False for the table of numbers that are never negative.
        double: whether scales are quantized too.
        second: to which type; by default the registered one that says `scale_default`.
        second_block: scales that share a scale of their own.

    Raises:
        UnknownNameError: no such type.
        OptionError: the type cannot be used so.
    """
    found = quant_types().get(quant_type) if isinstance(quant_type, str) else quant_type
    if found.scale.per != "block":
        if block_size:
            raise OptionError(
                f"{found.name} has a scale per {found.scale.per}; block_size is for types with "
                "a scale per block"
            )
        size = 0
    else:
        size = _checked_block(found.name, found.block_size if block_size is None else block_size)
    other = _second(found, second) if double or second is not None else None
    return _interned(
        Encoding(found, size, bool(signed), other, _checked_block("second_block", second_block))
    )


@lru_cache(maxsize=1024)
def _interned(encoding: Encoding) -> Encoding:
    """One object for equal encodings, so that what is derived from it is derived once."""
    return encoding


def known_block_size(size: Any) -> int | None:
    """A block size as Python's own int, from numpy's too; None if it is none.

    64.0 is none, though it equals 64: it would become the 64 of all that is kept by equality.
    """
    return int(size) if isinstance(size, Integral) and size in BLOCK_SIZES else None


def _checked_block(what: str, size: Any) -> int:
    found = known_block_size(size)
    if found is None:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise OptionError(f"{what}: block size {size!r:.200}; expected one of {sizes}")
    return found


def _second(found: QuantType, second: QuantType | str | None) -> QuantType:
    if found.scale.dtype != "float32":
        raise OptionError(
            f"{found.name} keeps scales in {found.scale.dtype}; only float32 ones are quantized"
        )
    if isinstance(second, QuantType):
        chosen: QuantType | None = second
    elif second is not None:
        chosen = quant_types().get(second)
    else:
        chosen = quant_types().find(lambda t: t.scale_default)
    if chosen is None or chosen.bits != 8 or chosen.scale != type(chosen.scale)():
        name = chosen.name if chosen else None
        raise OptionError(f"scales are quantized to 8-bit types with float32 blocks, not {name!r}")
    return chosen


_ANONYMOUS: dict[str, QuantType] = {}  # what states and parameters, which have names, are told by


def intern(quant_type: QuantType) -> str:
    """A name by which this process finds the type again: its own, if it is registered so."""
    if quant_types().holds(quant_type):
        return quant_type.name
    name = f"{quant_type.name}@{quant_type.digest}"
    _ANONYMOUS[name] = quant_type
    return name


def comes_with_bnbx(quant_type: QuantType) -> bool:
    """Whether a file need not say more of a type than its name: any bnbx has it."""
    catalog = quant_types()
    if not catalog.holds(quant_type):
        return False
    return catalog.package(quant_type.name).partition(".")[0] == __name__.partition(".")[0]


def _told(quant_type: QuantType) -> str:
    if quant_types().holds(quant_type):
        return f"{quant_type.name}@{quant_type.meaning}"
    return f"{quant_type.name}={_spelled(quant_type)}"


@lru_cache(maxsize=256)
def _spelled(quant_type: QuantType) -> str:
    """The spec in letters, digits, "-" and "_": 2 to 3 KB for a table of 256 numbers."""
    packed = zlib.compress(quant_type.to_json().encode())
    return base64.urlsafe_b64encode(packed).decode().rstrip("=")


def _type_told(told: str) -> QuantType:
    """The type that `_told` told.

    Raises:
        ValueError, BnbxError: it told of none.
    """
    _, spelled, text = told.partition("=")
    if not spelled:
        return type_named(told)
    unpack = zlib.decompressobj()
    try:
        found = unpack.decompress(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), LONGEST)
    except zlib.error as error:
        raise ValueError(f"a spec that cannot be unpacked: {error}") from None
    return QuantType.from_json(found.decode())


def type_named(name: str) -> QuantType:
    """The type that `intern` gave this name, or the registered one.

    Raises:
        UnknownNameError: no such type.
        QuantizedDataError: a label had this name, of a type that means something else by codes.
    """
    if name in _ANONYMOUS:
        return _ANONYMOUS[name]
    plain, _, meaning = name.partition("@")
    found = quant_types().get(plain)
    if meaning not in ("", found.meaning, found.digest):  # `intern` told the digest
        raise QuantizedDataError(
            f"these codes were written with a quant type {plain!r} that means other numbers than "
            f"the registered one, from {quant_types().package(plain)} ({meaning}, not "
            f"{found.meaning}): install the version of the package that wrote them, or save a "
            "state dict there, which holds the table"
        )
    return found


@lru_cache(maxsize=1024)
def from_label(label: str) -> Encoding:
    """The encoding with this `label`.

    Raises:
        UnknownNameError: no such type.
        QuantizedDataError: not a label, or one of another type of this name.
    """
    name, _, rest = label.partition("/")
    try:
        size, *options = rest.split("/")
        signed = "unsigned" not in options
        seconds = [o.rpartition(":") for o in options if o != "unsigned"]
        block = int(size) or None
        second, _, second_block = seconds[0] if seconds else ("", "", "256")
        return make_encoding(
            _type_told(name),
            block,
            signed=signed,
            second=_type_told(second) if seconds else None,
            second_block=int(second_block),
        )
    except BnbxError:
        raise
    except (ValueError, IndexError) as error:
        raise QuantizedDataError(f"{label!r:.200} does not name an encoding: {error}") from None


def check_parts(encoding: Encoding, shape: Sequence[int], parts: Sequence[Tensor]) -> None:
    """Raise QuantizedDataError unless the parts are those of a tensor of this shape.

    Kernels trust sizes, so nothing reads a part before this.
    """
    expected = encoding.shapes(shape)
    what = f"{encoding.describe()}, of shape {tuple(shape)}"
    if len(parts) != len(expected):
        raise QuantizedDataError(
            f"{what}: {len(parts)} parts; expected {len(expected)}: {', '.join(expected)}"
        )
    if any(side < 0 for side in shape):
        raise QuantizedDataError(f"{what}: a negative size")
    _check_each(what, expected, parts, parts[0].device, "the codes")


def check_memory_for(encoding: Encoding, x: Tensor, out: Sequence[Tensor]) -> None:
    """Raise QuantizedDataError unless `out` can be the first parts of x, once it is quantized."""
    what = f"memory for {encoding.describe()}, of shape {tuple(x.shape)}"
    expected = encoding.shapes(x.shape)
    most = 1 if encoding.second else len(expected)
    if len(out) > most:
        raise QuantizedDataError(f"{what}: {len(out)} tensors; expected {most} at most")
    _check_each(what, expected, out, x.device, "x")


def _check_each(
    what: str,
    expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    parts: Sequence[Tensor],
    device: torch.device,
    other: str,
) -> None:
    """`parts` may be fewer than are expected; `other` is what they are together with."""
    for (name, (size, dtype)), part in zip(expected.items(), parts, strict=False):
        if part.dtype != dtype or part.numel() != prod(size) or not part.is_contiguous():
            layout = "" if part.is_contiguous() else ", not contiguous"
            raise QuantizedDataError(
                f"{what}: {name} is {part.dtype} of shape {tuple(part.shape)}{layout}; expected "
                f"{dtype} of shape {size} ({prod(size)} elements), contiguous"
            )
        if part.device != device:
            raise QuantizedDataError(f"{what}: {name} is on {part.device}, {other} on {device}")
