"""Memory of tensors: whose it is, an error where it is lost, large pages where it is new."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from bnbx.errors import InputError

# First touches of a page cost more than what is written to it: 16.8 M numbers to new memory take
# 27 ms to dequantize with pages of 4 KiB, 5.4 ms with those of 2 MiB (Zen 5, one thread).
LARGE_PAGE = 2 << 20


def in_large_pages(tensor: Tensor) -> Tensor:
    """The tensor, which has just been made on the CPU; where it is large, in large pages.

    Only a wish: Linux grants it if /sys/kernel/mm/transparent_hugepage/enabled says so.
    """
    advise = _advise()
    if advise is not None and tensor.nbytes >= 2 * LARGE_PAGE:
        first = -(-tensor.data_ptr() // LARGE_PAGE) * LARGE_PAGE
        last = (tensor.data_ptr() + tensor.nbytes) // LARGE_PAGE * LARGE_PAGE
        if last > first:
            advise(first, last - first, mmap.MADV_HUGEPAGE)  # type: ignore[attr-defined, unused-ignore]
    return tensor


@lru_cache(maxsize=1)
def _advise() -> Callable[[int, int, int], int] | None:
    """The system's madvise; None where there is no such thing."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        found = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    found.restype = ctypes.c_int
    advise: Callable[[int, int, int], int] = found
    return advise


def check_memory(tensors: Iterable[Any]) -> None:
    """Raise InputError for a tensor whose storage was freed or shrunk: kernels read behind it.

    Lists are looked into; what is no tensor is passed over.
    """
    for tensor in tensors:
        if isinstance(tensor, (list, tuple)):
            check_memory(tensor)
        elif isinstance(tensor, Tensor) and (wrong := lost(tensor)):
            raise InputError(f"a tensor {wrong}")


def lost(tensor: Tensor) -> str:
    """What is wrong with a tensor whose storage was freed or shrunk; "" where it is all there."""
    if not tensor.numel():
        return ""
    held = tensor.untyped_storage().nbytes()
    if (tensor.storage_offset() + _reach(tensor)) * tensor.itemsize <= held:
        return ""
    return (
        f"of shape {tuple(tensor.shape)}, {tensor.dtype}, has a storage of {held} bytes: it was "
        "freed or made smaller"
    )


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor only stands for others, as a DTensor does: it has no memory of its own."""
    if type(tensor) in (Tensor, Parameter) or not tensor.numel():
        return False
    storage = tensor.untyped_storage()  # of a traced one, on the meta device
    held = storage.device.type != "meta" and storage.nbytes() > 0
    return held and tensor.data_ptr() == 0


def name_of(tensor: Tensor) -> str:
    """The class of a tensor, with its module."""
    return f"{type(tensor).__module__}.{type(tensor).__qualname__}"


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; from the meta device, which holds no numbers, comes room for them."""
    if tensor.is_meta and device.type != "meta":
        return torch.empty_like(tensor, device=device)
    return tensor.to(device)


def as_rows(x: Tensor) -> Tensor:
    """`x` as a matrix of as many rows as its leading sizes make, also where the last one is 0."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def reshaped(x: Tensor, shape: Sequence[int]) -> Tensor:
    """`x`, which has just been made, in another shape, and no view: users may write into a result.

    In a view that an operation returns autograd lets nobody write (`torch.relu_`, `y += 1`).
    """
    if x.shape == tuple(shape):
        return x
    made: Tensor = torch.ops.aten._unsafe_view(x, shape)
    return made


def _reach(tensor: Tensor) -> int:
    """How many elements a tensor's own reach over in memory."""
    if tensor.is_contiguous():
        return tensor.numel()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps)
