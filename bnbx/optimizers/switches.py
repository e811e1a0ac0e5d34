"""The arguments by which torch.optim chooses an implementation, and what they mean here."""

from __future__ import annotations

from typing import Any

import torch

from bnbx.errors import NotYetError, OptionError

_cuda: Any = torch.cuda  # whose functions are untyped
_FROZEN = (
    "a captured CUDA graph would freeze the step's scalars (bias corrections, learning rate), "
    "which come from the host"
)
_OUTSIDE = "keep the step outside of the graph, after its replay"
IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")


def check_implementation(
    foreach: Any = None, fused: Any = None, capturable: Any = False, differentiable: Any = False
) -> None:
    """Accept what torch.optim accepts, where the result is the same.

    Raises:
        OptionError: a value that is none of True, False (and None, for foreach and fused), or
            both foreach and fused, which torch refuses too, or differentiable=True.
        NotYetError: capturable=True.
    """
    for name, value, allowed in (
        ("foreach", foreach, (None, True, False)),
        ("fused", fused, (None, True, False)),
        ("capturable", capturable, (True, False)),
        ("differentiable", differentiable, (True, False)),
    ):
        if not any(value is each for each in allowed):
            raise OptionError(f"{name}={value!r}: expected one of {', '.join(map(str, allowed))}")
    if foreach and fused:
        raise OptionError("foreach and fused cannot both be True; here every step is fused")
    if differentiable:
        raise OptionError(
            "differentiable=True: steps write parameters in place, outside of autograd; "
            "use torch.optim or a functional optimizer to differentiate through a step"
        )
    if capturable:
        raise NotYetError(f"capturable=True: {_FROZEN}; leave it out, and {_OUTSIDE}")


def check_capture() -> None:
    """Raise NotYetError if torch's current stream is captured in a CUDA graph."""
    if _cuda.is_initialized() and _cuda.is_current_stream_capturing():
        raise NotYetError(f"optimizer.step() while a CUDA graph is captured: {_FROZEN}; {_OUTSIDE}")
