"""The doors for any type: every registered one goes through, and what comes out knows itself."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bnbx
from bnbx import functional
from bnbx.errors import OptionError, UnknownNameError
from bnbx.functional import QuantTensor, dequantize, fake_quantize, quantize
from bnbx.kernels import coding
from bnbx.kernels.encoding import make_encoding
from bnbx.registry import QuantType, quant_types
from same_bits import FLOATS, same_bits

TYPES = quant_types().names()
PLAIN = [t.name for t in quant_types() if t.scale == type(t.scale)()]


def matrix(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(12, 70, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("name", TYPES)
def test_every_type(name: str) -> None:
    """The parts are those of the kernels, and the numbers come back as near as the bits allow."""
    x, spec = matrix(), quant_types().get(name)
    q = quantize(x, name)
    expected = coding.encode(make_encoding(spec), x)
    assert all(map(same_bits, q.parts, expected))
    assert q.quant_type == name
    assert q.shape == x.shape
    assert q.dtype == x.dtype
    assert q.numel() == x.numel()
    assert q.ndim == 2
    assert q.nbytes == sum(part.nbytes for part in expected)
    assert q.bits_per_element == 8 * q.nbytes / 840
    assert q.bits_per_element >= spec.bits
    found = q.dequantize()
    assert same_bits(found, coding.decode(make_encoding(spec), expected, x.shape))
    assert same_bits(dequantize(q), found)
    error = float((found - x).square().mean().sqrt())
    assert error < {2: 0.8, 3: 0.4, 4: 0.2, 5: 0.1}.get(spec.bits, 0.06), error


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    q = quantize(matrix(dtype), "nf4")
    assert q.dtype == q.dequantize().dtype == dtype
    for other in FLOATS:
        expected = q.dequantize(torch.float32).to(other)
        assert same_bits(dequantize(q, other), expected)
        assert same_bits(dequantize(q, dtype=other), expected)
        assert same_bits(q.to(other).dequantize(), expected)
        out = torch.empty(70, 12, dtype=other).t()
        assert dequantize(q, out=out) is out
        assert same_bits(out, expected)


def test_parts_by_name() -> None:
    q = quantize(matrix(), "nf4", block_size=128, double=True)
    assert q.codes.numel() == 420
    assert q.scale.dtype == torch.uint8
    assert q.second_scale is not None
    assert q.mean is not None
    assert q.center is q.tensor_scale is None
    assert quantize(matrix(), "nvfp4").tensor_scale is not None
    assert quantize(matrix(), "int8_affine").center is not None
    assert q.encoding.block_size == 128
    assert q.bits_per_element < quantize(matrix(), "nf4", block_size=128).bits_per_element


def test_unsigned() -> None:
    x = matrix().abs()
    error = [
        float((quantize(x, "dynamic8", signed=signed).dequantize() - x).abs().mean())
        for signed in (False, True)
    ]
    assert error[0] < 0.6 * error[1]


def test_a_spec_that_nobody_registered() -> None:
    mine = QuantType(
        name="mine", summary="thirds", bits=2, values=(-1.0, 0.0, 0.5, 1.0), block_size=32
    )
    x = torch.tensor([1.0, 0.4, -0.9, 0.1])
    q = quantize(x, mine)
    assert q.dequantize().tolist() == [1.0, 0.5, -1.0, 0.0]
    assert QuantTensor.from_state_dict(q.state_dict()) == q


def test_fitted_scales_are_better() -> None:
    x = matrix()
    errors = [
        float((quantize(x, "linear3", fit=fit).dequantize() - x).square().sum())
        for fit in (None, "mse")
    ]
    assert errors[1] < 0.95 * errors[0]


def test_stochastic_rounding() -> None:
    x = torch.full((64 * 3000,), 0.3)
    x[::64] = 1.0
    generator = torch.Generator().manual_seed(5)
    found = quantize(x, "linear4", stochastic=True, generator=generator).dequantize()
    assert len(set(found.tolist())) == 3
    assert abs(float(found[x < 1].mean()) - 0.3) < 1e-3
    again = quantize(x, "linear4", stochastic=True, generator=generator).dequantize()
    assert not torch.equal(found, again)
    generator.manual_seed(5)
    repeated = quantize(x, "linear4", stochastic=True, generator=generator).dequantize()
    assert torch.equal(found, repeated)
    torch.manual_seed(1)
    first = quantize(x, "linear4", stochastic=True)
    torch.manual_seed(1)
    assert quantize(x, "linear4", stochastic=True) == first


def test_straight_through_gradient() -> None:
    x = matrix().requires_grad_()
    y = fake_quantize(x, "nf4", block_size=32)
    assert same_bits(y.detach(), quantize(x, "nf4", block_size=32).dequantize())
    weight = torch.randn_like(y)
    (grad,) = torch.autograd.grad((y * weight).sum(), x)
    assert torch.equal(grad, weight)
    half = fake_quantize(x.detach().bfloat16(), "fp4", stochastic=True, double=True)
    assert half.dtype == torch.bfloat16


def test_quantized_data_has_no_gradient() -> None:
    x = matrix().requires_grad_()
    q = quantize(x, "nf4")
    assert not q.scale.requires_grad
    codes, state = functional.quantize_4bit(x)
    assert not state.absmax.requires_grad
    assert not functional.dequantize_4bit(codes, state).requires_grad


# ---- files, copies, equality


@pytest.mark.parametrize("name", TYPES)
def test_state_dict(name: str) -> None:
    q = quantize(matrix(torch.bfloat16), name, double=name in PLAIN)
    saved = q.state_dict()
    assert all(isinstance(value, Tensor) for value in saved.values())
    found = QuantTensor.from_state_dict(saved)
    assert found == q
    assert same_bits(found.dequantize(), q.dequantize())


def test_files(tmp_path: Path) -> None:
    """Of torch with weights_only, and of safetensors."""
    q = quantize(matrix(), "nvfp4")
    buffer = io.BytesIO()
    torch.save(q.state_dict(), buffer)
    buffer.seek(0)
    assert QuantTensor.from_state_dict(torch.load(buffer, weights_only=True)) == q
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(q.state_dict(), tmp_path / "q.safetensors")
    assert QuantTensor.from_state_dict(safetensors.load_file(tmp_path / "q.safetensors")) == q


def test_copies() -> None:
    mine = quant_types().get("nf4").model_copy(update={"name": "mine"})
    for q in (quantize(matrix(), "nf4", double=True), quantize(matrix(), mine)):
        for other in (pickle.loads(pickle.dumps(q)), copy.deepcopy(q), q.to("cpu")):
            assert other == q
        copied = copy.deepcopy(q)
        copied.codes[0] ^= 1
        assert copied != q
        assert same_bits(q.dequantize(), copy.copy(q).dequantize())


def test_another_process_reads_a_type_that_it_does_not_have(tmp_path: Path) -> None:
    mine = quant_types().get("fp4").model_copy(update={"name": "mine"})
    q = quantize(matrix(), mine, double=True)
    torch.save(q.state_dict(), tmp_path / "q.pt")
    torch.save(q.dequantize(), tmp_path / "x.pt")
    code = """
import torch, bnbx
q = bnbx.QuantTensor.from_state_dict(torch.load("q.pt", weights_only=True))
assert torch.equal(q.dequantize(), torch.load("x.pt"))
print(q.quant_type)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == "mine\n", done.stderr


def test_equality() -> None:
    q = quantize(matrix(), "nf4")
    assert q == quantize(matrix(), "nf4")
    assert q != quantize(matrix(), "fp4")
    assert q != quantize(matrix(), "nf4", block_size=128)
    assert q != quantize(matrix() * 2, "nf4")
    assert q != quantize(matrix(torch.bfloat16), "nf4")
    assert q != quantize(matrix().view(70, 12), "nf4")
    assert q != matrix()
    bad = matrix()
    bad[0, 0] = float("nan")
    assert quantize(bad, "nf4") == quantize(bad, "nf4")  # by bytes, not by numbers
    with pytest.raises(TypeError, match="unhashable"):
        hash(q)


def test_repr() -> None:
    text = repr(quantize(matrix(), "nf4", double=True))
    assert text == (
        "QuantTensor(nf4, blocks of 64, scales in dynamic8, shape=(12, 70), float32, device=cpu, "
        "442 bytes, 4.21 bits per element)"
    )


def test_what_a_file_says_of_its_type() -> None:
    """By name for types that bnbx brings along, in full for others."""
    about = json.loads(bytes(quantize(matrix(), "nf4").state_dict()["about"].tolist()))
    assert about["quant_type"] == "nf4"
    assert "spec" not in about
    mine = quant_types().get("nf4").model_copy(update={"name": "mine"})
    about = json.loads(bytes(quantize(matrix(), mine).state_dict()["about"].tolist()))
    assert QuantType.from_json(json.dumps(about["spec"])) == mine


def test_from_parts() -> None:
    q = quantize(matrix(), "mxfp4")
    made = QuantTensor.from_parts(q.encoding, q.parts, [12, 70])
    assert made == q


# ---- the other two functions of these names


def test_with_a_table() -> None:
    """0.0.24: one absmax, whatever the block size would be."""
    x = torch.randn(3, 500)
    codes, (absmax, table) = quantize(x)
    assert codes.shape == x.shape
    assert float(absmax) == float(x.abs().max())
    nearest = ((x / absmax)[..., None].double() - table.double()).abs().argmin(-1)
    assert torch.equal(codes.long(), nearest)
    found = dequantize(codes, (absmax, table))
    assert same_bits(found, table[codes.long()] * absmax)
    assert same_bits(dequantize(codes, None, absmax, table), found)
    assert same_bits(dequantize(codes, absmax=absmax), found)
    own = functional.create_linear_map()
    out = torch.empty(3, 500, dtype=torch.uint8)
    assert quantize(x, own, out)[0] is out
    assert quantize(x, code=own)[1][1] is own
    numbers = torch.empty(3, 500, dtype=torch.float16)
    assert dequantize(codes, (absmax, table), out=numbers) is numbers
    assert same_bits(numbers, found.half())


@pytest.mark.parametrize("numbers", [[0.0, 0.0], [], [float("nan"), 1.0]])
def test_with_a_table_at_the_edges(numbers: list[float]) -> None:
    x = torch.tensor(numbers)
    found = dequantize(*quantize(x))
    expected = torch.full_like(x, float("nan")) if x.isnan().any() else x
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))


def test_without_scale() -> None:
    code = torch.tensor([3.0, -2.0, 0.5, 10.0])
    x = torch.tensor([[-5.0, 0.6, 2.9], [6.0, 7.0, 100.0]])
    codes = functional.quantize_no_absmax(x, code)
    assert codes.tolist() == [[1, 2, 0], [0, 3, 3]]
    assert functional.dequantize_no_absmax(codes, code).tolist() == [[-2, 0.5, 3], [3, 10, 10]]
    out = torch.empty(2, 3, dtype=torch.uint8)
    assert functional.quantize_no_absmax(x, code, out) is out
    numbers = torch.empty(2, 3, dtype=torch.bfloat16)
    assert functional.dequantize_no_absmax(codes, code, numbers) is numbers
    assert numbers.tolist() == [[-2, 0.5, 3], [3, 10, 10]]
    assert functional.quantize_no_absmax(torch.tensor(float("nan")), code).item() == 2


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (dict(code="nf5000"), UnknownNameError, "nf5"),
        (dict(code="nf4", block_size=63), OptionError, "block"),
        (dict(code="int8", block_size=64), OptionError, "per row"),
        (dict(code="mxfp4", double=True), OptionError, "e8m0"),
        (dict(code="nf4", fit="best"), OptionError, "mse"),
        (dict(code="nf4", fit="mse", stochastic=True), OptionError, "nearest"),
        (dict(code="nf4", generator=torch.Generator()), OptionError, "stochastic"),
        (dict(code="nf4", stochastic=True, generator=5), OptionError, r"generator=5; expected"),
        (dict(code="nf4", out=torch.empty(1)), OptionError, "own memory"),
        (dict(code=None, block_size=64), OptionError, "with a quant type"),
        (dict(code=4), TypeError, "expected a name"),
        (dict(code=torch.ones(3)), ValueError, "2\\*\\*bits"),
        (dict(code=torch.ones(4, dtype=torch.int32)), ValueError, "floating-point"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        quantize(matrix(), **arguments)


@pytest.mark.parametrize("bad", [torch.ones(2).long(), torch.ones(2).double(), [1.0], None])
def test_bad_tensors(bad: Any) -> None:
    with pytest.raises(TypeError, match="expected"):
        quantize(bad, "nf4")
    with pytest.raises(TypeError, match="expected"):
        fake_quantize(bad, "nf4")
    with pytest.raises(ValueError, match="expected"):
        quantize(torch.eye(3).to_sparse(), "nf4")


def test_bad_requests() -> None:
    q = quantize(matrix(), "nf4")
    with pytest.raises(OptionError, match="float16"):
        q.dequantize(torch.int8)
    with pytest.raises(OptionError, match="float16"):
        q.to(torch.float64)
    with pytest.raises(ValueError, match="shape"):
        q.dequantize(out=torch.empty(3))
    with pytest.raises(OptionError, match="give one"):
        q.dequantize(torch.float16, out=torch.empty(12, 70))
    with pytest.raises(OptionError, match="in it"):
        dequantize(q, absmax=torch.ones(1))
    with pytest.raises(OptionError, match="QuantTensor"):
        dequantize(torch.zeros(3, dtype=torch.uint8), absmax=torch.ones(1), dtype=torch.float16)
    with pytest.raises(TypeError, match=r"absmax is torch\.complex64; expected a real number"):
        dequantize(torch.zeros(3, dtype=torch.uint8), absmax=torch.ones(1) * 1j)
    with pytest.raises(TypeError, match="absmax, table"):
        dequantize(torch.zeros(3, dtype=torch.uint8), q)
    with pytest.raises(ValueError, match="needs quant_state"):
        dequantize(torch.zeros(3, dtype=torch.uint8))


def test_names_in_the_package() -> None:
    assert bnbx.quantize is quantize
    assert bnbx.dequantize is dequantize
    assert bnbx.QuantTensor is QuantTensor
