"""Which target runs a kernel of functions and layers: the native one, or torch operations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache

from bnbx.errors import BnbxWarning, TargetError
from bnbx.kernels import cuda
from bnbx.kernels.compiler import HOW_TO

REFERENCE = "reference"
HINTS = {"cpu": HOW_TO, "cuda": cuda.HOW_TO}


def choose(device: str, ready: Mapping[str, Callable[[], object]], what: str) -> str:
    """The target for a type of device: its own name if that is native, else "reference".

    Warns once per reason where it is the reference.

    Args:
        device: "cpu", "cuda", or another that torch has.
        ready: by device, what makes its kernel; raises TargetError where that cannot be.
        what: what runs, for the warning ("quantization").
    """
    reason = f"there are no native kernels for device {device!r}"
    make = ready.get(device)
    if make is not None:
        try:
            make()
        except TargetError as error:
            reason = str(error).splitlines()[0]
        else:
            return device
    hint = HINTS.get(device, "move the tensors to the CPU or a CUDA device")
    _warn_once(
        f"{reason}\nSo {what} runs on plain torch operations, with the same results but slowly. "
        f"For the fast path: {hint}."
    )
    return REFERENCE


@lru_cache(maxsize=64)
def _warn_once(message: str) -> None:
    warnings.warn(message, BnbxWarning, stacklevel=2)
