"""CUDA kernels of one source on one device: compiled through CuPy, run on torch's stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnbx.errors import TargetError

# No multiply-add contraction: element-wise kernels have the same bits on every target.
OPTIONS = ("--std=c++17", "--fmad=false")
THREADS = 256
BLOCKS_PER_MULTIPROCESSOR = 8


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
        names: of the kernels.
        device: where they are to run.
        what: what the source is of, for messages.
        options: of NVRTC.

    Raises:
        TargetError: CuPy is missing, or NVRTC refuses the source.
    """

    def __init__(
        self,
        source: str,
        names: Sequence[str],
        device: torch.device,
        what: str,
        options: tuple[str, ...] = OPTIONS,
    ) -> None:
        self.cupy, self.device = import_cupy(), device
        with torch.cuda.device(device):
            module = self.cupy.RawModule(code=source, options=options)
            try:
                self.functions = {name: module.get_function(f"bnbx_{name}") for name in names}
            except self.cupy.cuda.compiler.CompileException as error:
                raise TargetError(f"NVRTC refused the kernel of {what}: {error}") from error
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        self.most_blocks = processors * BLOCKS_PER_MULTIPROCESSOR

    def launch(
        self, name: str, blocks: int, arguments: Sequence[Any], threads: int = THREADS
    ) -> None:
        """Queue a kernel on torch's current stream: at most as many blocks as the device holds.

        Tensors among the arguments are passed as their addresses, None as a null pointer.
        """
        stream = torch.cuda.current_stream(self.device).cuda_stream
        plain = tuple(_plain(argument) for argument in arguments)
        with self.cupy.cuda.Device(self.device.index), self.cupy.cuda.ExternalStream(stream):
            self.functions[name]((min(blocks, self.most_blocks),), (threads,), plain)


def _plain(argument: Any) -> Any:
    if argument is None:
        return np.uint64(0)
    return np.uint64(argument.data_ptr()) if isinstance(argument, Tensor) else argument
