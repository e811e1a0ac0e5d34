"""How parameters move whose `to` does more than torch's, and the modules that hold them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self


class Moving:
    """Base of parameters whose `to` does more than torch's.

    The short ways to move go by way of `to`, which says what moving does to codes.
    """

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As `torch.Tensor.to`."""
        raise NotImplementedError

    def in_memory(self, data: Tensor) -> Any:
        """A parameter of these settings; what belongs to it goes where its memory is."""
        raise NotImplementedError

    def settle(self) -> None:
        """Bring what belongs to the parameter to where its memory has gone."""

    def type(self, dtype: Any = None, non_blocking: bool = False, **others: Any) -> Any:
        """As `torch.Tensor.type`; a dtype does what it does in `to`."""
        if dtype is None:
            own: Any = super()
            return own.type()
        del others
        mine: Any = self
        wanted = torch.empty(0, dtype=torch.float32, device=mine.device).type(dtype)
        moves = wanted.device.type != mine.device.type
        where = wanted.device if moves else None
        return self.to(device=where, dtype=wanted.dtype, non_blocking=non_blocking)

    def cpu(self, memory_format: torch.memory_format = torch.preserve_format) -> Any:
        """As `to("cpu")`."""
        return self.to("cpu", memory_format=memory_format)

    def cuda(
        self,
        device: torch.device | str | int | None = None,
        non_blocking: bool = False,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> Any:
        """As `to("cuda")`."""
        where = "cuda" if device is None else device
        return self.to(where, non_blocking=non_blocking, memory_format=memory_format)

    def xpu(
        self,
        device: torch.device | str | int | None = None,
        non_blocking: bool = False,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> Any:
        """As `to("xpu")`."""
        where = "xpu" if device is None else device
        return self.to(where, non_blocking=non_blocking, memory_format=memory_format)


class MovingModule(torch.nn.Module):
    """Base of modules whose parameters are `Moving`, and stay so wherever they go.

    To and from the meta device torch makes new parameters, of no class that it does not know.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As in torch."""
        before = dict(self._parameters)

        def plainly(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found is tensor else found.detach()

        super()._apply(plainly, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._parameters[name]
            if isinstance(old, Moving) and new is not None and not isinstance(new, Moving):
                found = old.in_memory(new.detach())
                found.grad = new.grad
                setattr(self, name, found)
            elif isinstance(new, Moving):
                new.settle()
        return self
