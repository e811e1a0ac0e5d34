"""CUDA kernels of one source on one device: compiled through CuPy, run on torch's stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnbx.errors import TargetError

# No multiply-add contraction: element-wise kernels have the same bits on every target.
OPTIONS = ("--std=c++17", "--fmad=false")
THREADS = 256
BLOCKS_PER_MULTIPROCESSOR = 8
HOW_TO = "pip install 'bnbx[cuda13]' (or 'bnbx[cuda12]', for the CUDA version of your driver)"


@dataclass(frozen=True)
class Launch:
    """One kernel: its name, how many blocks it has work for, and its arguments.

    Tensors among the arguments are passed as their addresses, None as a null pointer.
    """

    name: str
    blocks: int
    arguments: tuple[Any, ...]


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
            module = self.cupy.RawModule(code=source, options=OPTIONS)
            try:
                self.functions = {name: module.get_function(f"bnbx_{name}") for name in names}
            except self.cupy.cuda.compiler.CompileException as error:
                raise TargetError(f"NVRTC refused the kernel of {what}: {error}") from error
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        self.most_blocks = processors * BLOCKS_PER_MULTIPROCESSOR

    def launch(self, launches: Sequence[Launch], threads: int = THREADS) -> None:
        """Queue kernels on torch's current stream: at most as many blocks as the device holds."""
        stream = torch.cuda.current_stream(self.device).cuda_stream
        with self.cupy.cuda.Device(self.device.index), _stream(self.cupy, stream):
            for each in launches:
                grid = max(min(each.blocks, self.most_blocks), 1)
                arguments = tuple(_plain(argument) for argument in each.arguments)
                self.functions[each.name]((grid,), (threads,), arguments)


@dataclass(frozen=True)
class _Pointer:
    """A stream of another library by CUDA's stream protocol, which older torch does not speak."""

    address: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.address


def _stream(cupy: Any, address: int) -> Any:
    """The stream for CuPy: since version 14, which warns of the class before, by the protocol."""
    made = getattr(getattr(cupy.cuda, "Stream", None), "from_external", None)
    return cupy.cuda.ExternalStream(address) if made is None else made(_Pointer(address))


def _plain(argument: Any) -> Any:
    if argument is None:
        return np.uint64(0)
    return np.uint64(argument.data_ptr()) if isinstance(argument, Tensor) else argument
