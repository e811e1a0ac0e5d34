"""Quantization states: files of bitsandbytes both ways, and everything Python does with them."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from bnbx import functional
from bnbx.errors import QuantizedDataError
from bnbx.functional import QuantState
from oracles import bitsandbytes_functional
from same_bits import FLOATS, same_bits, same_dicts

SHAPES = ((64, 130), (7,), (3, 5, 7), (1, 2))
COMPRESSED = pytest.mark.parametrize("compressed", [False, True])


@pytest.fixture(scope="module")
def theirs() -> Any:
    return bitsandbytes_functional()


@COMPRESSED
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_both_ways(theirs: Any, dtype: torch.dtype, quant_type: str, compressed: bool) -> None:
    """What one writes is what the other writes, to the byte, and each reads it."""
    for shape in SHAPES:
        x = torch.randn(shape).to(dtype)
        kind = dict(quant_type=quant_type, compress_statistics=compressed)
        _, state = theirs.quantize_4bit(x, **kind)
        codes, found = functional.quantize_4bit(x, exact=False, **kind)  # type: ignore[arg-type]
        for packed in (False, True):
            assert same_dicts(state.as_dict(packed), found.as_dict(packed))
            ours = QuantState.from_dict(state.as_dict(packed), "cpu")
            assert ours == found
            assert theirs.QuantState.from_dict(found.as_dict(packed), torch.device("cpu")) == state
            expected = functional.dequantize_4bit(codes, found)
            assert same_bits(functional.dequantize_4bit(codes, ours), expected)
        key = f"bitsandbytes__{quant_type}"
        assert same_bits(getattr(state, key), getattr(found, key))
        for place in (0, 1, 2, 3, 5):
            assert same_bits(state[place], found[place])
        assert (found[4] is None) == (not compressed)
        assert found.nested == compressed


@COMPRESSED
def test_safetensors(theirs: Any, tmp_path: Path, compressed: bool) -> None:
    """Files of the same bytes, with the prefix that a layer's parameter gives to its keys."""
    safetensors = pytest.importorskip("safetensors.torch")
    x = torch.randn(96, 70).bfloat16()
    kind = dict(quant_type="nf4", compress_statistics=compressed)
    codes, state = theirs.quantize_4bit(x, **kind)
    ours, found = functional.quantize_4bit(x, exact=False, **kind)  # type: ignore[arg-type]
    files = []
    for each, by in ((codes, state), (ours, found)):
        entries = {f"weight.{key}": value for key, value in by.as_dict(packed=True).items()}
        files.append(safetensors.save({"weight": each, **entries}))
    assert files[0] == files[1]
    path = tmp_path / "weight.safetensors"
    path.write_bytes(files[0])
    loaded = safetensors.load_file(path)
    weight = loaded.pop("weight")
    read = QuantState.from_dict(loaded, "cpu")
    assert read == found
    assert same_bits(functional.dequantize_4bit(weight, read), theirs.dequantize_4bit(codes, state))


@pytest.mark.parametrize("nested", [False, True])
def test_states_of_bare_tables(theirs: Any, nested: bool) -> None:
    """They have no type and no shape; their tables say it all."""
    x = torch.randn(1000)
    for code in (None, functional.create_linear_map(), functional.create_dynamic_map(True, 7, 6)):
        codes, state = functional.quantize_blockwise(x, code, blocksize=64, nested=nested)
        found = QuantState.from_dict(state.as_dict(packed=True), "cpu")
        assert found.quant_type is None
        assert found.shape is None
        expected = functional.dequantize_blockwise(codes, state)
        assert same_bits(functional.dequantize_blockwise(codes, found), expected)
        other = theirs.QuantState.from_dict(state.as_dict(), torch.device("cpu"))
        assert same_bits(theirs.dequantize_blockwise(codes, other), expected)


def test_torch_files() -> None:
    _, state = functional.quantize_4bit(torch.randn(300), compress_statistics=True)
    buffer = io.BytesIO()
    torch.save(state.as_dict(packed=True), buffer)
    buffer.seek(0)
    assert QuantState.from_dict(torch.load(buffer, weights_only=True), "cpu") == state


def test_reading_leaves_the_dict_as_it_is() -> None:
    _, state = functional.quantize_4bit(torch.randn(300))
    saved = state.as_dict(packed=True)
    before = dict(saved)
    QuantState.from_dict(saved, "cpu")
    assert saved == before


def test_copies() -> None:
    codes, state = functional.quantize_4bit(torch.randn(300), compress_statistics=True)
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state)), copy.copy(state)):
        assert other == state
        expected = functional.dequantize_4bit(codes, state)
        assert same_bits(functional.dequantize_4bit(codes, other), expected)
    copied = copy.deepcopy(state)
    copied.absmax[0] ^= 1
    assert copied != state


def test_equality() -> None:
    x = torch.randn(300)
    _, state = functional.quantize_4bit(x)
    assert state == functional.quantize_4bit(x)[1]
    for other in (
        functional.quantize_4bit(x, quant_type="nf4")[1],
        functional.quantize_4bit(x, blocksize=128)[1],
        functional.quantize_4bit(x.half())[1],
        functional.quantize_4bit(x.view(3, 100))[1],
        functional.quantize_4bit(x * 2)[1],
        functional.quantize_4bit(x, compress_statistics=True)[1],
        functional.quantize_4bit(x[:299])[1],
        "state",
    ):
        assert state != other


def test_to() -> None:
    _, state = functional.quantize_4bit(torch.randn(300), compress_statistics=True)
    moved = copy.deepcopy(state).to("meta")
    assert moved.absmax.is_meta
    assert moved.code is not None
    assert moved.code.is_meta
    assert moved.state2 is not None
    assert moved.state2.absmax.is_meta
    assert state.to("cpu") is state
    assert not state.absmax.is_meta


def test_attributes_that_are_not_there() -> None:
    _, state = functional.quantize_4bit(torch.randn(300), quant_type="nf4")
    for name in ("bitsandbytes__fp4", "nothing"):
        with pytest.raises(AttributeError, match=name):
            getattr(state, name)
    with pytest.raises(IndexError):
        state[6]


def test_states_that_contradict_themselves() -> None:
    codes, state = functional.quantize_4bit(torch.randn(300), compress_statistics=True)
    for name, value, text in [
        ("state2", None, "scale is torch.uint8"),
        ("absmax", torch.ones(5), "uint8 codes"),
        ("offset", None, "offset"),
        ("shape", None, "shape"),
        ("shape", torch.Size([301]), "elements"),
        ("blocksize", 7, "blocksize=7"),
        ("blocksize", 128, "scale"),
        ("quant_type", "nf5000", "nf5"),
        ("quant_type", "dynamic8", "4-bit"),
        ("quant_type", None, "expected the name"),
        ("dtype", torch.int8, "int8"),
    ]:
        bad = copy.copy(state)
        setattr(bad, name, value)
        with pytest.raises((QuantizedDataError, ValueError), match=text):
            functional.dequantize_4bit(codes, bad)


@pytest.mark.parametrize("form", [None, 3, "state", (1, 2), (torch.ones(1),), [1] * 6, object()])
def test_what_is_no_state(form: Any) -> None:
    codes = torch.zeros(8, dtype=torch.uint8)
    for function in (functional.dequantize_blockwise, functional.dequantize_4bit):
        with pytest.raises((TypeError, ValueError), match=r"state|absmax|tensor"):
            function(codes, form)


def as_list(state: Any) -> list[Any]:
    """A state of bytes as quantize_blockwise of bitsandbytes 0.39 to 0.41 returned it."""
    second = None if state.state2 is None else as_list(state.state2)
    nested = second is not None
    return [state.absmax, state.code, state.blocksize, nested, state.dtype, state.offset, second]


@pytest.mark.parametrize("form", [list, tuple])
@pytest.mark.parametrize("nested", [False, True])
def test_lists_of_bytes(nested: bool, form: type) -> None:
    x = torch.randn(2000).half()
    codes, state = functional.quantize_blockwise(x, blocksize=64, nested=nested)
    expected = functional.dequantize_blockwise(codes, state)
    found = functional.dequantize_blockwise(codes, form(as_list(state)))
    assert same_bits(found, expected)
    without_table = as_list(state)
    without_table[1] = None
    assert same_bits(functional.dequantize_blockwise(codes, without_table), expected)


@COMPRESSED
@pytest.mark.parametrize("listed", [False, True], ids=["state2", "list"])
@pytest.mark.parametrize("table", [False, True], ids=["0.39", "0.41"])
def test_lists_of_halves(compressed: bool, listed: bool, table: bool) -> None:
    """0.41 appended the table; state2 is one of the lists above, in which it came."""
    x = torch.randn(50, 70).bfloat16()
    codes, state = functional.quantize_4bit(x, quant_type="nf4", compress_statistics=compressed)
    second: Any = as_list(state.state2) if listed and compressed else state.state2
    nested = [state.offset, second] if compressed else None
    old = [state.absmax, state.shape, state.dtype, state.blocksize, nested, state.quant_type]
    old += [state.code] if table else []
    expected = functional.dequantize_4bit(codes, state)
    assert same_bits(functional.dequantize_4bit(codes, old), expected)
    assert same_bits(functional.dequantize_nf4(codes, old), expected)
    row = torch.randn(1, 70).bfloat16()
    product = functional.gemv_4bit(row, codes, state=old)
    assert same_bits(product, functional.gemv_4bit(row, codes, state=state))


def test_lists_that_are_none() -> None:
    codes, state = functional.quantize_blockwise(torch.randn(2000), blocksize=64, nested=True)
    good = as_list(state)
    endless = [*good]
    endless[6] = endless
    for bad, text in [
        (good[:5], "list of 5 entries"),
        ([*good, None], "list of 8 entries"),
        ([*good[:6], None], "as state2"),
        ([*good[:6], good], "whose own scales are not quantized"),
        (endless, "whose own scales are not quantized"),
        ([*good[:6], state], "whose own scales are not quantized"),
        ([None, *good[1:]], "absmax is NoneType"),
        ([*good[:5], None, good[6]], "offset"),
    ]:
        with pytest.raises((TypeError, ValueError), match=text):
            functional.dequantize_blockwise(codes, bad)
    halves, four = functional.quantize_4bit(torch.randn(2000), quant_type="nf4")
    for shape in (7, "2000", [2000.0]):
        listed = [four.absmax, shape, four.dtype, 64, None, "nf4"]
        with pytest.raises(ValueError, match="shape"):
            functional.dequantize_4bit(halves, listed)
