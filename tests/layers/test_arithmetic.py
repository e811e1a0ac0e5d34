"""Arithmetic with a weight in codes is arithmetic with its numbers; its memory stays readable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnbx.errors import QuantizedDataError
from bnbx.layers.arithmetic import MEMORY, NUMBERS, kind_of
from bnbx.nn import Embedding8bit, Linear8bitLt, QuantEmbedding, QuantLinear, quantize_
from compiled import shared_cache

ROWS, COLUMNS = 48, 96
X = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_cache(tmp_path_factory):
        yield


def table(**settings: Any) -> QuantEmbedding:
    torch.manual_seed(0)
    found: QuantEmbedding = QuantEmbedding(ROWS, COLUMNS, block_size=32, **settings).to("cpu")
    return found


INDICES: dict[str, Any] = {
    "slice": slice(7),
    "step": slice(40, None, 3),
    "number": 3,
    "negative": -1,
    "numbers": torch.tensor([[1, 2], [40, -1]]),
    "int32": torch.tensor([5, 6], dtype=torch.int32),
    "list": [4, 4, 0],
    "mask": torch.arange(ROWS) % 5 == 0,
    "mask of all": torch.arange(ROWS * COLUMNS).view(ROWS, COLUMNS) % 7 == 0,
    "cell": (3, 4),
    "columns": (slice(None), slice(2, 9)),
    "rows and the rest": (slice(2, 4), Ellipsis),
    "column": (Ellipsis, 3),
    "cells": (torch.tensor([1, 2]), torch.tensor([3, 4])),
    "one more dimension": None,
    "row of one more dimension": (None, 3),
    "nothing": (),
    "flag": True,
}


@pytest.mark.parametrize("name", INDICES)
def test_entries_are_those_of_the_numbers(name: str) -> None:
    found = table(double=True)
    index = INDICES[name]
    expected = found.dequantized_weight()[index]
    entries = found.weight[index]
    assert type(entries) is Tensor
    assert torch.equal(entries, expected)


def test_rows_by_index_decode_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    found = table()
    monkeypatch.setattr("bnbx.layers.products.dense", lambda *args: pytest.fail("decoded whole"))
    for name in ("slice", "number", "numbers", "list", "mask", "cell", "columns"):
        assert found.weight[INDICES[name]].dtype == torch.float32


def test_index_errors_are_those_of_the_numbers() -> None:
    for index in (ROWS, torch.tensor([ROWS]), (0, COLUMNS)):
        with pytest.raises(IndexError, match="out of bounds"):
            table().weight[index]


OPERATIONS: dict[str, Callable[[Any], Tensor]] = {
    "add": lambda w: w + 1,
    "radd": lambda w: 1 + w,
    "rsub": lambda w: X[:1] - w,
    "mul": lambda w: w * X[:1],
    "rmul": lambda w: 2 * w,
    "div": lambda w: w / 3,
    "rdiv": lambda w: 1 / (w.abs() + 1),
    "power": lambda w: (w**2).sum(),
    "torch.pow": lambda w: torch.pow(w, 2),
    "negative": lambda w: -w,
    "greater": lambda w: (w > 0).float(),
    "sum": lambda w: w.sum(0),
    "mean": lambda w: w.mean(),
    "torch.mean": lambda w: torch.mean(w, 1),
    "norm": lambda w: w.norm(),
    "linalg": lambda w: torch.linalg.vector_norm(w, dim=1),
    "torch.norm": torch.norm,
    "normalize": F.normalize,
    "softmax": lambda w: w.softmax(-1),
    "largest": lambda w: w.max(1).values,
    "matmul": lambda w: w @ X.T,
    "rmatmul": lambda w: torch.ones(3, ROWS) @ w,
    "einsum": lambda w: torch.einsum("bi,oi->bo", X, w),
    "bmm": lambda w: torch.bmm(w.unsqueeze(0), X.T.unsqueeze(0)),
    "addmm": lambda w: torch.addmm(torch.zeros(5), w, X.T),
    "linear": lambda w: F.linear(X, w),
    "embedding": lambda w: F.embedding(torch.tensor([1, 7]), w),
    "bag": lambda w: F.embedding_bag(torch.tensor([[1, 7]]), w),
    "repeat": lambda w: w.unsqueeze(0).repeat(2, 1, 1),
    "expand": lambda w: w.expand(2, -1, -1),
    "index_select": lambda w: w.index_select(0, torch.tensor([2, 3])),
    "gather": lambda w: w.gather(0, torch.ones(1, COLUMNS, dtype=torch.long)),
    "rows": lambda w: torch.stack(list(w)),
    "where": lambda w: torch.where(torch.tensor(True), w, torch.zeros(())),
    "into floats": lambda w: torch.zeros(ROWS, COLUMNS).add_(w),
    "copied to floats": lambda w: torch.zeros(ROWS, COLUMNS).copy_(w),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
def test_operations_are_on_the_numbers(name: str, storage: torch.dtype) -> None:
    if name == "copied to floats" and storage != torch.uint8:
        return  # what FSDP does with its memory
    found = table(quant_storage=storage)
    result = OPERATIONS[name](found.weight)
    assert type(result) is Tensor
    torch.testing.assert_close(result, OPERATIONS[name](found.dequantized_weight()))


NOT_OF_INT8 = ("mul", "rmul", "div", "rows")


@pytest.mark.parametrize("name", [each for each in OPERATIONS if each not in NOT_OF_INT8])
def test_operations_are_on_the_numbers_of_int8_weights(name: str) -> None:
    torch.manual_seed(0)
    found = Embedding8bit(ROWS, COLUMNS).to("cpu")
    expected = OPERATIONS[name](found.dequantized_weight())
    torch.testing.assert_close(OPERATIONS[name](found.weight), expected)


def test_int8_weights_are_decoded_by_hand() -> None:
    layer = Linear8bitLt(COLUMNS, ROWS, has_fp16_weights=False).to("cpu")
    dense = layer.dequantized_weight()
    torch.testing.assert_close(layer.weight * layer.weight.SCB[:, None] / 127, dense)
    torch.testing.assert_close(layer.weight.float() * layer.weight.SCB[:, None] / 127, dense)
    assert F.linear(X.bfloat16(), layer.weight).dtype == torch.bfloat16
    with pytest.raises(QuantizedDataError, match=r"dequantized_weight\(\) for the numbers"):
        layer.weight[:3]
    assert torch.equal(layer.weight.data[:3], layer.weight.CB[:3])


WRITES: dict[str, Callable[[Any], Any]] = {
    "mul_": lambda w: w.mul_(2),
    "+=": lambda w: w.__iadd__(1),
    "entries": lambda w: w.__setitem__(0, 1.0),
    "zeros": nn.init.zeros_,
    "normal": nn.init.normal_,
    "uniform": nn.init.xavier_uniform_,
    "out": lambda w: torch.add(X, X, out=w),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("kind", [QuantLinear, Linear8bitLt])
def test_numbers_are_not_written_into_codes(name: str, kind: Any) -> None:
    settings = {"has_fp16_weights": False} if kind is Linear8bitLt else {}
    layer = kind(64, 32, **settings)
    nn.init.normal_(layer.weight)  # dense until it moves
    layer.to("cpu")
    before = layer.weight.detach().clone()
    with pytest.raises(QuantizedDataError, match=r"codes, and cannot hold .*weight\.data"):
        WRITES[name](layer.weight)
    assert torch.equal(layer.weight, before)


def test_memory_stays_readable() -> None:
    """What bitsandbytes' users do with codes: see contract 4.2 to 4.5."""
    weight: Any = table().weight
    codes = weight.data
    assert type(codes) is Tensor
    assert weight.shape == codes.shape == (ROWS * COLUMNS // 2, 1)
    for found in (weight.detach(), weight.clone(), weight.view(-1, 1), weight.to("cpu"), weight):
        assert torch.equal(found, codes)
    assert torch.equal(weight.t(), codes.t())
    assert (weight == codes).all()
    assert torch.equal(torch.cat([weight, weight]), torch.cat([codes, codes]))
    assert torch.equal(torch.empty_like(codes).copy_(weight), codes)
    assert torch.equal(weight.flatten() >> 4, codes.flatten() >> 4)
    assert torch.equal(weight.long() & 15, codes.long() & 15)
    assert weight.tolist() == codes.tolist()
    weight.copy_(codes.clone())
    weight.set_(codes.clone())
    assert torch.equal(weight, codes)


def test_what_means_memory_and_what_numbers() -> None:
    memory: tuple[Any, ...] = (Tensor.view, Tensor.detach, Tensor.t, Tensor.to, torch.cat, F.pad)
    assert {kind_of(func) for func in (*memory, torch.equal, torch.ops.bnbx.dequantize)} == {MEMORY}
    numbers: tuple[Any, ...] = (Tensor.add, Tensor.__rsub__, torch.einsum, torch.linalg.norm)
    assert {kind_of(func) for func in (*numbers, F.normalize)} == {NUMBERS}


class LearnedPositions(nn.Module):
    """As some sixty models of transformers have them; and whatever else reads a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, 64), nn.Embedding(32, 64)
        self.out = nn.Linear(64, 64)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        x = x + torch.einsum("bti,oi->bto", x, self.out.weight)
        found: Tensor = self.out(x) * self.out.weight.square().mean()
        return found


def test_model_that_reads_its_weights() -> None:
    torch.manual_seed(0)
    model, ids = LearnedPositions(), torch.randint(0, 50, (2, 9))
    expected = model(ids)
    quantize_(model, "int8")
    found = model(ids)
    assert (found - expected).norm() < 0.05 * expected.norm()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), found)
    found.sum().backward()
    assert model.out.bias.grad is not None
