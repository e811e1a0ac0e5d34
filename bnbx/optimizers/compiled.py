"""The step as one operation that torch.compile can put into a graph: `bnbx::optimizer_step`.

A graph holds tensors and numbers, so the operation finds its optimizer by a number; everything that
changes from step to step (counts, learning rates, states) stays with the optimizer, and nothing of
it makes the graph compile anew. Parameters and gradients are passed as tensors, for a graph may
have changed them in ways that their objects do not show before it ends.

A learning rate scheduler of torch wraps `optimizer.step`, of any optimizer, in a function that
torch.compile does not enter: compile `optimizer.step` before the scheduler is made.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bnbx.errors import OptionError, UnsupportedTensorError
from bnbx.kernels.fakes import register_fake

if TYPE_CHECKING:
    from bnbx.optimizers.engine import Optimizer8bit

_optimizers: weakref.WeakValueDictionary[int, Optimizer8bit] = weakref.WeakValueDictionary()
_handles = itertools.count(1)


def register(optimizer: Optimizer8bit) -> int:
    """The number by which the operation finds an optimizer while it lives."""
    handle = next(_handles)
    _optimizers[handle] = optimizer
    return handle


# A captured graph would repeat one step's numbers, and read memory that was given back: Inductor
# is told to leave the step out of those it makes (`mode="reduce-overhead"`), where torch knows how.
_TAGS: dict[str, Any] = {}
if hasattr(torch.Tag, "cudagraph_unsafe"):
    _TAGS["tags"] = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("bnbx::optimizer_step", mutates_args=("params",), **_TAGS)
def optimizer_step(
    params: list[Tensor], grads: list[Tensor], places: list[int], handle: int
) -> None:
    """Update parameters of the optimizer `handle` in place, by their gradients.

    Args:
        params: memory of the parameters.
        grads: their gradients.
        places: which parameters they are, counted over all groups.
        handle: the optimizer, from `register`.

    Raises:
        OptionError: the optimizer is gone, has no such parameters, or is in evaluation mode.
        UnsupportedTensorError: a gradient that cannot be used; then nothing was updated.
    """
    optimizer = _optimizers.get(handle)
    if optimizer is None:
        raise OptionError("a compiled step belongs to an optimizer that no longer exists")
    optimizer.update(params, grads, places)


def _fake(params: list[Tensor], grads: list[Tensor], places: list[int], handle: int) -> None:
    return None


register_fake("bnbx::optimizer_step", _fake)


def check_places(places: Sequence[int], counts: tuple[int, int], total: int) -> None:
    """Raise OptionError unless `places` are different ones of `total`, for as many tensors."""
    inside = all(0 <= place < total for place in places)
    if not inside or len(set(places)) < len(places) or {len(places)} != set(counts):
        raise OptionError(
            f"a compiled step with {counts[0]} parameters and {counts[1]} gradients is for the "
            f"places {list(places)[:20]} of {total} parameters; expected a place, which none "
            "shares, for each. Compile the step anew"
        )


def check_memory(p: Tensor, memory: Tensor) -> None:
    """Raise UnsupportedTensorError if `memory` cannot stand for the parameter `p`."""
    if memory.shape != p.shape or memory.dtype != p.dtype or memory.device != p.device:
        raise UnsupportedTensorError(
            f"a compiled step has memory of {memory.dtype}, shape {tuple(memory.shape)}, on "
            f"{memory.device}, for a parameter of {p.dtype}, shape {tuple(p.shape)}, on {p.device}"
        )


def step_in_graph(
    optimizer: Optimizer8bit, handle: int, closure: Callable[[], Any] | None, grad_scale: Any
) -> Any:
    """What torch.compile sees of a step."""
    if grad_scale is not None:
        raise OptionError("grad_scale: scale gradients outside of the compiled function")
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    params, grads, places = [], [], []
    place = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                params.append(p)
                grads.append(p.grad)
                places.append(place)
            place += 1
    if params:
        torch.ops.bnbx.optimizer_step(params, grads, places, handle)
    return loss
