"""The step of paged states on a device: batches cut into pieces that travel there and back.

A batch whose states are in host memory while its parameters are on a device is cut into pieces of
whole blocks; `bnbx.kernels.staging` brings each piece's states to the device and back while others
are updated. A plan that measures whole tensors (norms, one absmax for a tensor) is not cut inside a
tensor. Results are the bits of an update at once, but for the noise of masters, which is numbered
within a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bnbx.kernels.batch import Batch, seed_of
from bnbx.kernels.packing import bytes_of
from bnbx.kernels.plan import Plan
from bnbx.kernels.signature import RESIDUAL_TYPES
from bnbx.kernels.staging import PIECE_BYTES, Piece, Stager, cut, pack

Launch = Callable[[Sequence[Batch]], None]


@dataclass(frozen=True)
class _Owner:
    """A row of a batch: the tensors that are on the device already."""

    p: Tensor
    g: Tensor
    residual: tuple[Tensor, ...]
    gradient_scale: Tensor


class Staging:
    """The stagers of an optimizer, one a device, made when they are needed."""

    def __init__(
        self,
        make: Callable[[torch.device], Stager] | None = None,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self._make = make or partial(Stager, piece_bytes=piece_bytes)
        self._stagers: dict[torch.device, Stager] = {}
        self.piece_bytes = piece_bytes

    def launch(self, batches: Sequence[Batch], launch: Launch) -> None:
        """Run the batches with `launch`: those of host states in pieces, the others as they are."""
        near: list[Batch] = []
        far: list[Batch] = []
        for batch in batches:
            (far if is_far(batch) else near).append(batch)
        if near:
            launch(near)
        for number, batch in enumerate(far):
            self._run(batch, number, launch)

    def _run(self, batch: Batch, number: int, launch: Launch) -> None:
        device = batch.tensors[0][0].device
        if device not in self._stagers:
            self._stagers[device] = self._make(device)
        parts = []
        for row in batch.tensors:
            owner, states = _split(batch.plan, row)
            numel = owner.p.numel()
            block = numel if batch.plan.measured else batch.plan.chunk
            entries = _entries(batch.plan, states, block, numel)
            parts += cut(owner, numel, states, entries, block, self.piece_bytes)
        pieces = pack(parts, self.piece_bytes)
        seeds = {id(piece): seed_of(batch.seed, number + i) for i, piece in enumerate(pieces)}

        def update(piece: Piece, states: Sequence[tuple[Tensor, ...]]) -> None:
            rows = [
                _row(part.owner, part.start, part.stop, own)
                for part, own in zip(piece.parts, states, strict=True)
            ]
            launch([replace(batch, tensors=rows, seed=seeds[id(piece)])])

        self._stagers[device].run(pieces, update)


def is_far(batch: Batch) -> bool:
    """Whether a batch's states are in host memory and its parameters elsewhere."""
    if batch.tensors[0][0].is_cpu:
        return False
    _, states = _split(batch.plan, batch.tensors[0])
    return any(state.is_cpu for state in states)


def _split(plan: Plan, row: Sequence[Tensor]) -> tuple[_Owner, list[Tensor]]:
    p, g, *rest, gradient_scale = row
    residual = tuple(rest[:1]) if plan.master in RESIDUAL_TYPES else ()
    return _Owner(p, g, residual, gradient_scale), list(rest[len(residual) :])


def _entries(plan: Plan, states: Sequence[Tensor], block: int, numel: int) -> list[int]:
    """How many entries of each state tensor belong to `block` elements."""
    if block == numel:
        return [state.numel() for state in states]
    found = []
    for storage in plan.storages:
        if storage.quant_type is None:
            found.append(block)
        else:
            found += [bytes_of(storage.quant_type, block), block // storage.block_size]
    return found


def _row(owner: _Owner, start: int, stop: int, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    own = (owner.p, owner.g, *owner.residual)
    return (*(t.view(-1)[start:stop] for t in own), *states, owner.gradient_scale)
