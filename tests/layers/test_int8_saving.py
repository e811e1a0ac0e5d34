"""State dicts of int8 layers: the entries of bitsandbytes, both ways, and what does not fit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnbx.kernels import int8
from bnbx.layers.int8 import Linear8bitLt
from bnbx.layers.int8_params import Int8Params
from bnbx.nn import dequantize_
from compiled import shared_cache

KEYS = ["weight", "bias", "SCB", "weight_format"]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_cache(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def peer() -> Any:
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes, from the extra `peers`")


def make(frozen: bool = True, move: bool = True, seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    made = Linear8bitLt(96, 40, has_fp16_weights=not frozen, threshold=6.0, **more)
    return made.half().float().to("cpu") if move else made.half().float()


def numbers() -> Tensor:
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    x[:, 7] = 20
    return x


def theirs(peer: Any, **more: Any) -> Any:
    torch.manual_seed(3)
    made = peer.nn.Linear8bitLt(96, 40, has_fp16_weights=False, threshold=6.0, **more)
    return made.half().to("cpu").eval()


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return list(a) == list(b) and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )


# ---- with bitsandbytes


def test_entries_are_those_of_bitsandbytes(peer: Any) -> None:
    """The very bytes, from weights in float16: their codes are of weights rounded to that."""
    other = theirs(peer)
    torch.manual_seed(3)
    ours = Linear8bitLt(96, 40, has_fp16_weights=False, threshold=6.0).half().to("cpu")
    assert equal(ours.state_dict(), other.state_dict())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_loads_what_bitsandbytes_saves(peer: Any, quantized: bool, assign: bool) -> None:
    saved = {key: value.clone() for key, value in theirs(peer).state_dict().items()}
    ours = make(move=quantized)
    assert str(ours.load_state_dict(saved, assign=assign)) == "<All keys matched successfully>"
    assert equal({**ours.state_dict(), "bias": 0 * ours.bias}, {**saved, "bias": 0 * ours.bias})
    x = numbers().half()
    expected = theirs(peer)(x.clone())
    torch.testing.assert_close(ours(x), expected, rtol=2e-3, atol=2e-3)


def test_bitsandbytes_loads_what_is_saved_here(peer: Any) -> None:
    ours, other = make(), theirs(peer)
    other.float().load_state_dict(ours.state_dict())
    assert equal(other.state_dict(), ours.state_dict())
    x = numbers().half().float()  # they round to float16
    with torch.no_grad():
        torch.testing.assert_close(ours(x), other(x.clone()), rtol=1e-4, atol=1e-4)


def test_float_weights_go_both_ways(peer: Any) -> None:
    other = peer.nn.Linear8bitLt(96, 40)  # has_fp16_weights: floats, and no scales
    ours = make(frozen=False)
    assert ours.load_state_dict(other.state_dict())
    assert equal(ours.state_dict(), other.state_dict())
    assert other.load_state_dict(make(frozen=False).state_dict())


# ---- alone


def test_a_model_keeps_prefixes_and_order() -> None:
    model = nn.Sequential(make(), nn.ReLU(), nn.Linear(40, 3))
    expected = [*(f"0.{key}" for key in KEYS), "2.weight", "2.bias"]
    assert list(model.state_dict()) == expected
    saved = model.state_dict()
    assert saved["0.weight"].dtype == torch.int8
    assert saved["0.SCB"].dtype == torch.float32
    assert saved["0.weight_format"].tolist() == 0
    assert saved["0.weight_format"].dtype == torch.uint8
    assert list(make(move=False).state_dict()) == ["weight", "bias"]
    assert list(make(bias=False).state_dict()) == ["weight", "SCB", "weight_format"]


def test_files_of_tensors_alone(tmp_path: Path) -> None:
    made, x = make(), numbers()
    buffer = io.BytesIO()
    torch.save(made.state_dict(), buffer)
    buffer.seek(0)
    other = make(seed=1)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), made(x))
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.save_file(made.state_dict(), tmp_path / "layer.safetensors")
    other = make(seed=1)
    other.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(other(x), made(x))


def test_loading_copies_and_assigning_does_not() -> None:
    saved, made = make().state_dict(), make(seed=1)
    weight = made.weight
    made.load_state_dict(saved)
    assert made.weight is weight  # who shares it has the new codes
    assert made.weight.data_ptr() != saved["weight"].data_ptr()
    assert made.state.SCB is made.weight.SCB
    made.load_state_dict(saved, assign=True)
    assert isinstance(made.weight, Int8Params)
    assert made.weight.data_ptr() == saved["weight"].data_ptr()
    assert made.weight.SCB.data_ptr() == saved["SCB"].data_ptr()
    assert torch.equal(made(numbers()), make()(numbers()))


@pytest.mark.parametrize("assign", [False, True])
def test_a_quantized_layer_quantizes_floats_that_it_loads(assign: bool) -> None:
    """A fine-tuned float checkpoint, into a model that has been moved already."""
    dense, made = make(move=False), make(seed=1)
    made.load_state_dict(dense.state_dict(), assign=assign)
    assert made.weight.dtype == torch.int8
    assert equal(made.state_dict(), dense.to("cpu").state_dict())


@pytest.mark.parametrize("assign", [False, True])
def test_floats_stay_floats_until_they_move(assign: bool) -> None:
    saved, made = make(move=False).state_dict(), make(move=False, seed=1)
    made.load_state_dict(saved, assign=assign)
    assert isinstance(made.weight, Int8Params)
    assert torch.equal(made.weight, saved["weight"])
    assert equal(made.to("cpu").state_dict(), make().state_dict())


@pytest.mark.parametrize("assign", [False, True])
def test_a_float_master_takes_the_numbers_of_codes(assign: bool) -> None:
    saved, made = make().state_dict(), make(frozen=False, seed=1)
    made.load_state_dict(saved, assign=assign)
    assert made.weight.dtype == torch.float32
    assert made.weight.requires_grad
    expected = int8.dequantize_rows(saved["weight"], saved["SCB"])
    assert torch.equal(made.weight, expected)
    torch.testing.assert_close(made(numbers()), make()(numbers()))


def test_state_dict_without_the_layer_is_fine_if_not_strict() -> None:
    made = make()
    before = made.state_dict()["weight"].clone()
    made.load_state_dict({"bias": torch.zeros(40)}, strict=False)
    assert torch.equal(made.weight, before)
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        made.load_state_dict({"bias": torch.zeros(40)})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"other"'):
        made.load_state_dict({**made.state_dict(), "other": torch.zeros(1)})


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SCB": None}, "int8 codes without the absmax of their rows: no entry 'SCB'"),
        ({"SCB": torch.ones(39)}, r"absmax is torch\.float32 of shape \(39,\); expected .*\(40,\)"),
        ({"SCB": torch.ones(40).half()}, r"absmax is torch\.float16"),
        ({"weight": torch.ones(40, 95, dtype=torch.int8)}, r"\(40, 95\); expected \(40, 96\)"),
        ({"weight_format": torch.tensor(1)}, "only the 'row' weight format"),
        ({"weight_format": "col32"}, "only the 'row' weight format"),
    ],
    ids=["no SCB", "short SCB", "half SCB", "shape", "format", "named format"],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Any], message: str, quantized: bool
) -> None:
    made = make(move=quantized, seed=1)
    before = made.weight.detach().clone()
    saved = {**make().state_dict(), **change}
    with pytest.raises(RuntimeError, match=message):
        made.load_state_dict({key: value for key, value in saved.items() if value is not None})
    assert torch.equal(made.weight, before)


def test_floats_of_another_shape_are_refused() -> None:
    for quantized in (False, True):
        made = make(move=quantized)
        with pytest.raises(RuntimeError, match=r"96"):
            made.load_state_dict({"weight": torch.ones(40, 95), "bias": torch.zeros(40)})


def test_meta_layers_want_assign() -> None:
    made = make(move=False, device="meta", bias=False)  # of a bias torch warns
    with pytest.raises(RuntimeError, match="pass assign=True"):
        made.load_state_dict(make(bias=False).state_dict())


# ---- the dtype that a dense weight has again


def dtypes(layer: Any) -> set[torch.dtype]:
    """Of the parameters of a dense layer, which computes in one dtype or not at all."""
    dequantize_(layer)
    assert type(layer) is nn.Linear
    assert layer.__dict__.keys() == nn.Linear(1, 1).__dict__.keys()
    return {p.dtype for p in layer.parameters()}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_dense_weight_has_the_dtype_that_it_had(frozen: bool, bias: bool) -> None:
    saved = make(bias=bias).state_dict()
    ways: list[Callable[[Any], Any]] = [
        lambda layer: layer.bfloat16().to("cpu"),
        lambda layer: layer.to("cpu").bfloat16(),
        lambda layer: layer.to("cpu", torch.bfloat16),
        lambda layer: layer.bfloat16().to("cpu").to("meta").to_empty(device="cpu"),
        lambda layer: copy.deepcopy(layer.bfloat16().to("cpu")),
        lambda layer: pickle.loads(pickle.dumps(layer.bfloat16().to("cpu"))),
    ]
    for way in ways:
        assert dtypes(way(make(frozen, move=False, bias=bias))) == {torch.bfloat16}
    layer = make(frozen, move=False, bias=bias).bfloat16().to("cpu")
    layer.load_state_dict(saved)  # of float32, copied
    assert dtypes(layer) == {torch.bfloat16}


def test_a_dense_weight_has_the_dtype_of_what_was_loaded_or_used() -> None:
    def dense() -> dict[str, Tensor]:
        return {"weight": torch.randn(40, 96, dtype=torch.bfloat16)}

    for layer in (make(bias=False), make(bias=False, move=False)):
        layer.load_state_dict(dense(), assign=True)
        assert dtypes(layer.to("cpu")) == {torch.bfloat16}
    layer = make(bias=False)
    layer.load_state_dict(make(bias=False).state_dict(), assign=True)
    layer(numbers())
    layer(numbers().bfloat16())  # all that is known of what these codes came from
    assert dtypes(layer) == {torch.bfloat16}
    layer = make(bias=False)
    layer.load_state_dict(make(bias=False).state_dict(), assign=True)
    assert dtypes(layer) == {torch.float32}
