"""Modules and kernels: what a test holds in its hands."""

import ctypes
import re
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from cuda_on_cpu import abi
from cuda_on_cpu.arguments import Argument, Array, Memory, disjoint, memory_of, pack
from cuda_on_cpu.build import CompileError, Mode, build
from cuda_on_cpu.errors import CudaOnCpuError
from cuda_on_cpu.source import FILE_NAME, find_kernels, numbered, translation_unit

# Forward, reverse, and two random orders; any other number is the seed of one more.
SCHEDULES: tuple[int, ...] = (0, 1, 2, 3)

Extent = int | tuple[int, ...]

_MAX_GRID = (2**31 - 1, 65535, 65535)
_MAX_BLOCK = (1024, 1024, 64)
_MAX_THREADS = 1024
_MAX_SHARED_BYTES = 227 * 1024

# A launch uses global state of its module and the signal handlers of the process.
_one_launch_at_a_time = threading.Lock()


def compile_source(source: str, mode: Mode = "plain", *, cuda_arch: int = 800) -> "Module":
    """Compiles the kernels of the source; `cuda_arch` is the value of __CUDA_ARCH__ they see."""
    kernels = find_kernels(source)
    try:
        library = build(translation_unit(source, kernels), mode, cuda_arch)
    except CompileError as error:
        raise CudaOnCpuError(f"g++ cannot compile:\n{error}\n{numbered(source)}") from None
    return Module(source, mode, library, tuple(kernel.name for kernel in kernels))


class Module:
    """The kernels of one source text, compiled and loaded."""

    def __init__(self, source: str, mode: Mode, library: Path, names: tuple[str, ...]) -> None:
        self.names = names
        self.mode = mode
        self.path = library
        self._lines = source.splitlines()
        self._library = ctypes.CDLL(str(library))
        self._library.cuda_on_cpu_launch.restype = ctypes.POINTER(abi.Failure)
        self._library.cuda_on_cpu_kernels.restype = ctypes.POINTER(abi.KernelRecord)

    def kernel(self, name: str) -> "Kernel":
        """The kernel of this name."""
        record = self._library.cuda_on_cpu_kernels()
        while record:
            if record.contents.name.decode() == name:
                return Kernel(self, record.contents)
            record = record.contents.next
        raise CudaOnCpuError(f"there is no kernel {name!r}; the source has {', '.join(self.names)}")

    def launch(self, record: abi.KernelRecord, launch: abi.Launch) -> str | None:
        """Runs a launch that has been checked; says what went wrong in it, if anything."""
        with _one_launch_at_a_time:
            failure = self._library.cuda_on_cpu_launch(ctypes.byref(record), ctypes.byref(launch))
            return self._explain(failure.contents) if failure else None

    def _explain(self, failure: abi.Failure) -> str:
        line = failure.line or self._line_of(failure.site)
        text = f"{failure.message.decode()}\n  at {self._quote(line)}"
        if failure.other_site:
            text += f"\n  earlier at {self._quote(self._line_of(failure.other_site))}"
        return f"{text}\n  in block {failure.block}, thread {failure.thread}"

    def _line_of(self, site: int) -> int:
        """The line of the kernel text that an instruction belongs to, 0 if it belongs to none."""
        command = ("addr2line", "-i", "-s", "-e", str(self.path), hex(site))
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        # Innermost first: a header's function that was inlined comes before its caller.
        match = re.search(rf"^{re.escape(FILE_NAME)}:(\d+)", found, re.MULTILINE)
        return int(match.group(1)) if match else 0

    def _quote(self, line: int) -> str:
        if not 0 < line <= len(self._lines):
            return "an unknown line"
        return f"{FILE_NAME}:{line}: {self._lines[line - 1].strip()}"


class Kernel:
    """One kernel of a module; calling it launches it and waits."""

    def __init__(self, module: Module, record: abi.KernelRecord) -> None:
        self.name: str = record.name.decode()
        self._module = module
        self._record = record
        self._parameters = record.parameters[: record.parameter_count]

    def __call__(
        self,
        grid: Extent,
        block: Extent,
        args: Sequence[Argument],
        *,
        shared_bytes: int = 0,
        schedule: int = 0,
        buffers: Sequence[Array] = (),
    ) -> None:
        """Runs the kernel on CPU tensors and arrays.

        `buffers` are those that it reaches only through pointers stored elsewhere. In check mode
        there is no memory for it but these, the arguments and shared memory.
        """
        try:
            values, memory = pack(self._parameters, args)
            memory += [memory_of(item, f"buffer {i}") for i, item in enumerate(buffers)]
            launch = self._launch(grid, block, shared_bytes, schedule)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.name}: {error}") from None
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        launch.arguments = ctypes.cast(addresses, ctypes.POINTER(ctypes.c_void_p))
        table = _buffer_table(disjoint(memory))
        launch.buffers = table
        launch.buffer_count = len(table)
        failure = self._module.launch(self._record, launch)
        if failure is not None:
            raise CudaOnCpuError(
                f"{self.name}: {failure}, schedule {schedule}, {self._module.mode} mode"
            )

    def _launch(self, grid: Extent, block: Extent, shared_bytes: int, schedule: int) -> abi.Launch:
        grid_size = _extent("grid", grid, _MAX_GRID)
        block_size = _extent("block", block, _MAX_BLOCK)
        threads = block_size[0] * block_size[1] * block_size[2]
        if threads > _MAX_THREADS:
            raise ValueError(f"the block has {threads} threads; the limit is {_MAX_THREADS}")
        if threads > self._record.max_threads:
            raise ValueError(
                f"the block has {threads} threads; __launch_bounds__ allows "
                f"{self._record.max_threads}"
            )
        if not 0 <= shared_bytes <= _MAX_SHARED_BYTES:
            raise ValueError(f"shared_bytes is {shared_bytes}; expected 0 to {_MAX_SHARED_BYTES}")
        if not 0 <= schedule < 2**32:
            raise ValueError(f"schedule is {schedule}; expected 0 or more")
        launch = abi.Launch(shared_bytes=shared_bytes, schedule=schedule)
        launch.grid[:] = grid_size
        launch.block[:] = block_size
        return launch


def _extent(what: str, given: Extent, limits: tuple[int, int, int]) -> tuple[int, int, int]:
    sizes = (given,) if isinstance(given, int) else tuple(given)
    if not 1 <= len(sizes) <= len(limits):
        raise ValueError(f"{what} is {given}; expected one to three sizes")
    x, y, z = (*sizes, 1, 1)[:3]
    for size, limit in zip((x, y, z), limits, strict=True):
        if not 1 <= size <= limit:
            raise ValueError(f"{what} is {given}; expected sizes from 1 to {limits}")
    return x, y, z


def _buffer_table(memory: Sequence[Memory]) -> "ctypes.Array[abi.Buffer]":
    rows = [abi.Buffer(item.begin, item.size, item.label.encode()) for item in memory]
    return (abi.Buffer * len(rows))(*rows)
