"""Merging a low-rank update: what the report says is so, and no block is worse than before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from bnbx.errors import OptionError, QuantizedDataError, UnsupportedTensorError
from bnbx.kernels.coding import decode, encode
from bnbx.kernels.encoding import Encoding, make_encoding
from bnbx.nn import Linear4bit, Linear8bitLt, QuantEmbedding, QuantLinear, merge_lora
from scale_kinds import KINDS, block_errors

OUT, IN, RANK = 24, 136, 4
every = pytest.mark.parametrize("encoding", KINDS.values(), ids=KINDS)


def weight(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.05 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))).to(dtype)


def update(size: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Two factors whose product is `size` times as large as `weight`."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(RANK, IN, generator=generator), torch.randn(OUT, RANK, generator=generator)
    return a.to(dtype), (b * (0.05 * size / RANK**0.5)).to(dtype)


def exact_sum(encoding: Encoding, parts: list[Tensor], a: Tensor, b: Tensor, s: float) -> Tensor:
    return decode(encoding, parts, (OUT, IN)).double() + s * b.double() @ a.double()


@every
@pytest.mark.parametrize("size", [0.02, 0.5])
def test_report_and_guarantees(encoding: Encoding, size: float) -> None:
    parts = encode(encoding, weight())
    kept = [part.clone() for part in parts]
    a, b = update(size)
    merged = merge_lora((encoding, parts, (OUT, IN)), a, b, 0.5)
    assert all(map(torch.equal, parts, kept))
    before, exact = (
        decode(encoding, parts, (OUT, IN)).double(),
        exact_sum(encoding, parts, a, b, 0.5),
    )
    after = decode(encoding, merged.parts, (OUT, IN)).double()
    naive = decode(encoding, encode(encoding, exact.float()), (OUT, IN)).double()
    change, report = exact - before, merged.report
    expected = replace(
        report,
        error=float((after - exact).norm() / exact.norm()),
        absmax_error=float((naive - exact).norm() / exact.norm()),
        update_error=float((after - exact).norm() / change.norm()),
        absmax_update_error=float((naive - exact).norm() / change.norm()),
        survived=float(((after - before) * change).sum() / change.square().sum()),
        update=float(change.norm() / before.norm()),
    )
    for name, value in vars(expected).items():
        assert vars(report)[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert report.error <= report.absmax_error
    assert report.update_error <= 1 + 1e-6
    assert report.bytes == sum(part.nbytes for part in merged.parts)
    assert report.dense_bytes == 2 * OUT * IN


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_plain_requantization_is_that_of_bitsandbytes(name: str) -> None:
    """The advice that people are given, done with bitsandbytes, has the error that is reported."""
    functional = bitsandbytes.functional
    a, b = update(0.03)
    codes, state = functional.quantize_4bit(weight(), blocksize=64, quant_type=name)
    before = functional.dequantize_4bit(codes, state)
    exact = before + b @ a
    again = functional.dequantize_4bit(
        *functional.quantize_4bit(exact, None, None, 64, False, name)
    )
    theirs = float((again - exact).norm() / (b @ a).norm())
    encoding = make_encoding(name, 64)
    merged = merge_lora((encoding, encode(encoding, weight()), (OUT, IN)), a, b)
    assert merged.report.absmax_update_error == pytest.approx(theirs, rel=1e-5)
    assert theirs > 1  # worse than leaving the update out
    assert merged.report.update_error < 1


def test_no_block_is_further_from_the_sum_than_the_unmerged_weight() -> None:
    encoding = make_encoding("nf4")
    parts = encode(encoding, weight())
    a, b = update(0.05)
    exact = exact_sum(encoding, parts, a, b, 1.0).float()
    found = merge_lora((encoding, parts, (OUT, IN)), a, b).parts
    assert (block_errors(encoding, found, exact) <= block_errors(encoding, parts, exact)).all()


def test_without_a_fit_it_is_plain_requantization() -> None:
    encoding = make_encoding("nf4")
    parts = encode(encoding, weight())
    a, b = update(0.3)
    merged = merge_lora((encoding, parts, (OUT, IN)), a, b, fit=None)
    exact = torch.addmm(decode(encoding, parts, (OUT, IN)), b, a)
    assert merged.report.error == merged.report.absmax_error
    assert torch.equal(
        decode(encoding, merged.parts, (OUT, IN)),
        decode(encoding, encode(encoding, exact), (OUT, IN)),
    )


def test_no_update_changes_nothing() -> None:
    encoding = make_encoding("nf4", double=True)
    parts = encode(encoding, weight())
    a, b = update(0.3)
    merged = merge_lora((encoding, parts, (OUT, IN)), a, torch.zeros_like(b))
    assert all(map(torch.equal, merged.parts, parts))
    assert (merged.report.error, merged.report.update, merged.report.survived) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_sum(dtype: torch.dtype) -> None:
    encoding = make_encoding("nf4")
    parts = encode(encoding, weight())
    a, b = update(0.3, dtype)
    dense = merge_lora((encoding, parts, (OUT, IN)), a, b, 2.0, dense=dtype).dense
    assert dense is not None
    assert dense.dtype == dtype
    exact = exact_sum(encoding, parts, a, b, 2.0)
    assert torch.allclose(dense.double(), exact, atol=1e-6, rtol=4 * torch.finfo(dtype).eps)


def layers() -> dict[str, Any]:
    found: dict[str, Any] = {
        "Linear4bit": Linear4bit(IN, OUT, compress_statistics=True, quant_type="nf4"),
        "Linear4bit stored as bfloat16": Linear4bit(IN, OUT, quant_storage=torch.bfloat16),
        "QuantLinear": QuantLinear(IN, OUT, quant_type="nvfp4"),
        "QuantEmbedding": QuantEmbedding(OUT, IN, quant_type="int8"),
        "Linear8bitLt": Linear8bitLt(IN, OUT, has_fp16_weights=False),
    }
    for layer in found.values():
        layer.weight.data.copy_(weight())
    return {name: layer.to("cpu") for name, layer in found.items()}


def dense_weight(layer: Any) -> Tensor:
    found: Tensor = layer.dequantized_weight(torch.float32)
    return found


@pytest.mark.parametrize("name", layers())
def test_layers_are_merged_in_place(name: str) -> None:
    layer = layers()[name]
    tied, memory = layer.weight, layer.weight.data_ptr()
    before = dense_weight(layer)
    a, b = update(0.5)
    merged = merge_lora(layer, a, b, 0.5, in_place=True)
    after = dense_weight(layer)
    exact = before + 0.5 * b @ a
    assert float((after - exact).norm() / exact.norm()) == pytest.approx(
        merged.report.error, rel=1e-3
    )
    assert not torch.equal(after, before)
    assert layer.weight is tied
    assert layer.weight.data_ptr() == memory
    x = torch.randn(3, IN)
    if not isinstance(layer, QuantEmbedding):
        tolerance = 0.02 if isinstance(layer, Linear8bitLt) else 1e-5  # the input in 8 bits too
        product = x @ after.t() + layer.bias
        off = (layer(x) - product).detach()
        assert float(off.norm() / product.detach().norm()) < tolerance
    other = layers()[name]
    other.load_state_dict(layer.state_dict())
    assert torch.equal(dense_weight(other), after)


def test_a_parameter_will_do() -> None:
    layer = layers()["Linear4bit"]
    a, b = update(0.5)
    first = merge_lora(layer.weight, a, b)
    second = merge_lora(layer, a, b)
    assert first.report == second.report


def test_what_is_wrong_is_said_before_anything_is_written() -> None:
    layer = layers()["Linear4bit"]
    before = dense_weight(layer)
    a, b = update(0.5)
    wrong: list[tuple[Tensor, Tensor, float, str]] = [
        (b, a, 1.0, r"lora_a of shape \(24, 4\) and lora_b of shape \(4, 136\).*look swapped"),
        (a[:2], b, 1.0, r"\(2, 136\).*expected \(rank, 136\) and \(24, rank\)"),
        (a[:, :-1], b, 1.0, r"\(4, 135\)"),
        (a[0], b, 1.0, r"\(136,\)"),
        (a, b, float("nan"), "scaling is nan"),
        (a / 0, b, 1.0, "lora_a has numbers that are not finite"),
        (a, b * torch.nan, 1.0, "lora_b has numbers that are not finite"),
    ]
    for first, second, scaling, message in wrong:
        with pytest.raises(OptionError, match=message):
            merge_lora(layer, first, second, scaling, in_place=True)
    with pytest.raises(UnsupportedTensorError, match=r"lora_b is torch.float64"):
        merge_lora(layer, a, b.double(), in_place=True)
    with pytest.raises(UnsupportedTensorError, match="lora_a is on meta, the weight on cpu"):
        merge_lora(layer, a.to("meta"), b, in_place=True)
    with pytest.raises(OptionError, match="fit='mae'"):
        merge_lora(layer, a, b, fit="mae", in_place=True)
    with pytest.raises(OptionError, match=r"dense=torch.int8"):
        merge_lora(layer, a, b, dense=torch.int8, in_place=True)
    assert torch.equal(dense_weight(layer), before)


def test_weights_that_are_not_quantized() -> None:
    a, b = update(0.5)
    with pytest.raises(UnsupportedTensorError, match=r"expects a quantized layer.*not a Linear"):
        merge_lora(nn.Linear(IN, OUT), a, b)  # type: ignore[arg-type]
    with pytest.raises(QuantizedDataError, match="not quantized yet"):
        merge_lora(Linear4bit(IN, OUT), a, b)
    with pytest.raises(UnsupportedTensorError, match="has its weight in floats"):
        merge_lora(Linear8bitLt(IN, OUT), a, b)
    encoding = make_encoding("nf4")
    parts = encode(encoding, torch.randn(4, 8, 8))
    with pytest.raises(OptionError, match=r"shape \(4, 8, 8\); low-rank updates are for"):
        merge_lora((encoding, parts, (4, 8, 8)), a, b)


def test_report_reads_as_a_sentence() -> None:
    merged = merge_lora(layers()["Linear4bit"], *update(0.5))
    assert str(merged.report).startswith("merged with a relative error of 0.0")
    assert "% of the update survived" in str(merged.report)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_layer_is_merged_in_the_memory_that_it_has(storage: torch.dtype) -> None:
    from bnbx.nn import Linear4bit

    torch.manual_seed(0)
    layer = Linear4bit(64, 32, quant_type="nf4", quant_storage=storage).to("cpu")
    before, memory = layer.dequantized_weight(), layer.weight.data_ptr()
    a, b = torch.randn(4, 64) / 8, torch.randn(32, 4) / 8
    merged = merge_lora(layer, a, b, in_place=True)
    after = layer.dequantized_weight()
    assert layer.weight.data_ptr() == memory
    off, exact = (after - before - b @ a).norm(), before + b @ a
    assert off < (b @ a).norm()
    assert merged.report.error == pytest.approx(float(off / exact.norm()), rel=1e-3)
