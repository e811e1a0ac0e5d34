"""Fitted scales: never worse than absmax in any block of any type, and as good as brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bnbx.errors import OptionError, QuantizedDataError, UnsupportedTensorError
from bnbx.kernels import fit as kernels_fit
from bnbx.kernels.coding import decode, encode
from bnbx.kernels.encoding import Encoding, check_parts, make_encoding
from bnbx.kernels.fit import fit_scales
from scale_kinds import ENCODINGS, KINDS, SCALES, block_errors, blocks_of, even, float4

kinds = pytest.mark.parametrize("encoding", KINDS.values(), ids=KINDS)
every = pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weights(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers whose rows differ in size, as those of trained weights do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x * (0.01 + 0.05 * torch.rand((*shape[:-1], 1), generator=generator))


def assert_never_worse(encoding: Encoding, x: Tensor) -> tuple[Tensor, Tensor]:
    """The errors of each block with absmax and with fitted scales."""
    fitted = fit_scales(encoding, x)
    check_parts(encoding, x.shape, fitted)
    before = block_errors(encoding, encode(encoding, x), x)
    after = block_errors(encoding, fitted, x)
    same = (before == after) | (before.isnan() & after.isnan())
    assert ((after < before) | same).all()
    return before, after


@every
def test_never_worse_and_better_on_the_whole(encoding: Encoding) -> None:
    before, after = assert_never_worse(encoding, weights(37, 333))
    assert after.sum() < 0.99 * before.sum()


@settings(max_examples=40)
@given(data=st.data())
def test_never_worse_whatever_the_numbers(data: st.DataObject) -> None:
    encoding = ENCODINGS[data.draw(st.sampled_from(sorted(ENCODINGS)))]
    shape = data.draw(st.lists(st.integers(0, 40), min_size=0, max_size=3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    x = torch.randn(shape, generator=generator) ** data.draw(st.sampled_from((1, 3, 9)))
    x = x * torch.rand(shape, generator=generator).lt(data.draw(st.sampled_from((0.1, 1.0))))
    x = x + data.draw(st.sampled_from((0.0, 3.0)))
    x = x * data.draw(st.sampled_from((1e-42, 1e-30, 1e-3, 1.0, 1e30)))
    assert_never_worse(encoding, x.to(data.draw(st.sampled_from(DTYPES))))


@kinds
def test_blocks_that_are_not_finite_are_those_of_absmax(encoding: Encoding) -> None:
    x = weights(3, 512)
    x[0, 3], x[1, 400] = torch.nan, torch.inf
    plain, fitted = encode(encoding, x), fit_scales(encoding, x)
    bad = blocks_of(encoding, ~x.isfinite()).any(1)
    old = blocks_of(encoding, decode(encoding, plain, x.shape))
    new = blocks_of(encoding, decode(encoding, fitted, x.shape))
    assert torch.equal(old[bad].isnan(), new[bad].isnan())
    assert_never_worse(encoding, x)


def levels_of(encoding: Encoding) -> Tensor:
    """The numbers of the table, in its own unit."""
    values = [value for value in encoding.codebook.values if value is not None]
    return torch.tensor(values, dtype=torch.float64)


def brute_force(encoding: Encoding, x: Tensor) -> Tensor:
    """The least error of each block over a thousand scales, in float64 and without thresholds."""
    levels = levels_of(encoding)
    blocks = blocks_of(encoding, x).double()
    best = torch.full((len(blocks),), torch.inf, dtype=torch.float64)
    for multiple in torch.linspace(0.2, 1.5, 1000, dtype=torch.float64):
        grid = blocks.abs().amax(1, keepdim=True) * multiple * levels / encoding.codebook.unit
        off = (blocks[:, :, None] - grid[:, None]).abs().amin(2)
        best = torch.minimum(best, off.square().sum(1))
    return best


@pytest.mark.parametrize("name", ["nf4", "even2", "even3", "even4", "float4-plain"])
def test_as_good_as_brute_force(name: str) -> None:
    encoding, x = ENCODINGS[name], weights(8, 256)
    before, after = assert_never_worse(encoding, x)
    least = brute_force(encoding, x)
    gained, possible = before.sum() - after.sum(), before.sum() - least.sum()
    assert gained > 0.95 * possible


@pytest.mark.parametrize("kind", ["e4m3", "e8m0"])
def test_scales_of_few_values_are_searched_through(kind: str) -> None:
    """Every one of their values is tried here; the fit has to find most of what there is."""
    encoding, x = ENCODINGS[f"float4-{kind}"], weights(8, 256)
    parts = encode(encoding, x)
    least = block_errors(encoding, parts, x)
    blocks = blocks_of(encoding, x)
    codes = levels_of(encoding)
    for byte in range(127 if kind == "e4m3" else 254):
        scale = torch.tensor([byte], dtype=torch.uint8)
        step = (
            scale.view(torch.float8_e4m3fn).double()
            if kind == "e4m3"
            else 2.0 ** (scale.double() - 127)
        )
        off = (blocks.double()[:, :, None] - (codes * step)[None, None]).abs().amin(2)
        least = torch.minimum(least, off.square().sum(1).nan_to_num(torch.inf))
    before, after = assert_never_worse(encoding, x)
    assert before.sum() - after.sum() > 0.95 * (before.sum() - least.sum())


@kinds
def test_pieces_do_not_matter(encoding: Encoding, monkeypatch: pytest.MonkeyPatch) -> None:
    x = weights(9, 200)
    whole = block_errors(encoding, fit_scales(encoding, x), x)
    monkeypatch.setattr(kernels_fit, "PIECE", 128)
    pieces = fit_scales(encoding, x)
    assert_never_worse(encoding, x)
    assert torch.allclose(block_errors(encoding, pieces, x), whole, rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_dtypes(dtype: torch.dtype) -> None:
    encoding = make_encoding("nf4")
    x = weights(96, 64).to(dtype)
    for view in (x.t(), x[::2], x[:, 1:].reshape(8, 12, 63)[::2]):
        plain = fit_scales(encoding, view.contiguous().float())
        assert all(map(torch.equal, fit_scales(encoding, view), plain))


def test_a_parameter_is_fitted_without_a_graph() -> None:
    parameter = torch.nn.Parameter(weights(16, 64))
    assert not any(part.requires_grad for part in fit_scales(make_encoding("nf4"), parameter))


@kinds
def test_starts_where_it_is_told(encoding: Encoding) -> None:
    """From the parts of a weight, the fit of another near it is at least as near as the weight."""
    x = weights(12, 160)
    start = encode(encoding, x)
    kept = [part.clone() for part in start]
    near = decode(encoding, start, x.shape) + 0.1 * weights(12, 160, seed=1)
    found = fit_scales(encoding, near, start=start)
    assert all(map(torch.equal, start, kept))
    old, new = block_errors(encoding, start, near), block_errors(encoding, found, near)
    assert (new <= old).all()
    assert new.sum() < old.sum()


def test_what_blocks_share_stays() -> None:
    x = weights(40, 512)
    for encoding in (ENCODINGS["nf4-double"], ENCODINGS["float4-e4m3_tensor"]):
        plain, fitted = encode(encoding, x), fit_scales(encoding, x)
        pairs = dict(zip(encoding.parts, zip(plain, fitted, strict=True), strict=True))
        shared = set(encoding.parts) - {"codes", "scale"}
        assert shared
        assert all(torch.equal(*pairs[name]) for name in shared)


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the most bytes that an operation has made, views of `known` aside."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known, self.bytes = known.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() != self.known:
            self.bytes = max(self.bytes, out.nbytes)
        return out


@pytest.mark.parametrize("scale", [SCALES["plain"], SCALES["row"], SCALES["tensor"]])
def test_temporaries_are_small(monkeypatch: pytest.MonkeyPatch, scale: object) -> None:
    monkeypatch.setattr(kernels_fit, "PIECE", 4096)
    encoding = make_encoding(float4("float4_small", scale=scale, block_size=64))
    parts = encode(encoding, x := weights(128, 1024))
    with LargestTensor(x) as largest:
        fit_scales(encoding, x, start=parts)
    assert 0 < largest.bytes <= max(8 * 4096, parts[0].nbytes)


def test_more_steps_are_no_worse() -> None:
    encoding, x = make_encoding(even(4)), weights(16, 512)
    errors = [
        block_errors(encoding, fit_scales(encoding, x, steps=steps), x) for steps in (0, 1, 3)
    ]
    assert errors[0].sum() > errors[1].sum() > errors[2].sum()


def test_errors_say_what_is_possible() -> None:
    encoding, x = make_encoding("nf4"), weights(2, 64)
    with pytest.raises(OptionError, match=r"fit='mae'; expected one of \('mse',\), or None"):
        fit_scales(encoding, x, "mae")
    with pytest.raises(OptionError, match="steps=-1; expected"):
        fit_scales(encoding, x, steps=-1)
    with pytest.raises(UnsupportedTensorError, match="float64"):
        fit_scales(encoding, x.double())
    with pytest.raises(QuantizedDataError, match="codes is"):
        fit_scales(encoding, x, start=encode(encoding, weights(2, 128)))
