"""Embeddings in codes give the rows of their decoded table; those in floats are for training."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import bnbx.optim
from bnbx.errors import BnbxWarning, OptionError, QuantizedDataError
from bnbx.errors import UnsupportedTensorError as UnsupportedError
from bnbx.nn import (
    Embedding,
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Linear8bitLt,
    QuantEmbedding,
    QuantLinear,
    StableEmbedding,
)
from oracles import bitsandbytes_functional
from quantized_layers import TYPES

TOKENS = torch.tensor([[0, 49, 7], [7, 7, 1]])


def _bitsandbytes() -> Any:
    bitsandbytes_functional()
    return pytest.importorskip("bitsandbytes.nn")


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("columns", [256, 100])
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.filterwarnings("ignore:Embedding size:bnbx.errors.BnbxWarning")
def test_rows_of_the_decoded_table(name: str, columns: int, double: bool) -> None:
    torch.manual_seed(0)
    try:
        found = QuantEmbedding(50, columns, quant_type=name, double=double).to("cpu")
    except OptionError:
        assert double  # of a type whose scales are not float32
        return
    table = found.dequantized_weight()
    assert torch.equal(found(TOKENS), table[TOKENS])
    assert torch.equal(found(TOKENS.int()), table[TOKENS])
    assert found(TOKENS[:0]).shape == (0, 3, columns)
    assert torch.equal(found(TOKENS[0, 1]), table[49])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [EmbeddingNF4, EmbeddingFP4, Embedding8bit])
def test_vectors_are_those_of_bitsandbytes(kind: Any, dtype: torch.dtype) -> None:
    """It makes int8 codes of the table in float16, so here that loses nothing."""
    dense = nn.Embedding(50, 128, dtype=dtype).state_dict()
    dense["weight"] = dense["weight"].half().to(dtype)
    theirs = getattr(_bitsandbytes(), kind.__name__)(50, 128, dtype=dtype)
    ours = kind(50, 128, dtype=dtype)
    for each in (ours, theirs):
        each.load_state_dict(dense)
        each.to("cpu")
    one, two = ours(TOKENS), theirs(TOKENS)
    assert one.dtype == two.dtype == dtype
    assert torch.equal(one, two)


def test_rows_that_do_not_exist_are_errors() -> None:
    found = EmbeddingNF4(50, 64).to("cpu")
    for wrong in (50, -1):
        with pytest.raises(IndexError, match=f"row {wrong} of a quantized matrix with 50 rows"):
            found(torch.tensor([0, wrong]))
    with pytest.raises(UnsupportedError, match="float32"):
        found(torch.zeros(2))


@pytest.mark.parametrize("kind", [EmbeddingNF4, Embedding8bit])
def test_table_that_is_not_quantized_yet_says_what_to_do(kind: Any) -> None:
    with pytest.raises(QuantizedDataError, match=r'not quantized yet.*\.to\("cpu"\)'):
        kind(50, 64)(TOKENS)
    assert kind(50, 64, device="meta")(torch.empty(2, dtype=torch.long, device="meta")).shape == (
        2,
        64,
    )


def test_blocks_that_cross_rows_are_told() -> None:
    with pytest.warns(BnbxWarning, match="Embedding size 100 is not divisible by block size 64"):
        Embedding4bit(50, 100, quant_type="nf4")


@pytest.mark.parametrize("kind", [EmbeddingNF4, Embedding8bit])
def test_dtype_follows_conversions(kind: Any) -> None:
    found = kind(50, 64).to("cpu")
    assert found.dtype == torch.float32
    assert found.half().dtype == torch.float16
    assert found(TOKENS).dtype == torch.float16
    assert nn.Sequential(found).to(torch.bfloat16)[0](TOKENS).dtype == torch.bfloat16
    assert found.dequantized_weight().dtype == torch.bfloat16


def test_last_layer_may_share_the_table() -> None:
    embedding, last = EmbeddingNF4(50, 64), QuantLinear(64, 50, bias=False)
    last.weight = embedding.weight
    model = nn.ModuleList([embedding, last]).to("cpu")
    assert last.weight is embedding.weight
    table = embedding.dequantized_weight()
    x = torch.randn(3, 64)
    torch.testing.assert_close(last(x), x @ table.T)
    torch.testing.assert_close(nn.functional.linear(x, embedding.weight), x @ table.T)
    assert torch.equal(nn.functional.embedding(TOKENS, embedding.weight), table[TOKENS])
    again = copy.deepcopy(model)
    assert again[1].weight is again[0].weight
    with pytest.raises(OptionError, match="max_norm"):
        nn.functional.embedding(TOKENS, embedding.weight, max_norm=1.0)


# ---- int8


def test_int8_table_is_saved_as_int8_layers_are() -> None:
    found = Embedding8bit(50, 64).to("cpu")
    saved = found.state_dict()
    assert set(saved) == {"weight", "SCB", "weight_format"}
    linear = Linear8bitLt(64, 50, bias=False, has_fp16_weights=False)
    linear.load_state_dict(saved)
    assert torch.equal(linear.dequantized_weight(), found.dequantized_weight())
    memory = io.BytesIO()
    torch.save(saved, memory)
    memory.seek(0)
    loaded = torch.load(memory, weights_only=True)
    for assign in (False, True):
        again = Embedding8bit(50, 64, device="meta" if assign else None)
        again.load_state_dict(loaded, assign=assign)
        assert torch.equal(again(TOKENS), found(TOKENS))
        assert (again.weight.data_ptr() == loaded["weight"].data_ptr()) == assign
    assert torch.equal(copy.deepcopy(found)(TOKENS), found(TOKENS))


def test_int8_table_takes_floats() -> None:
    dense = nn.Embedding(50, 64)
    found, plain = Embedding8bit(50, 64).to("cpu"), Embedding8bit(50, 64)
    meta = Embedding8bit(50, 64, device="meta")
    found.load_state_dict(dense.state_dict())
    plain.load_state_dict(dense.state_dict())
    meta.load_state_dict(dense.state_dict(), assign=True)
    assert plain.weight.dtype == torch.float32
    for each in (plain, meta):
        assert torch.equal(each.to("cpu")(TOKENS), found(TOKENS))
    torch.testing.assert_close(found(TOKENS), dense(TOKENS).detach(), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("SCB", None, "no entry 'SCB'"),
        ("SCB", torch.ones(3), r"of shape \(3,\); expected float32 of shape \(50,\)"),
        ("weight", torch.ones(3, 64, dtype=torch.int8), r"shape \(3, 64\)"),
        ("weight", torch.ones(50, 64, dtype=torch.int16), "torch.int16"),
        ("weight_format", torch.tensor(2), "weight_format is 2"),
    ],
)
def test_int8_files_that_lie(key: str, value: Any, message: str) -> None:
    found = Embedding8bit(50, 64).to("cpu")
    saved = {**found.state_dict(), key: value}
    with pytest.raises(RuntimeError, match=message):
        found.load_state_dict({k: v for k, v in saved.items() if v is not None})


# ---- in floats


@pytest.mark.parametrize(
    "copied",
    [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["itself", "deepcopy", "pickle"],
)
@pytest.mark.parametrize("kind", [Embedding, StableEmbedding])
def test_states_of_these_stay_in_32_bits(kind: Any, copied: Callable[[Any], Any]) -> None:
    embedding = copied(kind(100, 64))
    model = nn.Sequential(embedding, nn.Linear(64, 64))
    optimizer = bnbx.optim.AdamW8bit(model.parameters(), min_8bit_size=0)
    model(TOKENS).sum().backward()
    optimizer.step()
    for p in model.parameters():
        state = optimizer.state[p]
        dtypes = {value.dtype for value in state.values() if isinstance(value, torch.Tensor)}
        assert (torch.uint8 in dtypes) == (p is not embedding.weight)


def test_stable_embedding_begins_and_computes_as_that_of_bitsandbytes() -> None:
    theirs, ours = _bitsandbytes().StableEmbedding(100, 64, 3), StableEmbedding(100, 64, 3)
    bound = (6 / 164) ** 0.5  # of Xavier
    assert ours.weight.abs().max() <= bound
    assert ours.weight.std() > 0.9 * bound / 3**0.5
    assert not ours.weight[3].any()
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(TOKENS), theirs(TOKENS))
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_stable_embedding_in_half_precision_normalizes_in_full() -> None:
    found = StableEmbedding(100, 64)
    expected = found(TOKENS)
    torch.testing.assert_close(found.half()(TOKENS), expected.half(), rtol=2e-3, atol=2e-3)


def test_embedding_takes_the_arguments_of_torch() -> None:
    weight = torch.randn(10, 4)
    found = Embedding(10, 4, 1, 0.5, 1.0, False, True, weight.clone())
    plain = nn.Embedding(10, 4, 1, 0.5, 1.0, False, True, weight.clone())
    tokens = torch.tensor([1, 2, 2])
    assert torch.equal(found(tokens), plain(tokens))
    found(tokens).sum().backward()
    plain(tokens).sum().backward()
    assert found.weight.grad is not None
    assert plain.weight.grad is not None
    assert found.weight.grad.is_sparse
    assert torch.equal(found.weight.grad.to_dense(), plain.weight.grad.to_dense())


def test_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        EmbeddingNF4(50, 64).to("cpu")(TOKENS)
    assert not caplog.records
