"""torch.compile of layers on a GPU: whole graphs, with the results of eager ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import bnbx
import on_gpu
from bnbx.nn import EmbeddingNF4, Linear8bitLt, LinearNF4, QuantLinear
from on_gpu import there

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*TensorFloat32.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Profiler.*will be ignored:UserWarning"),
]

MAKE: dict[str, Callable[[], nn.Module]] = {
    "LinearNF4": lambda: LinearNF4(64, 64),
    "nvfp4": lambda: QuantLinear(64, 64, quant_type="nvfp4"),
    "int8 codes": lambda: Linear8bitLt(64, 64, has_fp16_weights=False),
    "int8 codes, threshold": lambda: Linear8bitLt(64, 64, has_fp16_weights=False, threshold=6.0),
    "int8 floats": lambda: Linear8bitLt(64, 64, threshold=6.0),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", MAKE)
def test_a_layer_in_one_graph(name: str, backend: str) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(MAKE[name](), nn.GELU()).to(on_gpu.DEVICE)
    compiled: Callable[..., Any] = torch.compile(
        copy.deepcopy(layer), fullgraph=True, backend=backend
    )
    for rows in (1, 40):
        start = torch.randn(rows, 64)
        start[:, 5] = 9
        grads = []
        for run in (layer, compiled):
            x = there(start).requires_grad_()
            result = run(x)
            result.square().sum().backward()
            grads.append((result.detach(), x.grad))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


def test_an_embedding_and_its_layers_in_one_graph() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(EmbeddingNF4(100, 64), LinearNF4(64, 100)).to(on_gpu.DEVICE)
    compiled: Callable[..., Any] = torch.compile(model, fullgraph=True)
    ids = torch.randint(0, 100, (2, 7), device=on_gpu.DEVICE)
    torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-5, atol=1e-5)


def test_a_product_in_a_captured_graph() -> None:
    """Products of few rows are what graphs are used for: a token after the other."""
    if on_gpu.DEVICE.type == "cpu":
        pytest.skip("there are no graphs on a CPU")
    layer = LinearNF4(512, 256).to(on_gpu.DEVICE, torch.bfloat16)
    x = torch.randn(1, 512, device=on_gpu.DEVICE, dtype=torch.bfloat16)
    cuda: Any = torch.cuda
    with torch.no_grad():
        layer(x)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            y = layer(x)
        for _ in range(3):
            x.copy_(torch.randn(1, 512))
            graph.replay()
            assert torch.equal(y, layer(x))


@pytest.mark.parametrize("name", ["LinearNF4", "int8 codes"])
def test_reduce_overhead_uses_graphs(name: str) -> None:
    if on_gpu.DEVICE.type == "cpu":
        pytest.skip("there are no graphs on a CPU")
    torch.manual_seed(0)
    layer = MAKE[name]().to(on_gpu.DEVICE)
    compiled: Callable[..., Any] = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(1, 64, device=on_gpu.DEVICE)
            torch.testing.assert_close(compiled(x).clone(), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["nf4", "nvfp4", "int8"])
def test_quantizing_in_a_captured_graph(name: str) -> None:
    """What a replay reads of the host has to be there still."""
    if on_gpu.DEVICE.type == "cpu":
        pytest.skip("there are no graphs on a CPU")
    x = torch.randn(64, 256, device=on_gpu.DEVICE)
    cuda: Any = torch.cuda
    bnbx.quantize(x, name).dequantize()
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        y = bnbx.quantize(x, name).dequantize()
    for scale in (1.0, 100.0, 0.01):
        x.copy_(torch.randn(64, 256) * scale)
        rubbish = [torch.full((3,), 7, dtype=torch.int32).pin_memory() for _ in range(64)]
        graph.replay()
        cuda.synchronize()
        assert torch.equal(y, bnbx.quantize(x, name).dequantize())
        del rubbish
