"""Scaled gradients: what a step divides them by, and what happens where a loss overflowed.

`torch.amp.GradScaler` sets `grad_scale` and `found_inf` on an optimizer that has
`_step_supports_amp_scaling`, and the kernel unscales on the way in. On a CPU an overflow is known
at once and the step is left out. On other devices nobody waits: the kernel reads `found_inf` and
leaves everything as it is, and the step that was counted is taken back when the next one begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bnbx.errors import OptionError
from bnbx.registry.optimizer import STEP


@dataclass
class _Pending:
    """A step whose overflow is not known yet: the flag on its way to the host."""

    flag: Tensor
    arrived: Any
    stepped: Sequence[dict[str, Any]]


@dataclass
class Scaling:
    """The factors of gradients, and the steps whose overflow is not known yet."""

    _constants: dict[tuple[torch.device, float], Tensor] = field(default_factory=dict)
    _pending: list[_Pending] = field(default_factory=list)

    def factor(self, device: torch.device, maximize: bool, grad_scale: Any) -> Tensor:
        """What gradients on `device` are multiplied by: float32, one element.

        Raises:
            OptionError: `grad_scale` is no number.
        """
        sign = -1.0 if maximize else 1.0
        if grad_scale is None:
            return self._constant(device, sign)
        if isinstance(grad_scale, Tensor):
            if grad_scale.numel() != 1:
                raise OptionError(
                    f"grad_scale has the shape {tuple(grad_scale.shape)}; expected one number"
                )
            scale = grad_scale.detach().to(device, torch.float64, non_blocking=True)
            return (sign / scale).float()
        if isinstance(grad_scale, bool) or not isinstance(grad_scale, (int, float)):
            raise OptionError(f"grad_scale={grad_scale!r}: expected a number or a tensor of one")
        if grad_scale == 0:
            raise OptionError("grad_scale=0: gradients cannot be divided by it")
        return self._constant(device, sign / grad_scale)

    def _constant(self, device: torch.device, value: float) -> Tensor:
        if (device, value) not in self._constants:
            if len(self._constants) > 64:
                self._constants.clear()
            self._constants[device, value] = torch.tensor(
                [value], dtype=torch.float32, device=device
            )
        return self._constants[device, value]

    def overflowed(self, found_inf: Tensor | None) -> bool:
        """Whether it is known already that the step is to be left out."""
        return found_inf is not None and found_inf.device.type == "cpu" and bool(found_inf)

    def remember(self, found_inf: Tensor | None, stepped: Sequence[dict[str, Any]]) -> None:
        """Take back these steps later, if `found_inf` says so."""
        if found_inf is None or found_inf.device.type != "cuda":
            return
        flag = torch.empty(1, dtype=torch.float32, pin_memory=True)
        flag.copy_(found_inf.reshape(1), non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(found_inf.device))
        self._pending.append(_Pending(flag, arrived, list(stepped)))

    def settle(self) -> None:
        """Correct the count of steps that were left out. By now their flags have arrived."""
        for pending in self._pending:
            pending.arrived.synchronize()
            if bool(pending.flag):
                for saved in pending.stepped:
                    saved[STEP] -= 1
        self._pending.clear()
