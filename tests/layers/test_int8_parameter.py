"""The int8 layer: quantization on moves, copies, errors, and what libraries do with it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from bnbx.errors import OptionError, QuantizedDataError, UnsupportedTensorError
from bnbx.kernels import int8
from bnbx.layers.int8 import Linear8bitLt
from bnbx.layers.int8_params import Int8Params
from bnbx.layers.matmul import MatmulLtState, matmul
from compiled import shared_cache
from int8_layers import error, layer, numbers

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_cache(tmp_path_factory):
        yield


# ---- moving and copying


@pytest.mark.parametrize("dtype", DTYPES)
def test_moving_quantizes_the_numbers_as_they_are(dtype: torch.dtype) -> None:
    made = Linear8bitLt(96, 40, has_fp16_weights=False).to(dtype)
    assert made.weight.dtype == dtype
    codes, absmax, _ = int8.quantize_rows(made.weight)
    parameter = made.weight
    for move in ("cpu", torch.device("cpu"), torch.empty(0, dtype=dtype)):
        moved = copy.deepcopy(made).to(move)
        assert torch.equal(moved.weight, codes)
        assert torch.equal(moved.weight.SCB, absmax)
        assert moved.weight.SCB.dtype == torch.float32
    made.cpu()
    assert torch.equal(made.weight, codes)
    assert made.weight is parameter  # so that all who share it share the codes


def test_codes_stay_as_they_are() -> None:
    made = layer()
    codes, absmax = made.weight.detach().clone(), made.weight.SCB.clone()
    for change in (made.half, made.bfloat16, made.double, made.float, made.cpu):
        change()
        assert torch.equal(made.weight, codes)
        assert torch.equal(made.weight.SCB, absmax)
        assert made.weight.CB.data_ptr() == made.weight.data_ptr()
        assert made.state.SCB is made.weight.SCB
    assert torch.equal(made.weight.to(torch.bfloat16), codes)
    assert not made.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, "torch.HalfTensor", torch.DoubleTensor])
def test_type_keeps_codes(dtype: Any) -> None:
    made, x = layer(), numbers(3, 96)
    codes, y = made.weight.detach().clone(), made(x)
    assert torch.equal(made.weight.type(dtype), codes)
    assert made.weight.type() == "torch.CharTensor"
    made.type(dtype)
    assert torch.equal(made.weight, codes)
    assert made.weight.SCB.dtype == torch.float32
    assert made.bias.dtype == torch.empty(0).type(dtype).dtype
    assert error(made.float()(x), y.double()) < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_in_a_float_dtype_are_codes(dtype: torch.dtype) -> None:
    """A loop over parameters that sets `data`: bitsandbytes multiplies with what it kept."""
    made, x = layer(), numbers(3, 96)
    codes, y = made.weight.detach().clone(), made(x)
    made.weight.data = made.weight.data.to(dtype)
    assert torch.equal(made.weight, codes)
    assert made.weight.CB.data_ptr() == made.weight.data_ptr()
    assert torch.equal(made(x), y)


def test_dense_numbers_in_place_of_codes_forget_their_absmax() -> None:
    made, x, dense = layer(), numbers(3, 96), numbers(40, 96)
    made.weight.data = dense
    assert made.weight.SCB is made.weight.CB is None
    assert error(made(x), nn.functional.linear(x, dense, made.bias).double()) < 0.02
    assert "SCB" not in made.state_dict()
    assert made.cpu().weight.dtype == torch.int8
    assert error(made(x), nn.functional.linear(x, dense, made.bias).double()) < 0.02


def test_fast_paths_of_torch_leave_codes_alone() -> None:
    """They multiply by the weight themselves, where none has a `__torch_function__`."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(96, 4, 96, batch_first=True).eval()
    x = numbers(2, 5, 96)
    with torch.no_grad():
        expected = block(x)
        for name in ("linear1", "linear2"):
            made = Linear8bitLt(96, 96, has_fp16_weights=False)
            made.load_state_dict(getattr(block, name).state_dict())
            setattr(block, name, made.to("cpu"))
        assert error(block.eval()(x), expected.double()) < 0.02


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_a_copy_of_a_used_layer_has_its_codes_once(copied: Any) -> None:
    made, x = layer(), numbers(3, 96)
    y = made(x)
    assert len(pickle.dumps(made)) < 1.9 * made.weight.nbytes
    again = copied(made)
    assert again.state == made.state
    assert again.state.CB.data_ptr() == again.weight.data_ptr() != made.weight.data_ptr()
    assert again.state.SCB is again.weight.SCB
    assert made.state.CB is not None
    assert torch.equal(again(x), y)


def test_tied_weights_stay_tied() -> None:
    first: Any
    second: Any
    first, second = (Linear8bitLt(96, 40, has_fp16_weights=False) for _ in range(2))
    second.weight = first.weight
    nn.Sequential(first, second).to("cpu")
    assert first.weight is second.weight
    assert first.weight.dtype == torch.int8
    assert second.state.SCB is first.weight.SCB


def test_meta_device() -> None:
    made: Any = Linear8bitLt(96, 40, has_fp16_weights=False, threshold=6.0, device="meta")
    assert made(torch.empty(3, 96, device="meta")).shape == (3, 40)
    made.load_state_dict(layer().state_dict(), assign=True)
    x = numbers(3, 96)
    assert torch.equal(made(x), layer()(x))
    ghost = layer().to("meta")
    assert ghost.weight.dtype == torch.int8
    assert ghost.weight.SCB.is_meta
    assert ghost(torch.empty(3, 96, device="meta")).shape == (3, 40)
    empty = ghost.to_empty(device="cpu")
    assert isinstance(empty.weight, Int8Params)
    empty.load_state_dict(layer().state_dict())
    assert torch.equal(empty(x), layer()(x))


@pytest.mark.parametrize("frozen", [True, False])
def test_copies(frozen: bool) -> None:
    made, x = layer(frozen=frozen), numbers(3, 96)
    expected = made(x)
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    others: list[Any] = [copy.deepcopy(made), torch.load(buffer, weights_only=False)]
    for other in others:
        assert type(other.weight).__name__ == "Int8Params"
        assert other.weight.requires_grad is not frozen
        assert other.weight.__dict__.keys() == made.weight.__dict__.keys()
        assert other.weight.data_ptr() != made.weight.data_ptr()
        assert torch.equal(other(x), expected)
        if frozen:
            assert other.weight.CB.data_ptr() == other.weight.data_ptr()
            assert other.weight.SCB.data_ptr() != made.weight.SCB.data_ptr()
    shared = copy.copy(made.weight)
    assert shared.data_ptr() == made.weight.data_ptr()


# ---- what libraries do


def test_parameter_is_rebuilt_from_its_attributes() -> None:
    """As peft does when it merges, and accelerate when it loads."""
    made, x = layer(), numbers(3, 96)
    assert set(made.weight.__dict__) == {"CB", "SCB", "has_fp16_weights"}
    dense = made.dequantized_weight()
    made.weight = Int8Params(
        (dense * 2).to("cpu"), requires_grad=False, has_fp16_weights=made.weight.has_fp16_weights
    ).to(dense.device)
    made.state.reset_grads()
    expected = nn.functional.linear(x, 2 * dense, made.bias)
    assert error(made(x), expected) < 0.01
    codes, absmax = made.weight.detach().clone(), made.weight.SCB.clone()
    old = made.weight
    new = Int8Params(codes, requires_grad=old.requires_grad, **old.__dict__).to("cpu")
    assert new.CB.data_ptr() == new.data_ptr()
    made._parameters["weight"] = new
    made.weight.SCB = absmax
    made.state.SCB = made.state.CxB = None
    assert error(made(x), expected) < 0.01
    made.weight.SCB.div_(2)  # as RWKV does
    y = made(x)
    torch.testing.assert_close(y - made.bias, (expected - made.bias) / 2, rtol=0.1, atol=0.1)


def test_unknown_settings_are_accepted_and_dropped() -> None:
    made: Any = Int8Params(torch.ones(2, 3), requires_grad=False, _is_hf_initialized=True)
    assert set(made.__dict__) == {"CB", "SCB", "has_fp16_weights"}
    made._is_hf_initialized = True
    moved = made.to("cpu").to("cpu")
    assert set(moved.__dict__) == {"CB", "SCB", "has_fp16_weights"}
    assert set(copy.deepcopy(moved).__dict__) == {"CB", "SCB", "has_fp16_weights"}


def test_states_compare() -> None:
    a, b = MatmulLtState(), MatmulLtState()
    assert a == b
    for name in ("CB", "SCB", "CxB", "idx"):
        setattr(a, name, torch.ones(3))
        assert a != b
        setattr(b, name, torch.ones(3))
        assert a == b
    a.threshold = 6.0
    assert a != b
    a.reset_grads()
    assert (a.CB, a.SCB, a.CxB) == (None, None, None)
    assert a != 1
    with pytest.raises(TypeError, match="unhashable"):
        hash(a)


def test_class_names_and_signature() -> None:
    """Libraries compare the names as strings, and pass arguments by place."""
    assert Linear8bitLt.__name__ == "Linear8bitLt"
    assert Int8Params.__name__ == "Int8Params"
    made = Linear8bitLt(8, 4, False, False, 6.0, [1], "cpu")
    assert made.bias is None
    assert made.state.has_fp16_weights is False
    assert made.state.threshold == 6.0
    assert made.index == [1]
    assert made(torch.ones(2, 8)).shape == (2, 4)
    assert "threshold=6.0, weight in floats" in repr(made)
    assert "weight in codes" in repr(made.to("cpu"))


# ---- errors


def test_errors_name_what_is_wrong() -> None:
    made = layer()
    with pytest.raises(OptionError, match=r"threshold is -1; expected a magnitude"):
        Linear8bitLt(8, 4, threshold=-1)
    with pytest.raises(UnsupportedTensorError, match=r"\(2, 95\); expected \(\.\.\., 96\)"):
        made(torch.ones(2, 95))
    with pytest.raises(UnsupportedTensorError, match=r"x is torch\.int64"):
        made(torch.ones(2, 96, dtype=torch.int64))
    with pytest.raises(UnsupportedTensorError, match=r"x is list; expected a torch\.Tensor"):
        made([1, 2])
    for a, b, what in ((None, made.weight, "A"), (torch.ones(2, 96), None, "B")):
        with pytest.raises(UnsupportedTensorError, match=f"{what} is NoneType; expected a torch"):
            matmul(a, b)  # type: ignore[arg-type]
    wrong: Any
    for wrong in ("6", None, [6.0]):
        with pytest.raises(OptionError, match=r"threshold is .*; expected a magnitude"):
            matmul(torch.ones(2, 96), made.weight, threshold=wrong)
        with pytest.raises(OptionError, match=r"threshold is .*; expected a magnitude"):
            Linear8bitLt(8, 4, threshold=wrong)
    with pytest.raises(UnsupportedTensorError, match="come without the absmax"):
        matmul(torch.ones(2, 96), made.weight.detach())
    with pytest.raises(OptionError, match="gradients do not flow through `out`"):
        matmul(numbers(2, 96).requires_grad_(), made.weight, torch.empty(2, 40))
    with (
        pytest.raises(UnsupportedTensorError, match=r"out is .*expected torch\.float32 of shape"),
        torch.no_grad(),
    ):
        matmul(numbers(2, 96), made.weight, torch.empty(2, 41))
    made.weight.SCB = made.state.SCB = None
    with pytest.raises(QuantizedDataError, match=r"has no absmax: set weight\.SCB"):
        made.dequantized_weight()
