"""Sparse gradients, as `nn.Embedding(sparse=True)` makes them: only touched rows move.

The touched rows of the parameter and its states are gathered into small float32 tensors, updated by
the kernel of unquantized states, and put back. A quantized state is decoded and encoded in whole
blocks, those that hold a touched row: what else lies in such a block is rounded anew if its
absmax changes, by half a step of the table at most. Norms of rules with tensor_code are those of
the touched rows; weight decay and the decay of states concern them alone, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bnbx.errors import UnsupportedTensorError
from bnbx.kernels.batch import Batch, step_scalars
from bnbx.kernels.packing import codes_at, pack
from bnbx.kernels.plan import Storage
from bnbx.kernels.reference import encode_blocks, levels_of
from bnbx.kernels.signature import RESIDUAL, RESIDUAL_TYPES, absmax_name
from bnbx.optimizers.state import ParameterState, plan_for, storage_of
from bnbx.registry import Optimizer as OptimizerSpec
from bnbx.registry.config import Resolved
from bnbx.registry.optimizer import STEP


@dataclass
class SparseUpdate:
    """The touched rows of one parameter: a batch to launch, and where its results belong."""

    p: Tensor
    saved: ParameterState
    rows: Tensor
    batch: Batch
    storages: tuple[Storage, ...]

    def put_back(self) -> None:
        """Write the rows' new values; everything else stays as it is."""
        values = list(self.batch.tensors[0])
        self.p.index_copy_(0, self.rows, values[0])
        rest = values[2:-1]
        if self.batch.plan.master in RESIDUAL_TYPES:
            self.saved[RESIDUAL].index_copy_(0, self.rows, rest.pop(0))
        for storage, value in zip(self.storages, rest, strict=True):
            self._put_back(storage, value)

    def _put_back(self, storage: Storage, value: Tensor) -> None:
        name = storage.state.name
        if storage.quant_type is None:
            state: Tensor = self.saved[name]
            state.index_copy_(0, self.rows.to(state.device), value.to(state.device))
            return
        blocks = _Blocks(storage, self.saved, self.rows, self.p.shape)
        blocks.write(value, self.batch.found_inf)


def check_rows(p: Tensor, g: Tensor) -> None:
    """Raise UnsupportedTensorError if a sparse `g` is not the gradient of whole rows of `p`."""
    if g.sparse_dim() != 1:
        raise UnsupportedTensorError(
            f"the sparse gradient of a parameter of shape {tuple(p.shape)} has {g.sparse_dim()} "
            "sparse dimensions; expected 1 (whole rows), as nn.Embedding(sparse=True) makes them. "
            "Or give it as a dense tensor: p.grad = p.grad.to_dense()"
        )


def gather_rows(
    spec: OptimizerSpec,
    p: Tensor,
    g: Tensor,
    saved: ParameterState,
    resolved: Resolved,
    gradient_scale: Tensor,
) -> SparseUpdate | None:
    """The update of the rows that `g` touches; None if it touches none."""
    g = g.coalesce()
    rows = g.indices()[0]
    if not g.values().numel():
        return None
    active = spec.active_states(resolved.switches)
    storages = tuple(storage_of(state, resolved, p.numel()) for state in active)
    tensors = [p.index_select(0, rows), g.values().contiguous()]
    plan = plan_for(spec, p, g.dtype, resolved, decoded=True)
    if plan.master in RESIDUAL_TYPES:
        tensors.append(saved[RESIDUAL].index_select(0, rows))
    tensors += [_rows_of(storage, saved, rows, p.shape) for storage in storages]
    scalars, inputs = step_scalars(plan, resolved.hyper, saved[STEP] + 1)
    batch = Batch(plan, scalars, [(*tensors, gradient_scale)], inputs)
    return SparseUpdate(p, saved, rows, batch, storages)


def _rows_of(storage: Storage, saved: ParameterState, rows: Tensor, shape: torch.Size) -> Tensor:
    """The values of a state in these rows, where the rows are."""
    if storage.quant_type is None:
        value: Tensor = saved[storage.state.name]
        return value.index_select(0, rows.to(value.device)).to(rows.device)
    blocks = _Blocks(storage, saved, rows, shape)
    return blocks.values()[blocks.inside].view(len(rows), *shape[1:]).to(rows.device)


class _Blocks:
    """The blocks of a quantized state that hold any of some rows."""

    def __init__(
        self, storage: Storage, saved: ParameterState, rows: Tensor, shape: torch.Size
    ) -> None:
        assert storage.quant_type is not None
        self.storage, self.quant_type = storage, storage.quant_type
        self.numel = shape.numel()
        self.packed = saved[storage.state.name].view(-1)
        self.absmax: Tensor = saved[absmax_name(storage.state.name)]
        self.size = self.numel if storage.whole else storage.block_size
        device = self.packed.device  # that of the host, where states are paged
        width = shape[1:].numel()
        places = rows.to(device)[:, None] * width + torch.arange(width, device=device)
        places = places.view(-1)
        self.blocks, inverse = torch.unique(places // self.size, return_inverse=True)
        self.inside = inverse * self.size + places % self.size
        elements = self.blocks[:, None] * self.size + torch.arange(self.size, device=device)
        self.elements = elements.view(-1)

    def levels(self) -> Tensor:
        """What the codes of the blocks' elements stand for where absmax is 1; 0 beyond the end."""
        elements = self.elements.clamp(max=self.numel - 1)
        found = levels_of(self.storage, codes_at(self.packed, self.quant_type, elements))
        return torch.where(self.elements < self.numel, found, 0 * found)

    def values(self) -> Tensor:
        """The values of the blocks' elements."""
        return (self.levels().view(-1, self.size) * self.absmax[self.blocks, None]).view(-1)

    def write(self, value: Tensor, found_inf: Tensor | None) -> None:
        """Encode the blocks anew with these values in their rows; as they were if `found_inf`."""
        every = self.values()
        every[self.inside] = value.reshape(-1).to(every.device)
        blocks = every.view(-1, self.size)
        largest = torch.maximum(blocks.abs().amax(1), self._needed())
        codes, absmax = encode_blocks(self.storage, blocks, largest)
        packed = pack(codes, self.quant_type)
        count = packed.shape[1]
        places = self.blocks[:, None] * count + torch.arange(count, device=packed.device)
        there = places < self.packed.numel()
        places, packed = places[there], packed[there]
        if found_inf is not None:
            keep = found_inf.to(packed.device) != 0
            packed = torch.where(keep, self.packed[places], packed)
            absmax = torch.where(keep, self.absmax[self.blocks], absmax)
        self.packed[places] = packed
        self.absmax[self.blocks] = absmax

    def _needed(self) -> Tensor:
        """The absmax (blocks,) that untouched elements ask for, at the least.

        That is the present one if any of them has an outermost code, so that they stay as they
        are. Where the two ends of a table differ, an element at the shorter end would else shrink
        whenever its block is written.
        """
        codebook = self.storage.codebook
        values = [codebook.levels[code] for code in codebook.codes]
        shortest = min(end for end in (max(values), -min(values)) if end > 0)
        end = torch.tensor(shortest, dtype=torch.float32, device="cpu")
        untouched = self.levels().abs() >= end
        untouched[self.inside] = False
        present = self.absmax[self.blocks]
        return torch.where(untouched.view(-1, self.size).any(1), present, torch.zeros_like(present))
