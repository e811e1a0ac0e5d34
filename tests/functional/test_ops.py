"""Every operation passes torch's checks of custom operations, and goes into a compiled graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx import functional
from bnbx.errors import DeviceError
from bnbx.functional import QuantState, QuantTensor
from bnbx.functional.registration import names
from bnbx.registry import quant_types
from same_bits import same_bits

OPS = torch.ops.bnbx
Samples = dict[str, list[tuple[Any, ...]]]


def matrix(*shape: int) -> Tensor:
    return torch.randn(shape or (6, 70), generator=torch.Generator().manual_seed(1))


def bytes_of(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1)).byte()


def samples() -> Samples:
    """Arguments for each operation."""
    x, grad_x = matrix(), matrix().requires_grad_()
    code, rand, seed = functional.create_dynamic_map(), torch.rand(50), torch.tensor([3])
    double = functional.quantize(x, "nf4", double=True)
    codes, state = functional.quantize_blockwise(x, blocksize=64)
    _, nested = functional.quantize_blockwise(x, blocksize=64, nested=True)
    assert nested.state2 is not None
    second = (nested.state2.absmax, nested.state2.code, nested.offset, 64)
    halves, plain = functional.quantize_4bit(x, quant_type="nf4")
    _, deep = functional.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    assert deep.state2 is not None
    third = (deep.state2.absmax, deep.state2.code, deep.offset, 256)
    small = bytes_of(4, 8).view(torch.int8)
    update: tuple[Any, ...] = (
        matrix(),
        matrix(),
        [torch.zeros(6, 70)],
        [],
        [],
        [0.9, 0.9, 0.0],
        [0.0, 1e-8, 0.1],
    )
    eight = (matrix(), matrix(), [bytes_of(6, 70)], [code], [torch.ones(2)], *update[5:])
    return {
        "quantize": [
            (x, "nf4/64"),
            (grad_x, double.label),
            (x.bfloat16(), "nvfp4/16", None, seed),
            (x.t(), "linear3/32", rand),
            (x, "nf4/64", None, None, "mse"),
            (matrix(0), "nf4/64"),
        ],
        "dequantize_into": [(list(double.parts), double.label, torch.empty(70, 6).t())],
        "fake_quantize": [(x, "nf4/64"), (grad_x, "mxfp4/32"), (x, "nf4/64", None, seed)],
        "quantize_blockwise": [
            (x, code, 64),
            (grad_x, code, 256, rand),
            (x, code, 64, None, False),
        ],
        "quantize_blockwise_into": [
            (x, code, 64, None, True, bytes_of(6, 70), torch.empty(7)),
            (x.t(), code, 64, rand, True, bytes_of(70, 6), torch.empty(7)),
            (x, code * 3, 64, None, True, bytes_of(6, 70), torch.empty(7)),
        ],
        "dequantize_blockwise": [
            (codes, state.absmax, code, 64, torch.bfloat16),
            (codes, nested.absmax, code, 64, torch.float32, *second),
        ],
        "dequantize_blockwise_into": [(codes, state.absmax, code, 64, torch.empty(6, 70))],
        "quantize_no_absmax": [(x, code), (grad_x, code)],
        "dequantize_no_absmax": [(codes, code)],
        "quantize_4bit": [(x, 64, "nf4"), (grad_x, 128, "fp4")],
        "quantize_4bit_into": [(x, 64, "nf4", bytes_of(210), torch.empty(7))],
        "dequantize_4bit": [
            (halves, plain.absmax, 64, "nf4", x.shape, torch.float32),
            (halves, deep.absmax, 64, "nf4", x.shape, torch.float16, *third),
        ],
        "dequantize_4bit_into": [(halves, plain.absmax, 64, "nf4", torch.empty(6, 70))],
        "gemv_4bit": [
            (matrix(3, 70), halves, plain.absmax, 64, "nf4", x.shape, True),
            (matrix(2, 70).requires_grad_(), halves, deep.absmax, 64, "nf4", x.shape, True, *third),
            (matrix(2, 6).requires_grad_(), halves, plain.absmax, 64, "nf4", x.shape, False),
        ],
        "int8_linear_matmul": [(small, bytes_of(5, 8).view(torch.int8))],
        "int8_mm_dequant": [
            (bytes_of(4, 8).int(), torch.rand(4), torch.rand(8), torch.rand(8), torch.float16),
            (bytes_of(4, 8).int(), torch.rand(4), torch.rand(8), None, torch.float32),
        ],
        "int8_quantize_columns": [(x, 0.0), (x.half(), 1.0)],
        "estimate_quantiles": [(matrix(500), 0.01, 256)],
        "histogram_scatter_add_2d": [
            (torch.zeros(3, 4), torch.tensor([0, 2]), torch.tensor([1, 3]), torch.rand(2))
        ],
        "percentile_clipping": [(x, torch.rand(100), 7, 50)],
        "optimizer_update": [
            ("lion", *update, None, 1e-3, 2, torch.ones(()), None, True, False),
            ("lion", *update, 0.1, 1e-3, 2, torch.ones(()), torch.zeros(1), True, True),
            ("lion", *eight, None, 1e-3, 2, torch.ones(()), None, True, False),
        ],
    }


CASES = [(name, number) for name, cases in samples().items() for number in range(len(cases))]


def test_every_operation_has_samples() -> None:
    assert set(samples()) == set(names)


@pytest.mark.parametrize(("name", "number"), CASES)
def test_torch_checks(name: str, number: int) -> None:
    operation = getattr(OPS, name).default
    torch.library.opcheck(operation, samples()[name][number])


def to_meta(value: Any) -> Any:
    if isinstance(value, list):
        return [to_meta(each) for each in value]
    return value.to("meta") if isinstance(value, Tensor) else value


@pytest.mark.parametrize(("name", "number"), CASES)
def test_one_tensor_on_the_meta_device_is_an_error(name: str, number: int) -> None:
    """Else torch takes the fake form for the operation, and its result for numbers."""
    operation, arguments = getattr(OPS, name).default, samples()[name][number]
    named = [each.name for each in operation._schema.arguments]
    held = [i for i, each in enumerate(arguments) if tensors_in(each)]
    operation(*map(to_meta, arguments))
    if sum(named[i] != "seed" for i in held) > 1:
        for i in held:
            mixed = [to_meta(each) if i == j else each for j, each in enumerate(arguments)]
            with pytest.raises(DeviceError, match=f"bnbx::{name}: .* on the meta device, which"):
                operation(*mixed)


def test_noise_of_shapes_alone_may_come_from_the_cpu() -> None:
    found = functional.quantize(matrix().to("meta"), "linear4", stochastic=True)
    assert all(part.is_meta for part in found.parts)


# ---- graphs


def tensors_in(found: Any) -> list[Tensor]:
    """All tensors in what a function returned."""
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, QuantTensor):
        return list(found.parts)
    if isinstance(found, QuantState):
        second = tensors_in(found.state2) if found.state2 is not None else []
        return [*tensors_in([found.absmax, found.code, found.offset]), *second]
    if isinstance(found, (list, tuple)):
        return [tensor for each in found for tensor in tensors_in(each)]
    return []


def step32(p: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    p, m, v, norm = p.clone(), torch.zeros_like(p), torch.zeros_like(p), torch.zeros(1)
    functional.optimizer_update_32bit(
        "adam", g, p, m, 0.9, 1e-8, 1, 1e-2, v, 0.99, unorm_vec=norm, max_unorm=0.1
    )
    return p, m, v, norm


def step8(p: Tensor, g: Tensor, code: Tensor) -> tuple[Tensor, ...]:
    p, m, scale = p.clone(), torch.zeros(p.shape, dtype=torch.uint8), torch.zeros(2)
    functional.optimizer_update_8bit_blockwise(
        "lion", g, p, m, None, 0.9, 0.99, 0.0, 0.0, 1e-8, 1, 1e-2, code, None, scale, None
    )
    return p, m, scale


def into_halves(codes: Tensor, state: QuantState) -> Tensor:
    out = torch.empty(70, 6).t()
    return functional.dequantize_4bit(codes, state, out=out)


def histogram(first: Tensor, second: Tensor, source: Tensor) -> Tensor:
    found = torch.zeros(3, 4)
    functional.histogram_scatter_add_2d(found, first, second, source)
    return found


def clipping(grad: Tensor) -> tuple[Any, ...]:
    history = torch.ones(100)
    return (*functional.percentile_clipping(grad, history, 5), history)


F = functional
X = matrix()
CODES8, STATE8 = F.quantize_blockwise(X, blocksize=64, nested=True)
CODES4, STATE4 = F.quantize_4bit(X, quant_type="nf4", compress_statistics=True)
MINE = quant_types().get("nf4").model_copy(update={"name": "mine"})
Graph = tuple[Callable[..., Any], tuple[Any, ...]]
GRAPHS: dict[str, Graph] = {
    "quantize": (lambda x: F.quantize(x * 2, "nf4", block_size=128, double=True), (X,)),
    "quantize to a spec": (lambda x: F.quantize(x, MINE), (X,)),
    "there and back": (lambda x: F.quantize(x, "nvfp4").dequantize(torch.bfloat16) + 1, (X,)),
    "dequantize": (F.dequantize, (F.quantize(X, "linear3", double=True),)),
    "with a table": (lambda x: F.dequantize(*F.quantize(x)), (X,)),
    "fake_quantize": (lambda x: F.fake_quantize(x, "fp4"), (X,)),
    "blockwise": (lambda x: F.quantize_blockwise(x, blocksize=64), (X,)),
    "nested": (
        lambda x, c: F.quantize_blockwise(x, c, blocksize=64, nested=True),
        (X, F.create_linear_map()),
    ),
    "dequantize_blockwise": (F.dequantize_blockwise, (CODES8, STATE8)),
    "4bit": (lambda x: F.quantize_4bit(x, compress_statistics=True), (X,)),
    "stored": (lambda x: F.quantize_fp4(x, quant_storage=torch.bfloat16), (X,)),
    "4bit, there and back": (lambda x: F.dequantize_nf4(*F.quantize_nf4(x)), (X,)),
    "dequantize_4bit into": (into_halves, (CODES4, STATE4)),
    "gemv": (lambda x, q, s: F.gemv_4bit(x, q, state=s), (matrix(3, 70), CODES4, STATE4)),
    "without scale": (
        lambda x, c: F.dequantize_no_absmax(F.quantize_no_absmax(x, c), c),
        (X, F.create_dynamic_map()),
    ),
    "int8 product": (
        lambda a, b: F.int8_mm_dequant(F.int8_linear_matmul(a, b), torch.ones(4), torch.ones(5)),
        (bytes_of(4, 8).view(torch.int8), bytes_of(5, 8).view(torch.int8)),
    ),
    "int8 rows": (lambda x: F.int8_vectorwise_dequant(*F.int8_vectorwise_quant(x)[:2]), (X,)),
    "int8 outliers": (lambda x: F.int8_vectorwise_quant(x, 1.5), (X,)),
    "int8 both": (F.int8_double_quant, (X.half(),)),
    "quantiles": (F.estimate_quantiles, (X,)),
    "histogram": (histogram, (torch.tensor([0, 2]), torch.tensor([1, 3]), torch.rand(2))),
    "clipping": (clipping, (X,)),
    "32-bit step": (step32, (X, X)),
    "8-bit step": (step8, (X, X, F.create_dynamic_map())),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs(name: str) -> None:
    """One graph, without a break, with the bits of the plain call."""
    function, arguments = GRAPHS[name]
    torch._dynamo.reset()
    expected = tensors_in(function(*arguments))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = tensors_in(compiled(*arguments))
    assert len(found) == len(expected) > 0
    assert all(map(same_bits, found, expected))


def test_graphs_of_any_size() -> None:
    torch._dynamo.reset()
    graph = torch.compile(
        lambda x: F.quantize(x, "nf4").dequantize() + F.dequantize_4bit(*F.quantize_4bit(x)),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for rows in (3, 4, 7):
        x = matrix(rows, 65)
        expected = F.quantize(x, "nf4").dequantize() + F.dequantize_4bit(*F.quantize_4bit(x))
        assert same_bits(graph(x), expected)


def test_inductor() -> None:
    torch._dynamo.reset()

    def function(x: Tensor) -> Tensor:
        codes, state = F.quantize_4bit(x.sin(), quant_type="nf4", compress_statistics=True)
        return F.dequantize_4bit(codes, state) * 2 + F.fake_quantize(x, "dynamic8")

    x = matrix()
    assert torch.allclose(torch.compile(function, fullgraph=True)(x), function(x))


def test_noise_in_a_graph() -> None:
    torch._dynamo.reset()
    graph = torch.compile(
        lambda x: F.quantize(x, "linear4", stochastic=True).dequantize(),
        fullgraph=True,
        backend="aot_eager",
    )
    x = torch.full((5000,), 0.3)
    x[::64] = 1.0
    first, second = graph(x), graph(x)
    assert not torch.equal(first, second)
    assert abs(float(first[x < 1].mean()) - 0.3) < 0.01


# ---- gradients


@pytest.mark.parametrize("transposed", [False, True])
def test_gradient_of_a_product(transposed: bool) -> None:
    dense = F.dequantize_4bit(CODES4, STATE4)
    weight = dense if transposed else dense.t()
    x = matrix(3, len(weight)).requires_grad_()
    y = F.gemv_4bit(x, CODES4, state=STATE4, transposed_B=transposed)
    (found,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert torch.allclose(found, 2 * (x @ weight) @ weight.t(), rtol=1e-4, atol=1e-4)
    (second,) = torch.autograd.grad(found.sum(), x)
    assert torch.allclose(
        second, 2 * (weight @ weight.t()).sum(0).expand_as(x), rtol=1e-3, atol=1e-2
    )
    graph = torch.compile(
        lambda x: F.gemv_4bit(x, CODES4, state=STATE4, transposed_B=transposed),
        fullgraph=True,
        backend="aot_eager",
    )
    (compiled,) = torch.autograd.grad(graph(x).square().sum(), x)
    assert torch.allclose(compiled, found.detach())


def test_gradient_of_a_graph_with_fake_quantization() -> None:
    torch._dynamo.reset()
    x = matrix().requires_grad_()
    graph = torch.compile(
        lambda x: F.fake_quantize(x.sin(), "nf4"), fullgraph=True, backend="aot_eager"
    )
    (found,) = torch.autograd.grad(graph(x).sum(), x)
    assert torch.allclose(found, x.detach().cos())


def test_a_table_of_ones_own_may_be_on_the_meta_device() -> None:
    x, code = torch.empty(300, device="meta"), torch.empty(256, device="meta")
    codes, state = functional.quantize_blockwise(x, code, blocksize=64)
    assert codes.is_meta
    assert state.absmax.shape == (5,)
