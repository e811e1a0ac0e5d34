"""Small correct kernels and how to run them: the harness is tested on these and on broken copies.

Every runner launches its kernel on a few inputs and says whether all results were right.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from cuda_on_cpu import Module


class Sample(NamedTuple):
    """Kernel text and a runner: (module, schedule) -> all results right?"""

    source: str
    run: Callable[[Module, int], bool]


class Scale(ctypes.Structure):
    """The structure that scale_rows takes by value."""

    _fields_ = (("factor", ctypes.c_float), ("offset", ctypes.c_int))


def read(name: str) -> str:
    """The text of a kernel in this folder."""
    return Path(__file__).with_name(f"{name}.cu").read_text()


def random_floats(*shape: int) -> torch.Tensor:
    """The same normally distributed numbers in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def random_integers(count: int) -> torch.Tensor:
    """The same numbers of three digits in every run."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(1000, (count,), generator=generator, dtype=torch.int32)


def _block_absmax(module: Module, schedule: int) -> bool:
    kernel = module.kernel("block_absmax")
    right = True
    for n in (1, 255, 256, 257, 700):
        x, blocks = random_floats(n), -(-n // 256)
        result = torch.full((blocks,), -1.0)
        kernel(blocks, 256, [x, result, n], schedule=schedule)
        padded = torch.zeros(256 * blocks)
        padded[:n] = x.abs()
        expected = padded.view(blocks, 256).amax(1)
        right &= torch.equal(result, expected)
    return right


def _difference(module: Module, schedule: int) -> bool:
    x = random_floats(3, 64)
    result = torch.full_like(x, -1.0)
    module.kernel("difference")(3, 64, [x, result], schedule=schedule)
    return torch.equal(result, torch.diff(x, prepend=torch.zeros(3, 1)))


def _row_max(module: Module, schedule: int) -> bool:
    right = True
    for columns in (1, 33, 300):
        x, result = random_floats(3, columns), torch.full((3,), -1.0)
        module.kernel("row_max")(3, 96, [x, result, columns], shared_bytes=3 * 4, schedule=schedule)
        right &= torch.equal(result, x.abs().amax(1))
    return right


def _copy_vectors(module: Module, schedule: int) -> bool:
    right = True
    for n in (1, 4, 511, 513, 1024):
        x, result = random_floats(n), torch.full((n,), -1.0)
        module.kernel("copy_vectors")(-(-n // 512), 128, [x, result, n], schedule=schedule)
        right &= torch.equal(result, x)
    return right


def _scale_rows(module: Module, schedule: int) -> bool:
    tensors = [random_floats(n) for n in (3, 64, 65)]
    expected = [tensor * 0.5 + 3 for tensor in tensors]
    table = torch.tensor([[tensor.data_ptr(), tensor.numel()] for tensor in tensors])
    module.kernel("scale_rows")(3, 32, [table, Scale(0.5, 3)], buffers=tensors, schedule=schedule)
    return all(map(torch.equal, tensors, expected))


def _grid_sum(module: Module, schedule: int) -> bool:
    x, partial = random_integers(5 * 40), torch.full((5,), -1, dtype=torch.int32)
    finished, total = torch.zeros(2, 1, dtype=torch.int32)
    for _ in range(2):  # the kernel leaves its counter ready for the next launch
        module.kernel("grid_sum")(5, 40, [x, partial, finished, total], schedule=schedule)
    return int(total) == int(x.sum())


def _warp_reverse(module: Module, schedule: int) -> bool:
    x = random_integers(128)
    expected = x.view(4, 32).flip(1).reshape(-1)
    module.kernel("warp_reverse")(1, 128, [x], schedule=schedule)
    return torch.equal(x, expected)


SAMPLES: dict[str, Sample] = {
    name: Sample(read(name), run)
    for name, run in {
        "block_absmax": _block_absmax,
        "difference": _difference,
        "row_max": _row_max,
        "copy_vectors": _copy_vectors,
        "scale_rows": _scale_rows,
        "grid_sum": _grid_sum,
        "warp_reverse": _warp_reverse,
    }.items()
}
