"""State dicts of layers: those of bitsandbytes, both ways; safetensors; files that lie."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnbx.kernels.state_dict import pack_json
from bnbx.nn import (
    Embedding4bit,
    Linear4bit,
    Params4bit,
    QuantEmbedding,
    QuantLinear,
    quantize_,
)
from oracles import bitsandbytes_functional
from quantized_layers import TYPES, ids, language_model, layer

KEY = "weight.quant_state.bitsandbytes__nf4"
State = dict[str, Tensor]


def _bitsandbytes() -> Any:
    bitsandbytes_functional()
    return pytest.importorskip("bitsandbytes.nn")


class Two(nn.Module):
    """Two 4-bit layers of any library."""

    def __init__(self, kind: Any, **settings: Any) -> None:
        super().__init__()
        self.first = kind(128, 192, **settings)
        self.second = kind(192, 64, bias=False, **settings)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(x).relu())
        return found


def _bytes(value: Tensor) -> Tensor:
    return value.detach().contiguous().view(torch.uint8)


def _assert_equal(one: State, two: State, nearly: str = "(none)") -> None:
    """The same entries, to the last bit; keys that end in `nearly` may have a few other codes.

    On a CPU bitsandbytes rounds a number to one of 65536 before it looks for the nearest of an
    8-bit table, so that one code in 500 is a neighbor of the right one.
    """
    assert list(one) == list(two)
    for key, value in one.items():
        assert value.dtype == two[key].dtype, key
        assert value.shape == two[key].shape, key
        if key.endswith(nearly):
            off = (value.int() - two[key].int()).abs()
            assert off.max() <= 1
            assert off.float().mean() < 0.01
        else:
            assert torch.equal(_bytes(value), _bytes(two[key])), key


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_bitsandbytes_both_ways(
    name: str, double: bool, dtype: torch.dtype, storage: torch.dtype
) -> None:
    """A model that it quantized: the same bytes are made here, and come back from here."""
    library = _bitsandbytes()
    settings: dict[str, Any] = {
        "quant_type": name,
        "compress_statistics": double,
        "quant_storage": storage,
    }
    torch.manual_seed(0)
    theirs = Two(library.Linear4bit, **settings).to(dtype)
    ours = Two(Linear4bit, **settings).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    theirs.to("cpu")
    ours.to("cpu")
    saved = theirs.state_dict()
    _assert_equal(ours.state_dict(), saved, "weight.absmax" if double else "(none)")

    other = Two(Linear4bit, quant_type="nf4").to(dtype)
    other.load_state_dict(saved)
    _assert_equal(other.state_dict(), saved)
    for part in ("first", "second"):
        one, two = getattr(other, part), getattr(theirs, part)
        functional = bitsandbytes_functional()
        weight = functional.dequantize_4bit(two.weight.data, two.weight.quant_state)
        assert torch.equal(one.dequantized_weight(), weight)
        stats = {
            key.removeprefix(f"{part}.weight."): value
            for key, value in other.state_dict().items()
            if key.startswith(f"{part}.weight.")
        }
        again = library.Params4bit.from_prequantized(
            getattr(other, part).weight.detach(), stats, device="cpu"
        )
        assert again.quant_state == two.weight.quant_state
        assert torch.equal(functional.dequantize_4bit(again.data, again.quant_state), weight)


def test_products_are_those_of_bitsandbytes() -> None:
    library = _bitsandbytes()
    theirs = Two(library.Linear4bit, quant_type="nf4").to("cpu").train()
    ours = Two(Linear4bit, quant_type="nf4").to("cpu")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 128)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("kind", [QuantLinear, QuantEmbedding])
def test_every_type_comes_back(name: str, kind: Any) -> None:
    found = kind(64, 256, quant_type=name).to("cpu")
    saved = found.state_dict()
    assert f"weight.quant_state.bitsandbytes__{name}" in saved
    again = kind(64, 256)
    again.load_state_dict(saved)
    _assert_equal(again.state_dict(), saved)
    assert again.weight.quant_type == name
    assert torch.equal(again.dequantized_weight(), found.dequantized_weight())


def _model() -> nn.Module:
    model = language_model()
    quantize_(model, "nf4", double=True, overrides={"*mlp*": "nvfp4"}, parameters=["*experts.up"])
    return model


def test_files_of_torch_with_weights_only(tmp_path: Path) -> None:
    model = _model()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    other = language_model()
    quantize_(other, "linear8", parameters=["*experts.up"])
    other.load_state_dict(loaded)
    assert torch.equal(other(ids()), model(ids()))
    assert other.lm_head.weight is other.embed.weight


def test_files_of_safetensors(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch")
    model = _model()
    library.save_model(model, str(tmp_path / "model.safetensors"))
    other = _model()
    for value in other.state_dict().values():
        value.zero_()
    library.load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(other(ids()), model(ids()))


def test_no_entries_share_memory() -> None:
    """Safetensors refuses tensors that do, but for weights that are one by intent."""
    found = language_model(tied=False)
    quantize_(found, "nf4", double=True)
    saved = found.state_dict()
    assert len({value.data_ptr() for value in saved.values()}) == len(saved)


@pytest.mark.parametrize("quantized", [False, True])
def test_models_on_the_meta_device_take_over_what_is_loaded(quantized: bool) -> None:
    model = language_model()
    dense = copy.deepcopy(model.state_dict())
    quantize_(model, "nf4", parameters=["*experts.up"])
    saved = model.state_dict() if quantized else dense
    with torch.device("meta"):
        other = language_model()
    report = quantize_(other, "nf4", parameters=["*experts.up"])
    assert len(report.quantized) == 10
    other.load_state_dict(saved, assign=True)
    other.to("cpu")
    assert torch.equal(other(ids()), model(ids()))
    if quantized:
        assert other.embed.weight.data_ptr() == saved["embed.weight"].data_ptr()


def test_loading_copies_unless_it_assigns() -> None:
    found, other = layer(64, 32, double=True), QuantLinear(64, 32).to("cpu")
    weight = other.weight
    saved = found.state_dict()
    other.load_state_dict(saved)
    assert other.weight is weight  # whoever shares it goes on sharing it
    before = other(torch.ones(1, 64))
    for value in saved.values():
        value.zero_()
    assert torch.equal(other(torch.ones(1, 64)), before)
    assert before.abs().sum() > 0


def test_meta_without_assign_is_an_error() -> None:
    saved = layer(64, 32, bias=False).state_dict()
    with pytest.raises(RuntimeError, match=r"meta device.*assign=True"):
        QuantLinear(64, 32, bias=False, device="meta").load_state_dict(saved)


def test_dense_numbers_are_quantized_if_the_layer_is() -> None:
    dense = nn.Linear(64, 32)
    found, plain = layer(64, 32, quant_type="linear8"), QuantLinear(64, 32)
    for each in (found, plain):
        each.load_state_dict(dense.state_dict())
    assert found.weight.bnb_quantized
    assert not plain.weight.bnb_quantized
    assert torch.equal(plain.weight, dense.weight)
    torch.testing.assert_close(found.dequantized_weight(), dense.weight.detach(), rtol=0, atol=1e-3)
    meta = QuantLinear(64, 32, quant_type="linear8", device="meta")
    meta.load_state_dict(dense.state_dict(), assign=True)
    assert not meta.weight.bnb_quantized
    x = torch.randn(2, 64)
    assert torch.equal(meta.to("cpu")(x), found(x))


def test_strictness_is_that_of_torch() -> None:
    found = layer(64, 32)
    saved = found.state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        found.load_state_dict({"bias": saved["bias"]})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"stranger"'):
        found.load_state_dict({**saved, "stranger": saved["bias"]})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight.absmin"'):
        found.load_state_dict({**saved, "weight.absmin": saved["bias"]})
    result = found.load_state_dict({**saved, "stranger": saved["bias"]}, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], ["stranger"])


def test_entries_may_have_gradients_kept() -> None:
    found = layer(64, 32)
    kept = found.state_dict(keep_vars=True)
    assert kept["weight"] is found.weight
    assert kept["weight.absmax"] is found.weight.absmax


def test_quant_type_of_a_stranger_brings_its_table(tmp_path: Path) -> None:
    """A file made where a plugin is installed can be read where it is not."""
    from bnbx.registry import QuantType

    spec = QuantType(name="stranger", summary="", bits=2, values=(-1.0, -0.25, 0.25, 1.0))
    found = layer(64, 32, quant_type=spec)
    saved = found.state_dict()
    (key,) = [key for key in saved if "quant_state" in key]
    about = json.loads(bytes(saved[key].tolist()))
    assert QuantType.from_json(about["spec"]) == spec
    del saved[key]
    about["quant_type"] = "stranger"
    saved["weight.quant_state.bitsandbytes__stranger"] = pack_json(about)
    again = QuantLinear(64, 32)
    again.load_state_dict(saved)
    assert torch.equal(again.dequantized_weight(), found.dequantized_weight())


# ---- files that lie


def _about(saved: State) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bytes(saved[KEY].tolist()))
    return found


def _telling(**changes: Any) -> Callable[[State], None]:
    def change(saved: State) -> None:
        about = {**_about(saved), **changes}
        saved[KEY] = pack_json({key: value for key, value in about.items() if value != "gone"})

    return change


def _with(key: str, value: Any) -> Callable[[State], None]:
    def change(saved: State) -> None:
        saved[key] = value(saved[key]) if callable(value) else value

    return change


def _without(*keys: str) -> Callable[[State], None]:
    def change(saved: State) -> None:
        for key in keys:
            del saved[key]

    return change


LIES: dict[str, tuple[Callable[[State], None], str]] = {
    "no scales": (_without("weight.absmax"), "absmax is None"),
    "few scales": (_with("weight.absmax", lambda t: t[:3]), "scale is .* of 3 elements"),
    "whole scales": (_with("weight.absmax", lambda t: t.int()), "absmax is torch.int32"),
    "few codes": (_with("weight", lambda t: t[:10]), r"codes is torch.uint8 of shape \(10, 1\)"),
    "many codes": (_with("weight", lambda t: torch.cat([t, t])), "codes is torch.uint8"),
    "no table": (_without("weight.quant_map"), "quant_map is None"),
    "another table": (_with("weight.quant_map", lambda t: t.flip(0)), "another type of this name"),
    "a table that was cast": (
        _with("weight.quant_map", torch.Tensor.bfloat16),
        "cast to torch.bfloat16",
    ),
    "a long table": (_with("weight.quant_map", torch.zeros(256)), r"quant_map has \(256,\)"),
    "no state": (_without(KEY), "without an entry that ends in"),
    "codes alone": (
        _without(KEY, "weight.absmax", "weight.quant_map"),
        "without a quantization state",
    ),
    "no JSON": (_with(KEY, torch.zeros(9, dtype=torch.uint8)), "holds no JSON"),
    "JSON of a list": (_with(KEY, pack_json([1])), "expected a JSON object"),  # type: ignore[arg-type]
    "deep JSON": (
        _with(KEY, torch.tensor(list(b"[" * 100000), dtype=torch.uint8)),
        "holds no JSON",
    ),
    "huge JSON": (_with(KEY, torch.zeros(2 << 20, dtype=torch.uint8)), "expected a short JSON"),
    "JSON in floats": (_with(KEY, torch.zeros(9)), "expected JSON in a uint8 tensor"),
    "another type": (_telling(quant_type="fp4"), "is of the quant type 'fp4'"),
    "no type": (_telling(quant_type="gone"), "is of the quant type None"),
    "another shape": (_telling(shape=[64, 32]), r"shape \(64, 32\); expected \(32, 64\)"),
    "a huge shape": (_telling(shape=[1 << 40, 1 << 40]), "shape="),
    "a negative shape": (_telling(shape=[-32, -64]), "expected a list of sizes"),
    "a shape of floats": (_telling(shape=[32.0, 64.0]), "expected a list of sizes"),
    "a shape of text": (_telling(shape="3264"), "expected a list of sizes"),
    "no shape": (_telling(shape="gone"), "without shape"),
    "another block size": (_telling(blocksize=128), "of 32 elements; expected .* of 16 elements"),
    "an odd block size": (_telling(blocksize=48), "block size 48"),
    "block size true": (_telling(blocksize=True), "blocksize=True"),
    "a block size in words": (_telling(blocksize="64"), "blocksize='64'"),
    "a dtype that is code": (_telling(dtype="load"), "dtype='load'"),
    "a dtype of codes": (_telling(dtype="int8"), "dtype='int8'"),
    "an unknown entry": (_telling(absmin=3), "no entry 'absmin'; did you mean 'absmax'"),
    "a spec of another": (_telling(spec="{}"), "spec"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_errors_before_anything_is_read(lie: str) -> None:
    change, message = LIES[lie]
    saved = layer(64, 32).state_dict()
    change(saved)
    found = layer(64, 32)
    before = found(torch.ones(1, 64))
    with pytest.raises(RuntimeError, match=message):
        found.load_state_dict(saved)
    assert torch.equal(found(torch.ones(1, 64)), before)


SECOND_LIES: dict[str, tuple[Callable[[State], None], str]] = {
    "no scales of scales": (_without("weight.nested_absmax"), "absmax is torch.uint8"),
    "no table": (_without("weight.nested_quant_map"), "without nested_quant_map"),
    "a short table": (_with("weight.nested_quant_map", torch.zeros(3)), "a table of 3 numbers"),
    "a table of NaN": (
        _with("weight.nested_quant_map", torch.full((256,), torch.nan)),
        "a table of 256 numbers",
    ),
    "a wide table": (_with("weight.nested_quant_map", lambda t: t * 5), "a table of 256 numbers"),
    "many scales": (_with("weight.nested_absmax", torch.ones(9)), "second_scale is .* of 9"),
    "no mean": (_telling(nested_offset="gone"), "without nested_offset"),
    "a mean in words": (_telling(nested_offset="0"), "nested_offset='0'"),
    "a mean without end": (_telling(nested_offset=10**400), "nested_offset="),
    "scales in floats": (_with("weight.absmax", torch.ones(32)), "absmax is torch.float32"),
}


@pytest.mark.parametrize("lie", SECOND_LIES)
def test_lies_about_quantized_scales(lie: str) -> None:
    change, message = SECOND_LIES[lie]
    saved = layer(64, 32, double=True).state_dict()
    change(saved)
    with pytest.raises(RuntimeError, match=message):
        layer(64, 32).load_state_dict(saved)


def test_a_quant_type_that_nobody_has_is_named() -> None:
    saved = layer(64, 32).state_dict()
    about = {**_about(saved), "quant_type": "nf44"}
    saved["weight.quant_state.bitsandbytes__nf44"] = pack_json(about)
    del saved[KEY]
    with pytest.raises(RuntimeError, match="no quant type 'nf44'; did you mean 'nf4'"):
        layer(64, 32).load_state_dict(saved)


def test_two_states_are_an_error() -> None:
    saved = layer(64, 32).state_dict()
    saved["weight.quant_state.bitsandbytes__fp4"] = saved[KEY]
    with pytest.raises(RuntimeError, match="there are 2 quantization states"):
        layer(64, 32).load_state_dict(saved)


def test_embeddings_are_saved() -> None:
    """Bitsandbytes raises NotImplementedError."""
    found = Embedding4bit(50, 64, quant_type="nf4").to("cpu")
    assert isinstance(found.weight, Params4bit)
    memory = io.BytesIO()
    torch.save(found.state_dict(), memory)
    memory.seek(0)
    again = Embedding4bit(50, 64)
    again.load_state_dict(torch.load(memory, weights_only=True))
    tokens = torch.arange(50)
    assert torch.equal(again(tokens), found(tokens))
