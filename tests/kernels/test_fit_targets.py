"""A fit on either target: the same sums to float32, the same codes, and never worse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bnbx.kernels import fit, fit_cpu, fit_reference
from bnbx.kernels.coding import decode, encode
from bnbx.kernels.coding_reference import factors
from bnbx.kernels.encoding import Encoding
from scale_kinds import ENCODINGS, KINDS, block_errors

every = pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
kinds = pytest.mark.parametrize("encoding", KINDS.values(), ids=KINDS)


def blocks(encoding: Encoding, count: int, size: int) -> dict[str, Tensor | None]:
    """Blocks with arguments as a fit makes them."""
    torch.manual_seed(0)
    x = torch.randn(count, size) * torch.rand(count, 1) + (torch.rand(count, 1) - 0.5)
    factor = x.abs().amax(1) * (0.5 + torch.rand(count))
    factor[-1] = 0.0  # no scale at all
    inverse = torch.where(factor > 0, encoding.codebook.unit / factor, 0.0)
    if encoding.keeps_step:
        factor = factor / encoding.codebook.unit
    center = x.mean(1) if encoding.quant_type.scale.centered else None
    return {"x": x, "factor": factor, "inverse": inverse, "center": center}


@every
@pytest.mark.parametrize("short", [False, True])
def test_targets_agree(encoding: Encoding, short: bool) -> None:
    size = encoding.block_size or 600
    given = blocks(encoding, 9, size - 3 if short else size)
    x = given["x"]
    assert x is not None
    norm = 1 / x.abs().amax(1)
    ours = fit_cpu.sums(encoding, **given, norm=norm, codes=None)  # type: ignore[arg-type]
    theirs = fit_reference.sums(encoding, **given, norm=norm, codes=None)  # type: ignore[arg-type]
    assert torch.allclose(ours, theirs, rtol=2e-5, atol=1e-4)

    del given["factor"]
    codes = torch.zeros((len(x), -(-x.shape[1] * encoding.bits // 8)), dtype=torch.uint8)
    changed = torch.arange(len(x)) % 3 > 0
    expected = codes.clone()
    fit_cpu.write(encoding, **given, changed=changed, codes=codes)  # type: ignore[arg-type]
    fit_reference.write(encoding, **given, changed=changed, codes=expected)  # type: ignore[arg-type]
    assert torch.equal(codes, expected)
    assert not codes[~changed].any()


@kinds
def test_sums_are_those_of_what_is_decoded(encoding: Encoding) -> None:
    """The error that decides is that of the decoded numbers, on both targets."""
    size = encoding.block_size or 600
    x = torch.randn(1, size, generator=torch.Generator().manual_seed(1))
    parts = dict(zip(encoding.parts, encode(encoding, x), strict=True))
    off = decode(encoding, list(parts.values()), x.shape).double() - x.double()
    factor = factors(encoding, list(parts.values()), x.shape)
    center, one = parts.get("center"), torch.ones(1)
    codes = parts["codes"].view(1, -1)
    for target in (fit_cpu, fit_reference):
        found = target.sums(encoding, x, factor, one, center, one, codes)
        assert float(found[0]) == pytest.approx(float(off.square().sum()), rel=1e-5)


@kinds
def test_never_worse_with_torch_operations(
    encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(7, 300, generator=torch.Generator().manual_seed(2))
    native = block_errors(encoding, fit.fit_scales(encoding, x), x)
    monkeypatch.setattr(fit, "target_for", lambda *_: "reference")
    monkeypatch.setattr(fit_cpu, "sums", None)
    found = block_errors(encoding, fit.fit_scales(encoding, x), x)
    assert (found <= block_errors(encoding, encode(encoding, x), x)).all()
    assert float(found.sum()) == pytest.approx(float(native.sum()), rel=1e-3)
