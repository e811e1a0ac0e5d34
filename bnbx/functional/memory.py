"""Where tensors are, and what the processor can do."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bnbx.errors import DeviceError
from bnbx.functional import checks

_FLAGS = Path("/proc/cpuinfo")


def get_ptr(A: Tensor | None) -> ctypes.c_void_p | None:  # noqa: N803 - its name since 0.0.24
    """The address of a tensor's first element.

    Args:
        A: a tensor, or None.

    Returns:
        A pointer; None for None.

    Raises:
        InputError: no tensor.
    """
    return None if A is None else ctypes.c_void_p(checks.dense("A", A).data_ptr())


def is_on_gpu(tensors: Iterable[Tensor | None]) -> Literal[True]:
    """Check that tensors are on one device: one GPU, or the CPU.

    Args:
        tensors: None stands for none; a tensor with a true attribute `is_paged` may be anywhere.

    Returns:
        True.

    Raises:
        DeviceError: they are not; it is a RuntimeError too.
    """
    listed = list(tensors)
    fixed = [t for t in listed if t is not None and not getattr(t, "is_paged", False)]
    if len({checks.dense("tensors", t).device for t in fixed}) > 1:
        places = ", ".join(f"{tuple(t.shape)} on {t.device}" for t in fixed)
        raise DeviceError(f"tensors are on several devices: {places}; move them to one")
    return True


def has_avx512bf16() -> bool:
    """Whether this machine's processor multiplies bfloat16 in 512-bit vectors."""
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if asked is not None:
        return bool(asked())
    try:
        return "avx512_bf16" in _FLAGS.read_text(encoding="utf-8").split()
    except OSError:
        return False
