"""Operations on tensors that anybody hands over, of `bnbx.kernels.operation` with what that takes.

Their memory may be gone, and some is written to, behind the back of autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from bnbx.kernels.memory import check_memory
from bnbx.kernels.operation import Function, define

names: list[str] = []
"""Of the operations that are registered here; the tests hold each against torch's own checks."""


def operation(
    schema: str, fake: Function, anywhere: Collection[str] = (), *, gradient: bool = True
) -> Callable[[Function], Function]:
    """Registers the function below it as an operation: see `bnbx.kernels.operation.define`."""
    names.append(schema.partition("(")[0])
    arguments = torch._C.parse_schema(schema).arguments
    aliases = [argument.alias_info for argument in arguments]
    written = [number for number, alias in enumerate(aliases) if alias and alias.is_write]

    def register(function: Function) -> Function:
        @functools.wraps(function)
        def checked(*arguments: Any) -> Any:
            check_memory(arguments)
            result = function(*arguments)
            for number in written:
                _count_write(arguments[number])
            return result

        return define(schema, checked, fake, anywhere=anywhere, gradient=gradient)

    return register


def _count_write(argument: Tensor | Sequence[Tensor] | None) -> None:
    """Tell autograd, behind whose back kernels write: it refuses a saved tensor that changed."""
    for tensor in argument if isinstance(argument, (list, tuple)) else (argument,):
        if isinstance(tensor, Tensor) and not tensor.is_inference():
            increment_version(tensor)
