"""A type fitted to data has numbers that suit the data, and works wherever a type does."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bnbx import functional
from bnbx.errors import BnbxError, OptionError, UnsupportedTensorError
from bnbx.kernels import coding_reference, quantiles
from bnbx.kernels import encoding as encoding_module
from bnbx.kernels.encoding import from_label, make_encoding
from bnbx.kernels.quantiles import fit_quantiles
from bnbx.nn import QuantLinear
from bnbx.quant_types.nf4 import nf4
from bnbx.registry import QuantType

SIZE = 64


def data(kind: str, count: int = 100_000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, generator=generator)
    uniform = torch.rand(count, generator=generator).clamp(min=1e-6)
    return {
        "normal": x,
        "laplace": uniform.log() * x.sign(),
        "one-sided": -uniform.log(),
        "skewed": -uniform.log() - 0.3,
        "bimodal": x.sign() + 0.1 * uniform,
    }[kind]


def mean_error(found: QuantType, x: Tensor, *, signed: bool = True) -> float:
    encoding = make_encoding(found, SIZE, signed=signed)
    parts = coding_reference.encode(encoding, x)
    return float(
        (coding_reference.decode(encoding, parts, x.shape, torch.float32) - x).abs().mean()
    )


KINDS = ("normal", "laplace", "skewed", "bimodal")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_fit_is_at_least_as_near_as_fixed_types(kind: str, bits: int) -> None:
    """Where a fixed type is nearly the optimum, as nf4 is for normal data, by less than 1 %.

    The dynamic type of 2 bits is left out: it is nearer where it has no -1, which we keep.
    """
    x = data(kind)
    found = mean_error(fit_quantiles(x, bits, block_size=SIZE), x)
    for family in ("nf", "linear", "dynamic")[: 2 if bits == 2 else 3]:
        assert found < 1.01 * mean_error(make_encoding(f"{family}{bits}").quant_type, x)


@pytest.mark.parametrize("kind", ["laplace", "skewed", "bimodal"])
def test_the_fit_beats_nf4_where_data_are_not_normal(kind: str) -> None:
    assert mean_error(fit_quantiles(data(kind), 4), data(kind)) < 0.97 * mean_error(nf4, data(kind))


def test_on_normal_data_it_finds_nf4() -> None:
    found = fit_quantiles(data("normal", 1_000_000), 4)
    assert np.abs(np.subtract(found.values, nf4.values)).max() < 0.02  # type: ignore[arg-type]


def test_numbers_are_medians_of_what_is_nearest() -> None:
    """Checked without the search: every element goes to its nearest number, in float64."""
    x = data("skewed", 20_000)
    found = fit_quantiles(x, 3)
    rows = torch.nn.functional.pad(x, (0, -len(x) % SIZE)).view(-1, SIZE)
    scaled = (rows / rows.abs().amax(1, keepdim=True)).double().flatten()
    numbers = torch.tensor(found.values, dtype=torch.float64)
    nearest = (scaled[:, None] - numbers).abs().argmin(1)
    for code, number in enumerate(numbers.tolist()):
        if number not in (-1.0, 0.0, 1.0):
            below = int((scaled[nearest == code] < number).sum())
            above = int((scaled[nearest == code] > number).sum())
            assert abs(below - above) <= 2, (code, below, above)


@pytest.mark.parametrize("bits", range(2, 9))
def test_numbers_ascend_with_zero_and_both_ends(bits: int) -> None:
    for kind in KINDS:
        values = fit_quantiles(data(kind, 20_000), bits).values
        assert list(values) == sorted(values)  # type: ignore[type-var]
        assert {-1.0, 0.0, 1.0} <= {*values}
        assert len(values) == 2**bits


def test_data_of_one_sign_get_an_unsigned_table() -> None:
    x = data("one-sided")
    found = fit_quantiles(x, 4)
    assert found.unsigned_values is not None
    assert found.unsigned_values[0] == 0
    assert found.unsigned_values[-1] == 1
    assert mean_error(found, x, signed=False) < 0.7 * mean_error(found, x)
    assert mean_error(found, -x) < 1.2 * mean_error(found, x)
    assert fit_quantiles(data("normal"), 4).unsigned_values is None


def test_the_same_data_give_the_same_type() -> None:
    x = data("laplace")
    assert fit_quantiles(x, 4).digest == fit_quantiles(x.clone(), 4).digest
    assert fit_quantiles(x * 8, 4).values == fit_quantiles(x, 4).values
    assert (
        fit_quantiles(x.view(100, -1).t().contiguous().t(), 4).values == fit_quantiles(x, 4).values
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_fitted_too(dtype: torch.dtype) -> None:
    x = data("laplace").to(dtype)
    assert fit_quantiles(x, 4).values == fit_quantiles(x.float(), 4).values


def test_of_many_elements_some_blocks_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    x = data("laplace")
    whole = fit_quantiles(x, 4)
    monkeypatch.setattr(quantiles, "MOST", 30_000)
    part = fit_quantiles(x, 4)
    assert part.values != whole.values
    assert mean_error(part, x) < 1.01 * mean_error(whole, x)


def test_few_and_repeated_numbers() -> None:
    x = torch.tensor([0.0, 0.5, -0.5, 1.0] * 16)
    found = fit_quantiles(x, 2, block_size=64)
    assert set(found.values) == {-1.0, 0.0, 0.5, 1.0}
    assert mean_error(found, x.abs()) == 0


def test_the_type_works_where_types_do() -> None:
    x = data("skewed", 4096)
    found = fit_quantiles(x, 4, block_size=128, name="mine")
    assert (found.name, found.block_size, found.bits) == ("mine", 128, 4)
    assert fit_quantiles(x, 4).name == "quantile4"
    assert QuantType.from_json(found.to_json()) == found
    encoding = make_encoding(found)
    assert from_label(encoding.label) is encoding
    parts = coding_reference.encode(encoding, torch.tensor(found.values * 8))
    decoded = coding_reference.decode(encoding, parts, (128,), torch.float32)
    assert decoded.tolist() == list(found.values * 8)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that this process keeps of types that are not registered."""
    monkeypatch.setattr(encoding_module, "_ANONYMOUS", {})
    for kept in (encoding_module.from_label, encoding_module._interned):
        kept.cache_clear()


@pytest.mark.parametrize("bits", [3, 8])
def test_functions_keep_nothing_of_fitted_types(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(encoding_module._ANONYMOUS)
    made = [
        functional.quantize(data(kind, 4096), fit_quantiles(data(kind), bits)) for kind in KINDS
    ]
    numbers = [tensor.dequantize() for tensor in made]
    assert len(encoding_module._ANONYMOUS) == before
    forget(monkeypatch)
    for tensor, expected in zip(made, numbers, strict=True):
        assert torch.equal(tensor.dequantize(), expected)
        assert pickle.loads(pickle.dumps(tensor)) == tensor
    second = make_encoding("nf4", second=fit_quantiles(data("skewed"), 8))
    assert from_label(second.label) is second


def test_graphs_and_pickles_tell_fitted_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also to a process that never saw the type."""
    layer = QuantLinear(64, 8, quant_type=fit_quantiles(data("skewed"), 4)).to("cpu").eval()
    x, file = torch.randn(2, 64), io.BytesIO()
    expected = layer(x)
    torch.export.save(torch.export.export(layer, (x,)), file)
    pickled = pickle.dumps(layer)
    del layer
    forget(monkeypatch)
    again = pickle.loads(pickled)
    assert torch.equal(again(x), expected)
    assert again.weight.encoding.quant_type.name == "quantile4"
    forget(monkeypatch)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), expected)


@pytest.mark.parametrize(
    "text", ["nf4=/64", "nf4=!/64", "nf4=AAAA/64", "nf4=eJwDAAAAAAE/64", "=/64"]
)
def test_a_label_that_tells_of_no_type(text: str) -> None:
    with pytest.raises(BnbxError):
        from_label(text)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(100), 1), OptionError, "bits=1; expected a whole number from 2 to 8"),
        ((torch.ones(100), 9), OptionError, "bits=9"),
        ((torch.ones(100), 2.5), OptionError, "bits=2.5"),
        ((torch.ones(100), 4.0), OptionError, "bits=4.0"),
        ((torch.ones(3), 2), UnsupportedTensorError, "x has 3 elements; 4 quantiles"),
        ((torch.ones(100).long(), 2), UnsupportedTensorError, "x is torch.int64"),
        ((torch.zeros(100), 2), UnsupportedTensorError, "nothing but zeros"),
        ((torch.full((100,), torch.nan), 2), UnsupportedTensorError, "NaN or infinity"),
        (([1.0] * 100, 2), UnsupportedTensorError, "x is list"),
    ],
)
def test_what_cannot_be_fitted(
    arguments: tuple[Any, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fit_quantiles(*arguments)
    for wrong in (100, 64.0, True):
        with pytest.raises(OptionError, match=f"block_size={wrong}; expected one of"):
            fit_quantiles(torch.ones(1000), 2, block_size=wrong)  # type: ignore[arg-type]
