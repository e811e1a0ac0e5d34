"""A fit of scales on CUDA without a GPU: machine code, and what torch operations find."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

import nvrtc
from bnbx.kernels import fit, fit_cpu, fit_cuda, fit_reference
from bnbx.kernels.coding import encode
from bnbx.kernels.cuda_module import OPTIONS
from bnbx.kernels.encoding import Encoding, check_parts
from bnbx.kernels.packing import pack
from cuda_on_cpu import SCHEDULES
from cuda_on_cpu.build import Mode
from emulated_fit import Emulated
from scale_kinds import ENCODINGS, KINDS, block_errors

# All kinds of scales, and registered types, whose codes are found by tables of other forms.
REGISTERED = ("nf4", "nf4-double", "dynamic8", "dynamic3", "int8_affine", "mxfp6", "nvfp4")
CHOSEN: Mapping[str, Encoding] = {**KINDS, **{name: ENCODINGS[name] for name in REGISTERED}}
chosen = pytest.mark.parametrize("encoding", CHOSEN.values(), ids=CHOSEN)
COMPILED = [(name, nvrtc.ARCHITECTURES[turn % 7]) for turn, name in enumerate(CHOSEN)]
# Two resident blocks of 256 threads on the smallest multiprocessor: 65536 registers, 64 KiB.
MOST_REGISTERS = 128
MOST_SHARED_BYTES = 32 * 1024
# Blocks and their elements: a lane, two warps' worth of groups, long ones in several spans.
SHAPES = ((1, 1), (3, 8), (600, 16), (70, 61), (9, 250), (5, 1024), (3, 2500), (1, 20001))


@pytest.mark.parametrize(("name", "arch"), COMPILED)
def test_compiles_to_machine_code_without_spills(name: str, arch: int) -> None:
    if reason := nvrtc.available():
        pytest.skip(reason)
    cubin = nvrtc.compile_cubin(fit_cuda.source(CHOSEN[name]), arch, options=OPTIONS)
    assert set(cubin.kernels) == {f"bnbx_{name}" for name in fit_cuda.NAMES}
    assert (cubin.spill_stores, cubin.spill_loads, cubin.stack_bytes) == (0, 0, 0), cubin.log
    assert cubin.registers <= MOST_REGISTERS, cubin.log
    assert cubin.shared_bytes <= MOST_SHARED_BYTES, cubin.log


def blocks(encoding: Encoding, count: int, size: int) -> dict[str, Tensor | None]:
    """Blocks with arguments as a fit makes them."""
    generator = torch.Generator().manual_seed(count * size)
    rand = torch.rand(3, count, 1, generator=generator)
    x = torch.randn(count, size, generator=generator) * rand[0] + rand[1] - 0.5
    factor = x.abs().amax(1) * (0.5 + rand[2, :, 0])
    factor[count // 2] = 0.0  # no scale at all
    inverse = torch.where(factor > 0, encoding.codebook.unit / factor, 0.0)
    if encoding.keeps_step:
        factor = factor / encoding.codebook.unit
    center = x.mean(1) if encoding.quant_type.scale.centered else None
    return {"x": x, "factor": factor, "inverse": inverse, "center": center}


def random_codes(encoding: Encoding, count: int, size: int) -> Tensor:
    """Codes of blocks that do not begin at whole words, with bytes of others around them."""
    stride = -(-size * encoding.bits // 8) + 3
    room = torch.full((count * stride + 1,), 0xEE, dtype=torch.uint8)
    codes = torch.as_strided(room, (count, stride - 3), (stride, 1), 1)
    written = encoding.codebook.codes
    generator = torch.Generator().manual_seed(size)
    some = torch.tensor(written)[
        torch.randint(len(written), (count, size), generator=generator)
    ].to(torch.uint8)
    codes.copy_(pack(some, encoding.quant_type))
    return codes


def around(codes: Tensor) -> Tensor:
    """The bytes before, between and behind the blocks."""
    room = torch.as_strided(codes, (len(codes) * codes.stride(0) + 1,), (1,), 0)
    return torch.cat([room[:1], room[1:].view(len(codes), -1)[:, codes.shape[1] :].reshape(-1)])


def assert_same(encoding: Encoding, shape: tuple[int, int], target: Emulated) -> None:
    """The sums with the nearest codes and with given ones, and the codes that are written."""
    given = blocks(encoding, *shape)
    x = given["x"]
    assert x is not None
    codes = random_codes(encoding, *shape)
    scale = {**given, "norm": 1 / x.abs().amax(1)}
    for some in (None, codes):
        ours = target.sums(encoding, **scale, codes=some)  # type: ignore[arg-type]
        theirs = fit_reference.sums(encoding, **scale, codes=some)  # type: ignore[arg-type]
        assert torch.allclose(ours, theirs, rtol=2e-5, atol=1e-4 * max(1, x.shape[1] / 1000))
        again = target.sums(encoding, **scale, codes=some)  # type: ignore[arg-type]
        assert torch.equal(ours, again)

    del given["factor"]
    changed = torch.arange(len(x)) % 3 > 0 if len(x) > 1 else torch.ones(1, dtype=torch.bool)
    expected = codes.clone()
    fit_reference.write(encoding, **given, changed=changed, codes=expected)  # type: ignore[arg-type]
    target.write(encoding, **given, changed=changed, codes=codes)  # type: ignore[arg-type]
    assert torch.equal(codes, expected)
    assert (around(codes) == 0xEE).all()


@chosen
def test_emulated_kernels_do_what_torch_operations_do(encoding: Encoding) -> None:
    for turn, shape in enumerate(SHAPES):
        assert_same(encoding, shape, Emulated(schedule=SCHEDULES[turn % len(SCHEDULES)]))


@pytest.mark.parametrize("mode", ["check", "ubsan"])
@chosen
def test_no_access_is_out_of_bounds_racing_or_misaligned(encoding: Encoding, mode: Mode) -> None:
    for shape in ((1, 1), (70, 16), (9, 61), (2, 1500)):
        assert_same(encoding, shape, Emulated(mode))


def test_numbers_may_begin_anywhere() -> None:
    encoding = KINDS["even4"]
    given = blocks(encoding, 5, 64)
    x = given["x"]
    assert x is not None
    room = torch.empty(x.numel() + 1)
    moved = room[1:].view(x.shape).copy_(x)
    assert moved.data_ptr() % 16 != x.data_ptr() % 16
    one = torch.ones(5)
    target = Emulated("ubsan")
    found = target.sums(encoding, **{**given, "x": moved}, norm=one, codes=None)  # type: ignore[arg-type]
    expected = target.sums(encoding, **given, norm=one, codes=None)  # type: ignore[arg-type]
    assert torch.equal(found, expected)


@chosen
def test_a_whole_fit_is_never_worse_and_as_good(
    encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(7, 300, generator=torch.Generator().manual_seed(2))
    native = block_errors(encoding, fit.fit_scales(encoding, x), x)
    monkeypatch.setattr(fit, "TARGETS", {"cpu": Emulated()})
    parts = fit.fit_scales(encoding, x)
    found = block_errors(encoding, parts, x)
    assert (found <= block_errors(encoding, encode(encoding, x), x)).all()
    assert float(found.sum()) == pytest.approx(float(native.sum()), rel=1e-3)


def test_the_target_is_that_of_quantizing(monkeypatch: pytest.MonkeyPatch) -> None:
    encoding = KINDS["even4"]
    parts = encode(encoding, x := torch.randn(4, 64))
    found = {}
    for name in ("cpu", "cuda", "reference"):
        monkeypatch.setattr(fit, "target_for", lambda *_, name=name: name)
        found[name] = fit._Fit(encoding, parts, x.shape, 0, again=False)
    assert {name: each.target for name, each in found.items()} == {
        "cpu": fit_cpu,
        "cuda": fit_cuda,
        "reference": fit_reference,
    }
    assert found["cuda"].piece > found["cpu"].piece == found["reference"].piece


@pytest.mark.gpu
@chosen
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_fits_are_as_good(encoding: Encoding, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    for shape in ((37, 333), (3, 5000)):
        x = torch.randn(shape, generator=generator).to(dtype)
        parts = fit.fit_scales(encoding, x.cuda())
        assert all(part.is_cuda for part in parts)
        again = fit.fit_scales(encoding, x.cuda())
        assert all(map(torch.equal, parts, again))
        home = [part.cpu() for part in parts]
        check_parts(encoding, x.shape, home)
        found = block_errors(encoding, home, x)
        before = block_errors(encoding, [part.cpu() for part in encode(encoding, x.cuda())], x)
        assert (found <= before).all()
        on_cpu = block_errors(encoding, fit.fit_scales(encoding, x), x)
        assert float(found.sum()) == pytest.approx(float(on_cpu.sum()), rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("encoding", KINDS.values(), ids=KINDS)
def test_on_a_gpu_pieces_and_starts_work(
    encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long blocks in pieces, chunks of blocks, and codes that are given."""
    x = torch.randn(9, 700, generator=torch.Generator().manual_seed(5)).cuda()
    whole = block_errors(encoding, fit.fit_scales(encoding, x), x)
    start = encode(encoding, x)
    near = x + 0.05 * torch.randn(9, 700, generator=torch.Generator().manual_seed(6)).cuda()
    monkeypatch.setattr(fit, "PIECE", 16)
    pieces = block_errors(encoding, fit.fit_scales(encoding, x), x)
    assert torch.allclose(pieces, whole, rtol=1e-3)
    found = fit.fit_scales(encoding, near, start=start)
    old, new = block_errors(encoding, start, near), block_errors(encoding, found, near)
    assert (new <= old).all()


@pytest.mark.gpu
@pytest.mark.parametrize("encoding", KINDS.values(), ids=KINDS)
def test_on_a_gpu_sums_and_codes_are_those_of_torch_operations(encoding: Encoding) -> None:
    for shape in SHAPES:
        given = {
            name: None if each is None else each.cuda()
            for name, each in blocks(encoding, *shape).items()
        }
        x = given["x"]
        assert x is not None
        scale = {**given, "norm": 1 / x.abs().amax(1)}
        for codes in (None, random_codes(encoding, *shape).cuda()):
            ours = fit_cuda.sums(encoding, **scale, codes=codes)  # type: ignore[arg-type]
            theirs = fit_reference.sums(encoding, **scale, codes=codes)  # type: ignore[arg-type]
            assert torch.allclose(ours, theirs, rtol=2e-5, atol=1e-4 * max(1, x.shape[1] / 1000))
            again = fit_cuda.sums(encoding, **scale, codes=codes)  # type: ignore[arg-type]
            assert torch.equal(ours, again)
        del given["factor"]
        changed = (torch.arange(len(x)) % 3 > 0).cuda()
        codes = random_codes(encoding, *shape).cuda()
        expected = codes.clone()
        fit_cuda.write(encoding, **given, changed=changed, codes=codes)  # type: ignore[arg-type]
        fit_reference.write(encoding, **given, changed=changed, codes=expected)  # type: ignore[arg-type]
        assert torch.equal(codes, expected)
