"""Plans to test kernels with, taken from the catalogue: what is registered is tested.

Every rule comes with settings of its switches in which any two of them meet in every way that its
constraints allow, with every quant type that serves as a default, and with the dtypes asked for;
`feature_cases` adds masters and the other options of plans. `make_batch` fills a plan with tensors.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from bnbx.errors import OptionError
from bnbx.kernels.batch import Batch, step_scalars
from bnbx.kernels.packing import pack
from bnbx.kernels.plan import Plan, Storage, make_plan
from bnbx.registry import Optimizer, State, optimizers, quant_types
from bnbx.registry.config import Resolved, resolve
from bnbx.registry.quant_type import FLOAT32

T = TypeVar("T")

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


def pairwise_settings(spec: Optimizer) -> list[Resolved]:
    """Some of them, in which any two switches still meet in every way that is allowed."""
    every = list(settings(spec))
    return chosen_pairwise(every, [tuple(found.switches.items()) for found in every])


def chosen_pairwise(items: Sequence[T], facts: Sequence[tuple[Any, ...]]) -> list[T]:
    """Items, taken greedily, until any two facts that hold of one item hold of a chosen one."""
    pairs = [set(itertools.combinations_with_replacement(each, 2)) for each in facts]
    missing: set[Any] = set().union(*pairs)
    chosen = [0]
    missing -= pairs[0]
    while missing:
        best = max(range(len(items)), key=lambda i: len(pairs[i] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return [items[i] for i in chosen]


def case(
    resolved: Resolved, spec: Optimizer, types: Mapping[str, str], dtype: str, **options: Any
) -> Case:
    """The plan for these state types, "float32" for none, and with these options of a plan."""
    found = {name: None if t == FLOAT32 else quant_types().get(t) for name, t in types.items()}
    active = [state.name for state in spec.active_states(resolved.switches)]
    found |= {state.name: None for state in spec.states if not state.quantized}
    run = spec.clipped if resolved.clip else spec
    plan = make_plan(run, resolved.switches, dtype, dtype, found, **options)
    switches = [name for name, on in resolved.switches.items() if on]
    states = [types[name] for name in active] or ["stateless"]
    extra = ["clipped"] if resolved.clip else []
    extra += [f"{name}_{value}" for name, value in options.items()]
    names = [spec.name, *switches, *dict.fromkeys(states), dtype, *extra]
    return Case("-".join(names), plan, resolved)


def cases(dtypes: Sequence[str] = ("float32",)) -> list[Case]:
    """Every registered rule, with float32 states and with those of each default quant type.

    The first dtype comes with all of these; each further one with one of them in turn.
    """
    names = [*(t.name for t in quant_types() if t.state_default), FLOAT32]
    found: dict[str, Case] = {}
    turn = 0
    for spec in optimizers():
        for resolved in pairwise_settings(spec):
            turn += 1
            for number, dtype in enumerate(dtypes):
                some = [names[(turn + number) % len(names)]] if number else names
                for name in some:
                    types = dict.fromkeys((s.name for s in spec.states), name)
                    made = case(resolved, spec, types, dtype)
                    found[made.name] = made
    return list(found.values())


# What a plan may be asked for beside a rule, its switches and its dtypes.
FEATURES: Mapping[str, tuple[Any, ...]] = {
    "type": ("dynamic8", "state4", FLOAT32),
    "master": ("none", "stochastic", "kahan", "residual"),
    "skip_zeros": (False, True),
    "block_wise": (True, False),
    "clip": (False, True),
    "dtype": ("bfloat16", "float16", "float32"),
}


def feature_product(spec: Optimizer) -> list[dict[str, Any]]:
    """Every way to ask for a plan of a rule that the engine could ask for."""
    product = itertools.product(*FEATURES.values())
    ways = [dict(zip(FEATURES, values, strict=True)) for values in product]
    return [
        way
        for way in ways
        if (way["master"] == "none" or way["dtype"] != "float32")
        and (spec.can_clip or not way["clip"])
        and (way["block_wise"] or way["type"] != FLOAT32)
    ]


def feature_case(spec: Optimizer, way: Mapping[str, Any], number: int = 0) -> Case:
    """The case of such a way; `number` picks the setting of the rule's switches."""
    every = pairwise_settings(spec)
    resolved = every[number % len(every)]
    if way["clip"]:
        resolved = replace(resolved, clip=True, hyper={**resolved.hyper, "max_unorm": 0.02})
    types = dict.fromkeys((s.name for s in spec.states), way["type"])
    options = {name: way[name] for name in ("master", "skip_zeros", "block_wise")}
    return case(resolved, spec, types, way["dtype"], **options)


PER_RULE = 3


def feature_cases() -> list[Case]:
    """A few ways for each rule; over all rules any two features meet in every way."""
    uses: Counter[Any] = Counter()
    found: dict[str, Case] = {}
    for spec in optimizers():
        ways = feature_product(spec)
        for number in range(PER_RULE):
            way = max(ways, key=lambda w: sum(2.0 ** -uses[pair] for pair in _pairs(w)))
            uses.update(_pairs(way))
            made = feature_case(spec, way, number)
            found[made.name] = made
    every = {pair for spec in optimizers() for w in feature_product(spec) for pair in _pairs(w)}
    assert not every - set(uses), "too few cases"
    return list(found.values())


def _pairs(way: Mapping[str, Any]) -> set[Any]:
    return set(itertools.combinations(way.items(), 2))


def mixed_cases() -> list[Case]:
    """Kernels whose states differ: in type, and in whether they are quantized at all.

    Rules take turns until each has had one, and every type has held a state of either sign.
    """
    every = [*(t.name for t in quant_types()), FLOAT32]
    specs = [spec for spec in optimizers() if len(spec.states) > 1]
    # Types that have held no state of this sign yet; the two go in different directions.
    missing = {True: every[:], False: every[::-1]}
    found: list[Case] = []
    while len(found) < len(specs) or missing[True] or missing[False]:
        turn = len(found)
        spec = specs[turn % len(specs)]
        resolved = next(settings(spec))
        types = {}
        for number, state in enumerate(spec.states):
            here = missing[state.signed] if state.quantized else []
            other = every[(turn + number) % len(every)]
            types[state.name] = here.pop(0) if here and state in active(spec, resolved) else other
        made = case(resolved, spec, types, "float32")
        found.append(Case(f"{made.name}-{turn}", made.plan, made.resolved))
    return found


def active(spec: Optimizer, resolved: Resolved) -> Sequence[State]:
    """The states that a kernel has under these settings."""
    return spec.active_states(resolved.switches)


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


PLAIN = {name: values[0] for name, values in FEATURES.items()}
SHAPES = ("dynamic3", "mxfp4")  # codes of an odd width; a table in its own unit, in short blocks


def one_of_each() -> list[Case]:
    """One kernel for each way in which sources differ; all rules are in, in their default type."""
    adam = optimizers().get("adam")
    types = {"m": "dynamic8", "v": "linear8", "v_max": FLOAT32}
    mixed = case(pairwise_settings(adam)[0], adam, types, "float32")
    wide = [feature_case(optimizers().get("adamw"), {**PLAIN, "type": name}) for name in SHAPES]
    found = [cases(("bfloat16",))[0], mixed, *wide]
    for spec in optimizers():
        every = pairwise_settings(spec)
        for resolved in (every[0], every[-1]):
            types = dict.fromkeys((s.name for s in spec.states), "dynamic8")
            found.append(case(resolved, spec, types, "float32"))
    for name, values in FEATURES.items():
        found += [feature_case(optimizers().get("adamw"), {**PLAIN, name: v}) for v in values[1:]]
    return list({each.name: each for each in found}.values())
