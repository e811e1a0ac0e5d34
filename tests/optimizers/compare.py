"""Whether two optimizers hold the same parameters and states, to the last bit.

All NaN count as the same: IEEE 754 leaves open which of them, and with which sign, an operation
gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(value: Tensor) -> Tensor:
    """The bits of a tensor as integers, so that NaN equals NaN, and -0 does not equal 0."""
    value = value.detach().contiguous()
    if value.is_floating_point():
        value = torch.where(value.isnan(), torch.nan, value)
    return value.view(_INTEGERS[value.element_size()])


def equal(a: Any, b: Any) -> bool:
    """Whether two values of a state are the same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
    return type(a) is type(b) and bool(a == b)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def assert_same(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    """Assert that two optimizers hold the same bits."""
    for p, q in zip(parameters_of(a), parameters_of(b), strict=True):
        assert equal(p, q)
        assert list(a.state[p]) == list(b.state[q])
        for name, value in a.state[p].items():
            assert equal(value, b.state[q][name]), name
