"""Results in memory of the caller's: the same bytes, straight into it, whatever it looks like."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx import functional
from bnbx.errors import DeviceError, InputError, QuantizedDataError
from bnbx.kernels import coding
from bnbx.kernels.encoding import make_encoding
from same_bits import FLOATS, same_bits

F = functional
SIZES = (1, 2, 63, 64, 65, 1000, 4096 * 3 + 7)


def strided(tensor: Tensor) -> Tensor:
    """Memory of the same shape whose elements do not lie side by side."""
    return torch.stack([tensor, tensor], -1)[..., 0]


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_halves(storage: torch.dtype, compressed: bool, contiguous: bool) -> None:
    kind: dict[str, Any] = dict(
        quant_type="nf4", quant_storage=storage, compress_statistics=compressed
    )
    for numel in SIZES:
        x = torch.randn(numel)
        codes, state = F.quantize_4bit(x, **kind)
        out, absmax = torch.full_like(codes, 7), torch.full_like(state.absmax, 7)
        if not contiguous:
            out, absmax = strided(out), strided(absmax)
        made, found = F.quantize_4bit(x, absmax, out, **kind)
        assert made is out
        assert found.absmax is absmax
        assert same_bits(out, codes), numel
        assert found == state
        for some in (dict(out=torch.empty_like(codes)), dict(absmax=torch.empty_like(absmax))):
            named: dict[str, Any] = {**some, **kind}
            alone, other = F.quantize_4bit(x, **named)
            assert same_bits(alone, codes)
            assert other == state


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("factor", [1, 3], ids=["table", "any table"])
@pytest.mark.parametrize("nested", [False, True])
def test_bytes(nested: bool, factor: int, contiguous: bool) -> None:
    kind: dict[str, Any] = dict(code=F.create_dynamic_map() * factor, blocksize=64, nested=nested)
    for numel in SIZES:
        x = torch.randn(2, numel).bfloat16()
        codes, state = F.quantize_blockwise(x, **kind)
        out, absmax = torch.full_like(codes, 7), torch.full_like(state.absmax, 7)
        if not contiguous:
            out, absmax = strided(out), strided(absmax)
        made, found = F.quantize_blockwise(x, absmax=absmax, out=out, **kind)
        assert made is out
        assert found.absmax is absmax
        assert same_bits(out, codes), numel
        assert found == state


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_codes_over_the_numbers_that_they_are_made_of(dtype: torch.dtype) -> None:
    """Written as they are made, they would be read as numbers."""
    x = torch.randn(64 * 5000).to(dtype)
    codes, state = F.quantize_4bit(x, quant_type="nf4")
    four = x.clone()
    out = four.view(torch.uint8)[-codes.numel() :]
    made, found = F.quantize_4bit(four, out=out, quant_type="nf4")
    assert made is out
    assert same_bits(out.view(-1, 1), codes)
    assert found == state
    codes, _ = F.quantize_blockwise(x, blocksize=64)
    eight = x.clone()
    out = eight.view(torch.uint8)[-codes.numel() :]
    F.quantize_blockwise(eight, out=out, blocksize=64)
    assert same_bits(out, codes)


MEMORY = """
import resource
import torch
import bnbx.functional as F

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
x = torch.ones(1 << 24, dtype=torch.bfloat16)  # and no more before, which would be the peak
calls = {
    "4bit": lambda x, **memory: F.quantize_4bit(x, quant_type="nf4", **memory),
    "blockwise": lambda x, **memory: F.quantize_blockwise(x, blocksize=64, **memory),
}
for name, call in calls.items():
    codes, state = call(x[: 1 << 20])  # what is made once
    count = x.numel() // (2 if name == "4bit" else 1)
    shape = (count, 1) if name == "4bit" else (count,)
    out, absmax = torch.ones(shape, dtype=torch.uint8), torch.ones(x.numel() // 64)
    before = peak()
    call(x, out=out, absmax=absmax)
    more = peak() - before
    assert more < 2 << 20, (name, more)
"""


def test_nothing_is_made_first() -> None:
    """In a process of its own, whose peak of memory is that of the call."""
    pytest.importorskip("resource")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_writes_are_counted() -> None:
    """Autograd refuses to go back through a tensor that was written to."""
    x = torch.randn(64)
    codes, state = F.quantize_4bit(x, quant_type="nf4")
    absmax, numbers = torch.empty(1), torch.empty(64)
    for tensor, call in (
        (absmax, lambda: F.quantize_4bit(x, absmax=absmax)),
        (numbers, lambda: F.dequantize_4bit(codes, state, out=numbers)),
    ):
        saved = (torch.ones(1, requires_grad=True) * tensor).sum()
        call()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.backward(saved)


def test_memory_that_does_not_fit() -> None:
    x = torch.randn(128)
    for bad in (torch.empty(64), torch.empty(63, dtype=torch.uint8)):
        with pytest.raises(InputError, match="out"):
            F.quantize_4bit(x, out=bad)
    with pytest.raises(DeviceError, match="meta"):
        F.quantize_4bit(x, absmax=torch.empty(2, device="meta"))
    encoding = make_encoding("nf4")
    codes = torch.empty(64, dtype=torch.uint8)
    for out in ([codes[:63]], [codes.float()], [codes, codes], [codes.to("meta")], [codes] * 3):
        with pytest.raises(QuantizedDataError, match="memory for nf4"):
            coding.encode(encoding, x, out=out)
    with pytest.raises(QuantizedDataError, match="expected 1 at most"):
        coding.encode(make_encoding("nf4", double=True), x, out=[codes, codes])


@pytest.mark.parametrize("name", ["nf4", "int8", "nvfp4"])
def test_memory_for_the_first_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on native targets and on the reference."""
    encoding = make_encoding(name)
    x = torch.randn(16, 64)
    expected = coding.encode(encoding, x)
    for target in ("cpu", "reference"):
        monkeypatch.setattr(coding, "target_for", lambda *_, target=target: target)
        for count in range(len(expected) + 1):
            out = [torch.empty_like(part) for part in expected[:count]]
            parts = coding.encode(encoding, x, out=out)
            assert all(part is given for part, given in zip(parts, out, strict=False))
            assert all(map(same_bits, parts, expected))


def test_in_a_graph() -> None:
    def run(x: Tensor, out: Tensor, absmax: Tensor) -> Tensor:
        codes, _ = F.quantize_4bit(x, absmax, out, quant_type="nf4")
        return codes

    x = torch.randn(128)
    codes, state = F.quantize_4bit(x, quant_type="nf4")
    out, absmax = torch.zeros_like(codes), torch.zeros(2)
    found = torch.compile(run, backend="aot_eager", fullgraph=True)(x, out, absmax)
    assert same_bits(found, codes)
    assert same_bits(out, codes)
    assert same_bits(absmax, state.absmax)
