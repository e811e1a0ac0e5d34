"""Layers in graphs: the operations keep their contracts, and models compile and export whole."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import bnbx
from bnbx.kernels.coding import encode
from bnbx.kernels.encoding import make_encoding
from bnbx.nn import (
    Embedding,
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Linear4bit,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
    OutlierAwareLinear,
    QuantEmbedding,
    QuantLinear,
    StableEmbedding,
    dequantize_,
    quantize_,
)
from quantized_layers import LanguageModel, ids, language_model, layer

OPS = torch.ops.bnbx


def _parts(name: str, shape: tuple[int, ...], double: bool) -> tuple[list[torch.Tensor], str]:
    encoding = make_encoding(name, double=double)
    return encode(encoding, torch.randn(shape)), encoding.label


@pytest.mark.parametrize(
    ("name", "double"), [("nf4", False), ("nf4", True), ("int8", False), ("nvfp4", False)]
)
def test_operations_keep_their_contracts(name: str, double: bool) -> None:
    parts, label = _parts(name, (40, 64), double)
    x = torch.randn(3, 64, requires_grad=True)
    bias, grad = torch.randn(40, requires_grad=True), torch.randn(3, 40, requires_grad=True)
    size = (40, 64)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (OPS.linear, (x, parts, bias, label, size)),
        (OPS.linear, (x[:0].detach(), parts, None, label, size)),
        (OPS.linear_grad_input, (grad, parts, label, size)),
        (OPS.dequantize, (parts, label, size, torch.bfloat16)),
        (OPS.embedding, (torch.tensor([[0, 39], [1, 1]]), parts, label, size, torch.float16)),
    ]
    for operation, arguments in calls:
        torch.library.opcheck(operation.default, arguments)


def _compiled(network: nn.Module) -> Callable[..., Any]:
    torch._dynamo.reset()
    found: Callable[..., Any] = torch.compile(network, fullgraph=True, backend="aot_eager")
    return found


def test_model_compiles_without_a_break_and_trains_the_same() -> None:
    model = language_model()
    quantize_(model, "nf4", double=True, overrides={"*mlp*": "int8"}, parameters=["*experts.up"])
    other = copy.deepcopy(model)
    exact = dequantize_(copy.deepcopy(model)).double()
    compiled = _compiled(other)
    for _ in range(2):
        for network in (model, compiled, exact):
            network(ids()).square().sum().backward()
    oracle = {name: p.grad for name, p in exact.named_parameters()}
    for each in (model, other):
        trained = {name: p.grad for name, p in each.named_parameters() if p.grad is not None}
        assert len(trained) == 10
        for name, grad in trained.items():
            expected = oracle[name]
            assert expected is not None
            # Of the largest: what cancels keeps the rounding of what it cancelled from.
            assert (grad - expected).abs().max() < 3e-6 * expected.abs().max(), name


def test_inductor_compiles_a_layer() -> None:
    torch._dynamo.reset()
    found = layer(64, 32)
    x = torch.randn(3, 64, requires_grad=True)
    result = torch.compile(found, fullgraph=True)(x)
    torch.testing.assert_close(result, found(x))
    result.sum().backward()
    assert x.grad is not None


def test_compiled_int8_layer_with_a_threshold() -> None:
    found = Linear8bitLt(64, 32, has_fp16_weights=False, threshold=6.0).to("cpu")
    x = torch.randn(3, 64)
    x[:, 5] = 20
    torch.testing.assert_close(_compiled(found)(x), found(x))


def test_compiled_layer_follows_what_is_loaded_into_it() -> None:
    found, other = layer(64, 32), QuantLinear(64, 32).to("cpu")
    compiled, x = _compiled(found), torch.randn(3, 64)
    compiled(x)
    for state in (other.state_dict(), layer(64, 32, quant_type="int8").state_dict()):
        found.load_state_dict(state)
        torch.testing.assert_close(compiled(x), found(x), rtol=0, atol=0)
        assert found(x).abs().sum() > 0


def test_compiled_layer_takes_other_sizes_of_input() -> None:
    found = layer(64, 32)
    compiled = _compiled(found)
    for rows in (1, 4, 7, 0):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(compiled(x), found(x), rtol=0, atol=0)


def test_compiled_layer_under_autocast() -> None:
    found, x = layer(64, 32), torch.randn(3, 64)
    compiled = _compiled(found)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = compiled(x)
        torch.testing.assert_close(result, found(x), rtol=0, atol=0)
    assert result.dtype == torch.bfloat16


def _exportable() -> LanguageModel:
    model = language_model()
    quantize_(model, "nf4", overrides={"layers.1.mlp": {"double": True}})
    return model


@pytest.mark.parametrize("strict", [False, True])
def test_model_is_exported_saved_and_loaded(strict: bool) -> None:
    model = _exportable()
    program = torch.export.export(model, (ids(),), strict=strict)
    names = {str(node.target) for node in program.graph.nodes}
    assert {"bnbx.linear.default", "bnbx.embedding.default"} <= names
    memory = io.BytesIO()
    torch.export.save(program, memory)
    memory.seek(0)
    loaded = torch.export.load(memory)
    torch.testing.assert_close(loaded.module()(ids()), model(ids()), rtol=0, atol=0)


IDS = torch.tensor([[1, 49], [0, 7]])
LINEAR: tuple[Callable[[], nn.Module], ...] = (
    *(partial(kind, 64, 32) for kind in (Linear4bit, LinearFP4, LinearNF4, QuantLinear)),
    partial(QuantLinear, 64, 32, quant_type="nvfp4"),
    partial(QuantLinear, 64, 32, quant_type="int8"),
    partial(Linear8bitLt, 64, 32, threshold=6.0),
    partial(Linear8bitLt, 64, 32, has_fp16_weights=False, threshold=6.0),
)
EMBEDDINGS: tuple[Callable[[], nn.Module], ...] = tuple(
    partial(kind, 50, 64)
    for kind in (
        *(Embedding, StableEmbedding, Embedding4bit, EmbeddingFP4, EmbeddingNF4),
        *(Embedding8bit, QuantEmbedding),
    )
)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("number", range(len(LINEAR + EMBEDDINGS)))
def test_every_layer_is_exported(number: int, strict: bool) -> None:
    found = (LINEAR + EMBEDDINGS)[number]().to("cpu")
    given = torch.randn(3, 64) if number < len(LINEAR) else IDS
    program = torch.export.export(found, (given,), strict=strict)
    torch.testing.assert_close(program.module()(given), found(given), rtol=0, atol=0)


def test_every_layer_is_among_those_that_are_exported() -> None:
    kinds = {type(make()) for make in LINEAR + EMBEDDINGS}
    public = {getattr(bnbx.nn, name) for name in bnbx.nn.__all__}
    layers = {each for each in public if isinstance(each, type) and issubclass(each, nn.Module)}
    assert layers - {OutlierAwareLinear} == kinds  # it traces a whole model first


def test_int8_table_that_was_loaded_or_moved_is_exported() -> None:
    """torch.export puts a plain parameter in the place of the table, which has no absmax."""
    source = Embedding8bit(50, 64).to("cpu")
    loaded, shared, moved = (Embedding8bit(50, 64).to("cpu") for _ in range(3))
    loaded.load_state_dict(source.state_dict())
    shared.weight = source.weight
    moved.to("meta").load_state_dict(source.state_dict(), assign=True)
    for found in (loaded, shared, moved, copy.deepcopy(source)):
        program = torch.export.export(found, (IDS,))
        assert torch.equal(program.module()(IDS), source(IDS))


def test_export_with_dynamic_rows() -> None:
    found = layer(64, 32)
    rows = torch.export.Dim("rows", min=2, max=100)
    program = torch.export.export(found, (torch.randn(4, 64),), dynamic_shapes=({0: rows},))
    x = torch.randn(9, 64)
    torch.testing.assert_close(program.module()(x), found(x), rtol=0, atol=0)


def test_embedding_that_is_the_last_layer_too_compiles() -> None:
    """The model passes its weight to torch's own functions."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = QuantEmbedding(50, 64).to("cpu")

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = nn.functional.embedding(tokens, self.embed.weight)
            return nn.functional.linear(x, self.embed.weight)

    model, tokens = Tied(), torch.tensor([[1, 49], [0, 7]])
    dense = model.embed.dequantized_weight()
    expected = dense[tokens] @ dense.T
    torch.testing.assert_close(model(tokens), expected)
    torch.testing.assert_close(_compiled(model)(tokens), model(tokens))
