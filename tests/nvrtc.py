"""Compiles CUDA source to machine code with NVRTC: no GPU, no driver and no CuPy needed.

NVRTC comes from NVIDIA's wheels (`pip install nvidia-cuda-nvrtc`, or `nvidia-cuda-nvrtc-cu12`). So
every test machine can tell that a kernel compiles for every architecture, and how many registers
and how much memory it takes there.
"""

import ctypes
import functools
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cuda_on_cpu.source import numbered

# Compute capabilities, times ten: from Turing to the GeForce Blackwell.
ARCHITECTURES: tuple[int, ...] = (75, 80, 86, 89, 90, 100, 120)

# Where the wheels for CUDA 13 and for CUDA 12 put their libraries, below the package `nvidia`.
_LIBRARY_FOLDERS = ("cu13/lib", "cuda_nvrtc/lib")

_COMPILING = re.compile(r"Compiling entry function '(?P<name>\w+)'")
# A report lists the kernel and then the functions that it calls: whether a figure is the sum over
# them, or the largest.
_FIGURES: dict[str, tuple[re.Pattern[str], Callable[[Iterable[int]], int]]] = {
    "registers": (re.compile(r"Used (\d+) registers"), max),
    "shared_bytes": (re.compile(r"(\d+) bytes smem"), max),
    "stack_bytes": (re.compile(r"(\d+) bytes stack frame"), max),
    "spill_stores": (re.compile(r"(\d+) bytes spill stores"), sum),
    "spill_loads": (re.compile(r"(\d+) bytes spill loads"), sum),
}


class NvrtcError(RuntimeError):
    """NVRTC is missing, or refused the source."""


class Resources(NamedTuple):
    """What one kernel takes, as ptxas reports it; all but the registers in bytes."""

    registers: int
    shared_bytes: int  # static, of the block
    stack_bytes: int  # local memory of a thread
    spill_stores: int
    spill_loads: int


class Cubin(NamedTuple):
    """Machine code for one architecture."""

    arch: int
    image: bytes
    log: str
    kernels: Mapping[str, Resources]

    @property
    def registers(self) -> int:
        """Of the kernel that takes most."""
        return max(kernel.registers for kernel in self.kernels.values())

    @property
    def shared_bytes(self) -> int:
        """Of the kernel that takes most."""
        return max(kernel.shared_bytes for kernel in self.kernels.values())

    @property
    def stack_bytes(self) -> int:
        """Of the kernel that takes most."""
        return max(kernel.stack_bytes for kernel in self.kernels.values())

    @property
    def spill_stores(self) -> int:
        """Of all kernels."""
        return sum(kernel.spill_stores for kernel in self.kernels.values())

    @property
    def spill_loads(self) -> int:
        """Of all kernels."""
        return sum(kernel.spill_loads for kernel in self.kernels.values())


def available() -> str | None:
    """None where NVRTC is installed, else why it cannot be used: a reason to skip."""
    try:
        _library()
    except NvrtcError as error:
        return str(error)
    return None


def version() -> tuple[int, int]:
    """Of NVRTC, as (major, minor)."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def compile_cubin(source: str, arch: int, options: Sequence[str] = ("--fmad=false",)) -> Cubin:
    """Compiles the source for an architecture, such as 80 for compute capability 8.0."""
    program = ctypes.c_void_p()
    _call(
        "nvrtcCreateProgram",
        ctypes.byref(program),
        source.encode(),
        b"kernel.cu",
        ctypes.c_int(0),
        None,
        None,
    )
    try:
        given = (f"--gpu-architecture=sm_{arch}", "--std=c++17", "-Xptxas=-v", *options)
        c_options = (ctypes.c_char_p * len(given))(*(option.encode() for option in given))
        status = _library().nvrtcCompileProgram(program, len(given), c_options)
        log = _text(program, "ProgramLog")
        if status:
            raise NvrtcError(
                f"NVRTC cannot compile for sm_{arch} ({_message(status)}):\n{log}\n"
                f"{numbered(source)}"
            )
        return Cubin(arch, _bytes(program, "CUBIN"), log, _resources(log))
    finally:
        _call("nvrtcDestroyProgram", ctypes.byref(program))


def _resources(log: str) -> dict[str, Resources]:
    """What the log says of each kernel; a figure that it leaves out is zero."""
    pieces = _COMPILING.split(log)
    kernels = {}
    for name, report in zip(pieces[1::2], pieces[2::2], strict=True):
        kernels[name] = Resources(
            **{
                figure: combine([0, *map(int, pattern.findall(report))])
                for figure, (pattern, combine) in _FIGURES.items()
            }
        )
    if not kernels:
        raise NvrtcError(f"the source defines no kernel; ptxas reports:\n{log}")
    return kernels


@functools.cache
def _library() -> Any:
    package = importlib.util.find_spec("nvidia")
    roots = list(package.submodule_search_locations or ()) if package else []
    folders = [Path(root, folder) for folder in _LIBRARY_FOLDERS for root in roots]
    for folder in folders:
        for path in sorted(folder.glob("libnvrtc.so.*")):
            # Of some releases the library does not find its own second half.
            for builtins in folder.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
            library = ctypes.CDLL(str(path))
            library.nvrtcGetErrorString.restype = ctypes.c_char_p
            return library
    raise NvrtcError("NVRTC is not installed: pip install nvidia-cuda-nvrtc")


def _message(status: int) -> str:
    message: bytes = _library().nvrtcGetErrorString(status)
    return message.decode()


def _call(function: str, *arguments: Any) -> None:
    status = getattr(_library(), function)(*arguments)
    if status:
        raise NvrtcError(f"{function} failed: {_message(status)}")


def _bytes(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    _call(f"nvrtcGet{what}", program, buffer)
    return buffer.raw


def _text(program: ctypes.c_void_p, what: str) -> str:
    return _bytes(program, what).rstrip(b"\0").decode()
