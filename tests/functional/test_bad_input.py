"""Whatever comes in, an error comes out before memory is touched: never a crash, never nonsense."""

from __future__ import annotations

import contextlib
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bnbx import functional
from bnbx.errors import BnbxError, DeviceError, QuantizedDataError
from bnbx.functional import QuantState, QuantTensor

F = functional
DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int8,
    torch.int32, torch.int64, torch.bool, torch.complex64,
)  # fmt: skip


def tensors() -> st.SearchStrategy[Any]:
    """Tensors of any dtype, of small shapes, some strided, some on another device, some none."""

    def make(shape: list[int], dtype: torch.dtype, kind: str) -> Any:
        made = torch.ones(shape).to(dtype)
        match kind:
            case "meta":
                return made.to("meta")
            case "strided":
                return torch.stack([made, made], -1)[..., 0]
            case "sparse":
                return made.to_sparse() if made.dim() and dtype == torch.float32 else made
            case "none":
                return None
            case "number":
                return 3.0
            case _:
                return made

    shapes = st.lists(st.integers(0, 5), max_size=3) | st.sampled_from([[16], [64], [256], [100]])
    kinds = st.sampled_from(["plain", "plain", "strided", "meta", "sparse", "none", "number"])
    return st.builds(make, shapes, st.sampled_from(DTYPES), kinds)


def numbers() -> st.SearchStrategy[Any]:
    return st.sampled_from(
        [-1, 0, 1, 7, 16, 64, 4096, 1 << 40, True, 0.5, float("nan"), None, "64"]
    )


def state(absmax: Any, shape: Any, blocksize: Any = 64, **more: Any) -> Any:
    """A state with any attributes."""
    made: Any = QuantState(torch.ones(1))
    named = dict(absmax=absmax, shape=shape, blocksize=blocksize, dtype=torch.float16)
    for name, value in {**named, "quant_type": "nf4", **more}.items():
        setattr(made, name, value)
    return made


CALLS: dict[str, Callable[..., Any]] = {
    "quantize_blockwise": lambda a, b, c, d, n, m: F.quantize_blockwise(a, b, c, d, n),
    "blockwise rand": lambda a, b, c, d, n, m: F.quantize_blockwise(a, rand=b, blocksize=64),
    "dequantize_blockwise": lambda a, b, c, d, n, m: F.dequantize_blockwise(a, None, b, c, d, n),
    "blockwise pair": lambda a, b, c, d, n, m: F.dequantize_blockwise(a, (b, c), out=d),
    "quantize_4bit": lambda a, b, c, d, n, m: F.quantize_4bit(a, b, c, n),
    "dequantize_4bit": lambda a, b, c, d, n, m: F.dequantize_4bit(a, None, b, c, n, "nf4"),
    "state": lambda a, b, c, d, n, m: F.dequantize_4bit(a, state(b, [m, 4], n, code=c), out=d),
    "nested": lambda a, b, c, d, n, m: F.dequantize_4bit(
        a, state(b, (4, 4), offset=c, state2=state(d, None, n))
    ),
    "gemv": lambda a, b, c, d, n, m: F.gemv_4bit(a, b, d, state=state(c, (4, 4))),
    "quantize": lambda a, b, c, d, n, m: F.quantize(a, b, c),
    "quantize to a type": lambda a, b, c, d, n, m: F.quantize(a, "nf4", block_size=n),
    "dequantize": lambda a, b, c, d, n, m: F.dequantize(a, None, b, c, d),
    "without scale": lambda a, b, c, d, n, m: F.quantize_no_absmax(a, b, c),
    "entries": lambda a, b, c, d, n, m: F.dequantize_no_absmax(a, b, c),
    "products": lambda a, b, c, d, n, m: F.int8_linear_matmul(a, b, c),
    "scaling": lambda a, b, c, d, n, m: F.int8_mm_dequant(a, b, c, d),
    "rows": lambda a, b, c, d, n, m: F.int8_vectorwise_quant(a, n),
    "row numbers": lambda a, b, c, d, n, m: F.int8_vectorwise_dequant(a, b),
    "both": lambda a, b, c, d, n, m: F.int8_double_quant(a, b, c, d),
    "quantiles": lambda a, b, c, d, n, m: F.estimate_quantiles(a, b, n),
    "histogram": lambda a, b, c, d, n, m: F.histogram_scatter_add_2d(a, b, c, d),
    "clipping": lambda a, b, c, d, n, m: F.percentile_clipping(a, b, n),
    "32 bits": lambda a, b, c, d, n, m: F.optimizer_update_32bit(
        "adam", a, b, c, 0.9, 1e-8, n, 1e-2, d, 0.99
    ),
    "8 bits": lambda a, b, c, d, n, m: F.optimizer_update_8bit_blockwise(
        "lion", a, b, c, None, 0.9, 0.9, 0.0, 0.0, 0.0, n, 0.1, d, None, m, None
    ),
}


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=40)
@given(data=st.data())
def test_any_arguments(name: str, data: st.DataObject) -> None:
    """A call works, or says in bnbx's words what is wrong with it."""
    drawn = [data.draw(tensors()) for _ in range(4)]
    size, other = data.draw(numbers()), data.draw(numbers() | tensors())
    with contextlib.suppress(BnbxError):
        CALLS[name](*drawn, size, other)


# ---- files


def packed(fields: Any) -> Tensor:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return torch.tensor(list(text), dtype=torch.uint8)


def good_state(compressed: bool = True) -> dict[str, Any]:
    _, state = F.quantize_4bit(torch.ones(64, 65), quant_type="nf4", compress_statistics=compressed)
    return state.as_dict(packed=True)


KEY = "quant_state.bitsandbytes__nf4"
JSON_LIES: dict[str, dict[str, Any]] = {
    "a huge shape": dict(shape=[1 << 40, 1 << 40]),
    "a shape with other elements": dict(shape=[64, 66]),
    "a negative shape": dict(shape=[-64, -65]),
    "a shape of floats": dict(shape=[64.0, 65.0]),
    "a shape of booleans": dict(shape=[True, 4160]),
    "no list of a shape": dict(shape={"0": 64}),
    "a shape with a string": dict(shape="64,65"),
    "a negative block size": dict(blocksize=-64),
    "a block size of zero": dict(blocksize=0),
    "another block size": dict(blocksize=128),
    "a huge block size": dict(blocksize=1 << 70),
    "a block size that is a list": dict(blocksize=[64]),
    "another type": dict(quant_type="fp4"),
    "no such type": dict(quant_type="nf5000"),
    "a type that is a number": dict(quant_type=4),
    "a type of other bits": dict(quant_type="dynamic8"),
    "no such dtype": dict(dtype="float63"),
    "a dtype that is a function": dict(dtype="load"),
    "a dtype that is none": dict(dtype="int8"),
    "a second block size of zero": dict(nested_blocksize=0),
    "a second block size that is negative": dict(nested_blocksize=-1),
    "another second block size": dict(nested_blocksize=16),
    "a mean that is a string": dict(nested_offset="1"),
    "a mean that is a list": dict(nested_offset=[1]),
    "a mean beyond all numbers": dict(nested_offset=10**400),
    "an entry more": dict(other=1),
    "tensors by JSON": dict(absmax=[1.0]),
}


@pytest.mark.parametrize("lie", JSON_LIES)
def test_json_that_lies(lie: str) -> None:
    saved = good_state()
    fields = json.loads(bytes(saved[KEY].tolist()))
    saved[KEY] = packed({**fields, **JSON_LIES[lie]})
    with pytest.raises(BnbxError):
        QuantState.from_dict(saved, "cpu")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"shape": [' + b"9" * 10_000 + b"]}",
        b" " * (2 << 20),
    ],
    ids=lambda text: f"{text[:8]!r}-{len(text)}",
)
def test_json_that_is_none(text: bytes) -> None:
    saved = good_state()
    saved[KEY] = packed(text)
    with pytest.raises(QuantizedDataError):
        QuantState.from_dict(saved, "cpu")
    about = F.quantize(torch.ones(3), "nf4").state_dict()
    about["about"] = packed(text)
    with pytest.raises(QuantizedDataError):
        QuantTensor.from_state_dict(about)


@pytest.mark.parametrize("key", ["absmax", "quant_map", "nested_absmax", "nested_quant_map", KEY])
@pytest.mark.parametrize(
    "value",
    [
        None,
        3,
        torch.ones(3),
        torch.ones(66).half(),
        torch.zeros(66, dtype=torch.uint8),
        torch.zeros(67, dtype=torch.uint8),
        torch.zeros(16),
        torch.zeros(256),
        torch.full((256,), float("nan")),
        torch.ones(1, device="meta"),
        torch.eye(3).to_sparse(),
    ],
    ids=lambda value: str(getattr(value, "dtype", value)),
)
def test_tensors_that_lie(key: str, value: Any) -> None:
    """Each other tensor in each place: an error, or numbers without a crash."""
    saved = good_state()
    saved[key] = value
    codes, _ = F.quantize_4bit(torch.ones(64, 65), quant_type="nf4")
    try:
        state = QuantState.from_dict(saved, "cpu")
    except BnbxError:
        return
    found = F.dequantize_4bit(codes, state)
    assert found.shape == (64, 65)


@pytest.mark.parametrize("key", list(good_state()))
def test_entries_that_are_missing(key: str) -> None:
    saved = good_state()
    del saved[key]
    with pytest.raises(BnbxError):
        QuantState.from_dict(saved, "cpu")


@pytest.mark.parametrize("bad", [None, [], "x", 5, {5: 1}, {(1, 2): None}])
def test_what_is_no_dict_of_names(bad: Any) -> None:
    with pytest.raises(QuantizedDataError, match=r"a quantization state .*expected"):
        QuantState.from_dict(bad, "cpu")


def test_several_states_in_one_dict() -> None:
    saved = good_state()
    saved["quant_state.bitsandbytes__fp4"] = saved[KEY]
    with pytest.raises(QuantizedDataError):
        QuantState.from_dict(saved, "cpu")


ABOUT_LIES: dict[str, dict[str, Any]] = {
    "another shape": dict(shape=[12, 71]),
    "a huge shape": dict(shape=[1 << 62, 1 << 62]),
    "a shape of nothing and too much": dict(shape=[0, 1 << 63]),
    "a negative shape": dict(shape=[-12, -70]),
    "a shape of booleans": dict(shape=[True, 840]),
    "no shape": dict(shape=None),
    "another block size": dict(block_size=128),
    "a negative block size": dict(block_size=-64),
    "a block size of half": dict(block_size=0.5),
    "a block size that is true": dict(block_size=True),
    "unsigned": dict(signed="no"),
    "another dtype": dict(dtype="uint8"),
    "a dtype that is a list": dict(dtype=["float32"]),
    "another type": dict(quant_type="fp4"),
    "no such type": dict(quant_type="nf5000", digest=None),
    "a type that is a list": dict(quant_type=["nf4"]),
    "another digest": dict(digest="0123456789abcdef"),
    "a spec that is a string": dict(spec="nf4"),
    "a spec of something else": dict(spec={"name": "nf4"}),
    "a second level that is not there": dict(second=dict(quant_type="dynamic8", block_size=256)),
    "a second level that is a list": dict(second=[1]),
    "a second level of nothing": dict(second={"a": 1}),
    "an entry more": dict(more=1),
}


@pytest.mark.parametrize("lie", ABOUT_LIES)
def test_quantized_tensors_that_lie(lie: str) -> None:
    saved = F.quantize(torch.ones(12, 70), "nf4").state_dict()
    fields = json.loads(bytes(saved["about"].tolist()))
    saved["about"] = packed({**fields, **ABOUT_LIES[lie]})
    with pytest.raises(BnbxError):
        QuantTensor.from_state_dict(saved)


def test_quantized_tensors_with_other_parts() -> None:
    good = F.quantize(torch.ones(12, 70), "nf4", double=True).state_dict()
    for key in good:
        for value in (None, torch.ones(3), good[key][:-1], good[key].double(), "tensor"):
            with pytest.raises(BnbxError):
                QuantTensor.from_state_dict({**good, key: value})
        with pytest.raises(BnbxError):
            QuantTensor.from_state_dict({k: v for k, v in good.items() if k != key})
    others: list[Any] = [None, 3, [], {}, {**good, "more": torch.ones(1)}]
    for bad in others:
        with pytest.raises(BnbxError):
            QuantTensor.from_state_dict(bad)


def test_parts_that_change_afterwards() -> None:
    q = F.quantize(torch.ones(12, 70), "nf4")
    for number in range(2):
        bad = copy.copy(q)
        parts = list(q.parts)
        parts[number] = parts[number][:-1]
        bad.parts = tuple(parts)
        with pytest.raises(QuantizedDataError):
            bad.dequantize()
    q.codes.resize_(5)
    with pytest.raises(QuantizedDataError):
        q.dequantize()


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["nf4", "fp4", "float32", "dynamic8"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(
    fields=st.dictionaries(
        st.sampled_from(
            ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype",
             "nested_offset", "signed", "spec", "x"]
        ),
        json_values,
        max_size=4,
    ),
    compressed=st.booleans(),
)  # fmt: skip
def test_any_json(fields: dict[str, Any], compressed: bool) -> None:
    saved = good_state(compressed)
    before = json.loads(bytes(saved[KEY].tolist()))
    saved[KEY] = packed({**before, **fields})
    codes, _ = F.quantize_4bit(torch.ones(64, 65), quant_type="nf4")
    try:
        state = QuantState.from_dict(saved, "cpu")
        F.dequantize_4bit(codes, state)
    except BnbxError:
        return
    assert state.shape is not None
    assert state.shape.numel() == 64 * 65


@given(
    fields=st.dictionaries(
        st.sampled_from(
            ["quant_type", "digest", "spec", "block_size", "signed", "second", "shape", "dtype"]
        ),
        json_values,
        max_size=4,
    )
)
def test_any_json_of_a_quantized_tensor(fields: dict[str, Any]) -> None:
    saved = F.quantize(torch.ones(12, 70), "nf4", double=True).state_dict()
    before = json.loads(bytes(saved["about"].tolist()))
    saved["about"] = packed({**before, **fields})
    try:
        found = QuantTensor.from_state_dict(saved)
    except BnbxError:
        return
    assert found.dequantize().shape == found.shape
    assert found.numel() == 840


CRASHES = """
import sys
import torch
import bnbx.functional as F
from bnbx.errors import BnbxError
from bnbx.functional import QuantState

x = torch.randn(4096)
codes, state = F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
eight, plain = F.quantize_blockwise(x, blocksize=64)
refused = 0
def refuse(function, *arguments, **named):
    global refused
    try:
        function(*arguments, **named)
    except BnbxError:
        refused += 1
    else:
        sys.exit(f"{function.__name__} took it")

for shape in ((1 << 40,), (1 << 20, 1 << 20), (8192,), (4097,)):
    state.shape = torch.Size(shape)
    refuse(F.dequantize_4bit, codes, state)
    refuse(F.gemv_4bit, torch.ones(1, shape[-1] % 9000), codes, state=state)
state.shape = x.shape
for size in (16, 32, 128, 4096, 1 << 40, -64, 0):
    state.blocksize = plain.blocksize = size
    refuse(F.dequantize_4bit, codes, state)
    refuse(F.dequantize_blockwise, eight, plain)
state.blocksize = plain.blocksize = 64
for cut in (0, 1, 2047):
    refuse(F.dequantize_4bit, codes[:cut], state)
    refuse(F.dequantize_4bit, codes, absmax=plain.absmax[:cut % 64], out=torch.empty(4096))
for name in ("absmax", "state2", "offset"):
    kept = getattr(state, name)
    setattr(state, name, None)
    refuse(F.dequantize_4bit, codes, state)
    setattr(state, name, kept)
state.state2.absmax = state.state2.absmax[:0]
refuse(F.dequantize_4bit, codes, state)
refuse(F.histogram_scatter_add_2d, torch.zeros(2, 2), torch.tensor([1 << 40]), torch.tensor([0]),
       torch.ones(1))
refuse(F.optimizer_update_8bit_blockwise, "lion", x, x.clone(), eight[:64], None, 0.9, 0.9, 0.0,
       0.0, 0.0, 1, 0.1, plain.code, None, plain.absmax, None)
refuse(F.optimizer_update_8bit_blockwise, "lion", x, x.clone(), eight, None, 0.9, 0.9, 0.0,
       0.0, 0.0, 1, 0.1, plain.code, None, plain.absmax[:3], None)
for left in (0, 4095 * 4):
    freed = x.clone()
    freed.untyped_storage().resize_(left)
    refuse(F.quantize, freed, "nf4")
    refuse(F.fake_quantize, freed, "nf4")
    refuse(F.quantize_4bit, freed)
    refuse(F.quantize_blockwise, freed)
    refuse(F.int8_vectorwise_quant, freed.view(64, 64))
    refuse(F.dequantize_blockwise, eight, plain, out=freed)
    refuse(F.optimizer_update_32bit, "momentum", freed, x.clone(), x.clone(), 0.9, 0.0, 1, 0.1)
    q = F.quantize(x, "nf4")
    q.codes.untyped_storage().resize_(left // 16)
    refuse(q.dequantize)
print("alive", refused)
"""


def test_no_crash() -> None:
    """In a process of its own, where a read out of bounds would show as a signal."""
    done = subprocess.run(
        [sys.executable, "-c", CRASHES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr or done.stdout
    assert done.stdout.startswith("alive")


def test_tables_without_numbers() -> None:
    table, codes = torch.zeros(16, device="meta"), torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(DeviceError, match="code is on the meta device"):
        F.quantize_blockwise(torch.ones(8), code=table)
    with pytest.raises(DeviceError, match="code is on the meta device"):
        F.dequantize_blockwise(codes, absmax=torch.ones(1), code=table)
