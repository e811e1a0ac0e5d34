"""The same layer on the CPU and on a GPU, and what is equal of them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import on_gpu
from bnbx.nn import (
    Linear4bit,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
    QuantLinear,
)
from on_gpu import same

ROWS = (1, 3, 40)
# By name: how a layer of some columns and outputs is made.
LINEAR: dict[str, Callable[[int, int], Any]] = {
    "Linear4bit": Linear4bit,
    "LinearNF4": LinearNF4,
    "LinearFP4": LinearFP4,
    "bfloat16 memory": lambda i, o: Linear4bit(
        i, o, quant_type="nf4", quant_storage=torch.bfloat16
    ),
    "no statistics": lambda i, o: Linear4bit(i, o, quant_type="nf4", compress_statistics=False),
    "int8": lambda i, o: QuantLinear(i, o, quant_type="int8"),
    "linear3, no bias": lambda i, o: QuantLinear(i, o, bias=False, quant_type="linear3"),
    "nvfp4": lambda i, o: QuantLinear(i, o, quant_type="nvfp4"),
    "fitted": lambda i, o: QuantLinear(i, o, quant_type="nf4", fit="mse"),
}


def int8_codes(columns: int, outs: int) -> Any:
    return Linear8bitLt(columns, outs, has_fp16_weights=False)


def int8_layer(master: bool, threshold: float) -> Callable[[int, int], Any]:
    return lambda i, o: Linear8bitLt(i, o, has_fp16_weights=master, threshold=threshold)


INT8: dict[str, Callable[[int, int], Any]] = {
    f"{'floats' if master else 'codes'}, threshold {threshold}": int8_layer(master, threshold)
    for master in (False, True)
    for threshold in (0.0, 6.0)
}


def pair(make: Callable[..., Any], *arguments: Any, dtype: Any = torch.float32) -> tuple[Any, Any]:
    """The same layer, quantized on the CPU and on the device."""
    torch.manual_seed(0)
    here = make(*arguments).to(dtype)
    gpu = copy.deepcopy(here)
    return here.to("cpu"), gpu.to(on_gpu.DEVICE)


def assert_same_dicts(a: Any, b: Any) -> None:
    """Assert that two modules have the same entries, byte for byte.

    Where scales are quantized, their mean comes before; torch adds it up in another order on each
    device, so there the codes of numbers are the same, and scales are near.
    """
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    nested = {key.rpartition(".")[0] for key in first if key.endswith(".nested_absmax")}
    for name, value in first.items():
        if name.rpartition(".")[0] not in nested and ".quant_state." not in name:
            assert same(value, second[name]), name
    for name in nested:
        path, _, attribute = name.rpartition(".")
        found, expected = (
            getattr(module.get_submodule(path), attribute).dequantize(torch.float32).cpu()
            for module in (a, b)
        )
        assert (found - expected).abs().max() <= 0.01 * expected.abs().max()


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def through_a_file(saved: Any, **arguments: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True, **arguments)
