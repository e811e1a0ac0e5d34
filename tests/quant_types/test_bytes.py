"""Codes and scales are, byte for byte, those of the libraries that have the same type.

What bitsandbytes writes on a CPU, what a conversion to torch's 8-bit floats gives, and what
torchao's microscaling tensors hold. Where they differ on purpose, the difference is shown.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import oracles
from bnbx.kernels import coding_reference
from bnbx.kernels.encoding import make_encoding
from bnbx.kernels.packing import unpack
from bnbx.quant_types.dynamic8 import dynamic8
from bnbx.quant_types.dynamic8_grid import dynamic8_grid
from bnbx.quant_types.fp8_e4m3 import fp8_e4m3
from bnbx.quant_types.fp8_e5m2 import fp8_e5m2
from bnbx.quant_types.int8 import int8
from bnbx.quant_types.mxfp4 import mxfp4
from bnbx.quant_types.mxfp6 import mxfp6
from bnbx.quant_types.mxfp8 import mxfp8
from bnbx.quant_types.nvfp4 import nvfp4
from bnbx.registry import QuantType
from bnbx.registry.quant_type import Codebook

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (64, 128, 256, 512, 1024, 2048, 4096)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encode(
    name: str, x: Tensor, block_size: int | None = None, *, signed: bool = True
) -> list[Tensor]:
    return coding_reference.encode(make_encoding(name, block_size, signed=signed), x)


# ---- dynamic8_grid: bitsandbytes' 8 bits on a CPU


def near_thresholds(codebook: Codebook) -> Tensor:
    """The two sides of every step, and of every tie of the exact search, in one block each."""
    around = torch.tensor([*codebook.thresholds, *dynamic8.codebook(signed=True).thresholds])
    up, down = (torch.nextafter(around, torch.tensor(limit)) for limit in (2.0, -2.0))
    probes = torch.cat([around, up, down, torch.tensor(codebook.levels)])
    rows = torch.nn.functional.pad(probes, (0, -len(probes) % 63)).view(-1, 63)
    return torch.cat([torch.ones(len(rows), 1), rows], 1)  # an absmax of 1 leaves them as they are


GRID_CASES = {
    "normal": normal(20, 2001),
    "one element": normal(1),
    "a tail": normal(4099),
    "magnitudes": torch.exp(10 * normal(30_000)) * normal(30_000, seed=1),
    "points": torch.linspace(-1, 1, 65_536),
    "zeros": torch.zeros(5000),
    "zeros in blocks": normal(30_000) * (normal(30_000, seed=2) > 1),
    "tiny blocks": normal(30_000) * 1e-38,
    "subnormal blocks": normal(30_000) * 1e-39,
    "blocks without an inverse": normal(30_000) * 1e-41,
    "huge": normal(30_000) * 1e38,
}


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("case", [*GRID_CASES, "thresholds"])
def test_dynamic8_grid_writes_what_bitsandbytes_does(case: str, signed: bool) -> None:
    functional = oracles.bitsandbytes_functional()
    near = near_thresholds(dynamic8_grid.codebook(signed=signed))
    x = {**GRID_CASES, "thresholds": near}[case]
    x = x if signed else x.abs()
    table = functional.create_dynamic_map(signed)
    for turn, size in enumerate(SIZES):
        for dtype in (torch.float32, DTYPES[1 + turn % 2]):
            numbers = x.to(dtype).nan_to_num(0, 1, -1)
            codes, state = functional.quantize_blockwise(numbers, code=table, blocksize=size)
            found, absmax = encode("dynamic8_grid", numbers, size, signed=signed)
            assert torch.equal(found.view(codes.shape), codes), (size, dtype)
            assert torch.equal(absmax, state.absmax), (size, dtype)


def test_dynamic8_grid_reads_as_dynamic8() -> None:
    assert dynamic8_grid.values == dynamic8.values
    assert dynamic8_grid.unsigned_values == dynamic8.unsigned_values


def test_what_a_grid_costs() -> None:
    """Zero is not zero, the codes nearest to it are never written, and 0.2 % of codes differ."""
    x = normal(100_000)
    exact, rounded = encode("dynamic8", x), encode("dynamic8_grid", x)
    share = float((exact[0] != rounded[0]).double().mean())
    assert 0.001 < share < 0.003
    codebook = dynamic8_grid.codebook(signed=True)
    assert len(codebook.codes) == 249
    assert codebook.zero_code == 131
    assert dynamic8.values[127] == 0


# ---- bitsandbytes' 4 bits, and its rows


FOUR_BITS = {
    "normal": normal(33, 4096),
    "tiny": torch.cat([normal(2048) * 10 ** normal(2048, seed=1), torch.zeros(64)]).view(33, 64),
    "steps": torch.linspace(-1, 1, 64 * 64).view(64, 64),
    "ties": torch.tensor([1.0, 0, -0.0, 1e-9, -1e-9, 1e-45, -1e-45, -1]).repeat(8, 8),
}


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("case", FOUR_BITS)
def test_4_bit_types_write_what_bitsandbytes_does(name: str, case: str) -> None:
    functional = oracles.bitsandbytes_functional()
    for dtype in DTYPES:
        x = FOUR_BITS[case].to(dtype)
        packed, state = functional.quantize_4bit(x, blocksize=64, quant_type=name)
        codes, absmax = encode(name, x, 64)
        assert torch.equal(codes, packed.view(-1)), dtype
        assert torch.equal(absmax, state.absmax)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e20])
def test_int8_writes_what_bitsandbytes_does(scale: float) -> None:
    functional = oracles.bitsandbytes_functional()
    for seed, dtype in enumerate(DTYPES):
        x = (normal(65, 771, seed=seed) * (1e3 if dtype == torch.float16 else scale)).to(dtype)
        if seed == 0:
            x = torch.cat([x, torch.arange(-127, 128.0).mul(0.5).repeat(2, 4)[:, :771]])  # ties
        expected, rows, _ = functional.int8_vectorwise_quant(x.half() if seed == 2 else x)
        codes, absmax = encode("int8", x)
        assert torch.equal(codes.view(torch.int8), expected)
        assert torch.equal(absmax, rows)


def test_af4_of_bitsandbytes_reads_as_ours() -> None:
    functional = oracles.bitsandbytes_functional()
    x = normal(64, 64)
    codes, absmax = encode("af4", x, 64)
    table = functional.get_4bit_type("af4", device="cpu")
    unpacked = unpack(codes, make_encoding("af4").quant_type)
    expected = (table[unpacked.long()].view(-1, 64) * absmax[:, None]).view(64, 64)
    encoding = make_encoding("af4", 64)
    found = coding_reference.decode(encoding, [codes, absmax], (64, 64), torch.float32)
    assert torch.equal(found, expected)
    nearest = (x.view(-1, 64, 1) / absmax[:, None, None] - table).abs().amin(-1)
    assert torch.allclose((found - x).view(-1, 64).abs(), nearest * absmax[:, None], atol=1e-6)


# ---- torch's 8-bit floats


@pytest.mark.parametrize(
    ("found", "dtype"), [(fp8_e4m3, torch.float8_e4m3fn), (fp8_e5m2, torch.float8_e5m2)]
)
def test_8_bit_floats_round_as_torch_converts(found: QuantType, dtype: torch.dtype) -> None:
    """With an absmax that is the unit, scaled numbers are the numbers themselves."""
    thresholds = torch.tensor(found.codebook(signed=True).thresholds)
    ties = torch.cat([thresholds, torch.nextafter(thresholds, torch.tensor(torch.inf))])
    few = torch.exp(12 * normal(20_000) - 4) * normal(20_000, seed=1).sign()
    x = torch.cat([ties, few]).clamp(-found.unit, found.unit)
    x = torch.nn.functional.pad(x, (0, -len(x) % 127)).view(-1, 127)
    x = torch.cat([torch.full((len(x), 1), found.unit), x], 1)
    codes, absmax = encode(found.name, x, 128)
    converted = x.to(dtype)
    assert torch.equal(absmax, torch.full_like(absmax, found.unit))
    decoded = coding_reference.decode(
        make_encoding(found, 128), [codes, absmax], x.shape, torch.float32
    )
    assert torch.equal(decoded, converted.float())
    expected = converted.view(torch.uint8)
    assert torch.equal(codes, torch.where(expected == 0x80, 0, expected))  # we write no -0


# ---- microscaling


def theirs(codes: Tensor, bits: int) -> Tensor:
    """Codes of torchao: halves of bytes swapped to ours, and its -0 made 0, which we write."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten()
    return torch.where(codes == 2 ** (bits - 1), 0, codes).flatten()


def elements(name: str, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    parts = encode(name, x)
    return unpack(parts[0].flatten(), make_encoding(name).quant_type, x.numel()), parts[1:]


def blocks_of_all_kinds() -> Tensor:
    x = normal(256, 512) * torch.exp2(20 * normal(256, 1, seed=1))
    x[0], x[1, :64], x[2] = 0, 0, torch.linspace(-6, 6, 512)
    x[3] = torch.arange(512).remainder(49) * 0.25 - 6
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("found", [mxfp4, mxfp6, mxfp8], ids=lambda t: t.name)
def test_mx_codes_and_scales_are_those_of_torchao(found: QuantType, dtype: torch.dtype) -> None:
    to_mx = oracles.torchao_microscaling("mx_tensor").to_mx
    kinds = {4: torch.float4_e2m1fn_x2, 6: "fp6_e2m3", 8: torch.float8_e4m3fn}
    x = blocks_of_all_kinds().to(dtype)
    scales, codes = to_mx(x, kinds[found.bits], 32)
    ours, (exponents,) = elements(found.name, x)
    assert torch.equal(exponents, scales.view(torch.uint8).flatten())
    assert torch.equal(ours, theirs(codes.view(torch.uint8), found.bits))


def test_mx_blocks_of_what_is_not_finite() -> None:
    """NaN makes the block's scale NaN, in both; infinity as well here, a large scale in torchao."""
    to_mx = oracles.torchao_microscaling("mx_tensor").to_mx
    x = normal(3, 32)
    x[0, 3], x[1, 4] = torch.nan, torch.inf
    scales, _ = to_mx(x, torch.float4_e2m1fn_x2, 32)
    _, (exponents,) = elements("mxfp4", x)
    assert scales.view(torch.uint8).flatten().tolist()[:2] == [255, 253]
    assert exponents.tolist()[:2] == [255, 255]
    assert exponents[2] == scales.view(torch.uint8)[2]


def test_the_smallest_mx_scale_is_what_its_byte_says() -> None:
    """2**-127; torchao divides by 2**-126 there, so its codes are half of what they should be."""
    to_mx = oracles.torchao_microscaling("mx_tensor").to_mx
    x = torch.tensor([1.0, 2, 3, 4]).repeat(1, 8) * 2.0**-127
    scales, codes = to_mx(x, torch.float4_e2m1fn_x2, 32)
    ours, (exponents,) = elements("mxfp4", x)
    assert exponents.tolist() == scales.view(torch.uint8).flatten().tolist() == [0]
    assert [mxfp4.values[code] for code in ours[:4]] == [1, 2, 3, 4]
    halves = theirs(codes.view(torch.uint8), 4)[:4]
    assert [mxfp4.values[code] for code in halves] == [0.5, 1, 1.5, 2]


@functools.cache
def nvidia(x_seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = oracles.torchao_microscaling("nvfp4_tensor")
    x = (normal(256, 512, seed=x_seed) * torch.exp2(normal(256, 1, seed=1))).to(dtype)
    scale = module.per_tensor_amax_to_scale(x.abs().amax())
    scales, codes = module.nvfp4_quantize(x, 16, scale)
    return x, scale, scales.view(torch.uint8).flatten(), codes.view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_nvfp4_codes_and_scales_are_those_of_torchao(seed: int, dtype: torch.dtype) -> None:
    x, scale, scales, codes = nvidia(seed, dtype)
    ours, (steps, tensor_scale) = elements("nvfp4", x)
    assert torch.equal(tensor_scale, scale.reshape(1))
    assert torch.equal(steps, scales)
    assert torch.equal(ours, theirs(codes, 4))


def test_small_nvfp4_scales_are_kept() -> None:
    """E4M3 has subnormal numbers, so blocks far below the largest keep digits; not in torchao."""
    module = oracles.torchao_microscaling("nvfp4_tensor")
    x = normal(64, 16)
    x[1:] *= 1e-5
    scales, codes = module.nvfp4_quantize(x, 16, module.per_tensor_amax_to_scale(x.abs().amax()))
    least = 2.0**-6
    assert float(scales.float()[1:].max()) == least
    encoding = make_encoding(nvfp4)
    parts = coding_reference.encode(encoding, x)
    kept = parts[1].view(torch.float8_e4m3fn).float()
    assert 0 < float(kept[1:].max()) < least
    decoded = coding_reference.decode(encoding, parts, x.shape, torch.float32)
    table = torch.tensor(nvfp4.values)
    read = table[theirs(codes.view(torch.uint8), 4).long()].view(64, 16)
    read = read * scales.float().view(64, 1) * parts[2]
    assert (decoded - x)[1:].abs().mean() < (read - x)[1:].abs().mean()


def test_int8_rows_and_blocks_share_their_codes() -> None:
    """Where a row is a block, the one type is the other."""
    x = normal(20, 128)
    rows, blocks = encode("int8", x), encode("int8_block", x)
    assert torch.equal(rows[0].flatten(), blocks[0].flatten())
    assert torch.equal(rows[1], blocks[1])
    assert int8.block_size == 256  # means nothing where rows share a scale
