"""`matmul_4bit`: products with packed codes as a function, against decoded weights and peers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx.errors import BnbxError, OptionError, UnsupportedTensorError
from bnbx.kernels.coding import decode, encode
from bnbx.kernels.encoding import make_encoding
from bnbx.kernels.quant_state import QuantState
from bnbx.layers.matmul import matmul_4bit
from compiled import shared_cache

HOW = (("nf4", False), ("nf4", True), ("fp4", False), ("mxfp4", False))


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_cache(tmp_path_factory):
        yield


def weight(
    shape: tuple[int, int] = (24, 64), quant_type: str = "nf4", double: bool = False
) -> tuple[Tensor, QuantState, Tensor]:
    """Packed codes (n, 1), their state, and the numbers that they stand for."""
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    encoding = make_encoding(quant_type, double=double)
    parts = encode(encoding, dense)
    codes, state = QuantState.from_parts(encoding, parts, dense.shape, dense.dtype)
    return codes.reshape(-1, 1), state, decode(encoding, parts, shape)


@pytest.mark.parametrize(("quant_type", "double"), HOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_product_is_that_of_the_decoded_weight(
    dtype: torch.dtype, quant_type: str, double: bool
) -> None:
    codes, state, dense = weight(quant_type=quant_type, double=double)
    x, bias = torch.randn(2, 5, 64).to(dtype), torch.randn(24).to(dtype)
    expected = torch.nn.functional.linear(x.double(), dense.double(), bias.double())
    for packed in (codes, codes.t(), codes.reshape(-1)):
        y = matmul_4bit(x, packed, quant_state=state, bias=bias)
        assert y.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(y.double(), expected, rtol=4 * eps, atol=20 * eps)
    out = torch.empty(2, 5, 24, dtype=dtype)
    assert matmul_4bit(x, codes.t(), state, out, bias) is out
    assert torch.equal(out, matmul_4bit(x, codes.t(), state, bias=bias))
    assert matmul_4bit(x[:, :0], codes.t(), state).shape == (2, 0, 24)


@pytest.mark.parametrize("double", [False, True])
def test_product_is_that_of_bitsandbytes(double: bool) -> None:
    peer: Any = pytest.importorskip("bitsandbytes", reason="bitsandbytes, from the extra `peers`")
    dense, x = torch.randn(24, 64), torch.randn(3, 64)
    codes, theirs = peer.functional.quantize_4bit(
        dense, blocksize=64, quant_type="nf4", compress_statistics=double
    )
    state = QuantState.from_dict(theirs.as_dict(packed=True), "cpu")
    expected = peer.matmul_4bit(x, codes.t(), quant_state=theirs)
    torch.testing.assert_close(matmul_4bit(x, codes.t(), quant_state=state), expected)


def test_gradients() -> None:
    codes, state, dense = weight()
    x = torch.randn(3, 64, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    grad = torch.randn(3, 24)
    y = matmul_4bit(x, codes.t(), state, bias=bias)
    found = torch.autograd.grad(y, (x, bias), grad)
    torch.testing.assert_close(found[0], grad @ dense)
    torch.testing.assert_close(found[1], grad.sum(0))


def test_bias_of_another_dtype_is_converted() -> None:
    codes, state, _ = weight()
    x, bias = torch.randn(3, 64).bfloat16(), torch.randn(24)
    expected = matmul_4bit(x, codes.t(), state, bias=bias.bfloat16())
    assert torch.equal(matmul_4bit(x, codes.t(), state, bias=bias), expected)


def test_weight_the_other_way_around_warns() -> None:
    codes, state, dense = weight((64, 24))
    x, bias = torch.randn(3, 64), torch.randn(24)
    with pytest.warns(DeprecationWarning, match=r"quantized from a \[K, N\] tensor"):
        y = matmul_4bit(x, codes.t(), state, bias=bias)
    torch.testing.assert_close(y, x @ dense + bias)


def test_one_graph() -> None:
    codes, state, _ = weight()

    def run(x: Tensor) -> Tensor:
        return matmul_4bit(x, codes.t(), state)

    x = torch.randn(3, 64)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), run(x))


def test_errors_name_what_is_wrong() -> None:
    codes, state, _ = weight()
    x = torch.randn(3, 64)
    with pytest.raises(OptionError, match="quant_state is required"):
        matmul_4bit(x, codes.t(), None)  # type: ignore[arg-type]
    with pytest.raises(BnbxError, match="expected"):
        matmul_4bit(x, codes[:-1].t(), state)
    with pytest.raises(OptionError, match="gradients do not flow through `out`"):
        matmul_4bit(x.requires_grad_(), codes.t(), state, torch.empty(3, 24))
    with pytest.raises(UnsupportedTensorError, match=r"\(3, 63\)"):
        matmul_4bit(x.detach()[:, :63], codes.t(), state)
    state.shape = torch.Size([24 * 64])
    with pytest.raises(OptionError, match="must be 2D"):
        matmul_4bit(x.detach(), codes.t(), state)


def test_a_state_of_another_library_is_named_with_the_way_to_convert_it() -> None:
    peer = pytest.importorskip("bitsandbytes", reason="bitsandbytes, from the extra `peers`")
    x = torch.randn(3, 64)
    codes, theirs = peer.functional.quantize_4bit(
        torch.randn(32, 64), quant_type="nf4", compress_statistics=True
    )
    message = r"is bitsandbytes\.functional\.QuantState; expected the bnbx\..*from_dict"
    with pytest.raises(OptionError, match=message):
        matmul_4bit(x, codes, theirs)
    state = QuantState.from_dict(theirs.as_dict(), codes.device)
    torch.testing.assert_close(matmul_4bit(x, codes, state), peer.matmul_4bit(x, codes.t(), theirs))
    with pytest.raises(UnsupportedTensorError, match=r"A is list; expected a torch\.Tensor"):
        matmul_4bit([1], codes, state)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedTensorError, match=r"B is NoneType; expected a torch\.Tensor"):
        matmul_4bit(x, None, state)  # type: ignore[arg-type]
