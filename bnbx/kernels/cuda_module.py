"""CUDA kernels of one source on one device: compiled through CuPy, run on torch's stream.

What comes out of NVRTC is kept where compiled C++ is. CuPy has a cache too, but what goes through
it is compiled with `-ftz=true`, whatever is asked for: numbers below 1.2e-38 become zero, a block
of them loses its scale, and bits differ from those of other targets (seen on an H100).

They are launched by the driver's own function, with arguments that are packed here. A product of
one row takes a GPU 10 microseconds, and CuPy's way to say on which device and stream a kernel runs
took Python longer than that.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnbx.errors import TargetError
from bnbx.kernels.cache import key_of, load_or_build

# No multiply-add contraction but what the text asks for, no flushing to zero, quotients and roots
# as IEEE 754 has them: element-wise kernels have the same bits on every target.
OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")
# How kernels share out their work; templates have it from here.
LANES = 32  # of a warp
THREADS = 256  # of a block, if no more are asked for
WARPS = THREADS // LANES
PIECE = 256  # elements that a warp takes at a time
SHAPE = {"lanes": LANES, "threads": THREADS, "warps": WARPS, "piece": PIECE}
BLOCKS_PER_MULTIPROCESSOR = 8
# What torch.cuda.current_stream wraps in an object, where this torch shows it.
_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
HOW_TO = "pip install 'bnbx[cuda13]' (or 'bnbx[cuda12]', for the CUDA version of your driver)"


@dataclass(frozen=True)
class Launch:
    """One kernel: its name, how many blocks it has work for, and its arguments.

    Tensors among the arguments are passed as their addresses, None as a null pointer.
    """

    name: str
    blocks: int
    arguments: tuple[Any, ...]


def warps(longest: int) -> int:
    """Of a block, where `longest` elements are encoded together: all that take a part are in it."""
    return max(WARPS, longest // PIECE)


def import_cupy() -> Any:
    """CuPy.

    Raises:
        TargetError: it is not installed.
    """
    try:
        import cupy
    except ImportError as error:
        raise TargetError(f"CuPy is not installed ({error})") from None
    return cupy


class CudaModule:
    """The kernels `bnbx_<name>` of a source.

    Args:
        source: CUDA C++.
        names: of the kernels; they are looked up at once, which compiles the source.
        device: where they are to run.
        what: what the source is of, for messages.

    Raises:
        TargetError: CuPy is missing, or NVRTC refuses the source.
    """

    def __init__(
        self,
        source: str,
        names: Sequence[str],
        device: torch.device,
        what: str,
    ) -> None:
        self.cupy, self.device = import_cupy(), device
        with torch.cuda.device(device):
            try:
                code = _compiled(self.cupy, source, device)
            except self.cupy.cuda.compiler.CompileException as error:
                raise TargetError(f"NVRTC refused the kernel of {what}: {error}") from error
            module = self.cupy.cuda.function.Module()
            module.load(code)
            # Kept whole: the addresses are good for as long as the objects live.
            self.functions = {name: module.get_function(f"bnbx_{name}") for name in names}
        self._addresses = {name: each.ptr for name, each in self.functions.items()}
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        self.most_blocks = processors * BLOCKS_PER_MULTIPROCESSOR

    def launch(self, launches: Sequence[Launch], threads: int = THREADS) -> None:
        """Queue kernels on torch's current stream: at most as many blocks as the device holds."""
        runtime, run = self.cupy.cuda.runtime, self.cupy.cuda.driver.launchKernel
        device = self.device.index
        stream = _stream(device)
        before = runtime.getDevice()
        runtime.setDevice(device)  # also makes its context this thread's, if it has none yet
        try:
            for each in launches:
                grid = max(min(each.blocks, self.most_blocks), 1)
                address = self._addresses[each.name]
                held, places = _packed(each.arguments)
                run(address, grid, 1, 1, threads, 1, 1, 0, stream, ctypes.addressof(places), 0)
                del held  # the driver has copied what it needs
        finally:
            if before != device:
                runtime.setDevice(before)


def _compiled(cupy: Any, source: str, device: torch.device) -> bytes:
    """Machine code for a device, which is the current one; from the cache, or of NVRTC."""

    def build(_: Path, binary: Path) -> None:
        code, _names = cupy.cuda.compiler.compile_using_nvrtc(source, OPTIONS)
        binary.write_bytes(code if isinstance(code, bytes) else code.encode())

    capability = torch.cuda.get_device_capability(device)
    version = (*capability, *cupy.cuda.nvrtc.getVersion(), cupy.__version__)
    key = key_of(source, *OPTIONS, *map(str, version))
    return load_or_build(key, source, ".cu", build, Path.read_bytes)


def _stream(device: int) -> int:
    """The handle of torch's current stream on a device."""
    if _raw_stream is not None:
        return int(_raw_stream(device))
    return int(torch.cuda.current_stream(device).cuda_stream)


@lru_cache(maxsize=64)
def _slots(count: int) -> Any:
    return ctypes.c_uint64 * count


def _packed(arguments: Sequence[Any]) -> tuple[Any, Any]:
    """The values of arguments, 8 bytes each, and their addresses; the latter need the former."""
    kind = _slots(len(arguments))
    values = kind(*map(_value, arguments))
    first = ctypes.addressof(values)
    return values, kind(*range(first, first + 8 * len(arguments), 8))


def _value(argument: Any) -> int:
    """What 8 bytes of an argument hold, the lowest first: a kernel reads as many as it takes."""
    if argument is None:
        return 0
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, np.float32):
        return int.from_bytes(struct.pack("<f", argument), "little")
    return index(argument)  # TypeError for other floats, whose width is not said
