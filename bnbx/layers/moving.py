"""The short ways to move a parameter, by way of its `to`, which says what moving does to codes."""

from __future__ import annotations

from typing import Any

import torch


class Moving:
    """Base of parameters whose `to` does more than torch's."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As `torch.Tensor.to`."""
        raise NotImplementedError

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
