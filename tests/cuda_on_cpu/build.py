"""Compiles kernels for the CPU and keeps what it has compiled, by the hash of all that went in.

The runtime below the kernels is compiled once per content, not once per kernel. Every file enters
the cache by a rename, so any number of test processes may share it.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from cuda_on_cpu.errors import CudaOnCpuError
from cuda_on_cpu.source import FILE_NAME

Mode = Literal["plain", "check", "ubsan"]

_CPP = Path(__file__).parent / "cpp"
_COMMON_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-w")
_RUNTIME_FLAGS = (*_COMMON_FLAGS, "-O2")
_KERNEL_FLAGS = (
    *_COMMON_FLAGS,
    "-xc++",
    "-g",  # lines for the sites of failures
    "-fno-diagnostics-show-caret",  # #line would make it show the wrong ones
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-strict-aliasing",
    "-fsigned-char",
    "-fwrapv",
    "-fno-exceptions",
    "-fno-stack-protector",
)
_MODE_FLAGS: dict[Mode, tuple[str, ...]] = {
    "plain": ("-O2", "-fno-tree-vectorize"),
    "check": (
        "-O1",
        "-fno-tree-loop-im",  # a load moved out of its condition would be reported
        "-fsanitize=thread",
        "--param",
        "tsan-instrument-func-entry-exit=0",
    ),
    "ubsan": (
        "-O1",
        "-fsanitize=bounds-strict,alignment,null,shift,integer-divide-by-zero,float-cast-overflow",
    ),
}
_RUNTIME = ("collectives.cpp", "fiber.cpp", "launch.cpp", "scheduler.cpp")
_MODE_RUNTIME: dict[Mode, tuple[str, ...]] = {
    "plain": _RUNTIME,
    "check": (*_RUNTIME, "check.cpp", "history.cpp"),
    "ubsan": (*_RUNTIME, "ubsan.cpp"),
}
MODES: tuple[Mode, ...] = get_args(Mode)


class CompileError(CudaOnCpuError):
    """The compiler refused; the message is the compiler's."""


def build(translation_unit: str, mode: Mode, cuda_arch: int) -> Path:
    """Path of the shared library made of the text, compiled now or before."""
    flags = (*_KERNEL_FLAGS, *_MODE_FLAGS[mode], f"-D__CUDA_ARCH__={cuda_arch}")
    library = cache_folder() / f"{_key(translation_unit, mode, *flags)}.so"
    if library.exists():
        return library
    runtime = [str(_runtime_object(name)) for name in _MODE_RUNTIME[mode]]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        text = Path(folder, FILE_NAME)
        text.write_text(translation_unit)
        _run((*flags, "-iquote", str(_CPP), "-c", FILE_NAME, "-o", "kernel.o"), folder)
        # Linked without -fsanitize: the hooks of the sanitizers are ours.
        link = ("-shared", "-Wl,-z,defs", "kernel.o", *runtime, "-o", "kernel.so")
        _run(link, folder)
        text.replace(library.with_suffix(".cu"))
        Path(folder, "kernel.so").replace(library)
    return library


def cache_folder() -> Path:
    """$BNBX_TEST_CACHE, or a folder of this user's among the temporary ones."""
    chosen = os.environ.get("BNBX_TEST_CACHE")
    if chosen:
        folder = Path(chosen, "cuda_on_cpu").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    folder = Path(tempfile.gettempdir(), f"bnbx-tests-{os.getuid()}", "cuda_on_cpu")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # What lies there is loaded into this process: it has to be this user's own.
    if any(path.stat().st_uid != os.getuid() for path in (folder, folder.parent)):
        raise CudaOnCpuError(
            f"{folder.parent} belongs to another user; set BNBX_TEST_CACHE to a folder of your own"
        )
    return folder


def _runtime_object(name: str) -> Path:
    """Path of one compiled file of the runtime."""
    result = cache_folder() / f"{_key(name, *_RUNTIME_FLAGS)}.o"
    if not result.exists():
        with tempfile.TemporaryDirectory(dir=result.parent) as folder:
            _run((*_RUNTIME_FLAGS, "-c", str(_CPP / name), "-o", "runtime.o"), folder)
            Path(folder, "runtime.o").replace(result)
    return result


def _key(*parts: str) -> str:
    """Depends on the parts, on all the C++ of this package and on the compiler."""
    digest = hashlib.sha256()
    for part in (_compiler_version(), *_cpp_texts(), *parts):
        digest.update(hashlib.sha256(part.encode()).digest())
    return digest.hexdigest()[:32]


@functools.cache
def _cpp_texts() -> tuple[str, ...]:
    return tuple(path.read_text() for path in sorted(_CPP.iterdir()))


@functools.cache
def _compiler() -> str:
    found = shutil.which("g++")
    if found is None:
        raise CudaOnCpuError("g++ is not on PATH; CUDA kernels are compiled for the CPU with it")
    return found


@functools.cache
def _compiler_version() -> str:
    command = (_compiler(), "--version")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _run(arguments: Sequence[str], folder: str) -> None:
    command = (_compiler(), *arguments)
    environment = {**os.environ, "LC_ALL": "C"}  # messages in plain English and ASCII
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=folder, env=environment
    )
    if done.returncode:
        raise CompileError(done.stderr)
