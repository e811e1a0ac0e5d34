"""Compiles C++ source and opens what came out, with the types of the functions that are called."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bnbx.kernels.cache import key_of, load_or_build
from bnbx.kernels.compiler import find_compiler

POINTER, INTEGER = ctypes.c_void_p, ctypes.c_int64
Functions = Mapping[str, tuple[tuple[Any, ...], Any]]
"""Types of the arguments and of the result, by name."""

# `bnbx_run` of templates/cpu_run.h: jobs, how many, threads, the pool's entry.
RUN: Functions = {"bnbx_run": ((POINTER, INTEGER, INTEGER, POINTER), None)}


def compiled(source: str, functions: Functions) -> ctypes.CDLL:
    """The library of a source, compiled or read from the cache.

    Raises:
        CompileError: there is no compiler, it refuses the source, or what came out of it lacks one
            of the functions.
    """
    compiler = find_compiler()
    key = key_of(source, *compiler.key())
    return load_or_build(key, source, ".cpp", compiler.compile, partial(opened, functions))


def opened(functions: Functions, path: Path) -> ctypes.CDLL:
    """The library in a file; AttributeError if it lacks one of the functions."""
    library = ctypes.CDLL(str(path))
    for name, (arguments, result) in functions.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library


def address(library: ctypes.CDLL, name: str) -> int:
    """Where the function `bnbx_<name>` is."""
    return ctypes.cast(getattr(library, f"bnbx_{name}"), ctypes.c_void_p).value or 0
