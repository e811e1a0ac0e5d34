"""torch's default dtype and device are for the user's tensors: no function depends on them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx import functional as F
from defaults import DEFAULTS
from freed_memory import CALLS, tensors_in

MAPS: Mapping[str, Callable[[], Tensor]] = {
    "dynamic": F.create_dynamic_map,
    "linear": F.create_linear_map,
    "linear, unsigned": lambda: F.create_linear_map(signed=False, total_bits=5),
    "normal": F.create_normal_map,
    "fp8": F.create_fp8_map,
}


def called(name: str, default: AbstractContextManager[Any]) -> list[Tensor]:
    """All tensors that a call leaves behind: its arguments', and its result's."""
    torch.manual_seed(0)
    function, arguments = CALLS[name]()
    arguments = copy.deepcopy(arguments)
    with default:
        result = function(**arguments)
    return [tensor for _, tensor in tensors_in("", [arguments, result])]


def same(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype and one.device == other.device and one.shape == other.shape
    return alike and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", CALLS)
def test_functions_do_not_follow_defaults(name: str, default: str) -> None:
    found, expected = called(name, DEFAULTS[default]()), called(name, nullcontext())
    assert len(found) == len(expected)
    assert all(map(same, found, expected))


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", MAPS)
def test_tables_do_not_follow_defaults(name: str, default: str) -> None:
    with DEFAULTS[default]():
        found = MAPS[name]()
    assert same(found, MAPS[name]())
