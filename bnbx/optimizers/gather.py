"""Gathers the tensors of a step into batches: parameters of equal values, plan and step count.

What does not change from step to step (the plan, which state tensors there are) is kept per
parameter in a slot, and used only while everything it was made from is still the same object.
Pointers are never kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter
from torch.nn.parameter import is_lazy

from bnbx.errors import UnsupportedTensorError
from bnbx.kernels.batch import Batch, seed_of, step_scalars
from bnbx.kernels.memory import is_wrapper, name_of
from bnbx.kernels.plan import Plan
from bnbx.kernels.signature import RESIDUAL, RESIDUAL_TYPES
from bnbx.optimizers.sparse import SparseUpdate, check_rows, gather_rows
from bnbx.optimizers.state import (
    DTYPE_NAMES,
    ParameterState,
    check_held,
    check_states,
    plan_for,
    storage_of,
    tensor_names,
)
from bnbx.registry import Optimizer as OptimizerSpec
from bnbx.registry.config import Resolved
from bnbx.registry.optimizer import STEP

_STRIDED = torch.strided


@dataclass(frozen=True)
class Slot:
    """What a parameter's step needs besides pointers."""

    plan: Plan
    kernel_key: Any
    saved: ParameterState
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    shape: torch.Size
    dtypes: tuple[torch.dtype, torch.dtype]
    device: torch.device

    def fits(self, p: Tensor, g: Tensor, saved: ParameterState, kernel_key: Any) -> bool:
        """Whether nothing that the slot was made from has changed."""
        return (
            self.kernel_key is kernel_key
            and self.saved is saved
            and p.dtype is self.dtypes[0]
            and g.dtype is self.dtypes[1]
            and p.device == self.device
            and p.shape == self.shape
            and g.shape == self.shape
            and type(saved.get(STEP)) is int
            and all(map(is_, map(saved.get, self.names), self.tensors))
            and tuple(map(Tensor.numel, self.tensors)) == self.sizes
        )

    @property
    def far(self) -> bool:
        """Whether states are elsewhere than the parameter: paged, on a device."""
        return any(tensor.device != self.device for tensor in self.tensors)


# Resolved values and plan (both by identity), step, device, and whether states are on another.
BatchKey = tuple[int, int, int, torch.device, bool]


@dataclass(frozen=True)
class Item:
    """A parameter to update.

    Attributes:
        p: the parameter, by which its states are known.
        memory: what is updated: p itself, or a tensor that stands for it in a compiled graph.
        grad: its gradient.
        resolved: its values.
    """

    p: Tensor
    memory: Tensor
    grad: Tensor
    resolved: Resolved


class Gathering:
    """The batches of one step, as they grow."""

    def __init__(self) -> None:
        self.sparse: list[SparseUpdate] = []
        self.tensors: dict[BatchKey, list[tuple[Tensor, ...]]] = {}
        self.about: dict[BatchKey, tuple[Plan, Resolved]] = {}
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.updated: list[Tensor] = []
        self.stepped: list[ParameterState] = []

    def batches(self, found_inf: Tensor | None, first: int = 0) -> list[Batch]:
        """What is to be launched; their noise is numbered from `first`."""
        made = []
        for number, (key, tensors) in enumerate(self.tensors.items(), first):
            plan, resolved = self.about[key]
            step = key[2]
            scalars, inputs = step_scalars(plan, resolved.hyper, step)
            made.append(Batch(plan, scalars, tensors, inputs, seed_of(step, number)))
        for number, update in enumerate(self.sparse, first + len(made)):
            update.batch.seed = seed_of(update.saved[STEP] + 1, number)
            made.append(update.batch)
        if found_inf is not None:
            for batch in made:
                batch.found_inf = found_inf.to(batch.tensors[0][0].device, non_blocking=True)
        return made

    def finish(self) -> None:
        """After the launch: results go where they belong, and autograd and the states know."""
        for memory, updated in self.copies:
            memory.copy_(updated)
        for update in self.sparse:
            update.put_back()
        for memory in self.updated:  # kernels write behind autograd's back
            if not memory.is_inference():
                increment_version(memory)
        for saved in self.stepped:
            saved[STEP] += 1


class Slots:
    """The slots of an optimizer's parameters."""

    def __init__(self, spec: OptimizerSpec) -> None:
        self.spec = spec
        self._slots: dict[Tensor, Slot] = {}
        self._plans: dict[Any, Plan] = {}

    def add(self, to: Gathering, item: Item, slot: Slot, gradient_scale: Tensor) -> None:
        """Add a parameter, whose slot it is; `gradient_scale` is what multiplies its gradient."""
        memory, g, resolved, saved = item.memory, item.grad, item.resolved, slot.saved
        to.stepped.append(saved)
        if not memory.numel():
            return
        if g.layout is torch.sparse_coo:
            update = gather_rows(self.spec, memory, g, saved, resolved, gradient_scale)
            if update is not None:
                to.sparse.append(update)
                to.updated.append(memory)
            return
        to.updated.append(memory)
        target = memory
        if not memory.is_contiguous():
            target = memory.contiguous()
            to.copies.append((memory, target))
        key = (id(resolved), id(slot.plan), saved[STEP] + 1, slot.device, slot.far)
        if key not in to.tensors:
            to.tensors[key] = []
            to.about[key] = (slot.plan, resolved)
        g = g.contiguous()
        if g.is_neg():  # as autograd makes of a conjugate; in memory it has the other sign
            g = g.resolve_neg()
        to.tensors[key].append((target, g, *slot.tensors, gradient_scale))

    def slot(self, p: Tensor, g: Tensor, saved: ParameterState, resolved: Resolved) -> Slot:
        """The slot of a parameter, made anew if anything has changed.

        Raises:
            UnsupportedTensorError: the parameter or its gradient cannot be used.
            OptionError, CheckpointError: its states are not what it asks for.
        """
        slot = self.kept(p, g, saved, resolved)
        if slot is None:
            slot = self._slots[p] = self._make(p, g, saved, resolved)
        return slot

    def kept(self, p: Tensor, g: Tensor, saved: ParameterState, resolved: Resolved) -> Slot | None:
        """The slot that a parameter has, None if there is none or anything has changed.

        Raises:
            UnsupportedTensorError: the gradient cannot be used.
        """
        check_gradient(p, g)
        slot = self._slots.get(p)
        return slot if slot and slot.fits(p, g, saved, resolved.kernel_key) else None

    def _make(self, p: Tensor, g: Tensor, saved: ParameterState, resolved: Resolved) -> Slot:
        kernel_key = resolved.kernel_key
        check_parameter(p)
        if g.shape != p.shape:
            raise UnsupportedTensorError(
                f"a parameter of shape {tuple(p.shape)} has a gradient of shape {tuple(g.shape)}; "
                "was p.data replaced? Make a new optimizer for the new shape"
            )
        if p in self._slots and self._slots[p].shape != p.shape:
            raise UnsupportedTensorError(
                f"a parameter of shape {tuple(p.shape)} had the shape "
                f"{tuple(self._slots[p].shape)} in its last step; make a new optimizer for the new "
                "shape"
            )
        active = self.spec.active_states(resolved.switches)
        storages = tuple(storage_of(state, resolved, p.numel()) for state in active)
        check_held(p, saved, storages, resolved)
        label = f"the state of a parameter of shape {tuple(p.shape)}"
        check_states(label, p, saved, self.spec, resolved)
        quantized = tuple(storage.quant_type is not None for storage in storages)
        key = (kernel_key, p.dtype, g.dtype, quantized)
        if key not in self._plans:
            self._plans[key] = self.plan(p, g.dtype, resolved)
        plan = self._plans[key]
        names = tensor_names(storages)
        names = (RESIDUAL, *names) if plan.master in RESIDUAL_TYPES else names
        tensors = tuple(saved[name] for name in names)
        sizes = tuple(map(Tensor.numel, tensors))
        dtypes = (p.dtype, g.dtype)
        return Slot(plan, kernel_key, saved, names, tensors, sizes, p.shape, dtypes, p.device)

    def plan(self, p: Tensor, gradient: torch.dtype, resolved: Resolved) -> Plan:
        """The plan of a parameter with these values."""
        return plan_for(self.spec, p, gradient, resolved)

    def forget(self, p: Tensor) -> None:
        """Let go of one parameter's tensors."""
        self._slots.pop(p, None)

    def clear(self) -> None:
        """Let go of all tensors."""
        self._slots.clear()


def is_left_alone(p: Tensor) -> bool:
    """Whether `p` is frozen and could not be updated, as the weight of a quantized layer.

    `model.parameters()` has such too. It gets no gradient, so it has no states and no step.
    """
    frozen = isinstance(p, Parameter) and not p.requires_grad and not is_lazy(p)
    return frozen and bool(_flaw(p))


def check_parameter(p: Tensor) -> None:
    """Raise UnsupportedTensorError if `p` cannot be a parameter."""
    if is_lazy(p):
        raise UnsupportedTensorError(
            "a parameter of a lazy module has no shape yet; run the model once on some input "
            "before its optimizer is made"
        )
    if flaw := _flaw(p):
        raise UnsupportedTensorError(f"a parameter of shape {tuple(p.shape)} {flaw}")


def _flaw(p: Tensor) -> str:
    """Why no step can update `p`; "" if one can."""
    if p.dtype not in DTYPE_NAMES:
        return f"has dtype {p.dtype}; expected one of {', '.join(map(str, DTYPE_NAMES))}"
    if p.layout is not _STRIDED:
        return f"has layout {p.layout}; expected a dense tensor"
    if is_wrapper(p):
        return (
            f"is a {name_of(p)}, which stands for other tensors and has no memory of its own; "
            "expected a plain tensor. Sharded training has those with FullyShardedDataParallel("
            "..., use_orig_params=True), not with fully_shard"
        )
    if p.is_neg():
        return (
            "is a negative view: its numbers lie in memory with the other sign; make it of "
            "p.resolve_neg()"
        )
    span = 1 + sum((n - 1) * stride for n, stride in zip(p.shape, p.stride(), strict=True))
    if span < p.numel():
        return (
            f"and strides {p.stride()} is expanded or overlaps itself: several of its elements "
            "share memory; pass the tensor it is made from"
        )
    return ""


def check_gradient(p: Tensor, g: Tensor) -> None:
    """Raise UnsupportedTensorError if `g` is no gradient of `p` that can be used."""
    sparse = g.layout is torch.sparse_coo
    if g.device == p.device and g.dtype in DTYPE_NAMES and (sparse or g.layout is _STRIDED):
        if sparse:
            check_rows(p, g)
        return
    raise UnsupportedTensorError(
        f"the gradient of a parameter of shape {tuple(p.shape)} is {g.dtype}, {g.layout}, on "
        f"{g.device}; expected a dense tensor, or a sparse one (COO) of whole rows, of "
        f"{', '.join(map(str, DTYPE_NAMES))} on {p.device}"
    )
