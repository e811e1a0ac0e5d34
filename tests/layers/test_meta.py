"""The meta device: shapes where all is there, errors where some is, and ways there and back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnbx
from bnbx.errors import DeviceError
from bnbx.kernels.coding import encode
from bnbx.kernels.encoding import make_encoding
from bnbx.layers.moving import MovingModule
from bnbx.nn import (
    Embedding4bit,
    Embedding8bit,
    Linear4bit,
    Linear8bitLt,
    QuantEmbedding,
    QuantLinear,
    QuantParameter,
    quantize_,
)
from quantized_layers import ids, language_model

OPS = torch.ops.bnbx
X = torch.randn(3, 64)
TOKENS = torch.tensor([1, 49])
Make = Callable[[], Any]
LINEAR: dict[str, Make] = {
    "4 bits": lambda: Linear4bit(64, 48),
    "any type": lambda: QuantLinear(64, 48, quant_type="nvfp4"),
    "8 bits": lambda: QuantLinear(64, 48, quant_type="int8"),
    "int8, frozen": lambda: Linear8bitLt(64, 48, has_fp16_weights=False, threshold=6.0),
    "int8, trained": lambda: Linear8bitLt(64, 48),
}
EMBEDDINGS: dict[str, Make] = {
    "4 bits": lambda: Embedding4bit(50, 64),
    "any type": lambda: QuantEmbedding(50, 64, quant_type="nf3", double=True),
    "int8": lambda: Embedding8bit(50, 64),
}


# ---- some of it on the meta device


@pytest.mark.parametrize("name", LINEAR)
def test_product_of_tensors_in_two_places_is_an_error(name: str) -> None:
    found = LINEAR[name]().to("cpu")
    with pytest.raises(DeviceError, match=r"x on the meta device.*codes"):
        found(X.to("meta"))
    found.bias = nn.Parameter(found.bias.detach().to("meta"))
    with pytest.raises(DeviceError, match=r"bias on the meta device.*load_state_dict"):
        found(X)
    found = LINEAR[name]().to("cpu")
    found.weight = found.weight.to("meta")
    with pytest.raises(DeviceError, match=r"codes.* on the meta device.*x.* on cpu"):
        found(X)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_ids_on_the_meta_device_alone_are_an_error(name: str) -> None:
    with pytest.raises(DeviceError, match="ids on the meta device"):
        EMBEDDINGS[name]().to("cpu")(TOKENS.to("meta"))


def test_a_part_of_a_table_on_the_meta_device_is_an_error() -> None:
    found: Any = Embedding4bit(50, 64).to("cpu")
    found.weight.quant_state.absmax = found.weight.quant_state.absmax.to("meta")
    with pytest.raises(DeviceError, match=r"embedding: scale on the meta device.*codes"):
        found(TOKENS)
    found = Embedding8bit(50, 64).to("cpu")
    found.weight.SCB = found.weight.SCB.to("meta")
    with pytest.raises(DeviceError, match=r"Embedding8bit: SCB on the meta device.*weight on cpu"):
        found(TOKENS)


def test_weights_of_which_one_was_not_loaded_are_an_error() -> None:
    with torch.device("meta"):
        found = Linear4bit(64, 48)
    saved = Linear4bit(64, 48).to("cpu").state_dict()
    bias = saved.pop("bias")
    found.load_state_dict(saved, assign=True, strict=False)
    with pytest.raises(DeviceError, match="bias on the meta device"):
        found(X)
    found.load_state_dict({**saved, "bias": bias}, assign=True)
    assert found(X).isfinite().all()


def test_functions_take_tensors_of_one_place() -> None:
    weight = torch.randn(48, 64)
    codes, state = bnbx.functional.quantize_4bit(weight)
    bias = torch.zeros(48, device="meta")
    calls: tuple[Callable[[], Any], ...] = (
        lambda: bnbx.matmul(X, weight.to("meta")),
        lambda: bnbx.matmul(X, weight, bias=bias),
        lambda: bnbx.matmul_4bit(X, codes, state, bias=bias),
        lambda: bnbx.matmul_4bit(X, codes.to("meta"), state),
        lambda: bnbx.matmul_4bit(X.to("meta"), codes, state),
    )
    for call in calls:
        with pytest.raises(DeviceError, match="on the meta device, which holds no numbers"):
            call()


def _calls() -> list[tuple[Any, tuple[Any, ...]]]:
    encoding = make_encoding("nf4", double=True)
    parts, label, size = encode(encoding, torch.randn(40, 64)), encoding.label, (40, 64)
    int8, absmax = torch.ones(40, 64, dtype=torch.int8), torch.ones(40)
    return [
        (OPS.linear, (X, parts, torch.ones(40), label, size)),
        (OPS.linear_grad_input, (torch.ones(3, 40), parts, label, size)),
        (OPS.dequantize, (parts, label, size, torch.float32)),
        (OPS.embedding, (TOKENS[:1], parts, label, size, torch.float32)),
        (OPS.llm_int8_linear, (X, int8, absmax, torch.ones(40, 64), torch.ones(40), 6.0, True)),
        (OPS.llm_int8_grad_input, (torch.ones(3, 40), int8, absmax)),
        (OPS.int8_dequantize_rows, (int8, absmax, torch.float32)),
    ]


def _all_on_meta(value: Any) -> Any:
    if isinstance(value, list):
        return [_all_on_meta(each) for each in value]
    return value.to("meta") if isinstance(value, Tensor) else value


def _each_on_meta(value: Any) -> list[Any]:
    """The value with one of its tensors on the meta device, for each of them."""
    if isinstance(value, list):
        places = range(len(value))
        return [[t.to("meta") if i == j else t for j, t in enumerate(value)] for i in places]
    return [value.to("meta")] if isinstance(value, Tensor) else []


@pytest.mark.parametrize("number", range(len(_calls())))
def test_operations_refuse_each_tensor_on_the_meta_device_alone(number: int) -> None:
    operation: Any
    operation, arguments = _calls()[number]
    for i, value in enumerate(arguments):
        for moved in _each_on_meta(value):
            with pytest.raises(DeviceError, match="on the meta device, which holds no numbers"):
                operation(*arguments[:i], moved, *arguments[i + 1 :])
    results: Any = operation(*map(_all_on_meta, arguments))
    for found in results if isinstance(results, tuple) else [results]:
        assert found.is_meta


# ---- all of it there, and back


LAYERS: dict[str, tuple[Make, Tensor]] = {
    **{f"linear, {name}": (make, X) for name, make in LINEAR.items()},
    **{f"embedding, {name}": (make, TOKENS) for name, make in EMBEDDINGS.items()},
}


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_goes_to_the_meta_device_whole(name: str, quantized: bool) -> None:
    make, given = LAYERS[name]
    found = make().to("cpu") if quantized else make()
    kind, settings = type(found.weight), set(found.weight.__dict__)
    before, dtype = found.weight, found.weight.dtype
    kept = {key: value.clone() for key, value in found.state_dict().items()}
    assert found.to("meta") is found
    assert type(found.weight) is kind
    assert (found.weight.dtype, set(found.weight.__dict__)) == (dtype, settings)
    assert found.weight.requires_grad == before.requires_grad
    assert all(each.is_meta for each in found.parameters())
    assert found(given.to("meta")).is_meta
    assert found.state_dict().keys() == kept.keys()
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        found.to("cpu")
    # What somebody else still holds is as it was.
    assert not before.is_meta
    state = getattr(before, "quant_state", None)
    assert state is None or not state.absmax.is_meta


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("assign", [True, False])
def test_layer_comes_back_with_what_is_loaded(name: str, assign: bool) -> None:
    make, given = LAYERS[name]
    found = make().to("cpu")
    expected, kind = found(given), type(found.weight)
    saved = {key: value.clone() for key, value in found.state_dict().items()}
    found.to("meta")
    if not assign:
        found.to_empty(device="cpu")
        assert type(found.weight) is kind
        assert found(given).shape == expected.shape
    found.load_state_dict(saved, assign=assign)
    assert torch.equal(found(given), expected)
    if isinstance(found.weight, QuantParameter):
        assert found.quant_state is found.weight.quant_state


def test_model_in_codes_goes_to_the_meta_device_and_comes_back() -> None:
    model = language_model(tied=False)
    quantize_(model, "nf4", double=True, parameters=["*experts.up"])
    expected = model(ids())
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [type(each) for each in model.parameters()]
    model.to("meta")
    assert [type(each) for each in model.parameters()] == kinds
    assert all(each.is_meta for each in model.parameters())
    assert model.state_dict().keys() == saved.keys()
    model.to_empty(device="cpu")
    assert [type(each) for each in model.parameters()] == kinds
    model.load_state_dict(saved)
    assert torch.equal(model(ids()), expected)


def test_dtype_that_is_named_with_the_meta_device_is_kept() -> None:
    found = QuantLinear(64, 48).to("cpu").to("meta", torch.bfloat16)
    assert found.quant_state is not None
    assert found.quant_state.dtype == torch.bfloat16
    assert found.weight.quant_state is found.quant_state
    assert found.quant_state.absmax.dtype == torch.float32


def test_weight_that_lost_its_class_takes_its_state_along() -> None:
    found: Any = Linear4bit(64, 48).to("cpu")
    found.weight = nn.Parameter(found.weight.detach(), requires_grad=False)
    found.to("meta")
    assert found.quant_state.absmax.is_meta
    assert found.to_empty(device="cpu").quant_state.absmax.device.type == "cpu"


def test_codes_that_are_offloaded_leave_their_state_behind() -> None:
    """As accelerate does it: the codes alone go, by their parameter, and come back by hand."""
    found: Any = Linear4bit(64, 48).to("cpu")
    expected, codes = found(X), found.weight.detach()
    found.weight = found.weight.to("meta")
    found.eval().float()
    settings = found.weight.__dict__
    found.weight = type(found.weight)(codes, requires_grad=False, **settings).to("cpu")
    assert torch.equal(found(X), expected)


def test_gradient_goes_where_its_parameter_goes() -> None:
    found: Any = MovingModule()
    found.weight = Linear8bitLt(64, 48).weight
    found.weight.grad = torch.ones(48, 64)
    found.to("meta")
    assert type(found.weight) is type(Linear8bitLt(64, 48).weight)
    assert found.weight.grad.is_meta


# ---- as accelerate does


@pytest.mark.parametrize("name", [*LINEAR, *EMBEDDINGS])
def test_parameters_are_remade_on_the_meta_device(name: str) -> None:
    """As accelerate.init_empty_weights does: of their own `__dict__`, where it writes first."""
    found = {**LINEAR, **EMBEDDINGS}[name]()
    settings = found.weight.__dict__
    settings["requires_grad"] = found.weight.requires_grad
    made = type(found.weight)(found.weight.to("meta"), **settings)
    assert made.is_meta
    assert made.requires_grad == found.weight.requires_grad
    for copied in (copy.copy(found.weight), copy.deepcopy(found.weight)):
        assert copied.requires_grad == found.weight.requires_grad
        assert torch.equal(copied, found.weight)


@pytest.mark.parametrize("quant_type", ["nf4", "int8", "nf3", "mxfp4", "fp8_e4m3"])
@pytest.mark.parametrize("kind", [QuantLinear, QuantEmbedding])
def test_codes_come_back_without_their_settings(kind: Any, quant_type: str) -> None:
    """As accelerate's cpu_offload brings them where their class is not called Params4bit."""
    found = kind(64, 128, quant_type=quant_type).to("cpu")
    x = X if kind is QuantLinear else TOKENS
    expected, codes = found(x), found.weight.detach().clone()
    for device, data in (("meta", codes.to("meta")), ("cpu", codes)):
        made = QuantParameter(data, requires_grad=False).to(device)
        assert made.dtype == codes.dtype  # not taken for numbers
        found._parameters["weight"] = made
    assert torch.equal(found(x), expected)
