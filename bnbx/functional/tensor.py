"""`QuantTensor`: a quantized tensor that knows everything about itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bnbx.errors import BnbxError, InputError, OptionError, QuantizedDataError
from bnbx.functional import checks, ops
from bnbx.kernels.coding import FLOATS
from bnbx.kernels.encoding import (
    Encoding,
    check_parts,
    comes_with_bnbx,
    from_label,
    make_encoding,
)
from bnbx.kernels.memory import check_memory
from bnbx.kernels.state_dict import pack_json, unpack_json
from bnbx.layers.ops import dequantize
from bnbx.registry import QuantType, quant_types

ABOUT = "about"
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
KEYS = ("quant_type", "digest", "spec", "block_size", "signed", "second", "shape", "dtype")
SECOND_KEYS = ("quant_type", "digest", "spec", "block_size")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def names_of(label: str) -> tuple[str, ...]:
    """Names of the parts in an encoding."""
    return from_label(label).parts


class QuantTensor:
    """A tensor in codes, as `bnbx.functional.quantize` makes it.

    Attributes:
        shape, dtype: those of the tensor that was quantized.
        label: of its encoding.
        parts: all its tensors, in the order of `Encoding.parts`; `codes` and `scale` are the
            first two, the others are called as there.
    """

    def __init__(
        self, parts: Sequence[Tensor], label: str, shape: torch.Size, dtype: torch.dtype
    ) -> None:
        self.parts = tuple(parts)
        self.label = label
        self.shape = shape
        self.dtype = dtype

    @classmethod
    def from_parts(
        cls,
        encoding: Encoding,
        parts: Sequence[Tensor],
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> QuantTensor:
        """A quantized tensor from tensors that something else made.

        Raises:
            QuantizedDataError: they do not fit the encoding and the shape.
            InputError: no such shape.
        """
        size = checks.shape_of("a quantized tensor", shape)
        check_parts(encoding, size, parts)
        _check_dtype(dtype)
        return cls(parts, encoding.label, size, dtype)

    # ---- what is in it

    def part(self, name: str) -> Tensor | None:
        """A part by name; None where the encoding has none of this name."""
        for each, tensor in zip(names_of(self.label), self.parts, strict=True):
            if each == name:
                return tensor
        return None

    @property
    def codes(self) -> Tensor:
        """The codes: uint8, packed without gaps where they are narrower than a byte."""
        return self.parts[0]

    @property
    def scale(self) -> Tensor:
        """What is kept of the largest magnitude of each block: absmax, a step, or their codes."""
        return self.parts[1]

    @property
    def center(self) -> Tensor | None:
        """Mid-points of blocks, float32, in types that have them."""
        return self.part("center")

    @property
    def tensor_scale(self) -> Tensor | None:
        """What all scales are multiplied by, float32 (1,), in types that have it."""
        return self.part("tensor_scale")

    @property
    def second_scale(self) -> Tensor | None:
        """The scales of scales that are quantized too, float32."""
        return self.part("second_scale")

    @property
    def mean(self) -> Tensor | None:
        """What was taken from scales that are quantized too, float32 (1,)."""
        return self.part("mean")

    @property
    def encoding(self) -> Encoding:
        """Type, block size and kinds of scales."""
        return from_label(self.label)

    @property
    def quant_type(self) -> str:
        """The name of the quant type."""
        return self.encoding.quant_type.name

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self.parts[0].device

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    @property
    def bits_per_element(self) -> float:
        """Bits of all parts, per element; 0 for a tensor without elements."""
        return 8 * self.nbytes / self.numel() if self.numel() else 0.0

    # ---- what can be done with it

    def dequantize(self, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
        """The numbers.

        Args:
            dtype: float32, bfloat16 or float16; that of the original by default, or of `out`.
            out: memory for them, of this shape, any strides.

        Raises:
            QuantizedDataError: the parts do not fit one another (any more).
            OptionError: another dtype.
        """
        if out is None:
            wanted = self.dtype if dtype is None else dtype
            _check_dtype(wanted)
            found: Tensor = dequantize(list(self.parts), self.label, self.shape, wanted)
            return found
        checks.floats("out", out)
        checks.of_shape("out", out, self.shape)
        if dtype is not None and out.dtype != dtype:
            raise OptionError(f"out is {out.dtype}, but dtype={dtype}; give one of them")
        ops.dequantize_into(list(self.parts), self.label, out)
        return out

    def to(
        self,
        device: torch.device | str | int | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> QuantTensor:
        """On another device, or for another dtype to dequantize to; the codes stay as they are.

        Args:
            device: where the parts go; the dtype may stand here.
            dtype: float32, bfloat16 or float16.

        Raises:
            OptionError: another dtype.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None:
            _check_dtype(dtype)
        parts = self.parts if device is None else [part.to(device) for part in self.parts]
        return QuantTensor(parts, self.label, self.shape, dtype or self.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only: the parts by name, and "about", JSON in uint8.

        Any file format for tensors holds it, and `from_state_dict` needs nothing else: of a type
        that bnbx does not bring along, the whole spec is in it.
        """
        encoding = self.encoding
        about: dict[str, Any] = {
            **_describe(encoding.quant_type),
            "block_size": encoding.block_size,
            "signed": encoding.signed,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        if encoding.second is not None:
            about["second"] = {
                **_describe(encoding.second),
                "block_size": encoding.second_block,
            }
        named = dict(zip(encoding.parts, self.parts, strict=True))
        return {**named, ABOUT: pack_json(about)}

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, Any], device: torch.device | str | None = None
    ) -> QuantTensor:
        """What `state_dict` wrote.

        Args:
            state_dict: may come from a stranger; everything is checked before it is used.
            device: where to put the parts; where they are by default.

        Raises:
            QuantizedDataError: something is missing, not known, or contradicts the rest.
            UnknownNameError: no such quant type.
        """
        if not isinstance(state_dict, Mapping):
            raise QuantizedDataError(f"a state dict is {type(state_dict).__name__}; expected dict")
        about = unpack_json(ABOUT, state_dict.get(ABOUT))
        encoding, shape, dtype = _read(about)
        expected = (*encoding.parts, ABOUT)
        if set(state_dict) != set(expected):
            raise QuantizedDataError(
                f"{encoding.describe()}: a state dict with {sorted(map(str, state_dict))}; "
                f"expected {', '.join(expected)}"
            )
        parts = [state_dict[name] for name in encoding.parts]
        for name, part in zip(encoding.parts, parts, strict=True):
            checks.dense(f"{encoding.describe()}: {name}", part)
        moved = [
            p.detach().contiguous() if device is None else p.detach().to(device).contiguous()
            for p in parts
        ]
        return cls.from_parts(encoding, moved, shape, dtype)

    # ---- what Python does with it

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantTensor):
            return NotImplemented
        same = (
            self.encoding == other.encoding
            and self.shape == other.shape
            and self.dtype == other.dtype
            and self.device == other.device
        )
        return same and all(map(_equal_bits, self.parts, other.parts))

    __hash__ = None  # type: ignore[assignment] # its tensors may change

    def __reduce__(self) -> tuple[Any, ...]:
        return QuantTensor.from_state_dict, (self.state_dict(),)

    def __repr__(self) -> str:
        return (
            f"QuantTensor({self.encoding.describe()}, shape={tuple(self.shape)}, "
            f"{str(self.dtype).removeprefix('torch.')}, device={self.device}, "
            f"{self.nbytes} bytes, {self.bits_per_element:.4g} bits per element)"
        )


def _check_dtype(dtype: Any) -> None:
    if dtype not in FLOATS:
        raise OptionError(f"dtype={dtype!r}; expected one of {', '.join(map(str, FLOATS))}")


def _equal_bits(a: Tensor, b: Tensor) -> bool:
    check_memory((a, b))
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# ---- files


def _describe(spec: QuantType) -> dict[str, Any]:
    """What a file says of a type."""
    found = {"quant_type": spec.name, "digest": spec.digest}
    if not comes_with_bnbx(spec):
        found["spec"] = json.loads(spec.to_json())
    return found


def _read(about: Mapping[str, Any]) -> tuple[Encoding, torch.Size, torch.dtype]:
    """Encoding, shape and dtype of a state dict."""
    _check_keys(about, KEYS, ("quant_type", "block_size", "signed", "shape", "dtype"))
    second = about.get("second")
    if second is not None:
        if not isinstance(second, dict):
            raise QuantizedDataError(f"{ABOUT}: second={second!r:.200}; expected an object")
        _check_keys(second, SECOND_KEYS, ("quant_type", "block_size"))
    sizes = [about["block_size"], *([second["block_size"]] if second else [])]
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise QuantizedDataError(f"{ABOUT}: block sizes {sizes!r:.200}; expected whole numbers")
    if not isinstance(about["signed"], bool):
        raise QuantizedDataError(f"{ABOUT}: signed={about['signed']!r:.200}; expected a boolean")
    dtype = about["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPE_NAMES:
        names = ", ".join(DTYPE_NAMES)
        raise QuantizedDataError(f"{ABOUT}: dtype={dtype!r:.200}; expected one of {names}")
    shape = about["shape"]
    if not isinstance(shape, list):
        raise QuantizedDataError(f"{ABOUT}: shape={shape!r:.200}; expected a list of sizes")
    try:
        encoding = make_encoding(
            _type_in(about),
            about["block_size"] or None,
            signed=about["signed"],
            second=_type_in(second) if second else None,
            second_block=second["block_size"] if second else 256,
        )
        return encoding, checks.shape_of(ABOUT, shape), DTYPE_NAMES[dtype]
    except (OptionError, InputError) as error:
        raise QuantizedDataError(f"{ABOUT}: {error}") from None


def _check_keys(found: Mapping[str, Any], known: Sequence[str], needed: Sequence[str]) -> None:
    unknown = sorted(found.keys() - set(known))
    missing = [key for key in needed if key not in found]
    if unknown or missing:
        told = f"unknown {unknown!r:.200}" if unknown else f"nothing of {', '.join(missing)}"
        raise QuantizedDataError(f"{ABOUT}: {told}; expected {', '.join(known)}")


def _type_in(found: Mapping[str, Any]) -> QuantType:
    """The type that a file describes."""
    name, digest, spec = found["quant_type"], found.get("digest"), found.get("spec")
    if not isinstance(name, str):
        raise QuantizedDataError(f"{ABOUT}: quant_type={name!r:.200}; expected a name")
    if spec is None:
        made = quant_types().get(name)
    else:
        try:
            made = QuantType.from_json(json.dumps(spec))
        except BnbxError as error:
            raise QuantizedDataError(f"{ABOUT}: {error}") from None
    if made.name != name or (digest is not None and digest != made.digest):
        raise QuantizedDataError(
            f"{ABOUT}: the file was written with quant type {name!r}, digest {digest!r:.40}; "
            f"{'its spec' if spec else 'the registered one'} is {made.name!r}, {made.digest}: "
            "it has other numbers, so the codes do not mean the same"
        )
    return made
