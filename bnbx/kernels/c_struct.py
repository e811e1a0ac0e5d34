"""Structs that C++ sources and Python share: one list of fields makes both texts of each.

With a list on either side, a slip in one of them would be memory written at random.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

# The typedefs of templates/numbers.h that fields have; whatever points is the same to ctypes.
_TYPES = {
    "double": ctypes.c_double,
    "i32": ctypes.c_int32,
    "u32": ctypes.c_uint32,
    "i64": ctypes.c_int64,
}


@dataclass(frozen=True)
class Field:
    """A field: its name, its type in C++ ({} for the name, where that is not last), a comment."""

    name: str
    c_type: str
    comment: str = ""

    @property
    def declaration(self) -> str:
        """The field in the struct."""
        text = self.c_type if "{}" in self.c_type else f"{self.c_type} {{}}"
        return f"{text.format(self.name)};"

    @property
    def points(self) -> bool:
        """Whether it holds an address: of numbers, or of a function."""
        return "*" in self.c_type


def declaration(name: str, fields: Iterable[Field]) -> str:
    """The struct in C++; comments of neighbors begin in one column."""
    lines = []
    for commented, group in groupby(fields, lambda field: bool(field.comment)):
        texts = [(field.declaration, field.comment) for field in group]
        width = max(len(text) for text, _ in texts)
        lines += [f"  {a:{width}}  // {b}" if commented else f"  {a}" for a, b in texts]
    return "\n".join([f"struct {name} {{", *lines, "};"])


def ctypes_fields(fields: Iterable[Field], **structs: Sequence[Field]) -> list[tuple[str, Any]]:
    """The `_fields_` of the struct in Python.

    Where a field is one of the `structs`, that one's fields stand in its place: they take half the
    time of a struct in a struct to fill. So `structs` are of pointers and 64-bit numbers only.
    """
    found: list[tuple[str, Any]] = []
    for field in fields:
        if field.c_type in structs:
            found += ctypes_fields(structs[field.c_type])
        else:
            found.append((field.name, ctypes.c_void_p if field.points else _TYPES[field.c_type]))
    return found


_SLICE = "void (*{})(const Job*, i64, i64)"
PHASES = (
    Field("row_count", "i64"),
    Field("chunk_count", "i64"),
    Field("update", _SLICE, "chunks [first, last) of the job"),
    Field("measure", _SLICE, "the same before that, or null"),
    Field("reduce", _SLICE, "and rows of it in between, or null"),
)
"""The last fields of a `Job` that templates/cpu_run.h runs."""
