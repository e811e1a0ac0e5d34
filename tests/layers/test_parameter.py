"""What libraries do with the weight of a 4-bit layer: each line of contract 4.2 and more."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnbx.errors import QuantizedDataError
from bnbx.layers.module import QuantizedModule
from bnbx.layers.moving import MovingModule
from bnbx.nn import FP4Params, Linear4bit, LinearNF4, Params4bit, QuantParameter, QuantState
from oracles import bitsandbytes_functional

SETTINGS = {
    "blocksize",
    "bnb_quantized",
    "compress_statistics",
    "module",
    "quant_state",
    "quant_storage",
    "quant_type",
}


def weight(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def quantized(**settings: Any) -> Params4bit:
    found: Params4bit = Params4bit(weight(64, 96), **settings).to("cpu")
    return found


def assert_same(one: QuantParameter, two: QuantParameter) -> None:
    assert type(one) is type(two)
    assert one is not two
    assert one.dtype == two.dtype
    assert torch.equal(one.detach(), two.detach())
    assert one.requires_grad == two.requires_grad
    assert one.__dict__.keys() == two.__dict__.keys()
    for name in SETTINGS - {"module"}:
        assert getattr(one, name) == getattr(two, name)


# ---- making one


def test_settings_are_the_dict_and_constructor_arguments() -> None:
    """Peft builds parameters anew from the `__dict__` of others."""
    layer = Linear4bit(96, 64, quant_type="nf4")
    assert set(layer.weight.__dict__) == SETTINGS
    layer.to("cpu")
    settings = layer.weight.__dict__
    assert set(settings) == SETTINGS
    settings["bnb_quantized"] = False
    settings["requires_grad"] = False
    again = Params4bit(weight(64, 96), **settings).to("cpu")
    assert again.bnb_quantized
    assert again.module is layer
    assert torch.equal(again.detach(), quantized(quant_type="nf4").detach())
    assert layer.quant_state is again.quant_state


def test_defaults_and_positions_are_those_of_bitsandbytes() -> None:
    found = Params4bit(weight(4, 4))
    assert not found.requires_grad
    assert (found.blocksize, found.compress_statistics, found.quant_type) == (64, True, "fp4")
    assert (found.quant_storage, found.quant_state) == (torch.uint8, None)
    assert (found.module, found.bnb_quantized) == (None, False)
    found = Params4bit(weight(4, 4), False, None, 128, False, "nf4", torch.bfloat16, None, False)
    assert (found.blocksize, found.compress_statistics, found.quant_type) == (128, False, "nf4")
    assert found.quant_storage == torch.bfloat16
    assert Params4bit().numel() == 0


def test_unknown_arguments_are_accepted_and_dropped() -> None:
    """Transformers marks parameters, and accelerate passes all of `__dict__` on."""
    found: Any = Params4bit(weight(4, 4), _is_hf_initialized=True, quant_type="nf4")
    assert set(found.__dict__) == SETTINGS
    found._is_hf_initialized = True
    again: Any = Params4bit(weight(4, 4), **found.__dict__)
    assert set(again.__dict__) == SETTINGS
    for other in (found.to("cpu").to("cpu"), copy.copy(found), copy.deepcopy(found)):
        assert set(other.__dict__) == SETTINGS
    theirs = bitsandbytes_functional() and pytest.importorskip("bitsandbytes.nn").Params4bit
    assert set(theirs(weight(4, 4), _is_hf_initialized=True).__dict__) == SETTINGS


def test_names_of_classes_are_compared_as_strings() -> None:
    assert type(Linear4bit(4, 4).weight).__name__ == "Params4bit"
    assert Linear4bit.__name__ == "Linear4bit"
    assert FP4Params.__name__ == "FP4Params"
    assert issubclass(FP4Params, Params4bit)


# ---- quantizing and moving


@pytest.mark.parametrize("move", ["cpu()", 'to("cpu")', "to(device)", "to(dtype, device)"])
def test_moving_quantizes(move: str) -> None:
    found: Any = Params4bit(weight(64, 96), quant_type="nf4")
    moved = {
        "cpu()": found.cpu,
        'to("cpu")': lambda: found.to("cpu"),
        "to(device)": lambda: found.to(device=torch.device("cpu"), non_blocking=True),
        "to(dtype, device)": lambda: found.to("cpu", torch.bfloat16),
    }[move]()
    assert moved is found
    assert found.bnb_quantized
    assert found.shape == (64 * 96 // 2, 1)
    assert found.quant_state.shape == (64, 96)
    expected = torch.bfloat16 if "dtype" in move else torch.float32
    assert found.quant_state.dtype == expected


def test_meta_and_dtypes_do_not_quantize() -> None:
    found = Params4bit(weight(64, 96))
    assert not found.to("meta").bnb_quantized
    half = found.to(torch.bfloat16)
    assert not half.bnb_quantized
    assert half.dtype == torch.bfloat16
    assert isinstance(half, Params4bit)
    assert found.half().dtype == torch.float16


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_codes_keep_their_bytes_whatever_dtype_is_asked_for(storage: torch.dtype) -> None:
    """A layer whose codes lie in bfloat16 memory, as FSDP wants it, is converted with its model."""
    layer = Linear4bit(96, 64, quant_type="nf4", quant_storage=storage).to("cpu")
    assert layer.weight.dtype == storage
    assert layer.weight.shape == (64 * 96 // 2 // storage.itemsize, 1)
    before = layer.weight.detach().view(torch.uint8).clone()
    dense = layer.dequantized_weight()
    for convert in ("half", "bfloat16", "double", "float"):
        getattr(layer, convert)()
        assert torch.equal(layer.weight.detach().view(torch.uint8), before)
    assert torch.equal(layer.dequantized_weight(), dense)
    assert torch.equal(layer.weight.to(torch.float16).detach().view(torch.uint8), before)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "torch.BFloat16Tensor"])
def test_type_keeps_codes(dtype: Any, storage: torch.dtype) -> None:
    layer = Linear4bit(96, 64, quant_type="nf4", quant_storage=storage).to("cpu")
    before = layer.weight.detach().view(torch.uint8).clone()
    assert layer.weight.type() == layer.weight.detach().type()
    layer.type(dtype)
    assert torch.equal(layer.weight.detach().view(torch.uint8), before)
    assert layer.bias.dtype == layer.dequantized_weight().dtype == torch.bfloat16
    assert layer(torch.ones(2, 96, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_codes_in_a_float_dtype_are_codes() -> None:
    layer = LinearNF4(96, 64).to("cpu")
    before = layer.weight.detach().clone()
    layer.weight.data = layer.weight.data.half()
    assert layer.weight.dtype == torch.uint8
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_looking_at_a_weight_in_another_dtype_leaves_the_layer_as_it_is(
    storage: torch.dtype,
) -> None:
    layer = Linear4bit(96, 64, quant_type="nf4", quant_storage=storage).to("cpu").bfloat16()
    state = layer.quant_state
    seen = layer.weight.float()
    assert seen.dequantize().dtype == torch.float32
    assert seen.quant_state is not state
    layer.weight.to("meta", torch.float16)
    layer.weight.half()
    assert layer.dequantized_weight().dtype == torch.bfloat16
    assert layer.quant_state is layer.weight.quant_state is state
    assert state is not None
    assert state.absmax.device.type == "cpu"


@pytest.mark.parametrize("holder", [nn.Module, QuantizedModule])
def test_conversions_of_modules_reach_all_who_share_a_weight(holder: Any) -> None:
    """Of any module that holds one, not only of layers."""
    module: Any = nn.ModuleList([holder(), holder()])
    weight = Params4bit(torch.randn(64, 96), quant_type="nf4", quant_storage=torch.bfloat16)
    for each in module:
        each.register_parameter("weight", weight)
    weight.to("cpu")
    state = weight.quant_state
    if holder is QuantizedModule:
        for each in module:
            each.quant_state = state
    module.to(torch.float16)
    assert module[0].weight is module[1].weight is weight
    assert weight.quant_state is state
    assert state is not None
    assert state.dtype == torch.float16


def test_scales_go_where_a_module_brings_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameter of a module stays itself, and so does its state: `to` moved another's."""

    class Away(Params4bit):
        device = property(lambda self: torch.device("cuda"))

    weight = Away(torch.randn(64, 96), quant_type="nf4").to("cpu")
    moved: list[Any] = []
    monkeypatch.setattr(QuantState, "to", lambda state, device: moved.append((state, device)))
    module = MovingModule()
    module.register_parameter("weight", weight)
    module._apply(lambda tensor: tensor)
    assert len(moved) == 1
    assert moved[0][0] is weight.quant_state
    assert moved[0][1] == torch.device("cuda")


def test_moved_parameter_is_another_with_the_same_settings() -> None:
    found = quantized(quant_type="nf4")
    assert_same(found, found.to("cpu"))


def test_data_can_be_set() -> None:
    found = quantized(quant_type="nf4")
    other = torch.zeros_like(found.detach())
    found.data = other
    assert found.data_ptr() == other.data_ptr()
    assert set(found.__dict__) == SETTINGS
    assert found.bnb_quantized


def test_dense_numbers_with_the_settings_of_a_quantized_one_are_quantized_anew() -> None:
    """Peft's pvera and randlora merge so: bitsandbytes leaves a float weight that breaks later."""
    layer = LinearNF4(96, 64).to("cpu")
    merged = layer.dequantized_weight() + 0.5
    layer.weight = Params4bit(merged, **layer.weight.__dict__).to("cpu")
    assert layer.weight.bnb_quantized
    assert layer.weight.dtype == torch.uint8
    torch.testing.assert_close(layer.dequantized_weight(), merged, rtol=0, atol=0.2)
    assert layer(torch.randn(2, 96)).shape == (2, 64)


def test_prequantized_data() -> None:
    found: Any = quantized(quant_type="nf4")
    stats = {f"weight.{key}": v for key, v in found.quant_state.as_dict(packed=True).items()}
    kept = dict(stats)
    layer = LinearNF4(96, 64)
    again = Params4bit.from_prequantized(
        data=found.detach(), quantized_stats=stats, requires_grad=False, device="cpu", module=layer
    )
    assert stats.keys() == kept.keys()  # bitsandbytes takes an entry out of the caller's dict
    assert again.module is layer
    assert layer.quant_state is again.quant_state
    again.module = None
    assert_same(found, again)
    with pytest.raises(QuantizedDataError, match=r"codes is torch.uint8 of shape \(5, 1\)"):
        Params4bit.from_prequantized(found.detach()[:5], stats)
    with pytest.raises(QuantizedDataError, match="without quant_type"):
        Params4bit.from_prequantized(found.detach(), {})


def test_bitsandbytes_reads_it_and_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = bitsandbytes_functional()
    found = Params4bit(weight(64, 128), quant_type="nf4").to("cpu")
    assert found.quant_state is not None
    state = functional.QuantState.from_dict(found.quant_state.as_dict(packed=True), "cpu")
    theirs = functional.dequantize_4bit(found.detach(), state)
    assert torch.equal(theirs, found.dequantize())
    packed, state = functional.quantize_4bit(
        weight(64, 128), quant_type="nf4", compress_statistics=True
    )
    assert torch.equal(packed, found.detach())
    again = Params4bit.from_prequantized(packed, state.as_dict(packed=True))
    assert_same(found, again)


# ---- copies


@pytest.mark.parametrize("of", ["dense", "quantized", "double"])
@pytest.mark.parametrize("how", ["copy", "deepcopy", "pickle", "torch.save"])
def test_copies_are_equal(of: str, how: str) -> None:
    found = Params4bit(weight(64, 96), quant_type="nf4", compress_statistics=of == "double")
    found = found if of == "dense" else found.to("cpu")
    again = _copied(found, how)
    assert_same(found, again)
    if how != "copy":
        assert again.data_ptr() != found.data_ptr()
    if how != "copy" and of != "dense":
        assert again.absmax.data_ptr() != found.absmax.data_ptr()


def _copied(found: Any, how: str) -> Any:
    if how == "copy":
        return copy.copy(found)
    if how == "deepcopy":
        return copy.deepcopy(found)
    if how == "pickle":
        return pickle.loads(pickle.dumps(found))
    memory = io.BytesIO()
    torch.save(found, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copied_layers_have_a_weight_that_is_theirs(how: str) -> None:
    layer = LinearNF4(96, 64).to("cpu")
    again = _copied(layer, how)
    assert again.weight.module is again
    assert again.quant_state is again.weight.quant_state
    assert again.quant_state is not layer.quant_state
    assert torch.equal(again(torch.ones(1, 96)), layer(torch.ones(1, 96)))
    alone = _copied(layer.weight, how)
    assert_same(layer.weight, alone)
    assert how == "deepcopy" or alone.module.weight is alone


def test_a_layer_that_is_gone_frees_its_weight() -> None:
    """The weight refers back to its layer; that is found."""
    layer = LinearNF4(96, 64).to("cpu")
    codes = weakref.ref(layer.weight)
    del layer
    gc.collect()
    assert codes() is None


def test_parts_keep_settings() -> None:
    """FSDP cuts parameters up."""
    found: Any = quantized(quant_type="nf4")
    functions: Any = torch
    by_torch = (functions.chunk(found, 3), functions.split(found, 1024))
    for parts in (*by_torch, found.chunk(3), found.split(1024)):
        assert len(parts) == 3
        assert torch.equal(torch.cat([part.detach() for part in parts]), found.detach())
        for part in parts:
            assert isinstance(part, Params4bit)
            assert part.quant_state is found.quant_state
            assert part.__dict__.keys() == found.__dict__.keys()


# ---- attributes


@pytest.mark.parametrize("double", [False, True])
def test_entries_of_the_state_dict_are_attributes(double: bool) -> None:
    """FSDP takes every key, "weight.absmax", for a path of attributes."""
    layer = Linear4bit(96, 64, quant_type="nf4", compress_statistics=double).to("cpu")
    entries = [key for key in layer.state_dict() if key.startswith("weight.")]
    assert len(entries) == (5 if double else 3)
    for key in entries:
        found: Any = layer
        for name in key.split("."):
            found = getattr(found, name)
        assert torch.equal(found, layer.state_dict()[key])
    found = layer.weight
    assert found.code is found.quant_map is found.quant_state.code
    assert (found.offset is None) != double
    assert (found.state2 is None) != double
    if double:
        assert found.nested_blocksize == 256
        assert found.nested_dtype == torch.float32
        assert found.nested_offset is found.offset


def test_missing_attributes_are_attribute_errors() -> None:
    found = Params4bit(weight(4, 4))
    for name in ("absmax", "code", "quant_map", "offset", "state2", "nested_absmax"):
        assert not hasattr(found, name)
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            getattr(found, name)
    assert not hasattr(quantized(compress_statistics=False), "nested_absmax")
    assert found.element_size() == 4
    assert quantized().element_size() == 1
    assert quantized().quant_storage.itemsize == 1


def test_quant_state_of_a_parameter_is_of_this_class() -> None:
    assert isinstance(quantized().quant_state, QuantState)
