"""Which target runs a kernel: the native one of its device, or torch operations; and why."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from bnbx.errors import BnbxWarning, TargetError
from bnbx.kernels import compiler, cuda_module

REFERENCE = "reference"
HINTS: Mapping[str, Callable[[], str]] = {
    "cpu": compiler.how_to,
    "cuda": lambda: cuda_module.HOW_TO,
}


@dataclass(frozen=True)
class Target:
    """What runs something: the name of its device type where that is native, or "reference".

    `reason` says why nothing faster does.
    """

    name: str
    reason: str = ""


def choose(device: str, ready: Mapping[str, Callable[[], object]], what: str) -> Target:
    """The target for a type of device; warns once per reason where it is the reference.

    Args:
        device: "cpu", "cuda", or another that torch has.
        ready: by device, what makes its kernel; raises TargetError where that cannot be.
        what: what runs, for the warning: "quantizing runs".
    """
    reason = f"there are no native kernels for device {device!r}"
    make = ready.get(device)
    if make is not None:
        try:
            make()
        except TargetError as error:
            reason = str(error)
        else:
            return Target(device)
    hint = HINTS.get(device, lambda: "move the tensors to the CPU or a CUDA device")()
    _warn_once(
        f"{reason.splitlines()[0]}\n{what} on plain torch operations, with the same results but "
        f"slowly. For the fast path: {hint}."
    )
    return Target(REFERENCE, reason)


@lru_cache(maxsize=64)
def _warn_once(message: str) -> None:
    warnings.warn(message, BnbxWarning, stacklevel=2)
