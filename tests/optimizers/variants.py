"""The catalog's rules as tests run them: hyperparameters by rule, storages of states, tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bnbx.kernels import cpu, reference
from bnbx.kernels.batch import Batch
from bnbx.optimizers.engine import Optimizer8bit
from bnbx.registry import Optimizer, optimizers

Run = Callable[[Sequence[Batch]], None]
TARGETS: Mapping[str, Run] = {"cpu": cpu.run, "reference": reference.run}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# By rule and variant: the hyperparameters of two groups. Every one differs from its default, and
# every switch of a rule is on in some variant and off in another.
Groups = tuple[dict[str, Any], dict[str, Any]]
_PLAIN = (dict(lr=1e-2, weight_decay=0.1), dict(lr=3e-3, weight_decay=1e-2))
_ADAM = (
    dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
    dict(lr=3e-3, betas=(0.95, 0.9), eps=1e-7, weight_decay=1e-2),
)
_ADAMW = (_ADAM[0], dict(_ADAM[1], weight_decay=0.3))
_LION = (
    dict(lr=1e-3, betas=(0.8, 0.95), weight_decay=0.1),
    dict(lr=3e-3, betas=(0.95, 0.9), weight_decay=1e-2),
)
_ADEMAMIX = (
    dict(lr=1e-2, betas=(0.8, 0.95, 0.99), alpha=3.0, eps=1e-6, weight_decay=0.1),
    dict(lr=3e-3, betas=(0.95, 0.9, 0.97), alpha=2.0, eps=1e-7, weight_decay=0.3),
)
_RMSPROP = (
    dict(lr=1e-3, alpha=0.9, eps=1e-6, weight_decay=0.1),
    dict(lr=3e-3, alpha=0.95, eps=1e-5, weight_decay=1e-2),
)
_FREE = (
    dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
    dict(lr=3e-3, betas=(0.95, 0.9), eps=1e-7, weight_decay=1e-2),
)


def _with(groups: Groups, *more: dict[str, Any], **both: Any) -> Groups:
    """The groups with other values: by group, and for both."""
    first, second = more or ({}, {})
    return dict(groups[0], **first, **both), dict(groups[1], **second, **both)


VARIANTS: Mapping[str, Mapping[str, Groups]] = {
    "adagrad": {
        "": _with(_PLAIN, lr_decay=0.1, initial_accumulator_value=0.05, eps=1e-6),
    },
    "adam": {
        "": _ADAM,
        "amsgrad": _with(_ADAM, amsgrad=True),
    },
    "adamw": {
        "": _ADAMW,
        "amsgrad": _with(_ADAMW, amsgrad=True),
        "clipped": _with(_ADAMW, dict(max_unorm=1e-3), dict(max_unorm=5.0)),
    },
    "ademamix": {
        "": _ADEMAMIX,
        "warm": _with(_ADEMAMIX, dict(t_alpha=5, t_beta3=7), dict(t_alpha=100, t_beta3=50)),
        "warm alpha": _with(_ADEMAMIX, t_alpha=4),
    },
    "adopt": {
        "": _ADAM,
    },
    "cautious_adamw": {
        "": _ADAMW,
    },
    "cautious_lion": {
        "": _LION,
    },
    "lamb": {
        "": _with(_ADAM, dict(max_unorm=0.3), dict(max_unorm=2.0)),
        "unbounded": _with(_ADAM, max_unorm=0.0, amsgrad=True),
        "l2": _with(_ADAM, max_unorm=0.5, adam_w_mode=False, bias_correction=False),
    },
    "lars": {
        "plain": _with(_PLAIN, dict(max_unorm=0.3), dict(max_unorm=1e-3)),
        "momentum": _with(
            _PLAIN,
            dict(momentum=0.9, dampening=0.1, max_unorm=0.3),
            dict(momentum=0.5, dampening=0.3, max_unorm=1e-3),
        ),
        "unbounded": _with(_PLAIN, momentum=0.9, nesterov=True, max_unorm=0.0),
    },
    "lion": {
        "": _LION,
    },
    "rmsprop": {
        "": _RMSPROP,
        "momentum": _with(_RMSPROP, dict(momentum=0.9), dict(momentum=0.5)),
        "centered": _with(_RMSPROP, dict(momentum=0.9), dict(momentum=0.5), centered=True),
    },
    "schedule_free_adamw": {
        "": _FREE,
        "warm": _with(_FREE, dict(warmup_steps=4), dict(warmup_steps=20)),
    },
    "sgd": {
        "plain": _PLAIN,
        "momentum": _with(_PLAIN, dict(momentum=0.9), dict(momentum=0.5)),
        "dampening": _with(
            _PLAIN, dict(momentum=0.9, dampening=0.1), dict(momentum=0.5, dampening=0.3)
        ),
        "nesterov": _with(_PLAIN, dict(momentum=0.9), dict(momentum=0.5), nesterov=True),
    },
}
CASES = [(rule, variant) for rule in optimizers().names() for variant in VARIANTS.get(rule, {})]

# By name: how the states are stored. "mixed" is one state in linear8 and the others in float32.
STORAGES = ("float32", "dynamic8", "linear8", "state4", "mixed")


# Rules that run in every storage and dtype; between them they have all that storages meet.
WHOLE_PRODUCT = ("adam", "adamw", "lion", "sgd")


def sampled() -> list[tuple[str, str, str, torch.dtype]]:
    """Rule, variant, storage and dtype: the product for some rules, a third of it for others."""
    product = itertools.product(enumerate(CASES), enumerate(STORAGES), enumerate(DTYPES))
    return [
        (rule, variant, storage, dtype)
        for (i, (rule, variant)), (j, storage), (k, dtype) in product
        if (rule in WHOLE_PRODUCT and variant != "clipped") or (i + j + k) % len(DTYPES) == 0
    ]


def state_types(spec: Optimizer, storage: str) -> dict[str, str]:
    """Quant type by state, of those that can be quantized."""
    names = [state.name for state in spec.states if state.quantized]
    if storage == "mixed":
        return {name: "float32" if names.index(name) else "linear8" for name in names}
    return dict.fromkeys(names, storage)


# Both sides of a block and of a chunk, in several ranks.
SHAPES = ((), (255,), (16, 16), (257,), (4, 16, 64), (17, 241))


def parameters(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    """Fresh parameters; the first elements of the large ones are zero, for `gradients`."""
    return [fill(torch.empty(shape, dtype=dtype)) for shape in shapes]


def gapped(dtype: torch.dtype) -> list[Tensor]:
    """Parameters whose elements do not lie in memory in the order of their indices."""
    transposed = torch.empty(65, 64, dtype=dtype).t()
    strided = torch.empty(3, 5, 200, dtype=dtype)[..., ::2]
    assert not transposed.is_contiguous()
    assert not strided.is_contiguous()
    return [fill(transposed), fill(strided)]


def fill(p: Tensor) -> Tensor:
    """The tensor with values, as a parameter."""
    values = torch.randn(p.shape)
    if p.numel() > 1024:
        values.view(-1)[:512] = 0
    return p.copy_(values).requires_grad_()


def gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """Gradients over many magnitudes.

    Where a parameter is large, its first block has none, and its second has such small ones that
    a second moment is subnormal.
    """
    made = []
    for p in params:
        values = torch.randn(p.shape) * 10 ** (torch.rand(p.shape) * 6 - 5)
        if p.numel() > 1024:
            values.view(-1)[:256] = 0
            values.view(-1)[256:512] = 3e-21 * torch.randn(256)
        made.append(values.to(p.dtype))
    return made


def copies(params: Sequence[Tensor]) -> list[Tensor]:
    """The same parameters again, with the same strides."""
    return [
        torch.empty_strided(p.shape, p.stride(), dtype=p.dtype).copy_(p.detach()).requires_grad_()
        for p in params
    ]


def set_gradients(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Give each parameter a copy of its gradient."""
    for p, value in zip(params, values, strict=True):
        p.grad = value.clone()


def make(
    rule: str, variant: str, params: Sequence[Tensor], storage: str = "float32"
) -> Optimizer8bit:
    """An optimizer over two groups of `params`, all of whose states are stored as asked."""
    spec = optimizers().get(rule)
    groups = [
        {"params": list(params[number::2]), **hyper}
        for number, hyper in enumerate(VARIANTS[rule][variant])
    ]
    return Optimizer8bit(groups, spec, state_types=state_types(spec, storage), min_8bit_size=0)
