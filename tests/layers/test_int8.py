"""The int8 layer: products and gradients."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bnbx.kernels import int8
from bnbx.layers.int8 import Linear8bitLt
from bnbx.layers.matmul import MatmulLtState, matmul
from compiled import shared_cache
from int8_layers import error, layer, numbers

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_cache(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def peer() -> Any:
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes, from the extra `peers`")


def outlier_columns(made: Linear8bitLt) -> list[int] | None:
    return None if made.state.idx is None else made.state.idx.tolist()


# ---- forward


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96,), (1, 96), (7, 96), (2, 3, 4, 96), (300, 96)])
def test_product_is_close_to_the_dense_one(
    shape: tuple[int, ...], dtype: torch.dtype, frozen: bool
) -> None:
    made, x = layer(frozen=frozen), numbers(*shape, dtype=dtype)
    weight = made.dequantized_weight()
    y = made(x)
    expected = nn.functional.linear(x.double(), weight.double(), made.bias.double())
    assert y.dtype == dtype
    assert y.shape == expected.shape
    assert error(y, expected) < 0.01


def test_any_strides_and_no_rows() -> None:
    made, x = layer(), numbers(4, 6, 96)
    y = made(x)
    assert torch.equal(made(x.transpose(0, 1)), y.transpose(0, 1))
    assert torch.equal(made(x.permute(2, 0, 1).contiguous().permute(1, 2, 0)), y)
    assert torch.equal(made(x[:, ::2]), made(x[:, ::2].contiguous()))
    assert made(x[:0]).shape == (0, 6, 40)
    assert made(x[:, :0]).shape == (4, 0, 40)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_function_and_layer_are_the_same(threshold: float) -> None:
    made, x = layer(threshold=threshold), numbers(9, 96)
    y = made(x)
    assert torch.equal(matmul(x, made.weight, threshold=threshold, bias=made.bias), y)
    state = MatmulLtState(CB=made.weight.detach(), SCB=made.weight.SCB)
    state.has_fp16_weights = False
    ignored = torch.zeros(40, 96)  # the state has codes
    assert torch.equal(matmul(x, ignored, state=state, threshold=threshold, bias=made.bias), y)
    out = torch.empty(9, 40)
    with torch.no_grad():
        assert matmul(x, made.weight, out, threshold=threshold, bias=made.bias) is out
    assert torch.equal(out, y)
    transposed = made.dequantized_weight().t().contiguous().t()
    assert torch.equal(matmul(x, transposed, threshold=threshold, bias=made.bias), y)


def test_state_has_what_was_used() -> None:
    made = layer()
    assert torch.equal(made.state.CB, made.weight)
    assert made.state.SCB is made.weight.SCB
    assert outlier_columns(made) is None
    made(numbers(9, 96))
    assert outlier_columns(made) == [5, 17]
    made(numbers(9, 96).clamp(-3, 3))
    assert outlier_columns(made) == []
    made.eval()
    made(numbers(9, 96))
    assert made.state.is_training is False
    plain: Any = layer(threshold=0.0)
    plain(numbers(9, 96))
    assert plain.state.idx is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_forward_warns_or_logs(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        layer()(numbers(3, 96, dtype=dtype))
    assert not caplog.records


def test_numbers_beyond_float16_are_multiplied() -> None:
    made, x = layer(), numbers(5, 96, dtype=torch.bfloat16)
    x[:, 40] = 3e38
    assert made(x).isfinite().all()
    large = Linear8bitLt(96, 40, has_fp16_weights=False)
    with torch.no_grad():
        large.weight.mul_(1e7)
    y = large.to("cpu")(numbers(5, 96).clamp(-3, 3))
    assert y.isfinite().all()


@pytest.mark.parametrize("frozen", [True, False])
def test_autocast_gives_the_dtype_of_a_linear_layer(frozen: bool) -> None:
    made, x = layer(frozen=frozen), numbers(3, 96)
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
        assert y.dtype == nn.Linear(96, 40)(x).dtype == torch.bfloat16
    assert torch.equal(y, made(x.bfloat16()))
    y.float().sum().backward()
    assert made.bias.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_outputs_are_those_of_bitsandbytes(peer: Any, dtype: torch.dtype) -> None:
    """In their evaluation mode, which rounds twice and has 1 / 127**2 with an error of 2e-5."""
    made, x = layer(), numbers(20, 96, dtype=dtype)
    theirs = peer.nn.Linear8bitLt(96, 40, has_fp16_weights=False, threshold=6.0)
    theirs.load_state_dict(nn.Linear(96, 40).state_dict())
    theirs = theirs.to("cpu").eval()
    theirs.load_state_dict(made.state_dict())
    eps = torch.finfo(dtype).eps
    with torch.no_grad():
        torch.testing.assert_close(made(x), theirs(x.clone()), rtol=2 * eps, atol=2 * eps + 1e-4)


# ---- gradients


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_go_straight_through(dtype: torch.dtype, frozen: bool, threshold: float) -> None:
    made = layer(frozen=frozen, threshold=threshold)
    x = numbers(2, 9, 96, dtype=dtype).requires_grad_()
    grad = torch.randn(2, 9, 40).to(dtype)
    made(x).backward(grad)
    codes, absmax, _ = int8.quantize_rows(layer(frozen=False).weight)
    dense = int8.dequantize_rows(codes, absmax, dtype)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, grad @ dense)
    torch.testing.assert_close(made.bias.grad, grad.float().sum((0, 1)), rtol=1e-3, atol=1e-3)
    if frozen:
        assert made.weight.grad is None
        return
    rows = grad.reshape(-1, 40).t() @ x.detach().reshape(-1, 96)
    torch.testing.assert_close(made.weight.grad, rows.float())


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_are_those_of_bitsandbytes(peer: Any, frozen: bool) -> None:
    made = layer(frozen=frozen, threshold=0.0)
    theirs = peer.nn.Linear8bitLt(96, 40, has_fp16_weights=not frozen)
    theirs.load_state_dict(layer(frozen=False).state_dict())
    theirs = theirs.to("cpu")
    x = numbers(9, 96)
    found = []
    for module in (made, theirs):
        given = x.clone().requires_grad_()
        module(given).pow(2).sum().backward()
        found.append((given.grad, module.bias.grad, module.weight.grad))
    for got, expected in zip(*found, strict=True):
        if frozen and got is None:
            assert expected is None
        else:  # theirs multiplies decoded numbers, so that outputs differ by the rounding of x
            assert error(got, expected) < 0.05


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_of_few_rows(rows: int, frozen: bool) -> None:
    made = layer(frozen=frozen)
    x = numbers(rows, 96).requires_grad_()
    made(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (rows, 96)
    assert made.bias.grad.tolist() == [float(rows)] * 40
    if not frozen:
        assert made.weight.grad.shape == (40, 96)


def test_second_derivatives() -> None:
    made, grad = layer(), torch.randn(3, 40, requires_grad=True)
    x = numbers(3, 96).requires_grad_()
    (first,) = torch.autograd.grad(made(x), x, grad, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum() / 2, grad)
    dense = made.dequantized_weight()
    torch.testing.assert_close(second, (grad @ dense @ dense.t()).detach())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_checkpointing(frozen: bool, reentrant: bool) -> None:
    made = nn.Sequential(layer(frozen=frozen), nn.GELU(), layer(40, 8, frozen=frozen))
    found = []
    run: Any
    for run in (made, lambda x: checkpoint(made, x, use_reentrant=reentrant)):
        x = numbers(5, 96).requires_grad_()
        made.zero_grad()
        run(x).pow(2).sum().backward()
        found.append([x.grad, *(p.grad for p in made.parameters() if p.requires_grad)])
    for got, expected in zip(*found, strict=True):
        assert got is not None
        assert torch.equal(got, expected)


def saved_dtypes(made: Any, x: Tensor) -> tuple[list[torch.dtype], list[Tensor]]:
    """Dtypes of what is kept for the backward pass, and the gradients that it gives."""
    kept: list[torch.dtype] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = made(x)
    y.pow(2).sum().backward()
    assert x.grad is not None
    return kept, [x.grad, made.weight.grad, made.bias.grad]


def test_memory_efficient_backward_keeps_no_codes_and_changes_no_gradient() -> None:
    plain = layer(frozen=False)
    thrifty = layer(frozen=False, memory_efficient_backward=True)
    kept, expected = saved_dtypes(plain, numbers(9, 96).requires_grad_())
    fewer, got = saved_dtypes(thrifty, numbers(9, 96).requires_grad_())
    assert torch.int8 in kept
    assert torch.int8 not in fewer
    assert plain.state.CB is not None
    assert thrifty.state.CB is None
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_with_a_float_master_learns(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    target = nn.Linear(64, 32)
    made = Linear8bitLt(64, 32, threshold=6.0).to(dtype)
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        x = numbers(64, 64)
        with torch.no_grad():
            wanted = target(x)
        loss = (made(x.to(dtype)).float() - wanted).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert made.weight.dtype == dtype
    assert losses[-1] < 0.1 * losses[0]


def test_weight_is_quantized_anew_when_it_changes() -> None:
    made, x = layer(frozen=False), numbers(3, 96)
    made.eval()
    first = made(x)
    made.weight.data.mul_(2)  # unseen by autograd
    made.bias.data.mul_(2)
    torch.testing.assert_close(made(x), 2 * first)
    still = Linear8bitLt(96, 40, has_fp16_weights=False, threshold=6.0)  # has not moved yet
    first = still(x)
    still.weight.data.mul_(2)
    still.bias.data.mul_(2)
    torch.testing.assert_close(still(x), 2 * first)
    assert still.weight.dtype == torch.float32
