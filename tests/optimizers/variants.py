"""The catalog's rules as tests run them: hyperparameters by rule, storages of states, tensors."""

from __future__ import annotations

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
VARIANTS: Mapping[str, Mapping[str, Groups]] = {
    "adam": {
        "": (
            dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
            dict(lr=3e-3, betas=(0.95, 0.9), eps=1e-7, weight_decay=1e-2),
        ),
    },
    "adamw": {
        "": (
            dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
            dict(lr=3e-3, betas=(0.95, 0.9), eps=1e-7, weight_decay=0.3),
        ),
    },
    "lion": {
        "": (
            dict(lr=1e-3, betas=(0.8, 0.95), weight_decay=0.1),
            dict(lr=3e-3, betas=(0.95, 0.9), weight_decay=1e-2),
        ),
    },
    "sgd": {
        "plain": _PLAIN,
        "momentum": (dict(_PLAIN[0], momentum=0.9), dict(_PLAIN[1], momentum=0.5)),
        "dampening": (
            dict(_PLAIN[0], momentum=0.9, dampening=0.1),
            dict(_PLAIN[1], momentum=0.5, dampening=0.3),
        ),
        "nesterov": (
            dict(_PLAIN[0], momentum=0.9, nesterov=True),
            dict(_PLAIN[1], momentum=0.5, nesterov=True),
        ),
    },
}
CASES = [(rule, variant) for rule in optimizers().names() for variant in VARIANTS.get(rule, {})]

# By name: how the states are stored. "mixed" is one state in linear8 and the others in float32.
STORAGES = ("float32", "dynamic8", "linear8", "mixed")


def state_types(spec: Optimizer, storage: str) -> dict[str, str]:
    """Quant type by state."""
    names = [state.name for state in spec.states]
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
