"""Makes functions into operations of torch, `torch.ops.bnbx.*`.

An operation is one node of a compiled graph, whatever happens inside. It is known by its schema;
its fake form gives what torch.compile may know of a result: shapes, dtypes, devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from bnbx.kernels.fakes import register_fake
from bnbx.kernels.memory import check_memory

NAMESPACE = "bnbx"
Function = Callable[..., Any]
names: list[str] = []
"""Of the operations that are registered here; the tests hold each against torch's own checks."""


def operation(
    schema: str, fake: Function, anywhere: Collection[str] = ()
) -> Callable[[Function], Any]:
    """Registers a function for every device, with its fake form; gives the operation.

    Args:
        schema: as `torch.library.define` takes it, the name of the operation first.
        fake: the same arguments, with tensors that have no memory, to tensors that have none.
        anywhere: see `bnbx.kernels.fakes.register_fake`.
    """
    name = f"{NAMESPACE}::{schema.partition('(')[0]}"
    names.append(name.partition("::")[2])
    torch.library.define(name, schema[schema.index("(") :], tags=(torch.Tag.pt2_compliant_tag,))
    register_fake(name, fake, anywhere=anywhere)

    found = getattr(getattr(torch.ops, NAMESPACE), name.partition("::")[2])
    aliases = [argument.alias_info for argument in found.default._schema.arguments]
    written = [number for number, alias in enumerate(aliases) if alias and alias.is_write]

    def register(function: Function) -> Any:
        @functools.wraps(function)
        def checked(*arguments: Any, **named: Any) -> Any:
            check_memory(arguments)
            check_memory(named.values())
            result = function(*arguments, **named)
            for number in written:
                _count_write(arguments[number])
            return result

        torch.library.impl(name, "default", checked)
        return found

    return register


def _count_write(argument: Tensor | Sequence[Tensor] | None) -> None:
    """Tell autograd, behind whose back kernels write: it refuses a saved tensor that changed."""
    for tensor in argument if isinstance(argument, (list, tuple)) else (argument,):
        if isinstance(tensor, Tensor) and not tensor.is_inference():
            increment_version(tensor)


def without_gradient(function: Any, arguments: int) -> None:
    """Says that no result of an operation has a gradient: its results are codes and scales."""

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        del inputs
        ctx.mark_non_differentiable(*(output if isinstance(output, (tuple, list)) else (output,)))

    def backward(ctx: Any, *grads: Any) -> Any:
        del ctx, grads
        return (None,) * arguments

    torch.library.register_autograd(function.default._name, backward, setup_context=setup)
