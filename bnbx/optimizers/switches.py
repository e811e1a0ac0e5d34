"""The arguments by which torch.optim chooses an implementation, and what they mean here."""

from __future__ import annotations

from typing import Any

from bnbx.errors import NotYetError, OptionError

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
        raise NotYetError(
            "capturable=True: a captured CUDA graph would freeze the step's scalars (bias "
            "corrections, learning rate), which come from the host; leave it out and keep "
            "optimizer.step() outside of the graph"
        )
