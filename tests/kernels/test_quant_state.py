"""`QuantState`: made by hand or from parts, changed, compared, and turned into entries and back."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch

from bnbx.errors import OptionError, QuantizedDataError, UnknownNameError
from bnbx.kernels import table_types
from bnbx.kernels.coding import decode, encode
from bnbx.kernels.encoding import from_label, make_encoding
from bnbx.kernels.quant_state import QuantState
from bnbx.kernels.table_types import type_of_table
from bnbx.registry import quant_types
from oracles import bitsandbytes_functional

SHAPE = torch.Size((4, 96))
TYPES = quant_types().names()


def made(name: str = "nf4", **settings: Any) -> tuple[torch.Tensor, QuantState]:
    torch.manual_seed(0)
    encoding = make_encoding(name, **settings)
    parts = encode(encoding, torch.randn(SHAPE))
    return QuantState.from_parts(encoding, parts, SHAPE, torch.bfloat16)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", TYPES)
def test_entries_and_back(name: str, double: bool, packed: bool) -> None:
    try:
        codes, state = made(name, double=double)
    except OptionError:
        assert double  # of a type whose scales are not float32
        return
    entries = state.as_dict(packed=packed)
    assert packed == all(isinstance(value, torch.Tensor) for value in entries.values())
    kept = dict(entries)
    again = QuantState.from_dict(entries, "cpu")
    assert entries.keys() == kept.keys()
    assert again == state
    assert again.label == state.label
    encoding = state.encoding
    one, two = (decode(encoding, each.parts(codes), SHAPE) for each in (state, again))
    assert torch.equal(one, two)
    prefixed = {f"model.layer.weight.{key}": value for key, value in entries.items()}
    assert QuantState.from_dict(prefixed, "cpu") == state


def test_entries_of_unsigned_codes() -> None:
    _, state = made("dynamic8", signed=False)
    assert not QuantState.from_dict(state.as_dict(packed=True), None).signed


@pytest.mark.parametrize("double", [False, True])
def test_keys_and_json_are_those_of_bitsandbytes(double: bool) -> None:
    functional = bitsandbytes_functional()
    torch.manual_seed(0)
    x = torch.randn(SHAPE, dtype=torch.float16)
    _, theirs = functional.quantize_4bit(x, quant_type="nf4", compress_statistics=double)
    encoding = make_encoding("nf4", double=double)
    _, ours = QuantState.from_parts(encoding, encode(encoding, x), SHAPE, x.dtype)
    key = "quant_state.bitsandbytes__nf4"
    one, two = ours.as_dict(packed=True), theirs.as_dict(packed=True)
    assert list(one) == list(two)
    assert bytes(one[key].tolist()) == bytes(two[key].tolist())
    assert list(ours.as_dict()) == list(theirs.as_dict())


def test_state_by_hand_as_bitsandbytes_makes_them() -> None:
    codes, state = made()
    by_hand = QuantState(
        state.absmax, SHAPE, state.code, 64, "nf4", torch.bfloat16, offset=None, state2=None
    )
    assert by_hand == state
    assert by_hand.check(codes) is state.encoding
    by_hand.quant_type = None  # then the table says what it is
    assert by_hand.encoding.codebook.levels == pytest.approx(state.code.tolist())  # type: ignore[union-attr]
    assert torch.equal(
        decode(by_hand.encoding, by_hand.parts(codes), SHAPE),
        decode(state.encoding, state.parts(codes), SHAPE),
    )


def test_label_follows_the_attributes() -> None:
    _, state = made(double=True)
    assert from_label(state.label) is state.encoding
    state.blocksize = 128
    assert from_label(state.label).block_size == 128
    state.quant_type = "fp4"
    assert from_label(state.label).quant_type.name == "fp4"
    assert state.state2 is not None
    state.state2.blocksize = 512
    assert from_label(state.label).second_block == 512
    state.state2 = None
    assert from_label(state.label).second is None


def test_nested_scales_in_another_table() -> None:
    """Bitsandbytes always has its dynamic one, but the file says which."""
    codes, state = made(double=True, second="linear8")
    entries = state.as_dict(packed=True)
    assert type_of_table(entries["nested_quant_map"]).bits == 8
    again = QuantState.from_dict(entries, "cpu")
    encoding = again.check(codes)
    assert encoding.second is not None
    assert torch.equal(
        decode(encoding, again.parts(codes), SHAPE),
        decode(state.encoding, state.parts(codes), SHAPE),
    )


def test_table_of_the_usual_type_is_that_type() -> None:
    usual = quant_types().get("dynamic8")
    assert type_of_table(torch.tensor(usual.values)) is usual
    other = type_of_table(torch.tensor([-1.0, -0.5, 0.5, 1.0]))
    assert (other.bits, type_of_table(torch.tensor([-1.0, -0.5, 0.5, 1.0]))) == (2, other)
    for wrong in (torch.ones(3), torch.zeros(4), torch.tensor([-3.0, 0, 1, 2]), torch.ones(2**10)):
        with pytest.raises(QuantizedDataError, match="a table of"):
            type_of_table(wrong)
    with pytest.raises(QuantizedDataError, match="neither a quant type nor a table"):
        type_of_table(None)


def test_types_of_many_tables_are_not_all_kept() -> None:
    """Tables fitted to data are as many as there are data."""
    first = torch.tensor([-1.0, -0.5, 0.5, 1.0])
    kept = type_of_table(first)
    assert type_of_table(first.clone()) is kept
    bound = table_types._of_bytes.cache_info().maxsize
    assert bound is not None
    for number in range(bound + 10):
        type_of_table(torch.tensor([-1.0, -0.5, number / 1000, 1.0]))
    assert table_types._of_bytes.cache_info().currsize == bound
    again = type_of_table(first)
    assert again == kept
    assert make_encoding(again) is make_encoding(kept)  # what is derived is found by equality


def test_equality_and_copies() -> None:
    _, state = made(double=True)
    for again in (copy.deepcopy(state), pickle.loads(pickle.dumps(state)), copy.copy(state)):
        assert again == state
    other = copy.deepcopy(state)
    other.absmax[0] += 1
    assert other != state
    for name, value in (("dtype", torch.float16), ("blocksize", 32), ("quant_type", "fp4")):
        other = copy.deepcopy(state)
        setattr(other, name, value)
        assert other != state
    assert made()[1] != state
    assert state != "nf4"
    with pytest.raises(TypeError):
        hash(state)
    assert "nf4, shape=(4, 96), bfloat16, blocksize=64, scales in blocks of 256" in repr(state)


def test_moving_is_in_place() -> None:
    _, state = made("nvfp4")
    assert state.to("meta") is state
    for tensor in (state.absmax, state.code, state.tensor_scale):
        assert tensor is not None
        assert tensor.is_meta
    _, state = made(double=True)
    state.to("meta")
    assert state.state2 is not None
    assert state.state2.absmax.is_meta
    assert state.nbytes == 6 + 64 + 4 + 4 + 1024


def test_codes_that_do_not_fit() -> None:
    codes, state = made()
    with pytest.raises(QuantizedDataError, match="codes is"):
        state.check(codes[:-1])
    with pytest.raises(QuantizedDataError, match="not a contiguous matrix"):
        state.check(torch.zeros(2, 192, dtype=torch.bfloat16)[:, ::4])
    state.shape = None
    with pytest.raises(QuantizedDataError, match="shape of the tensor is not known"):
        state.check(codes)


def test_nonsense_is_an_error() -> None:
    _, state = made()
    entries = state.as_dict(packed=True)
    key = "quant_state.bitsandbytes__nf4"
    with pytest.raises(QuantizedDataError, match="without quant_type"):
        QuantState.from_dict({}, "cpu")
    with pytest.raises(QuantizedDataError, match="no entry 'stranger'"):
        QuantState.from_dict({**entries, "stranger": torch.ones(1)}, "cpu")
    about = json.loads(bytes(entries[key].tolist()))
    unpacked = {**{k: v for k, v in entries.items() if k != key}, **about}
    assert QuantState.from_dict(unpacked, "cpu") == state
    with pytest.raises(UnknownNameError, match="did you mean 'nf4'"):
        QuantState.from_dict({**unpacked, "quant_type": "nf44"}, "cpu")
    with pytest.raises(QuantizedDataError, match="holds"):
        QuantState.from_dict({**entries, key: torch.tensor([91, 93], dtype=torch.uint8)}, "cpu")
    assert len(state.as_dict(packed=True)[key]) == len(entries[key])


@pytest.mark.parametrize("double", [False, True])
def test_tensors_are_no_views_of_more_memory(double: bool) -> None:
    """Safetensors refuses such, and torch.save writes the whole memory."""
    encoding = make_encoding("nf4", double=double)
    whole = [torch.stack([part, part]) for part in encode(encoding, torch.randn(SHAPE))]
    codes, state = QuantState.from_parts(encoding, [w[1] for w in whole], SHAPE, torch.float32)
    for tensor in (codes, *state.parts(codes)):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
