"""Tensors that have lost their memory: an error here, where a kernel would end the process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from bnbx.errors import InputError


def check_memory(tensors: Iterable[Any]) -> None:
    """Raise InputError for a tensor whose storage was freed or shrunk: kernels read behind it.

    Lists are looked into; what is no tensor is passed over.
    """
    for tensor in tensors:
        if isinstance(tensor, (list, tuple)):
            check_memory(tensor)
        elif isinstance(tensor, Tensor) and tensor.numel():
            held = tensor.untyped_storage().nbytes()
            if (tensor.storage_offset() + _reach(tensor)) * tensor.itemsize > held:
                raise InputError(
                    f"a tensor of shape {tuple(tensor.shape)}, {tensor.dtype}, has a storage of "
                    f"{held} bytes: it was freed or made smaller"
                )


def _reach(tensor: Tensor) -> int:
    """How many elements a tensor's own reach over in memory."""
    if tensor.is_contiguous():
        return tensor.numel()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps)
