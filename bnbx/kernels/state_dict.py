"""Entries of saved quantization states: what may stand in them, and how they are read.

Tensors stand under their names; all else is JSON in one uint8 tensor, under a key that ends in
"quant_state.bitsandbytes__" and the name of the quant type. A file may come from a stranger, so
every entry is checked here; `QuantState.from_dict` checks that they fit one another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bnbx.errors import BnbxError, QuantizedDataError, UnknownNameError
from bnbx.kernels.dtypes import BY_NAME
from bnbx.kernels.memory import lost
from bnbx.registry import QuantType, quant_types
from bnbx.registry.names import nearest

PACKED = "quant_state.bitsandbytes__"
"""What the key of the packed entry ends in, but for the name of the type."""

TENSORS = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    "center",
    "tensor_scale",
)
NUMBERS = ("nested_blocksize", "nested_dtype", "nested_offset", "signed", "spec")
NEEDED = ("quant_type", "blocksize", "dtype", "shape")
LARGEST_JSON = 1 << 20
LARGEST_SIDE = 1 << 62


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """A dtype as files spell it: "bfloat16"."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype that a file means, whose entries are checked."""
    return None if name is None else BY_NAME[name]


def alone(part: Tensor) -> Tensor:
    """In memory of its own: files hold the whole memory that a tensor is a view of."""
    return part if part.untyped_storage().nbytes() == part.nbytes else part.clone()


def pack_json(fields: Mapping[str, Any]) -> Tensor:
    """JSON as uint8 (bytes,)."""
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8, device="cpu")


def unpack_json(key: str, packed: Any) -> dict[str, Any]:
    """The object whose JSON a uint8 tensor holds.

    Raises:
        QuantizedDataError: it holds none; the message names `key`.
    """
    packed = plain_tensor(key, packed)
    if packed.dtype != torch.uint8:
        raise QuantizedDataError(f"{key} is {packed.dtype}; expected JSON in a uint8 tensor")
    if packed.numel() > LARGEST_JSON:
        raise QuantizedDataError(f"{key} has {packed.numel()} bytes; expected a short JSON text")
    try:
        found = json.loads(bytes(packed.cpu().contiguous().numpy().tobytes()))
    except (ValueError, RecursionError) as error:
        raise QuantizedDataError(f"{key} holds no JSON: {error}") from None
    if not isinstance(found, dict):
        raise QuantizedDataError(f"{key} holds {found!r:.200}; expected a JSON object")
    return found


def plain_tensor(what: str, value: Any, *, meta: bool = False, repeats: bool = False) -> Tensor:
    """An entry of a file, detached, if it is a tensor whose memory a kernel could read.

    A file may hold any kind of tensor, sparse, quantized by torch or nested, and a few bytes that
    are a view of as many elements as it likes.

    Args:
        what: the entry, for the message.
        value: the entry.
        meta: whether it may be on the meta device.
        repeats: whether its elements may share memory, as those of expanded tensors do.

    Raises:
        QuantizedDataError: it is not.
    """
    if not isinstance(value, Tensor):
        raise QuantizedDataError(f"{what} is {value!r:.200}; expected a tensor")
    kind = "nested" if value.is_nested else value.dtype if value.is_quantized else value.layout
    if kind is not torch.strided or (value.is_meta and not meta):
        raise QuantizedDataError(
            f"{what} is {kind} on {value.device}; expected a plain tensor with memory"
        )
    if not value.is_meta and (wrong := lost(value)):
        raise QuantizedDataError(f"{what}, {wrong}; expected a tensor with memory")
    if not repeats and value.untyped_storage().nbytes() < value.nbytes:
        raise QuantizedDataError(
            f"{what} is a view of shape {tuple(value.shape)} and strides {value.stride()} that "
            "repeats its memory; expected memory for every element: call .contiguous() on it"
        )
    return value.detach().resolve_conj().resolve_neg()


def checked_keys(entries: Any) -> list[str]:
    """The names in a dict of entries.

    Raises:
        QuantizedDataError: it is no dict, or something else than a name stands in it.
    """
    if not isinstance(entries, Mapping):
        raise QuantizedDataError(
            f"a quantization state is {type(entries).__name__}; expected a dict, as "
            "QuantState.as_dict gives it"
        )
    for key in entries:
        if not isinstance(key, str):
            raise QuantizedDataError(
                f"a quantization state has the key {key!r:.200}; expected names of entries"
            )
    return list(entries)


def packed_entry(entries: Mapping[str, Any]) -> dict[str, Any]:
    """What the packed entry among `entries` says; nothing, if there is none.

    Raises:
        QuantizedDataError: there are several, it cannot be read, or is of a type that its key does
            not name.
    """
    keys = [key for key in checked_keys(entries) if PACKED in key]
    if len(keys) > 1:
        raise QuantizedDataError(f"there are {len(keys)} quantization states: {', '.join(keys)}")
    if not keys:
        return {}
    (key,) = keys
    found = unpack_json(key, entries[key])
    name = key.rpartition(PACKED)[2]
    if found.get("quant_type") != name:
        raise QuantizedDataError(f"{key} is of the quant type {found.get('quant_type')!r}")
    return found


def checked_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are no tensors, each with a value that it can have.

    Raises:
        QuantizedDataError: one is missing, not known, or has another.
    """
    known = (*NEEDED, *TENSORS, *NUMBERS)
    for key in fields:
        if key not in known:
            raise QuantizedDataError(
                f"a quantization state has no entry {key!r}{nearest(str(key), known)}; "
                f"there are: {', '.join(known)}"
            )
    missing = [key for key in NEEDED if key not in fields]
    if missing:
        raise QuantizedDataError(
            f"a quantization state without {', '.join(missing)}; expected its JSON, under a key "
            f"that ends in {PACKED!r} and the name of the quant type"
        )
    nested = "nested_absmax" in fields
    needed = ("nested_quant_map", "nested_blocksize", "nested_dtype", "nested_offset")
    missing = [key for key in needed if nested and key not in fields]
    if missing:
        raise QuantizedDataError(f"scales that are quantized too, without {', '.join(missing)}")
    found = {
        "quant_type": _field(fields, "quant_type", "the name of a quant type", _is_name),
        "blocksize": _field(fields, "blocksize", "a number of elements", _is_count),
        "dtype": _field(fields, "dtype", "float32, bfloat16 or float16", _is_dtype),
        "shape": _field(fields, "shape", "a list of sizes", _is_shape),
        "signed": _field({"signed": True, **fields}, "signed", "true or false", _is_bool),
        "spec": _field({"spec": None, **fields}, "spec", "JSON of a quant type", _is_text),
    }
    shape = found["shape"]
    found["shape"] = None if shape is None else torch.Size(shape)
    if nested:
        found |= {
            "nested_blocksize": _field(fields, "nested_blocksize", "a count", _is_count),
            "nested_dtype": _field(fields, "nested_dtype", "float32", _is_dtype),
            "nested_offset": float(
                _field(fields, "nested_offset", "a number that float32 has", _is_number)
            ),
        }
    return found


def _field(fields: Mapping[str, Any], key: str, expected: str, good: Any) -> Any:
    value = fields[key]
    if not good(value):
        raise QuantizedDataError(
            f"{key}={value!r:.200} in a quantization state; expected {expected}"
        )
    return value


def _is_name(value: Any) -> bool:
    return value is None or (isinstance(value, str) and bool(value))


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST_SIDE


def _is_dtype(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value in BY_NAME)


def _is_shape(value: Any) -> bool:
    if value is None:
        return True
    listed = isinstance(value, (list, tuple))  # torch.Size is a tuple
    return listed and all(map(_is_count, value)) and math.prod(value) < LARGEST_SIDE


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= torch.finfo(torch.float32).max  # not so of NaN


def tensor_entry(
    what: str,
    fields: Mapping[str, Any],
    key: str,
    dtype: torch.dtype,
    device: torch.device | str | int | None,
) -> Tensor:
    """A tensor among the fields, contiguous and on a device.

    Raises:
        QuantizedDataError: it is missing, or has a dtype that `dtype` cannot stand for.
    """
    value = fields.get(key)
    if not isinstance(value, Tensor):
        raise QuantizedDataError(f"{what}: {key} is {value!r:.200}; expected a tensor of {dtype}")
    plain = plain_tensor(f"{what}: {key}", value, meta=str(device) == "meta")
    both = plain.dtype.is_floating_point and dtype.is_floating_point
    if plain.dtype != dtype and not both:
        raise QuantizedDataError(f"{what}: {key} is {plain.dtype}; expected {dtype}")
    return plain.to(device=device, dtype=dtype).contiguous()


def scales_entry(
    what: str,
    fields: Mapping[str, Any],
    key: str,
    dtype: torch.dtype,
    device: torch.device | str | int | None,
) -> Tensor:
    """As `tensor_entry`, as a vector: lookups of rows take a scale by its number."""
    return tensor_entry(what, fields, key, dtype, device).reshape(-1)


def spec_entry(found: Mapping[str, Any], what: str) -> QuantType | None:
    """The type that checked fields bring along, if they do.

    Raises:
        QuantizedDataError: it is none, or another than they name.
    """
    if found["spec"] is None:
        return None
    try:
        spec = QuantType.from_json(found["spec"])
    except BnbxError as error:
        raise QuantizedDataError(f"{what}: {error}") from None
    if spec.name != (found["quant_type"] or "").partition("@")[0]:
        raise QuantizedDataError(f"{what} comes with the spec of {spec.name!r}")
    try:
        here = quant_types().get(spec.name)
    except UnknownNameError:
        return spec
    return here if here.meaning == spec.meaning else spec  # but for words, it is the same
