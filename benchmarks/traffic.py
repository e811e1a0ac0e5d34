"""How many bytes a step moves for each parameter, counted from a plan.

A step that waits for memory can be no faster than these bytes let it, so times are set against
them. What a rule does not need is counted as long as its kernel reads it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from bnbx.kernels.master import residual_dtype
from bnbx.kernels.plan import Plan, Storage

ABSMAX_BYTES = 4


@dataclass(frozen=True)
class Traffic:
    """Bytes for each parameter.

    Attributes:
        update: what the pass that updates reads and writes.
        measure: what the pass before it reads; 0 for rules that need none.
    """

    update: float
    measure: float

    @property
    def total(self) -> float:
        """Of both passes."""
        return self.update + self.measure


def traffic(plan: Plan) -> Traffic:
    """What a step by this plan moves, for tensors of many blocks."""
    gradient = itemsize(plan.gradient)
    kept = itemsize(plan.parameter) + _residual(plan) + sum(map(state_bytes, plan.storages))
    # A first pass reads all that the second one reads, and writes a few numbers a chunk.
    return Traffic(2 * kept + gradient, kept + gradient if plan.measured else 0.0)


def in_float32(plan: Plan) -> Plan:
    """The same plan with all states in float32."""
    storages = tuple(Storage(storage.state, None) for storage in plan.storages)
    return dataclasses.replace(plan, storages=storages)


def reference_bytes(dtype: str) -> float:
    """What torch's fused AdamW moves: its two states have the dtype of parameter and gradient.

    It reads and writes the parameter and both states, and reads the gradient.
    """
    return 7.0 * itemsize(dtype)


def state_bytes(storage: Storage) -> float:
    """The size of a state for each parameter: its codes and its share of an absmax, or a float."""
    if storage.quant_type is None:
        return float(itemsize("float32"))
    absmax = 0.0 if storage.whole else ABSMAX_BYTES / storage.block_size
    return storage.quant_type.bits / 8 + absmax


def itemsize(dtype: str) -> int:
    """Bytes of a number of torch's dtype of this name."""
    kind: torch.dtype = getattr(torch, dtype)
    return kind.itemsize


def _residual(plan: Plan) -> int:
    dtype = residual_dtype(plan.master, getattr(torch, plan.parameter))
    return 0 if dtype is None else dtype.itemsize
