"""Plans to test kernels with, taken from the catalogue: what is registered is tested.

Every rule comes with each setting of its switches that its constraints allow, every quant type
that serves as a default, and the dtypes asked for. `make_batch` fills a plan with tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bnbx.errors import OptionError
from bnbx.kernels.batch import Batch, step_scalars
from bnbx.kernels.packing import pack
from bnbx.kernels.plan import Plan, Storage, make_plan
from bnbx.registry import Optimizer, optimizers, quant_types
from bnbx.registry.config import Resolved, resolve
from bnbx.registry.quant_type import FLOAT32

SIZES = (1, 3, 255, 256, 257, 1000, 4097)


@dataclass(frozen=True)
class Case:
    """A plan with hyperparameters that fit it, and a name for the test's report."""

    name: str
    plan: Plan
    resolved: Resolved


def settings(spec: Optimizer) -> Iterator[Resolved]:
    """The rule with weight decay, and with each allowed setting of its switches."""
    for truth in itertools.product((False, True), repeat=len(spec.switches)):
        chosen: dict[str, Any] = {"weight_decay": 0.05} if "weight_decay" in spec.hyper else {}
        for name, on in zip(spec.switches, truth, strict=True):
            chosen[name] = on if spec.hyper[name].flag else 0.9 * on
        try:
            yield resolve(spec, quant_types(), [("test", chosen)])
        except OptionError:  # the rule forbids this combination
            continue


def case(
    resolved: Resolved, spec: Optimizer, types: Mapping[str, str], dtype: str, **options: Any
) -> Case:
    """The plan for these state types, "float32" for none, and with these options of a plan."""
    found = {name: None if t == FLOAT32 else quant_types().get(t) for name, t in types.items()}
    active = [state.name for state in spec.active_states(resolved.switches)]
    found |= {state.name: None for state in spec.states if not state.quantized}
    plan = make_plan(spec, resolved.switches, dtype, dtype, found, **options)
    switches = [name for name, on in resolved.switches.items() if on]
    states = [types[name] for name in active] or ["stateless"]
    extra = [f"{name}_{value}" for name, value in options.items()]
    names = [spec.name, *switches, *dict.fromkeys(states), dtype, *extra]
    return Case("-".join(names), plan, resolved)


def cases(dtypes: Sequence[str] = ("float32",)) -> list[Case]:
    """Every registered rule, with float32 states and with those of each default quant type."""
    defaults = [t.name for t in quant_types() if t.state_default]
    found: dict[str, Case] = {}
    for spec in optimizers():
        for resolved in settings(spec):
            for name in (*defaults, FLOAT32):
                for dtype in dtypes:
                    types = dict.fromkeys((s.name for s in spec.states), name)
                    made = case(resolved, spec, types, dtype)
                    found[made.name] = made
    return list(found.values())


def mixed_cases() -> list[Case]:
    """Kernels whose states differ: in type, and in whether they are quantized at all."""
    every = [*(t.name for t in quant_types()), FLOAT32]
    found = []
    for spec in optimizers():
        if len(spec.states) > 1:
            resolved = next(settings(spec))
            names = [state.name for state in spec.states]
            for turn in range(len(every)):
                types = {name: every[(turn + i) % len(every)] for i, name in enumerate(names)}
                made = case(resolved, spec, types, "float32")
                found.append(Case(f"{made.name}-{turn}", made.plan, made.resolved))
    return found


def make_batch(made: Case, sizes: Sequence[int] = SIZES, step: int = 3, seed: int = 0) -> Batch:
    """Random tensors for a plan: states of any code, in blocks of very different magnitude."""
    plan = made.plan
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    gradient_scale = torch.tensor([0.75])
    for size in sizes:
        scale = torch.exp(torch.randn(size, generator=generator))
        p = torch.randn(size, generator=generator) * scale
        g = torch.randn(size, generator=generator) * scale * 1e-2
        row = [p.to(getattr(torch, plan.parameter)), g.to(getattr(torch, plan.gradient))]
        if plan.master == "kahan":
            row.append((row[0].float() * torch.rand(size, generator=generator) / 512).to(row[0]))
        if plan.master == "residual":
            row.append(torch.randint(-127, 128, (size,), generator=generator).to(torch.int8))
        for storage in plan.storages:
            row += random_state(storage, size, generator)
        tensors.append((*row, gradient_scale))
    scalars, inputs = step_scalars(plan, made.resolved.hyper, step)
    return Batch(plan, scalars, tensors, inputs, seed=0x12345678 + seed)


def random_state(storage: Storage, size: int, generator: torch.Generator) -> list[Tensor]:
    """A state of `size` elements, as a kernel receives it."""
    if storage.quant_type is None:
        value = torch.randn(size, generator=generator) * 1e-2
        return [value if storage.state.signed else value.square()]
    blocks = 1 if storage.whole else -(-size // storage.block_size)
    codes = torch.randint(0, 2**storage.quant_type.bits, (size,), generator=generator)
    absmax = torch.exp(4 * torch.randn(blocks, generator=generator) - 6)
    return [pack(codes.to(torch.uint8), storage.quant_type), absmax]


def copy(batch: Batch) -> Batch:
    """The same batch on tensors of its own."""
    return replace(batch, tensors=[tuple(t.clone() for t in row) for row in batch.tensors])


def assert_equal_bits(left: Batch, right: Batch) -> None:
    """Every tensor of both batches is equal bit for bit; NaN equals NaN whatever its payload."""
    names = [column.name for column in _columns(left.plan)]
    for row, (ours, theirs) in enumerate(zip(left.tensors, right.tensors, strict=True)):
        for name, a, b in zip(names, ours, theirs, strict=True):
            bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
            same = (a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())
            if not bool(same.all()):
                at = int((~same).nonzero()[0])
                raise AssertionError(
                    f"{name} of row {row} ({a.numel()} elements) differs in "
                    f"{int((~same).sum())} places, first at {at}: {a[at]!r} and {b[at]!r}"
                )


def _columns(plan: Plan) -> list[Any]:
    from bnbx.kernels.signature import make_signature

    return [column for column in make_signature(plan).columns if column.points_to]
