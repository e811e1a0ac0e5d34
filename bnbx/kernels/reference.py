"""The reference target: the lowered rule run with torch operations, on any device.

No compiler, and the same bits as the native targets: every operation is one correctly rounded
float32 operation. It is what runs where nothing faster can, and what the native targets are
tested against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from bnbx.kernels.batch import Batch
from bnbx.kernels.codebook import tables
from bnbx.kernels.evaluate import (
    Operations,
    evaluate,
    has_float64,
    square_root,
    tensor_operations,
)
from bnbx.kernels.master import load, store
from bnbx.kernels.packing import pack, unpack
from bnbx.kernels.plan import Plan, Storage
from bnbx.kernels.signature import RESIDUAL_TYPES
from bnbx.registry.checks import NORM, NUMEL
from bnbx.registry.optimizer import UPDATE
from bnbx.registry.rule import Statement

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def run(batches: Sequence[Batch]) -> None:
    """Update all batches, tensor by tensor."""
    for batch in batches:
        if batch.found_inf is not None and bool(batch.found_inf):
            continue
        for number, chunk in enumerate(batch.first_chunks()):
            update(batch, number, chunk * batch.plan.chunk)


def update(batch: Batch, number: int, first_place: int) -> None:
    """Update one parameter in place; `first_place` numbers its noise."""
    plan, p = batch.plan, batch.tensors[number][0]
    residual, stored = _split(plan, batch.tensors[number])
    values = _elements(batch, number)
    states = {s.state.name: values[s.state.name] for s, _ in stored}
    values |= _tensor_values(plan, batch.inputs.tolist(), values)
    _run(plan.lowered.apply, values, tensor_operations(torch.float32, p.device))
    for storage, parts in stored:
        _store(storage, states[storage.state.name], parts)
    flat = p.reshape(-1)
    store(plan.master, values["p"], flat, residual, batch.seed, first_place)
    p.copy_(flat.view_as(p))


def update_norm(batch: Batch, number: int) -> Tensor:
    """The norm (0-d, float64) of a parameter's update as element_code has it, before any bound."""
    return square_root(_elements(batch, number)[UPDATE].double().square().sum())


def _elements(batch: Batch, number: int) -> dict[str, Tensor]:
    """All values of one parameter once element_code has run; its tensors stay as they are."""
    plan, (p, g, *_, gradient_scale) = batch.plan, batch.tensors[number]
    residual, stored = _split(plan, batch.tensors[number])
    values = {
        "p": load(plan.master, p.reshape(-1), residual),
        "g": g.reshape(-1).float() * gradient_scale,
    }
    for name, scalar in zip(plan.lowered.scalars, batch.scalars.tolist(), strict=True):
        values[name] = torch.full((), scalar, dtype=torch.float32, device=p.device)
    for storage, parts in stored:
        values[storage.state.name] = _load(storage, parts, p.numel())
    _run(plan.lowered.element, values, tensor_operations(torch.float32, p.device))
    return values


def _run(
    statements: Sequence[Statement], values: dict[str, Tensor], operations: Operations
) -> None:
    for statement in statements:
        result = evaluate(statement.value, values, operations)
        values[statement.target] = result.expand_as(values["p"])


def _tensor_values(
    plan: Plan, inputs: Sequence[float], values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The scalars of tensor_code, which runs in float64 where the device has it."""
    lowered, device = plan.lowered, values["p"].device
    if not lowered.tensor_scalars:
        return {}
    wide = torch.float64 if has_float64(device.type) else torch.float32
    operations = tensor_operations(wide, device)
    numbers = dict(zip(lowered.inputs, inputs, strict=True)) | {NUMEL: values["p"].numel()}
    found = {n: torch.tensor(x, dtype=wide, device=device) for n, x in numbers.items()}
    for name in lowered.norms:
        found[NORM + name] = square_root(values[name].to(wide).square().sum())
    for statement in lowered.tensor:
        found[statement.target] = evaluate(statement.value, found, operations)
    scalars = lowered.tensor_scalars.items()
    return {name: evaluate(value, found, operations).float() for name, value in scalars}


def _split(
    plan: Plan, tensors: Sequence[Tensor]
) -> tuple[Tensor | None, list[tuple[Storage, list[Tensor]]]]:
    """The residual of a parameter, flat, if it has one; and what is kept of each state."""
    rest = list(tensors[2:-1])
    residual = rest.pop(0).view(-1) if plan.master in RESIDUAL_TYPES else None
    stored = []
    for storage in plan.storages:
        count = 1 if storage.quant_type is None else 2
        stored.append((storage, rest[:count]))
        rest = rest[count:]
    return residual, stored


def _load(storage: Storage, parts: list[Tensor], numel: int) -> Tensor:
    if storage.quant_type is None:
        return parts[0].reshape(-1).clone()  # a rule may hand one state's old values to another
    return decode(storage, parts[0].reshape(-1), parts[1], numel)


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
    read, written = len(storage.codebook.values), len(storage.codebook.codes)
    parts = (found.levels[:read], found.thresholds[: written - 1], found.order[:written])
    levels, thresholds, order = (torch.from_numpy(part.copy()).to(device) for part in parts)
    return levels, thresholds, order, found.zero_code


def decode(storage: Storage, packed: Tensor, absmax: Tensor, numel: int) -> Tensor:
    """Packed codes (bytes,) uint8 and absmax (blocks,) float32 to values (numel,) float32."""
    assert storage.quant_type is not None
    codes = unpack(packed, storage.quant_type, numel)
    scale = absmax if storage.whole else absmax.repeat_interleave(storage.block_size)[:numel]
    return levels_of(storage, codes) * scale


def levels_of(storage: Storage, codes: Tensor) -> Tensor:
    """What codes (uint8, any shape) stand for where absmax is 1, in float32."""
    levels, *_ = _codebook(storage, codes.device)
    return levels[codes.long()]


def encode(storage: Storage, values: Tensor) -> tuple[Tensor, Tensor]:
    """Values (numel,) float32 to packed codes (bytes,) uint8 and absmax (blocks,) float32.

    A block with NaN or infinity gets absmax NaN; one whose largest magnitude has no finite
    inverse, or is subnormal, gets absmax 0. Both get the code of zero throughout.
    """
    assert storage.quant_type is not None
    numel = values.numel()
    size = max(numel, 1) if storage.whole else storage.block_size
    padded = torch.nn.functional.pad(values, (0, -numel % size)).view(-1, size)
    # As integers, magnitudes compare like floats, and NaN is the largest.
    largest = (padded.view(torch.int32) & 0x7FFFFFFF).amax(1).view(torch.float32)
    codes, absmax = encode_blocks(storage, padded, largest)
    return pack(codes.view(-1)[:numel], storage.quant_type), absmax


def encode_blocks(storage: Storage, blocks: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (blocks, size) uint8, and absmax (blocks,) float32, of blocks (blocks, size) float32.

    `largest` (blocks,) is what becomes the table's unit: no less than the magnitudes in a block.
    """
    _, thresholds, order, zero_code = _codebook(storage, blocks.device)
    finite = largest.isfinite()
    one = torch.ones((), dtype=torch.float32, device=blocks.device)
    usable = finite & (largest >= SMALLEST_NORMAL)
    inverse = storage.codebook.unit * one / torch.where(usable, largest, one)
    usable &= inverse.isfinite()
    absmax = torch.where(usable, largest, torch.where(finite, 0 * one, one * float("nan")))
    scaled = torch.where(usable[:, None], blocks * inverse[:, None], 0 * one)
    codes = order[torch.bucketize(scaled, thresholds)]
    codes = torch.where(usable[:, None], codes, torch.full_like(codes, zero_code))
    return codes, absmax
