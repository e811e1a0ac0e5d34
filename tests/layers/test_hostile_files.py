"""Entries of state dicts that no writer makes: each is an error of `load_state_dict` with its key.

A file may come from a stranger, and `torch.load(weights_only=True)` makes tensors of any kind:
sparse, nested, quantized by torch, on no device, or a view that repeats one element.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnbx.errors import QuantizedDataError
from bnbx.kernels.state_dict import PACKED, pack_json, plain_tensor
from bnbx.nn import (
    Embedding8bit,
    Linear8bitLt,
    Params4bit,
    QuantEmbedding,
    QuantLinear,
    replace_parameter,
)

KEY = f"weight.{PACKED}nf4"


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8, 64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight[0].T


def _experts(double: bool = False) -> nn.Module:
    module = _Experts()
    replace_parameter(module, "weight", "nf4", double=double)
    return module


CODED: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: QuantLinear(64, 32, double=True).to("cpu"),
    "linear, bfloat16 memory": lambda: QuantLinear(64, 32, quant_storage=torch.bfloat16).to("cpu"),
    "linear, nvfp4": lambda: QuantLinear(64, 32, quant_type="nvfp4").to("cpu"),
    "linear, int8_affine": lambda: QuantLinear(64, 32, quant_type="int8_affine").to("cpu"),
    "embedding": lambda: QuantEmbedding(32, 64, double=True).to("cpu"),
    "experts": lambda: _experts(double=True),
}
INT8: dict[str, Callable[[], nn.Module]] = {
    "linear8": lambda: Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu"),
    "embedding8": lambda: Embedding8bit(32, 64).to("cpu"),
}
LAYERS = {**CODED, **INT8}


def _use(module: nn.Module) -> None:
    x = torch.tensor([1, 2]) if isinstance(module, nn.Embedding) else torch.ones(2, 64)
    module(x)
    module.state_dict()


def _oddities(given: Tensor) -> Iterator[tuple[str, Any]]:
    """What may stand in the place of an entry."""
    yield from (("None", None), ("text", "x"), ("a list", [1]))
    yield "empty", torch.empty(0, dtype=given.dtype)
    yield "0-d", torch.zeros((), dtype=given.dtype)
    yield "a row", given[None]
    yield "a row of rows", given[None, None]
    yield "a column", given[..., None]
    yield "twice as much", torch.cat([given.reshape(-1)] * 2)
    for dtype in (torch.bool, torch.int8, torch.int64, torch.float16, torch.float64):
        yield f"{dtype}", given.to(dtype)
    yield "complex", given.to(torch.complex64)
    yield "conjugate", given.to(torch.complex64).conj()
    yield "negative", torch._neg_view(given)
    yield "meta", given.to("meta")
    yield "sparse", given.to_sparse()
    yield "compressed", given.reshape(1, -1).to_sparse_csr()
    yield "quantized by torch", torch.quantize_per_tensor(given.float(), 1.0, 0, torch.qint8)
    yield "nested", torch.nested.nested_tensor([given.reshape(-1).clone()])
    yield "expanded", torch.zeros((), dtype=given.dtype).expand(given.shape)
    yield "strided", torch.stack([given, given], -1)[..., 0]


@pytest.mark.filterwarnings("ignore:.*prototype stage:UserWarning", "ignore:.*beta state")
@pytest.mark.filterwarnings("ignore:Casting complex:UserWarning", "ignore:.*deprecated")
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_an_odd_entry_is_an_error_with_its_key_or_works(name: str, assign: bool) -> None:
    """Never another exception, nor a layer that fails when it is used."""
    torch.manual_seed(0)
    saved = {key: value.clone() for key, value in LAYERS[name]().state_dict().items()}
    saved.pop("bias", None)  # torch loads it
    refused = set()
    for key, given in saved.items():
        for oddity, value in _oddities(given):
            module = LAYERS[name]()
            told = _told(module, {**saved, key: value}, assign)
            _use(module)
            if told is not None:
                refused.add(oddity)
                assert told.startswith("Error(s) in loading state_dict"), (key, oddity, told)
                assert "weight" in told, (key, oddity, told)
    assert refused >= {"empty", "twice as much", "meta", "sparse", "nested", "quantized by torch"}


def _told(module: nn.Module, state_dict: dict[str, Any], assign: bool) -> str | None:
    try:
        module.load_state_dict(state_dict, strict=False, assign=assign)
    except RuntimeError as error:
        return str(error)
    return None


def _telling(saved: dict[str, Any], **changes: Any) -> None:
    saved[KEY] = pack_json({**json.loads(bytes(saved[KEY].tolist())), **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight.nested_quant_map": (1, 256)}, r"a table of shape \(1, 256\); expected \(2\*\*b"),
        ({"weight.nested_quant_map": (1, 1, 256)}, r"a table of shape \(1, 1, 256\)"),
        ({"weight.nested_quant_map": ()}, r"a table of shape \(\)"),
        ({"weight": torch.zeros(1024, 1).to_sparse()}, "the weight is torch.sparse_coo on cpu"),
        ({"weight": torch.empty(1024, 1, device="meta")}, "the weight is torch.strided on meta"),
        ({"weight": torch.zeros(1, 1).to(torch.uint8).expand(1024, 1)}, "repeats its memory"),
        ({"weight.absmax": torch.zeros(1).expand(1 << 40)}, "absmax is a view .* repeats its mem"),
        ({KEY: torch.zeros(9, dtype=torch.uint8).to_sparse()}, f"{KEY} is torch.sparse_coo"),
    ],
)
def test_entries_of_codes(change: dict[str, Any], message: str) -> None:
    made = QuantLinear(64, 32, double=True).to("cpu")
    saved = made.state_dict()
    for key, value in change.items():
        saved[key] = torch.zeros(value) if isinstance(value, tuple) else value
    for assign in (False, True):
        with pytest.raises(RuntimeError, match=f"\n\tweight: .*{message}"):
            made.load_state_dict(saved, assign=assign)


@pytest.mark.parametrize("offset", [float("nan"), float("inf"), -float("inf"), 1e308, 10**39])
def test_a_mean_that_float32_has_not(offset: float) -> None:
    made = QuantLinear(64, 32, double=True).to("cpu")
    saved = made.state_dict()
    _telling(saved, nested_offset=offset)
    with pytest.raises(RuntimeError, match=r"weight: nested_offset=.*a number that float32 has"):
        made.load_state_dict(saved)


def test_no_tensor_for_a_parameter() -> None:
    made = _experts()
    saved = {**made.state_dict(), "weight": None}
    with pytest.raises(RuntimeError, match="weight: the weight is None; expected a tensor"):
        made.load_state_dict(saved)


def test_scales_of_any_shape_are_a_vector() -> None:
    """Lookups take them by number."""
    made = QuantEmbedding(32, 64, double=True).to("cpu")
    saved = made.state_dict()
    expected = made(torch.arange(32))
    for key in ("weight.absmax", "weight.nested_absmax"):
        saved[key] = saved[key][:, None]
    other = QuantEmbedding(32, 64).to("cpu")
    other.load_state_dict(saved)
    assert torch.equal(other(torch.arange(32)), expected)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_format": torch.empty(0, dtype=torch.uint8)}, r"weight_format is \(0,\)"),
        ({"weight_format": torch.zeros(2)}, r"weight_format is \(2,\)"),
        ({"weight_format": torch.zeros((), device="meta")}, "weight_format is .* on meta"),
        ({"SCB": torch.ones(32, dtype=torch.bool)}, "absmax is torch.bool"),
        ({"SCB": torch.ones(32, dtype=torch.int64)}, "absmax is torch.int64"),
        ({"SCB": torch.ones(32, dtype=torch.complex64)}, "absmax is torch.complex64"),
        ({"SCB": torch.ones(32, device="meta")}, "SCB is torch.strided on meta"),
        ({"SCB": torch.ones(32).to_sparse()}, "SCB is torch.sparse_coo"),
        ({"SCB": torch.ones(1).expand(32)}, "SCB is a view .* repeats its memory"),
        ({"SCB": "x"}, "SCB is 'x'"),
        ({"weight": torch.ones(32, 64, dtype=torch.int8).to_sparse()}, "the weight is torch.spars"),
        ({"weight": torch.ones(32, 64, dtype=torch.int8, device="meta")}, "absmax on cpu"),
        ({"weight": torch.ones(1, 1, dtype=torch.int8).expand(32, 64)}, "repeats its memory"),
        ({"weight": torch.ones(32, 64, dtype=torch.int32)}, "torch.int32; expected int8 codes"),
    ],
)
@pytest.mark.parametrize("name", INT8)
def test_entries_of_int8_layers(
    name: str, change: dict[str, Any], message: str, assign: bool
) -> None:
    made = INT8[name]()
    before = made.state_dict()["weight"].clone()
    with pytest.raises(RuntimeError, match=f"\n\tweight: .*{message}"):
        made.load_state_dict({**made.state_dict(), **change}, assign=assign)
    assert torch.equal(made.state_dict()["weight"], before)


@pytest.mark.parametrize("name", INT8)
def test_no_tensor_for_the_weight_of_an_int8_layer(name: str) -> None:
    made = INT8[name]()
    with pytest.raises(RuntimeError, match=r'parameter named "weight", expected torch\.Tensor'):
        made.load_state_dict({**made.state_dict(), "weight": "x"})


@pytest.mark.parametrize("name", INT8)
def test_int8_codes_with_gaps_are_laid_out_anew(name: str) -> None:
    made = INT8[name]()
    saved = {key: value.clone() for key, value in made.state_dict().items()}
    turned = saved["weight"].T.contiguous().T
    made.load_state_dict({**saved, "weight": turned}, assign=True)
    weight: Any = made.weight
    assert weight.is_contiguous()
    assert torch.equal(weight, saved["weight"])


@pytest.mark.parametrize("name", INT8)
def test_whole_state_dicts_on_the_meta_device(name: str) -> None:
    """A skeleton of a model into a skeleton: there is nothing that could be wrong."""
    saved = {key: value.to("meta") for key, value in INT8[name]().state_dict().items()}
    kinds: dict[str, Callable[[], nn.Module]] = {
        "linear8": lambda: Linear8bitLt(64, 32, has_fp16_weights=False),
        "embedding8": lambda: Embedding8bit(32, 64),
    }
    for assign in (False, True):
        with torch.device("meta"):
            made: Any = kinds[name]()
        made.load_state_dict(saved, assign=assign)
        assert made.weight.is_meta
        assert made.weight.dtype == torch.int8


def test_codes_that_are_given_by_hand_are_looked_at_too() -> None:
    made = QuantLinear(64, 32).to("cpu")
    stats = made.weight.quant_state.as_dict(packed=True)
    with pytest.raises(QuantizedDataError, match=r"the weight is torch\.sparse_coo"):
        Params4bit.from_prequantized(made.weight.detach().to_sparse(), stats)
    with pytest.raises(QuantizedDataError, match=r"codes are torch.float32 of shape \(\)"):
        Params4bit.from_prequantized(torch.zeros(()), stats)


def test_plain_tensors_are_what_they_were() -> None:
    given = torch.arange(6.0).reshape(2, 3).T
    assert plain_tensor("it", given).data_ptr() == given.data_ptr()
    assert torch.equal(plain_tensor("it", given[:1].expand(9, 2), repeats=True)[8], given[0])
    assert not plain_tensor("it", nn.Parameter(given)).requires_grad
