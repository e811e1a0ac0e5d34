"""Scaled gradients: what a step divides them by, and what happens where a loss overflowed.

`torch.amp.GradScaler` sets `grad_scale` and `found_inf` on an optimizer that has
`_step_supports_amp_scaling`, and the kernel unscales on the way in. On a CPU an overflow is known
at once and the step is left out. On CUDA nobody waits: the kernel reads `found_inf` and leaves
everything as it is, and the step that was counted is taken back when the next one begins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bnbx.errors import OptionError
from bnbx.registry.optimizer import STEP

MAX_KEPT = 64
_cuda: Any = torch.cuda  # whose classes are untyped


@dataclass
class _Pending:
    """A step whose overflow is not known yet: the flag on its way to the host."""

    flag: Tensor
    arrived: Any
    stepped: Sequence[dict[str, Any]]


def check_scale(grad_scale: Any) -> None:
    """Refuse what gradients cannot be divided by; a number on a device is not looked at.

    Raises:
        OptionError: it is neither None nor one positive, finite number.
    """
    if grad_scale is None:
        return
    if isinstance(grad_scale, Tensor):
        if grad_scale.numel() != 1 or grad_scale.is_complex() or grad_scale.dtype is torch.bool:
            raise OptionError(
                f"grad_scale is {grad_scale.dtype} of shape {tuple(grad_scale.shape)}; expected "
                "one number"
            )
        number = 1.0 if grad_scale.device.type != "cpu" else float(grad_scale.detach())
    elif isinstance(grad_scale, bool) or not isinstance(grad_scale, (int, float)):
        raise OptionError(f"grad_scale={grad_scale!r}: expected a number or a tensor of one")
    else:
        number = grad_scale
    if not 0 < number < math.inf:
        raise OptionError(f"grad_scale={number!r}: expected a finite number > 0 to divide by")


def combined(grad_scale: Any, by_scaler: Any) -> Any:
    """What gradients are divided by: an argument of the step, and what a GradScaler has set.

    Raises:
        OptionError: one of them is neither None nor one positive, finite number.
    """
    check_scale(grad_scale)
    check_scale(by_scaler)
    if grad_scale is None or by_scaler is None:
        return by_scaler if grad_scale is None else grad_scale
    return by_scaler * grad_scale


def overflow_flag(found_inf: Any) -> Tensor | None:
    """`found_inf` as one float32 number, None if there is none.

    Args:
        found_inf: a tensor of one number, or the plain 0 that a GradScaler makes where no
            parameter has a gradient.
    """
    if not isinstance(found_inf, Tensor):
        if not found_inf:
            return None
        return torch.tensor([float(found_inf)], dtype=torch.float32, device="cpu")
    return found_inf.detach().reshape(1).float()


@dataclass
class Scaling:
    """The factors of gradients, and the steps whose overflow is not known yet."""

    _constants: dict[tuple[torch.device, float], Tensor] = field(default_factory=dict)
    _pending: list[_Pending] = field(default_factory=list)

    def factor(self, device: torch.device, maximize: bool, grad_scale: Any) -> Tensor:
        """What gradients on `device` are multiplied by: float32, of shape (1,).

        Args:
            device: of the gradients.
            maximize: whether to turn them around.
            grad_scale: what to divide them by, or None; checked by `check_scale`.
        """
        sign = -1.0 if maximize else 1.0
        if grad_scale is None:
            return self._constant(device, sign)
        if not isinstance(grad_scale, Tensor):
            return self._constant(device, sign / grad_scale)
        scale = grad_scale.detach().reshape(1)
        return (sign / scale.to(device, torch.float64, non_blocking=True)).float()

    def _constant(self, device: torch.device, value: float) -> Tensor:
        found = self._constants.get((device, value))
        if found is None:
            if len(self._constants) >= MAX_KEPT:
                self._constants.clear()
            found = torch.tensor([value], dtype=torch.float32, device=device)
            self._constants[device, value] = found
        return found

    def overflowed(self, found_inf: Any) -> bool:
        """Whether it is known already that the step is to be left out."""
        if isinstance(found_inf, Tensor) and found_inf.device.type == "cuda":
            return False
        return bool(found_inf)  # None and a plain 0 are none

    def remember(self, found_inf: Tensor | None, stepped: Sequence[dict[str, Any]]) -> None:
        """Take back these steps later, if `found_inf` says so."""
        if found_inf is None or found_inf.device.type != "cuda":
            return
        flag = torch.empty(1, dtype=torch.float32, device="cpu", pin_memory=True)
        flag.copy_(found_inf.reshape(1), non_blocking=True)
        arrived: Any = _cuda.Event()
        arrived.record(_cuda.current_stream(found_inf.device))
        self._pending.append(_Pending(flag, arrived, list(stepped)))

    def settle(self) -> None:
        """Correct the count of steps that were left out. By now their flags have arrived."""
        while self._pending:
            pending = self._pending.pop(0)
            pending.arrived.synchronize()
            if bool(pending.flag):
                for saved in pending.stepped:
                    saved[STEP] -= 1
