"""Products of many rows by a processor's matrix unit, which plain C++ stands in for on any other.

Where the processor has one and the system lets it be used, the same is asked of it.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx.kernels import coding, linear, linear_cpu, linear_panels, linear_source, linear_tiles
from bnbx.kernels.encoding import Encoding, make_encoding
from bnbx.registry import quant_types
from compiled import shared_cache
from exact_weights import NOTHING, Weight, exact_encoding, exact_weight, small_numbers

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64") or not shutil.which("g++"),
    reason="needs g++ for x86",
)
BFLOAT16 = torch.bfloat16
EMULATED, PLAIN, REAL = "-DBNBX_EMULATE_TILES", "-DBNBX_EMULATE_TILES -mno-avx512f", "-g0"
COUNTS = (1, 15, 16, 17, 33, 70)  # of rows of x
# Outputs and columns: fewer than a tile, whole ones, and what is left of them; rows that begin in
# the middle of bytes and blocks; more columns than are decoded at a time, and more outputs.
SHAPES = ((5, 1), (33, 37), (16, 128), (32, 192), (70, 100), (9, 513), (40, 1184), (300, 64))
ENCODINGS: dict[str, Encoding] = {
    "2-blocks_of_16": exact_encoding(2, block=16),
    "3-centered": exact_encoding(3, "centered", 32),
    "4": exact_encoding(4),
    "4-second": exact_encoding(4, block=16, second=16),
    "4-row_centered": exact_encoding(4, "row_centered"),
    "4-blocks_of_4096": exact_encoding(4, block=4096),
    "5-e8m0": exact_encoding(5, "e8m0", 32),
    "6-tensor": exact_encoding(6, "tensor"),
    "6-centered": exact_encoding(6, "centered", 16),
    "7-bfloat16": exact_encoding(7, "bfloat16"),
    "8-row": exact_encoding(8, "row"),
}
PLAINLY = ("3-centered", "4", "6-tensor")


def forget() -> None:
    """Let the next kernel be made by the compiler that there is then."""
    linear_cpu.kernel.cache_clear()
    linear_cpu.compiled_for.cache_clear()
    linear_cpu.has_tiles.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_cache(tmp_path_factory):
        yield


@pytest.fixture(params=[EMULATED, PLAIN, REAL])
def flags(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What the compiler is told."""
    monkeypatch.setenv("BNBX_CXX", f"g++ {request.param}")
    forget()
    if not linear_cpu.has_tiles(ENCODINGS["4"], BFLOAT16):
        assert request.param == REAL
        pytest.skip("needs AMX")
    yield request.param
    forget()


def multiply(weight: Weight, x: Tensor, bias: Tensor | None = None) -> Tensor:
    assert linear_cpu.has_tiles(weight.encoding, BFLOAT16)
    return linear_tiles.multiply(weight.encoding, weight.parts, weight.shape, x, bias)


def across(weight: Weight, grad: Tensor) -> Tensor:
    found = linear_tiles.multiply_across(weight.encoding, weight.parts, weight.shape, grad)
    assert found is not None
    return found


def quantized(name: str, shape: tuple[int, int]) -> Weight:
    encoding = make_encoding(name)
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return Weight(encoding, shape, list(coding.encode(encoding, numbers)))


def rounded(weight: Weight) -> Tensor:
    """The weight as panels have it."""
    return coding.decode(weight.encoding, weight.parts, weight.shape).to(BFLOAT16).double()


@pytest.mark.parametrize("name", ENCODINGS)
def test_exact_products_are_exact(name: str, flags: str) -> None:
    if flags == PLAIN and name not in PLAINLY:
        return
    for turn, shape in enumerate(SHAPES):
        weight = exact_weight(ENCODINGS[name], shape, turn)
        bias = small_numbers(1, shape[0], BFLOAT16, seed=2)[0]
        for count in COUNTS:
            x = small_numbers(count, shape[1], BFLOAT16, seed=count)
            exact = x.double() @ weight.dense.T
            assert torch.equal(multiply(weight, x), exact.to(BFLOAT16)), (shape, count)
            with_bias = (exact + bias.double()).to(BFLOAT16)
            assert torch.equal(multiply(weight, x, bias), with_bias), (shape, count)
            grad = small_numbers(count, shape[0], BFLOAT16, seed=count)
            exact = grad.double() @ weight.dense
            assert torch.equal(across(weight, grad), exact.to(BFLOAT16)), (shape, count)


def test_pieces_of_all_sizes(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows and of outputs; whatever is cut up, by so many threads, results are the same."""
    weight = quantized("nf4", (333, 1111))
    x = torch.randn(100, 1111, generator=torch.Generator().manual_seed(4)).to(BFLOAT16)
    grad = torch.randn(100, 333, generator=torch.Generator().manual_seed(5)).to(BFLOAT16)
    expected, threads = multiply(weight, x), torch.get_num_threads()
    expected_across = across(weight, grad)
    for rows in (100, 64, 37, 16):
        monkeypatch.setattr(linear_tiles, "MOST_ROWS", rows)
        for least in (16, 400_000):
            monkeypatch.setattr(linear_panels, "LEAST_BYTES", least)
            for number in (1, 3):
                torch.set_num_threads(number)
                try:
                    assert torch.equal(multiply(weight, x), expected), (rows, least, number)
                    assert torch.equal(across(weight, grad), expected_across), (rows, least, number)
                finally:
                    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", quant_types().names())
def test_every_type_is_rounded_as_panels_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One number of x alone is not 0: products are the weight's numbers in bfloat16."""
    monkeypatch.setenv("BNBX_CXX", f"g++ {EMULATED}")
    forget()
    weight = quantized(name, (20, 160))
    found = multiply(weight, torch.eye(160, dtype=BFLOAT16))
    assert torch.equal(found.double(), rounded(weight).T)
    assert torch.equal(across(weight, torch.eye(20, dtype=BFLOAT16)).double(), rounded(weight))
    forget()


def test_sums_are_those_of_floats(flags: str) -> None:
    weight = quantized("nf4", (70, 1100))
    x = torch.randn(40, 1100, generator=torch.Generator().manual_seed(5)).to(BFLOAT16)
    exact, size = x.double() @ rounded(weight).T, x.double().abs() @ rounded(weight).abs().T
    near = 2.0**-8 * exact.abs() + 1100 * 2.0**-24 * size
    assert ((multiply(weight, x).double() - exact).abs() <= near).all()
    grad = torch.randn(40, 70, generator=torch.Generator().manual_seed(6)).to(BFLOAT16)
    exact, size = grad.double() @ rounded(weight), grad.double().abs() @ rounded(weight).abs()
    near = 2.0**-8 * exact.abs() + 70 * 2.0**-24 * size
    assert ((across(weight, grad).double() - exact).abs() <= near).all()


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row(number: float, flags: str) -> None:
    weight = quantized("nf3", (40, 100))
    for row, column, count in ((0, 99, 17), (16, 3, 17), (32, 50, 40)):
        x = torch.randn(count, 100, generator=torch.Generator().manual_seed(7)).to(BFLOAT16)
        plain = multiply(weight, x)
        x[row, column] = number
        got = multiply(weight, x)
        others = torch.arange(count) != row
        assert torch.equal(got[others], plain[others])
        expected = x[row].double() @ rounded(weight).T
        assert torch.equal(got[row].isnan(), expected.isnan())
        assert torch.equal(got[row].isinf(), expected.isinf())


def test_a_code_that_is_no_number(flags: str) -> None:
    weight = exact_weight(ENCODINGS["4"], (40, 192))
    weight.parts[0][96 * 17 + 70] = NOTHING  # two codes of row 17
    got = multiply(weight, small_numbers(20, 192, BFLOAT16))
    assert got.isnan().all(0).nonzero()[:, 0].tolist() == [17]
    assert got.isnan().any(0).nonzero()[:, 0].tolist() == [17]


def test_rows_apart_and_turned(flags: str) -> None:
    weight = exact_weight(ENCODINGS["4"], (40, 72))
    for x in (
        small_numbers(30, 100, BFLOAT16)[:, 5:77],
        small_numbers(72, 30, BFLOAT16).T,
        small_numbers(60, 72, BFLOAT16)[::2],
        small_numbers(1, 72, BFLOAT16).expand(30, 72),
    ):
        assert torch.equal(multiply(weight, x), (x.double() @ weight.dense.T).to(BFLOAT16))


def test_nothing_is_written_beside(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The room that a kernel asks for, and what it makes, are all that it writes to."""
    around: list[Tensor] = []
    empty: Any = Tensor.new_empty

    def guarded(tensor: Tensor, size: Any, **options: Any) -> Any:
        numel = size if isinstance(size, int) else size[0] * size[1]
        room = torch.full((numel + 64,), 7.0).to(options.get("dtype", tensor.dtype))
        around.append(room)
        inside = room[32:-32]
        return inside if isinstance(size, int) else inside.view(size)

    weight = quantized("nf4", (45, 1000))
    x = torch.randn(50, 1000, generator=torch.Generator().manual_seed(6)).to(BFLOAT16)
    expected = multiply(weight, x)
    monkeypatch.setattr(Tensor, "new_empty", guarded)
    got, got_across = multiply(weight, x), across(weight, x[:, :45])
    monkeypatch.setattr(Tensor, "new_empty", empty)
    assert torch.equal(got, expected)
    assert torch.equal(got_across, across(weight, x[:, :45]))
    assert len(around) == 4
    for each in around:
        assert torch.cat((each[:32], each[-32:])).eq(7).all()


def test_many_rows_of_a_layer_go_this_way(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = exact_weight(ENCODINGS["4"], (40, 128))
    x = small_numbers(16, 128, BFLOAT16)
    exact = (x.double() @ weight.dense.T).to(BFLOAT16)
    monkeypatch.setattr(linear_panels, "multiply", None)
    assert torch.equal(linear.linear(weight.encoding, weight.parts, weight.shape, x), exact)
    monkeypatch.setattr(linear_panels, "multiply_columns", None)
    found = linear.grad_input(weight.encoding, weight.parts, weight.shape, exact)
    assert torch.equal(found, (exact.double() @ weight.dense).to(BFLOAT16))


def test_a_system_that_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNBX_CXX", f"g++ {EMULATED} -DBNBX_REFUSE_TILES")
    forget()
    weight = exact_weight(ENCODINGS["4"], (40, 128))
    assert not linear_cpu.has_tiles(weight.encoding, BFLOAT16)
    x = small_numbers(16, 128, BFLOAT16)
    got = linear_tiles.multiply(weight.encoding, weight.parts, weight.shape, x, None)
    assert torch.equal(got, (x.double() @ weight.dense.T).to(BFLOAT16))
    forget()


def test_room_is_shared_by_threads(flags: str) -> None:
    """They take no more together than a panel would, until pieces are as small as they get."""
    library = linear_cpu.compiled_for(ENCODINGS["4"], BFLOAT16).library
    most = 4096 * 4096 * BFLOAT16.itemsize * linear_panels.SHARE
    for count in (1, 2, 4, 8):
        for rows in (1, 40, 512, 5000):
            for side in (linear_source.SIDE, linear_source.SIDE_ACROSS):
                pieces = linear_tiles.cut(library, (4096, 4096), rows, count, 4096, side)
                assert pieces.room * count * 4 <= most
                assert pieces.outputs % side == 0 < pieces.outputs <= linear_source.MOST_OUTPUTS
