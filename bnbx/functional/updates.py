"""One step of an optimizer on tensors: bitsandbytes' optimizer_update functions, for every rule.

The rules are the registry's, called as bitsandbytes calls them (its "adam" is AdamW) or by their
own names. What runs are the kernels of `bnbx.optim`, on tables of the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bnbx.errors import InputError, OptionError
from bnbx.functional import checks, coded
from bnbx.kernels import reference
from bnbx.kernels.batch import Batch, step_scalars
from bnbx.kernels.launch import launch
from bnbx.kernels.plan import make_plan
from bnbx.optim.legacy_names import LIBRARY, betas_of
from bnbx.registry import Optimizer, QuantType
from bnbx.registry.formats import place_of
from bnbx.registry.optimizer import State
from bnbx.registry.options import CLIP
from bnbx.registry.quant_type import BLOCK_SIZES

USUAL_BLOCK = 256


@dataclass(frozen=True)
class Stored:
    """A state as the caller keeps it: numbers, or codes with their table and scales."""

    state: State
    key: str
    values: Tensor
    table: Tensor | None = None
    scales: Tensor | None = None


@dataclass(frozen=True)
class Numbers:
    """What a step is told, in bitsandbytes' words."""

    betas: tuple[float, float, float]
    alpha: float
    eps: float
    weight_decay: float
    max_unorm: float | None
    lr: float


# ---- from bitsandbytes' arguments to a rule's


def hyper_of(spec: Optimizer, numbers: Numbers) -> dict[str, float | bool]:
    """The rule's hyperparameters.

    Raises:
        OptionError: a value out of range.
    """
    found: dict[str, Any] = {name: hyper.default for name, hyper in spec.hyper.items()}
    given: dict[str, Any] = {
        "lr": numbers.lr,
        "eps": numbers.eps,
        "weight_decay": numbers.weight_decay,
        "alpha": numbers.alpha,
        **dict(zip(betas_of(spec), numbers.betas, strict=False)),
    }
    third = {"beta3": numbers.betas[2], "alpha": numbers.alpha}
    for name, value in third.items():
        if value and name not in found:
            raise OptionError(
                f"{spec.name} has no {name}, but {name}={value!r}; in the order of bitsandbytes "
                "0.0.24, weight_decay and gnorm_scale are told from beta3 and alpha only by a "
                "unorm_vec behind them: pass them by name"
            )
    if numbers.max_unorm is not None:
        given[CLIP] = numbers.max_unorm
    found.update({name: value for name, value in given.items() if name in found})
    return {name: spec.hyper[name].check(name, value) for name, value in found.items()}


def states_of(
    spec: Optimizer,
    switches: Mapping[str, bool],
    states: Sequence[Tensor],
    tables: Sequence[Tensor],
    scales: Sequence[Tensor],
) -> list[Stored]:
    """The active states, out of state1 and state2.

    Raises:
        InputError: there are more or fewer than the rule has.
    """
    active = spec.active_states(switches)
    places = [place_of(state, LIBRARY) for state in active]
    if all(place is None for place in places):  # a rule that bitsandbytes does not have
        places = [(f"state{number}", None) for number in range(1, len(active) + 1)]
    found = []
    for state, place in zip(active, places, strict=True):
        key, index = place or ("", None)
        at = int(key.removeprefix("state") or 0) - 1
        if not 0 <= at < len(states):
            raise InputError(f"{spec.name}: {key or 'a place for state ' + state.name} is missing")
        of = [part[at] if part else None for part in (states, tables, scales)]
        if index is not None:
            of = [_stacked(key, part, index) if n != 1 else part for n, part in enumerate(of)]
        values, table, scale = of
        assert values is not None
        found.append(Stored(state, key, values, table, scale))
    used = {stored.key for stored in found}
    if len(used) < len(states):
        raise InputError(f"{spec.name} has {', '.join(sorted(used)) or 'no states'}; more is given")
    return found


def _stacked(key: str, part: Tensor | None, index: int) -> Tensor | None:
    if part is None:
        return None
    if part.dim() == 0 or len(part) != 2:
        raise InputError(f"{key} has shape {tuple(part.shape)}; expected two states in a stack")
    return part[index]


# ---- the step


def update(
    spec: Optimizer,
    numbers: Numbers,
    p: Tensor,
    g: Tensor,
    states: Sequence[Tensor],
    tables: Sequence[Tensor],
    scales: Sequence[Tensor],
    *,
    step: int,
    gradient_scale: Tensor,
    update_norm: Tensor | None = None,
    block_wise: bool = True,
    skip_zeros: bool = False,
) -> None:
    """One step, in place.

    Raises:
        InputError, OptionError: something does not fit; then nothing was changed.
    """
    spec = _clipping(spec, numbers)
    hyper = hyper_of(spec, numbers)
    switches = {name: bool(hyper[name]) for name in spec.switches}
    stored = states_of(spec, switches, states, tables, scales)
    types = {one.state.name: _checked_type(spec, one, p, block_wise) for one in stored}
    plan = make_plan(
        spec,
        switches,
        str(p.dtype).removeprefix("torch."),
        str(g.dtype).removeprefix("torch."),
        types,
        block_wise=block_wise,
        skip_zeros=skip_zeros,
    )
    rows = [p, g]
    for one in stored:
        rows += [one.values] if one.scales is None else [one.values, one.scales]
    near = [tensor.contiguous() for tensor in rows]
    values, inputs = step_scalars(plan, hyper, step)
    batch = Batch(plan, values, [(*near, gradient_scale.reshape(1))], inputs)
    if update_norm is not None and numbers.max_unorm:
        update_norm.fill_(reference.update_norm(batch, 0))
    launch([batch])
    for number, (tensor, made) in enumerate(zip(rows, near, strict=True)):
        if number != 1 and made is not tensor:
            tensor.copy_(made)


def _clipping(spec: Optimizer, numbers: Numbers) -> Optimizer:
    """The rule, with its update's norm bounded where that is asked for and not its own affair."""
    if not numbers.max_unorm or spec.clips_itself:
        return spec
    if not spec.can_clip:
        raise OptionError(f"{spec.name}: max_unorm is for rules that write their update as 'u'")
    return spec.clipped


def _checked_type(spec: Optimizer, stored: Stored, p: Tensor, block_wise: bool) -> QuantType | None:
    """The type of a state, None for float32, once its tensors are found good."""
    what = f"{spec.name}: {stored.key} ({stored.state.name})"
    checks.of_size(what, stored.values, p.numel(), "one per element of p")
    if stored.table is None or stored.scales is None:
        checks.of_dtype(what, stored.values, torch.float32)
        return None
    checks.of_dtype(what, stored.values, torch.uint8)
    checks.of_dtype(f"{what}: absmax", stored.scales, torch.float32)
    kind = coded.type_of(stored.table)
    if kind is None:
        raise InputError(f"{what}: its table reaches to something else than 1")
    if not stored.state.quantized:
        raise InputError(f"{what} is as precise as the parameter: it stays float32")
    blocks, numel = stored.scales.numel(), p.numel()
    if not block_wise:
        checks.of_size(f"{what}: max", stored.scales, 1, "one for the whole tensor")
        return kind
    fitting = [size for size in (USUAL_BLOCK, *BLOCK_SIZES) if checks.blocks(numel, size) == blocks]
    if not fitting:
        expected = checks.blocks(numel, USUAL_BLOCK)
        checks.of_size(f"{what}: absmax", stored.scales, expected, f"blocks of {USUAL_BLOCK}")
    return kind if kind.block_size == fitting[0] else _with_block(kind, fitting[0])


@lru_cache(maxsize=64)
def _with_block(kind: QuantType, size: int) -> QuantType:
    return kind.model_copy(update={"block_size": size})
