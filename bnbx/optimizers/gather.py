"""Gathers the tensors of a step into batches: parameters of one group, plan and step count.

What does not change from step to step (the plan, which state tensors there are) is kept per
parameter in a slot, and used only while everything it was made from is still the same object.
Pointers are never kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor

from bnbx.errors import UnsupportedTensorError
from bnbx.kernels.plan import DTYPES, Plan, make_plan
from bnbx.optimizers.state import (
    ParameterState,
    check_states,
    storage_types,
    tensor_names,
    type_key,
)
from bnbx.registry import Optimizer as OptimizerSpec
from bnbx.registry.config import Resolved
from bnbx.registry.optimizer import STEP

DTYPE_NAMES: Mapping[torch.dtype, str] = {getattr(torch, name): name for name in DTYPES}
_STRIDED = torch.strided
KernelKey = tuple[tuple[tuple[str, Any], ...], ...]


@dataclass(frozen=True)
class Slot:
    """What a parameter's step needs besides pointers."""

    plan: Plan
    kernel_key: KernelKey
    saved: ParameterState
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    shape: torch.Size
    dtypes: tuple[torch.dtype, torch.dtype]

    def fits(self, p: Tensor, g: Tensor, saved: ParameterState, kernel_key: KernelKey) -> bool:
        """Whether nothing that the slot was made from has changed."""
        return (
            self.kernel_key is kernel_key
            and self.saved is saved
            and p.dtype is self.dtypes[0]
            and g.dtype is self.dtypes[1]
            and p.shape == self.shape
            and g.shape == self.shape
            and all(map(is_, map(saved.get, self.names), self.tensors))
            and tuple(map(Tensor.numel, self.tensors)) == self.sizes
        )


BatchKey = tuple[int, int, int]  # group, plan (by identity), step


class Gathering:
    """The batches of one step, as they grow."""

    def __init__(self) -> None:
        self.tensors: dict[BatchKey, list[tuple[Tensor, ...]]] = {}
        self.about: dict[BatchKey, tuple[Plan, Resolved]] = {}
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.updated: list[Tensor] = []
        self.stepped: list[ParameterState] = []


class Slots:
    """The slots of an optimizer's parameters."""

    def __init__(self, spec: OptimizerSpec) -> None:
        self.spec = spec
        self._slots: dict[Tensor, Slot] = {}
        self._plans: dict[Any, Plan] = {}
        self._kernel_keys: dict[KernelKey, KernelKey] = {}

    def add(
        self, to: Gathering, number: int, p: Tensor, saved: ParameterState, resolved: Resolved
    ) -> None:
        """Add a parameter of group `number`, which has a gradient, with its states.

        Raises:
            UnsupportedTensorError: the gradient cannot be used.
        """
        g = p.grad
        assert g is not None
        if g.layout is not _STRIDED or g.device != p.device or g.dtype not in DTYPE_NAMES:
            refuse_gradient(p)
        kernel_key = self._kernel_keys.setdefault(resolved.kernel_key, resolved.kernel_key)
        slot = self._slots.get(p)
        if slot is None or not slot.fits(p, g, saved, kernel_key):
            slot = self._slots[p] = self._make(p, g, saved, resolved, kernel_key)
        to.stepped.append(saved)
        if not p.numel():
            return
        to.updated.append(p)
        target = p
        if not p.is_contiguous():
            target = p.contiguous()
            to.copies.append((p, target))
        key = (number, id(slot.plan), saved[STEP] + 1)
        if key not in to.tensors:
            to.tensors[key] = []
            to.about[key] = (slot.plan, resolved)
        to.tensors[key].append((target, g.contiguous(), *slot.tensors))

    def _make(
        self,
        p: Tensor,
        g: Tensor,
        saved: ParameterState,
        resolved: Resolved,
        kernel_key: KernelKey,
    ) -> Slot:
        check_parameter(p)
        active = self.spec.active_states(resolved.switches)
        if g.shape != p.shape:
            raise UnsupportedTensorError(
                f"a parameter of shape {tuple(p.shape)} has a gradient of shape {tuple(g.shape)}; "
                "was p.data replaced? Make a new optimizer for the new shape"
            )
        held = [saved[s.name] for s in active if isinstance(saved.get(s.name), Tensor)]
        if any(tensor.numel() != p.numel() for tensor in held):
            raise UnsupportedTensorError(
                f"a parameter of shape {tuple(p.shape)} has states of shape "
                f"{[tuple(tensor.shape) for tensor in held]}; was p.data or optimizer.state "
                "replaced? Make a new optimizer for the new shape"
            )
        types = storage_types(saved, active, resolved, p.numel())
        quantized = tuple(type_key(s.name) in saved for s in active)
        key = (kernel_key, p.dtype, g.dtype, quantized)
        label = f"the state of a parameter of shape {tuple(p.shape)}"
        check_states(label, p, saved, self.spec.states, resolved)
        if key not in self._plans:
            self._plans[key] = make_plan(
                self.spec, resolved.switches, DTYPE_NAMES[p.dtype], DTYPE_NAMES[g.dtype], types
            )
        names = tensor_names(types)
        tensors = tuple(saved[name] for name in names)
        sizes = tuple(map(Tensor.numel, tensors))
        dtypes = (p.dtype, g.dtype)
        return Slot(self._plans[key], kernel_key, saved, names, tensors, sizes, p.shape, dtypes)

    def clear(self) -> None:
        """Let go of all tensors."""
        self._slots.clear()


def check_parameter(p: Tensor) -> None:
    """Raise UnsupportedTensorError if `p` cannot be a parameter."""
    if p.dtype not in DTYPE_NAMES:
        raise UnsupportedTensorError(
            f"a parameter of shape {tuple(p.shape)} has dtype {p.dtype}; expected one of "
            f"{', '.join(map(str, DTYPE_NAMES))}"
        )
    if p.layout is not _STRIDED:
        raise UnsupportedTensorError(
            f"a parameter of shape {tuple(p.shape)} has layout {p.layout}; expected a dense tensor"
        )
    span = 1 + sum((n - 1) * stride for n, stride in zip(p.shape, p.stride(), strict=True))
    if span < p.numel():
        raise UnsupportedTensorError(
            f"a parameter of shape {tuple(p.shape)} and strides {p.stride()} is expanded or "
            "overlaps itself: several of its elements share memory; pass the tensor it is made from"
        )


def refuse_gradient(p: Tensor) -> None:
    """Raise UnsupportedTensorError about the gradient of `p`."""
    g = p.grad
    assert g is not None
    raise UnsupportedTensorError(
        f"the gradient of a parameter of shape {tuple(p.shape)} is {g.dtype}, {g.layout}, on "
        f"{g.device}; expected a dense tensor of {', '.join(map(str, DTYPE_NAMES))} on {p.device}"
        + ("; make the layer with sparse=False" if g.layout is not _STRIDED else "")
    )
