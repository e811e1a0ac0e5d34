"""int8 layers under torch.compile and torch.export: one graph, outliers included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnbx.kernels import int8
from bnbx.layers.int8 import Linear8bitLt
from compiled import shared_cache


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_cache(tmp_path_factory):
        yield


def model(frozen: bool = True, threshold: float = 6.0) -> nn.Sequential:
    torch.manual_seed(0)
    parts = [
        Linear8bitLt(64, 48, has_fp16_weights=not frozen, threshold=threshold),
        nn.GELU(),
        Linear8bitLt(48, 8, has_fp16_weights=not frozen, threshold=threshold),
    ]
    return nn.Sequential(*parts).to("cpu")


def numbers(*shape: int, outliers: int = 2) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    x[..., :outliers] = 25
    return x


def samples() -> list[tuple[str, tuple[Any, ...]]]:
    codes, absmax, _ = int8.quantize_rows(torch.randn(8, 16))
    x, master = torch.randn(2, 3, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    bias = torch.randn(8, requires_grad=True)
    narrow = x.detach().bfloat16().requires_grad_()
    return [
        ("llm_int8_linear", (x, codes, absmax, None, None, 0.0, True)),
        ("llm_int8_linear", (x, codes, absmax, None, bias, 1.0, True)),
        ("llm_int8_linear", (x, codes, absmax, master, bias, 6.0, True)),
        ("llm_int8_linear", (narrow, codes, absmax, master, bias, 6.0, False)),
        ("llm_int8_grad_input", (torch.randn(2, 8, requires_grad=True), codes, absmax)),
        ("int8_quantize_rows", (x, 0.0)),
        ("int8_quantize_rows", (x, 1.0)),
        ("int8_dequantize_rows", (codes, absmax, torch.bfloat16)),
    ]


@pytest.mark.parametrize("number", range(len(samples())))
def test_operations_are_what_they_say(number: int) -> None:
    name, arguments = samples()[number]
    torch.library.opcheck(getattr(torch.ops.bnbx, name).default, arguments)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("frozen", [True, False])
def test_one_graph_forward_and_backward(frozen: bool, threshold: float) -> None:
    made = model(frozen, threshold)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    for outliers in (0, 2, 5):  # none of which compiles anew
        x, again = (numbers(4, 64, outliers=outliers).requires_grad_() for _ in range(2))
        made.zero_grad()
        expected = made(x)
        expected.pow(2).sum().backward()
        grads = [p.grad for p in made.parameters()]
        made.zero_grad()
        y = compiled(again)
        y.pow(2).sum().backward()
        assert torch.equal(y, expected)
        assert x.grad is not None
        assert again.grad is not None
        assert torch.equal(again.grad, x.grad)
        for got, wanted in zip([p.grad for p in made.parameters()], grads, strict=True):
            assert (got is None) == (wanted is None)
            if got is not None and wanted is not None:
                torch.testing.assert_close(got, wanted)


def test_outliers_do_not_compile_anew() -> None:
    made = model()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(made, fullgraph=True, backend=counter)
    with torch.no_grad():
        for outliers in (0, 1, 7):
            compiled(numbers(4, 64, outliers=outliers))
    assert counter.frame_count == 1


def test_inductor_and_any_number_of_rows() -> None:
    made = model()
    compiled = torch.compile(made, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (2, 3, 40):
            x = numbers(rows, 64)
            torch.testing.assert_close(compiled(x), made(x))


@pytest.mark.parametrize("frozen", [True, False])
def test_export(frozen: bool) -> None:
    made, x = model(frozen), numbers(4, 64)
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(made, (x,), dynamic_shapes=({0: rows},))
    names = {str(node.target) for node in program.graph.nodes}
    assert "bnbx.llm_int8_linear.default" in names
    for count in (2, 9):
        given = numbers(count, 64)
        torch.testing.assert_close(program.module()(given), made(given))


def test_layer_that_has_not_moved_compiles() -> None:
    made = Linear8bitLt(64, 8, has_fp16_weights=False, threshold=6.0)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    x = numbers(3, 64)
    assert torch.equal(compiled(x), made(x))
    made.to("cpu")
    assert torch.equal(compiled(x), made(x))
