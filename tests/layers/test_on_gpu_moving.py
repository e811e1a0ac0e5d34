"""Layers move to a GPU and back, in memory and in files, and keep their bits."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import on_gpu
from bnbx.nn import (
    Linear8bitLt,
    LinearNF4,
    Params4bit,
    QuantLinear,
)
from layers.gpu_layers import (
    LINEAR,
    assert_same_dicts,
    int8_codes,
    numbers,
    pair,
    through_a_file,
)
from on_gpu import assert_there, same, there

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Embedding size:bnbx.errors.BnbxWarning"),
]

# ---- moving


@pytest.mark.parametrize("how", ["to", "cuda", "index", "device", "dtype too", "half first"])
def test_ways_to_move(how: str) -> None:
    torch.manual_seed(0)
    layer = LinearNF4(65, 32)
    here = copy.deepcopy(layer)
    if on_gpu.DEVICE.type == "cpu":
        how = "to"
    ways: dict[str, Callable[[], Any]] = {
        "to": lambda: layer.to(on_gpu.DEVICE),
        "cuda": layer.cuda,
        "index": lambda: layer.cuda(0),
        "device": lambda: layer.to("cuda:0"),
        "dtype too": lambda: layer.to(on_gpu.DEVICE, torch.bfloat16),
        "half first": lambda: layer.half().cuda(),
    }
    moved = ways[how]()
    dtype = {"dtype too": torch.bfloat16, "half first": torch.float16}.get(how, torch.float32)
    here.to("cpu", dtype)
    assert moved is layer
    assert_there(layer.weight, layer.bias, layer.weight.quant_state.absmax)
    assert_same_dicts(layer, here)
    assert layer(there(numbers(1, 65, dtype=dtype))).dtype == dtype


@pytest.mark.parametrize("name", [*LINEAR, "Linear8bitLt"])
def test_there_and_back_keeps_the_bits(name: str) -> None:
    make = LINEAR.get(name) or int8_codes
    here, gpu = pair(make, 128, 64)
    start = {k: v.clone() for k, v in gpu.state_dict().items()}
    weight = gpu.weight
    gpu.cpu()
    assert all(value.device.type == "cpu" for value in gpu.state_dict().values())
    x = numbers(3, 128)
    expected = gpu(x)
    gpu.to(on_gpu.DEVICE)
    assert gpu.weight is weight
    assert_there(gpu.weight)
    for key, value in start.items():
        assert same(value, gpu.state_dict()[key]), key
    scale = expected.abs().max()
    assert (gpu(there(x)).cpu() - expected).abs().max() <= 1e-5 * scale
    here.to(on_gpu.DEVICE)
    here.to("cpu")
    if name != "fitted":
        assert_same_dicts(here, gpu)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_parameter_alone(quantized: bool) -> None:
    dense = numbers(64, 65)
    here = Params4bit(dense, quant_type="nf4", compress_statistics=True).to("cpu")
    fresh = Params4bit(dense, quant_type="nf4", compress_statistics=True)
    start: Any = here if quantized else fresh
    gpu = start.to(on_gpu.DEVICE)
    assert_there(gpu, gpu.absmax, gpu.quant_state.code)
    assert same(gpu.data, here.data)
    torch.testing.assert_close(gpu.quant_state.state2.absmax.cpu(), here.quant_state.state2.absmax)
    kwargs = {**gpu.__dict__, "bnb_quantized": False, "requires_grad": False}  # as peft does
    again = Params4bit(gpu.dequantize() + 0, **kwargs).to(gpu.device)
    assert_there(again, again.absmax)
    assert again.shape == gpu.shape


# ---- files and copies


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("to_gpu", [False, True])
@pytest.mark.parametrize("name", [*LINEAR, "Linear8bitLt"])
def test_state_dicts_go_from_device_to_device(name: str, to_gpu: bool, assign: bool) -> None:
    make = LINEAR.get(name) or int8_codes
    here, gpu = pair(make, 128, 64)
    source, device = (here, on_gpu.DEVICE) if to_gpu else (gpu, torch.device("cpu"))
    target = make(128, 64).to(device)
    location = device if assign else None
    saved = through_a_file(source.state_dict(), map_location=location)
    target.load_state_dict(saved, assign=assign)
    assert {value.device.type for value in target.state_dict().values()} <= {device.type, "cpu"}
    assert target.weight.device.type == device.type
    assert_same_dicts(target, source)
    x = numbers(3, 128).to(device)
    assert target(x).device.type == device.type


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies(how: str) -> None:
    model = nn.Sequential(
        LinearNF4(64, 64), Linear8bitLt(64, 64, has_fp16_weights=False, threshold=6.0),
        QuantLinear(64, 8, quant_type="nvfp4"),
    ).to(on_gpu.DEVICE)  # fmt: skip
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert_same_dicts(other, model)
    x = there(numbers(3, 64))
    assert same(other(x), model(x))


def test_safetensors() -> None:
    files: Any = pytest.importorskip("safetensors.torch", reason="the extra `test` has it")
    here, gpu = pair(LinearNF4, 128, 64)
    other = LinearNF4(128, 64).to(on_gpu.DEVICE)
    other.load_state_dict(files.load(files.save(gpu.state_dict())))
    for key, value in gpu.state_dict().items():
        assert same(value, other.state_dict()[key]), key
    assert_same_dicts(other, here)
