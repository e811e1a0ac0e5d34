"""Structs that C++ and Python share: both texts of each have every field in the same place."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from bnbx.kernels import (
    coding_cpu,
    coding_source,
    cpu,
    fit_cpu,
    int8_cpu,
    linear_cpu,
    linear_source,
    signature,
)
from bnbx.kernels.c_struct import Field, ctypes_fields, declaration

PARTS = coding_source.PARTS
STRUCTS: dict[str, tuple[type[ctypes.Structure], Sequence[Field]]] = {
    "optimizer": (cpu.Job, signature.JOB),
    "coding": (coding_cpu.Job, coding_source.JOB),
    "linear": (linear_cpu.Job, linear_source.JOB),
    "fit": (fit_cpu.Job, fit_cpu.JOB),
    "int8 rows": (int8_cpu.Rows, int8_cpu.ROWS),
    "int8 decode": (int8_cpu.Decode, int8_cpu.DECODE),
    "int8 product": (int8_cpu.Product, int8_cpu.PRODUCT),
}
BEFORE = """
#include <cstddef>
#include <cstdio>
typedef signed char i8; typedef unsigned char u8;
typedef int i32; typedef unsigned int u32; typedef long long i64;
typedef float Number;
struct Tables; struct Row;
"""


def test_a_declaration_is_what_a_reader_expects() -> None:
    fields = (
        Field("x", "const float*", "what goes in"),
        Field("n", "i64", "how many"),
        Field("run", "void (*{})(const Job*)"),
    )
    assert declaration("Job", fields) == (
        "struct Job {\n"
        "  const float* x;  // what goes in\n"
        "  i64 n;           // how many\n"
        "  void (*run)(const Job*);\n"
        "};"
    )
    types = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    assert ctypes_fields(fields) == list(zip("x n run".split(), types, strict=True))


def test_a_type_that_python_does_not_know_is_refused() -> None:
    with pytest.raises(KeyError, match="Levels"):
        ctypes_fields([Field("levels", "Levels")])


def places_in(field: Field) -> list[str]:
    """The fields that Python has for one of C++: those of a struct in a struct are its own."""
    return [f"parts.{part.name}" for part in PARTS] if field.c_type == "Parts" else [field.name]


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("name", STRUCTS)
def test_fields_lie_where_the_compiler_puts_them(name: str, tmp_path: Path) -> None:
    structure, fields = STRUCTS[name]
    names = [inner for field in fields for inner in places_in(field)]
    printed = [f'std::printf("%zu\\n", offsetof(Job, {place}));' for place in names]
    text = (
        f"{BEFORE}{declaration('Parts', PARTS)}\n{declaration('Job', fields)}\n"
        f'int main() {{ std::printf("%zu\\n", sizeof(Job)); {" ".join(printed)} }}\n'
    )
    source, binary = tmp_path / "places.cpp", tmp_path / "places"
    source.write_text(text, encoding="utf-8")
    subprocess.run(["g++", "-w", str(source), "-o", str(binary)], check=True)
    said = subprocess.run([str(binary)], check=True, capture_output=True, text=True).stdout
    places = [getattr(structure, place.split(".")[-1]).offset for place in names]
    assert list(map(int, said.split())) == [ctypes.sizeof(structure), *places]
