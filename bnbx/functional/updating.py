"""The optimizer_update functions: bitsandbytes' arguments, in the orders of all its versions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bnbx.errors import InputError
from bnbx.functional import checks, coded
from bnbx.functional.conventions import orders
from bnbx.functional.registration import operation
from bnbx.functional.updates import Numbers, update
from bnbx.optim.legacy_names import rule_of

Value = float | Tensor
LAST_STEP = (1 << 53) - 1  # that float64, in which step_code runs, counts to
TENSORS = "g p state1 state2 qmap1 qmap2 absmax1 absmax2 max1 max2 new_max1 new_max2 unorm_vec"
OLD_32BIT = (
    "optimizer_name g p state1 beta1 eps step lr state2 beta2 weight_decay gnorm_scale unorm_vec "
    "max_unorm"
)
OLD_BLOCKWISE = (
    "optimizer_name g p state1 state2 beta1 beta2 eps step lr qmap1 qmap2 absmax1 absmax2 "
    "weight_decay gnorm_scale"
)


def _nothing_fake(*arguments: Any) -> None:
    return None


@operation(
    "optimizer_update(str rule, Tensor g, Tensor(a!) p, Tensor(b!)[] states, Tensor[] tables, "
    "Tensor(c!)[] scales, float[] betas, float[] others, float? max_unorm, float lr, SymInt step, "
    "Tensor gradient_scale, Tensor(d!)? update_norm, bool block_wise, bool skip_zeros) -> ()",
    _nothing_fake,
)
def _update(
    rule: str,
    g: Tensor,
    p: Tensor,
    states: Sequence[Tensor],
    tables: Sequence[Tensor],
    scales: Sequence[Tensor],
    betas: Sequence[float],
    others: Sequence[float],
    max_unorm: float | None,
    lr: float,
    step: int,
    gradient_scale: Tensor,
    update_norm: Tensor | None,
    block_wise: bool,
    skip_zeros: bool,
) -> None:
    beta1, beta2, beta3 = betas
    alpha, eps, weight_decay = others
    update(
        rule_of(rule),
        Numbers((beta1, beta2, beta3), alpha, eps, weight_decay, max_unorm, lr),
        p,
        g,
        states,
        tables,
        scales,
        step=step,
        gradient_scale=gradient_scale,
        update_norm=update_norm,
        block_wise=block_wise,
        skip_zeros=skip_zeros,
    )


def _run(
    rule: str,
    g: Tensor,
    p: Tensor,
    states: Sequence[Tensor | None],
    tables: Sequence[Tensor | None] = (),
    scales: Sequence[Tensor | None] = (),
    *,
    betas: tuple[float, float, float],
    others: tuple[float, float, float],
    lr: float,
    step: int,
    gnorm_scale: Value,
    max_unorm: float | None = None,
    unorm_vec: Tensor | None = None,
    block_wise: bool = True,
    skip_zeros: bool = False,
) -> None:
    checks.floats("p", p)
    checks.floats("g", g)
    checks.of_shape("g", g, p.shape)
    if not isinstance(rule, str):
        raise InputError(f"optimizer_name={rule!r}; expected a name")
    step = checks.whole("step", step, 1, LAST_STEP)
    if max_unorm is not None:
        max_unorm = checks.number("max_unorm", max_unorm)
    held = [[t for t in group if t is not None] for group in (states, tables, scales)]
    named = [("p", p), ("g", g), ("unorm_vec", unorm_vec)]
    for name, group, asked in zip(
        ("state", "qmap", "absmax"), held, (states, tables, scales), strict=True
    ):
        named += [(f"{name}{i}", checks.dense(f"{name}{i}", t)) for i, t in enumerate(group, 1)]
        if asked and len(group) != len(held[0]):
            raise InputError(f"{len(held[0])} states, but {len(group)} {name}; expected one each")
    for table in held[1]:
        coded.check_table(table)
    checks.together(named)
    if unorm_vec is not None:
        checks.of_dtype("unorm_vec", unorm_vec, torch.float32)
        checks.of_size("unorm_vec", unorm_vec, 1, "the norm of one update")
    factor = checks.one_number("gnorm_scale", gnorm_scale, "one factor for the gradient")
    with torch.no_grad():
        _update(
            rule, g, p, *held, [checks.number("beta", beta) for beta in betas],
            [checks.number("alpha, eps or weight_decay", other) for other in others], max_unorm,
            _rate(lr), step, factor.to(p.device), unorm_vec, block_wise, bool(skip_zeros),
        )  # fmt: skip


def _rate(lr: Any) -> float:
    if isinstance(lr, Tensor) and lr.numel() == 1 and not lr.is_complex():
        return float(checks.dense("lr", lr))
    return checks.number("lr", lr)


@orders(
    OLD_32BIT,
    tensors=TENSORS,
    either="lr gnorm_scale",
    optional=(
        "state2 beta2 beta3 alpha weight_decay gnorm_scale unorm_vec max_unorm skip_zeros".split()
    ),
)
def optimizer_update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    beta1: float,
    eps: float,
    step: int,
    lr: float,
    state2: Tensor | None = None,
    beta2: float = 0.0,
    beta3: float = 0.0,
    alpha: float = 0.0,
    weight_decay: float = 0.0,
    gnorm_scale: Value = 1.0,
    unorm_vec: Tensor | None = None,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
) -> None:
    """One step of an optimizer with float32 states; p and the states are changed in place.

    The order of 0.0.24, which has no beta3 and alpha, works too, where a tensor or None in the
    place of `unorm_vec` tells it.

    Args:
        optimizer_name: what bitsandbytes calls a rule: "adam" (AdamW), "momentum", "lamb", "lars",
            "rmsprop", "adagrad", "lion", "ademamix"; or any registered rule by its own name.
        g: the gradient: float32, bfloat16 or float16, the shape of p.
        p: the parameter: float32, bfloat16 or float16.
        state1: float32, the elements of p; of "ademamix" two such in a stack.
        beta1: the first of the rule's decay rates (momentum, of "momentum" and "lars").
        eps: added to a denominator.
        step: number of the step, 1 for the first.
        lr: the learning rate.
        state2: float32, the elements of p, of rules with two states.
        beta2: the second of the rule's decay rates (dampening, of "momentum" and "lars").
        beta3: the third of the rule's decay rates, of "ademamix".
        alpha: the weight of the slow average, of "ademamix".
        weight_decay: as the rule has it.
        gnorm_scale: what the gradient is multiplied by; a number or a tensor of one element.
        unorm_vec: float32 (1,): gets the norm of the update where max_unorm is not 0.
        max_unorm: the most that the norm of the update may be, over that of p; 0 for no limit.
        skip_zeros: whether elements with gradient zero stay as they are.

    Raises:
        UnknownNameError: no such rule.
        OptionError: a number out of range; a beta3 or alpha for a rule without.
        InputError: a tensor of another dtype or size.
        DeviceError: tensors on different devices.
    """
    _run(
        optimizer_name,
        g,
        p,
        [state1, state2],
        betas=(beta1, beta2, beta3),
        others=(alpha, eps, weight_decay),
        lr=lr,
        step=step,
        gnorm_scale=gnorm_scale,
        max_unorm=max_unorm,
        unorm_vec=unorm_vec,
        skip_zeros=skip_zeros,
    )


@orders(
    OLD_BLOCKWISE,
    tensors=TENSORS,
    either="lr gnorm_scale",
    optional="beta3 alpha weight_decay gnorm_scale skip_zeros".split(),
)
def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    weight_decay: float = 0.0,
    gnorm_scale: Value = 1.0,
    skip_zeros: bool = False,
) -> None:
    """One step of an optimizer with 8-bit states in blocks; p and states are changed in place.

    The order of 0.0.24, which has no beta3 and alpha, works too.

    Args:
        optimizer_name: as in optimizer_update_32bit.
        g: the gradient: float32, bfloat16 or float16, the shape of p.
        p: the parameter: float32, bfloat16 or float16.
        state1: codes: uint8, the elements of p; of "ademamix" two such in a stack.
        state2: the same of rules with two states, else None.
        beta1: the first of the rule's decay rates.
        beta2: the second of the rule's decay rates.
        beta3: the third of the rule's decay rates, of "ademamix".
        alpha: the weight of the slow average, of "ademamix".
        eps: added to a denominator.
        step: number of the step, 1 for the first.
        lr: the learning rate.
        qmap1: the table of state1: 2**bits numbers, floating point.
        qmap2: that of state2.
        absmax1: the scales of state1: float32, one per block of 256 elements, or of the block
            size that their number tells; of "ademamix" two rows of such.
        absmax2: those of state2.
        weight_decay: as the rule has it.
        gnorm_scale: what the gradient is multiplied by; a number or a tensor of one element.
        skip_zeros: whether elements with gradient zero stay as they are.

    Raises:
        UnknownNameError: no such rule.
        OptionError: a number out of range; a beta3 or alpha for a rule without.
        InputError: a tensor of another dtype or size.
        DeviceError: tensors on different devices.
    """
    _run(
        optimizer_name,
        g,
        p,
        [state1, state2],
        [qmap1, qmap2],
        [absmax1, absmax2],
        betas=(beta1, beta2, beta3),
        others=(alpha, eps, weight_decay),
        lr=lr,
        step=step,
        gnorm_scale=gnorm_scale,
        skip_zeros=skip_zeros,
    )


def optimizer_update_8bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    max1: Tensor,
    max2: Tensor | None,
    new_max1: Tensor,
    new_max2: Tensor | None,
    weight_decay: float = 0.0,
    gnorm_scale: Value = 1.0,
    unorm_vec: Tensor | None = None,
    max_unorm: float = 0.0,
) -> None:
    """One step of an optimizer with 8-bit states, one scale for a whole tensor.

    As in bitsandbytes 0.0.24, the scale of the states as they are is read from max1 and max2, and
    that of the states as they become is written to new_max1 and new_max2.

    Args:
        optimizer_name: as in optimizer_update_32bit.
        g: the gradient: float32, bfloat16 or float16, the shape of p.
        p: the parameter: float32, bfloat16 or float16; changed in place.
        state1: codes: uint8, the elements of p; changed in place.
        state2: the same of rules with two states, else None.
        beta1: the first of the rule's decay rates.
        beta2: the second of the rule's decay rates.
        eps: added to a denominator.
        step: number of the step, 1 for the first.
        lr: the learning rate.
        qmap1: the table of state1: 2**bits numbers, floating point.
        qmap2: that of state2.
        max1: the largest magnitude of state1: float32 (1,).
        max2: that of state2.
        new_max1: memory for that of state1 after the step: float32 (1,).
        new_max2: that of state2.
        weight_decay: as the rule has it.
        gnorm_scale: what the gradient is multiplied by; a number or a tensor of one element.
        unorm_vec: float32 (1,): gets the norm of the update where max_unorm is not 0.
        max_unorm: the most that the norm of the update may be, over that of p; 0 for no limit.

    Raises:
        UnknownNameError: no such rule.
        OptionError: a number out of range.
        InputError: a tensor of another dtype or size.
        DeviceError: tensors on different devices.
    """
    held, memory = [max1, max2], [new_max1, new_max2]
    for name, tensors in (("max", held), ("new_max", memory)):
        for number, tensor in enumerate(tensors, 1):
            if tensor is not None:
                checks.of_dtype(f"{name}{number}", tensor, torch.float32)
                checks.of_size(f"{name}{number}", tensor, 1, "one for the whole tensor")
    if [t is None for t in held] != [t is None for t in memory]:
        raise InputError("max2 and new_max2: expected both or none")
    checks.together([("p", p), ("new_max1", new_max1), ("new_max2", new_max2)])
    working = [None if tensor is None else tensor.clone() for tensor in held]
    _run(
        optimizer_name,
        g,
        p,
        [state1, state2],
        [qmap1, qmap2],
        working,
        betas=(beta1, beta2, 0.0),
        others=(0.0, eps, weight_decay),
        lr=lr,
        step=step,
        gnorm_scale=gnorm_scale,
        max_unorm=max_unorm,
        unorm_vec=unorm_vec,
        block_wise=False,
    )
    for memory_of, made in zip(memory, working, strict=True):
        if memory_of is not None and made is not None:
            memory_of.copy_(made.view(memory_of.shape))
