"""The reference target: the lowered rule run with torch operations, on any device.

No compiler, and the same bits as the native targets: every operation is one correctly rounded
float32 operation. It is what runs where nothing faster can, and what the native targets are
tested against.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from bnbx.kernels.batch import Batch
from bnbx.kernels.codebook import tables
from bnbx.kernels.evaluate import evaluate, tensor_operations
from bnbx.kernels.plan import Plan, Storage

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def run(batches: Sequence[Batch]) -> None:
    """Update all batches, tensor by tensor."""
    for batch in batches:
        for tensors in batch.tensors:
            update(batch.plan, batch.scalars.tolist(), tensors)


def update(plan: Plan, scalars: Sequence[float], tensors: Sequence[Tensor]) -> None:
    """Update one parameter in place; `tensors` as in `Batch.tensors`."""
    p, g = tensors[0], tensors[1]
    device = p.device
    operations = tensor_operations(torch.float32, device)
    values = {"p": p.reshape(-1).float(), "g": g.reshape(-1).float()}
    for name, number in zip(plan.lowered.scalars, scalars, strict=True):
        values[name] = torch.tensor(number, dtype=torch.float32, device=device)
    stored = list(_by_storage(plan, tensors[2:]))
    for storage, parts in stored:
        values[storage.state.name] = _load(storage, parts, p.numel())
    for statement in plan.lowered.statements:
        result = evaluate(statement.value, values, operations)
        values[statement.target] = result.expand_as(values["p"])
    for storage, parts in stored:
        _store(storage, values[storage.state.name], parts)
    p.copy_(values["p"].view_as(p))


def _by_storage(plan: Plan, tensors: Sequence[Tensor]) -> Iterator[tuple[Storage, list[Tensor]]]:
    rest = list(tensors)
    for storage in plan.storages:
        count = 1 if storage.quant_type is None else 2
        yield storage, rest[:count]
        rest = rest[count:]


def _load(storage: Storage, parts: list[Tensor], numel: int) -> Tensor:
    if storage.quant_type is None:
        return parts[0].reshape(-1)
    return decode(storage, parts[0].reshape(-1), parts[1])[:numel]


def _store(storage: Storage, value: Tensor, parts: list[Tensor]) -> None:
    if storage.quant_type is None:
        parts[0].copy_(value.view_as(parts[0]))
        return
    codes, absmax = encode(storage, value)
    parts[0].copy_(codes.view_as(parts[0]))
    parts[1].copy_(absmax)


@lru_cache(maxsize=64)
def _codebook(storage: Storage, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    found = tables(storage.codebook)
    used = len(storage.codebook.values)
    levels = torch.from_numpy(found.levels[:used].copy()).to(device)
    thresholds = torch.from_numpy(found.thresholds[: used - 1].copy()).to(device)
    order = torch.from_numpy(found.order[:used].copy()).to(device)
    return levels, thresholds, order, found.zero_code


def decode(storage: Storage, codes: Tensor, absmax: Tensor) -> Tensor:
    """Codes (numel,) uint8 and absmax (blocks,) float32 to values (numel,) float32."""
    levels, *_ = _codebook(storage, codes.device)
    scale = absmax.repeat_interleave(storage.block_size)[: codes.numel()]
    return levels[codes.long()] * scale


def encode(storage: Storage, values: Tensor) -> tuple[Tensor, Tensor]:
    """Values (numel,) float32 to codes (numel,) uint8 and absmax (blocks,) float32.

    A block with NaN or infinity gets absmax NaN; one whose largest magnitude is subnormal gets
    absmax 0. Both get the code of zero throughout.
    """
    _, thresholds, order, zero_code = _codebook(storage, values.device)
    size, numel = storage.block_size, values.numel()
    padded = torch.nn.functional.pad(values, (0, -numel % size)).view(-1, size)
    # As integers, magnitudes compare like floats, and NaN is the largest.
    largest = (padded.view(torch.int32) & 0x7FFFFFFF).amax(1).view(torch.float32)
    finite = largest.isfinite()
    usable = finite & (largest >= SMALLEST_NORMAL)
    one = torch.ones((), dtype=torch.float32, device=values.device)
    inverse = torch.where(usable, one / torch.where(usable, largest, one), 0 * one)
    absmax = torch.where(usable, largest, torch.where(finite, 0 * one, one * float("nan")))
    scaled = torch.where(usable[:, None], padded * inverse[:, None], 0 * one)
    codes = order[torch.bucketize(scaled, thresholds)]
    codes = torch.where(usable[:, None], codes, torch.full_like(codes, zero_code))
    return codes.view(-1)[:numel], absmax
