"""Makes functions into operations of torch, called directly where its dispatcher has nothing to do.

The dispatcher takes 45 microseconds to pass a call through two functions in Python, one for
gradients and one for the result: a third of a product of one row with a small weight, and a model
that writes one token after the other makes hundreds of these. So where nobody asks for gradients,
traces or profiles, the function is called as it is. An operation is one node of a compiled graph,
whatever happens inside; its fake form gives what torch.compile may know of a result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from bnbx.errors import NotYetError
from bnbx.kernels.fakes import register_fake

try:  # names of torch's own, which other versions may not have
    from torch._C import (
        _dispatch_keys,
        _get_tracing_state,
        _len_torch_dispatch_stack,
        _len_torch_function_stack,
    )
    from torch._C._autograd import _profiler_enabled
    from torch._C._functorch import peek_interpreter_stack

    _TELLING = hasattr(forward_ad, "_current_level")
except ImportError:
    _TELLING = False

NAMESPACE = "bnbx"
COMPLIANT = (torch.Tag.pt2_compliant_tag,)
_library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_unpack: Any = forward_ad.unpack_dual
Function = Callable[..., Any]
_TENSORS = frozenset({Tensor, Parameter})
_known: set[int] = set()  # what torch dispatches tensors on that are their memory and no more
_OTHERS = frozenset({type(None), bool, int, float, str, torch.dtype, torch.Size})


def define(
    schema: str,
    run: Function,
    fake: Function,
    *,
    anywhere: Collection[str] = (),
    gradient: bool = True,
    tags: tuple[torch.Tag, ...] = COMPLIANT,
) -> Function:
    """Registers an operation, for every device; gives what calls it.

    Args:
        schema: as `torch.library.define` takes it, the name of the operation first.
        run: the arguments to results. What it writes to, of what the schema says it writes to,
            is for it to tell autograd.
        fake: the arguments to results without numbers.
        anywhere: see `bnbx.kernels.fakes.register_fake`.
        gradient: False where no result has one: they are codes and scales.
        tags: of the operation.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=tags)
    _library.impl(f"{NAMESPACE}::{name}", run, "CompositeExplicitAutograd")
    register_fake(f"{NAMESPACE}::{name}", fake, _library, anywhere)
    operation = getattr(getattr(torch.ops, NAMESPACE), name).default
    if not gradient:
        _without_gradient(name, len(operation._schema.arguments))

    def call(*arguments: Any) -> Any:
        if unwatched(arguments):
            return run(*arguments)
        if gradient and not torch.compiler.is_compiling():
            _refuse_tangents(name, arguments)
        return operation(*arguments)

    return call


def differentiate(name: str, backward: Function, setup: Function | None = None) -> None:
    """Says how an operation is differentiated, as `torch.library.register_autograd` takes it."""
    name = f"{NAMESPACE}::{name}"
    torch.library.register_autograd(name, backward, setup_context=setup, lib=_library)


def _without_gradient(name: str, arguments: int) -> None:
    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        del inputs
        ctx.mark_non_differentiable(*(output if isinstance(output, (tuple, list)) else (output,)))

    differentiate(name, lambda ctx, *grads: (None,) * arguments, setup)


def unwatched(arguments: Iterable[Any]) -> bool:
    """Whether the result of a function of these arguments is all that is asked for.

    Not so where torch compiles, traces or profiles; inside of a mode (`FakeTensorMode`,
    `FlopCounterMode`, `torch.device`) or of a transform (`torch.func.vmap`); where a gradient may
    be wanted, forward or backward; where a tensor is more than its memory: of a class of its own,
    on the meta device, nested, a negative view. Nor where this torch cannot tell.
    """
    return (
        not torch.compiler.is_compiling()  # first: torch.compile takes it for a constant
        and _TELLING
        and _get_tracing_state() is None
        and not _len_torch_dispatch_stack()
        and not _len_torch_function_stack()
        and peek_interpreter_stack() is None
        and not _profiler_enabled()
        and forward_ad._current_level < 0
        and _plain(arguments, torch.is_grad_enabled())
    )


def _plain(arguments: Iterable[Any], gradients: bool) -> bool:
    for each in arguments:
        kind = type(each)
        if kind in _TENSORS:
            if gradients and each.requires_grad:
                return False
            if _dispatch_keys(each).raw_repr() not in _known and not _is_its_memory(each):
                return False
        elif kind not in _OTHERS and not (kind in (list, tuple) and _plain(each, gradients)):
            return False
    return True


def _is_its_memory(tensor: Tensor) -> bool:
    """Whether torch dispatches on a tensor as on any that is its memory and no more."""
    if tensor.is_meta:
        return False
    with torch.inference_mode(tensor.is_inference()):
        plain = _dispatch_keys(torch.empty(0, dtype=torch.uint8, device=tensor.device))
    if _dispatch_keys(tensor).raw_repr() != plain.raw_repr():
        return False
    _known.add(plain.raw_repr())
    return True


def _refuse_tangents(name: str, arguments: Iterable[Any]) -> None:
    """Torch would drop a tangent that an operation has no rule for, without a word."""
    for each in arguments:
        if isinstance(each, Tensor) and _unpack(each).tangent is not None:
            raise NotYetError(
                f"{NAMESPACE}::{name} has no forward-mode derivative: torch.func.jvp and dual "
                "tensors cannot go through it; backward() and autograd.grad can"
            )
