"""Parameters of any shape in codes: what modules see of them, and how little is decoded."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnbx.errors import OptionError, QuantizedDataError, UnknownNameError
from bnbx.kernels.coding import decode, encode
from bnbx.kernels.encoding import make_encoding
from bnbx.kernels.rows import take
from bnbx.layers.parametrize import coded_parameter, keep_in_codes
from bnbx.layers.stacked import Stacked
from bnbx.nn import QuantParameter, quantize_, replace_parameter, restore_parameter
from quantized_layers import TYPES, Experts


def experts(quant_type: str = "nf4", **settings: Any) -> tuple[Experts, Tensor]:
    """A module whose parameter is in codes, and the decoded numbers."""
    torch.manual_seed(0)
    module = Experts()
    replace_parameter(module, "up", quant_type, **settings)
    param = coded_parameter(module, "up")
    assert param is not None
    return module, param.dequantize()


def stacked(module: Experts) -> Stacked:
    found: Any = module.up
    assert isinstance(found, Stacked)
    return found


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", TYPES)
def test_entries_are_those_of_the_decoded_tensor(name: str, double: bool) -> None:
    try:
        encoding = make_encoding(name, double=double)
    except OptionError:
        assert double  # of a type whose scales are not float32
        return
    shape = (3, 8, 512)
    parts = encode(encoding, torch.randn(shape))
    whole = decode(encoding, parts, shape)
    for index in (0, 2, -2):
        found = take(encoding, parts, shape, index)
        if encoding.per == "tensor":
            assert found is None
            continue
        assert found is not None
        assert torch.equal(decode(*found, shape[1:]), whole[index])
    with pytest.raises(IndexError, match=r"entry 3 of a quantized tensor of shape \(3, 8, 512\)"):
        take(encoding, parts, shape, 3)


def test_entries_that_share_a_block_are_not_taken() -> None:
    encoding = make_encoding("nf4")
    assert take(encoding, encode(encoding, torch.randn(3, 5, 7)), (3, 5, 7), 1) is None
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(3, 5, 7))
    replace_parameter(module, "weight")
    weight: Any = module.weight
    assert torch.equal(weight[1], weight.dense()[1])
    assert not isinstance(weight[1], Stacked)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", ["nf4", "int8", "nvfp4"])
def test_products_are_those_of_the_decoded_entry(name: str, double: bool) -> None:
    if double and name == "nvfp4":
        return
    module, dense = experts(name, double=double)
    up, x, bias = stacked(module), torch.randn(3, 64), torch.randn(64)
    one, of = up[2], dense[2]
    assert isinstance(one, Stacked)
    near: Any = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(F.linear(x, one), F.linear(x, of), **near)
    torch.testing.assert_close(F.linear(x, one, bias), F.linear(x, of, bias), **near)
    torch.testing.assert_close(x @ one, x @ of, **near)
    for turned, plain in ((one.t(), of.t()), (one.T, of.T), (one.mT, of.mT)):
        torch.testing.assert_close(x @ turned, x @ plain, **near)
        torch.testing.assert_close(F.linear(x, turned, bias), F.linear(x, plain, bias), **near)
        assert torch.equal(turned + 0, plain)
    torch.testing.assert_close(torch.matmul(x, one.transpose(-2, -1)), x @ of.T, **near)
    assert torch.equal(one.transpose(0, 0) + 0, of)
    assert F.linear(x, up[torch.tensor(1)]).shape == (3, 64)


def test_all_else_is_done_with_the_dense_numbers() -> None:
    module, dense = experts()
    up = stacked(module)
    assert torch.equal(up.dense(), dense)
    assert torch.equal(up + 1, dense + 1)
    assert torch.equal(up[1:3], dense[1:3])
    assert torch.equal(up[torch.tensor([2, 0])], dense[[2, 0]])
    assert torch.equal(up[1, 3], dense[1, 3])
    assert torch.equal(up[..., 0], dense[..., 0])
    assert torch.equal(torch.stack([up[0], up[1]]), dense[:2])
    assert torch.equal(up.transpose(1, 2), dense.transpose(1, 2))
    x = torch.randn(4, 3, 64)
    assert torch.equal(torch.bmm(x, up), torch.bmm(x, dense))
    assert torch.equal(torch.einsum("bnk,bok->bno", x, up), torch.einsum("bnk,bok->bno", x, dense))
    assert up.sum().shape == ()
    assert up.to(torch.bfloat16).dtype == torch.bfloat16
    assert "nf4" in repr(up)
    assert up.shape == dense.shape
    with pytest.raises(IndexError):
        up[4]


def test_no_more_than_an_expert_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    module, dense = experts()
    decoded: list[int] = []

    def watched(encoding: Any, parts: Any, shape: Any, *args: Any, **named: Any) -> Tensor:
        decoded.append(torch.Size(shape).numel())
        return decode(encoding, parts, shape, *args, **named)

    monkeypatch.setattr("bnbx.kernels.coding.decode", watched)
    monkeypatch.setattr("bnbx.layers.stacked.decode", watched)
    module(torch.randn(1, 64))
    assert all(count <= dense[0].numel() for count in decoded)
    stacked(module).sum()
    assert decoded[-1] == dense.numel()


def test_gradients_are_those_of_the_dense_module() -> None:
    module, dense = experts()
    plain = Experts()
    plain.load_state_dict({"up": dense})
    start = torch.randn(5, 64)
    grads = []
    for each in (module, plain):
        x = start.clone().requires_grad_()
        each(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)


def test_autocast() -> None:
    module, _ = experts()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(torch.randn(2, 64)).dtype == torch.bfloat16


def test_compiled_module() -> None:
    module, _ = experts(double=True)
    x = torch.randn(2, 64)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-4)


def test_state_dict_has_the_entries_of_layers() -> None:
    module, dense = experts(double=True)
    saved = module.state_dict()
    assert list(saved) == [
        "up",
        "up.absmax",
        "up.quant_map",
        "up.nested_absmax",
        "up.nested_quant_map",
        "up.quant_state.bitsandbytes__nf4",
    ]
    again, _ = experts("int8")
    again.load_state_dict(saved)
    assert torch.equal(stacked(again).dense(), dense)
    again.load_state_dict({"up": torch.zeros(4, 64, 64)})
    assert not stacked(again).dense().any()
    with torch.device("meta"):
        empty = Experts()
    replace_parameter(empty, "up")
    assert empty.up.shape == (4, 64, 64)
    for entries in (saved, {"up": dense}):
        meta = copy.deepcopy(empty)
        meta.load_state_dict(entries, assign=True)
        assert torch.equal(stacked(meta.to("cpu")).dense(), dense)
    del saved["up.absmax"]
    with pytest.raises(RuntimeError, match=r"up: .*absmax is None"):
        again.load_state_dict(saved)


def test_keys_that_are_missing_are_told_by_their_names() -> None:
    module, dense = experts()
    saved = dict(module.state_dict())
    beside = [key for key in saved if key != "up"]
    del saved["up"]
    found = module.load_state_dict(saved, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["up"], [])
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "up"\.'):
        module.load_state_dict(saved)
    found = module.load_state_dict({"other": dense}, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["up", *beside], ["other"])
    outer = nn.Sequential(module)
    assert outer.load_state_dict({}, strict=False).missing_keys[0] == "0.up"
    assert torch.equal(stacked(module).dense(), dense)


@pytest.mark.parametrize("shape", [(4, 64, 64), (4, 64, 63)])
def test_dense_numbers_are_copied_before_anything_is_quantized(shape: tuple[int, ...]) -> None:
    module = Experts()
    param = QuantParameter(module.up)
    keep_in_codes(module, "up", param)
    numbers = torch.ones(shape)
    if shape[-1] == 63:
        with pytest.raises(RuntimeError, match="size mismatch for up: copying"):
            module.load_state_dict({"up": numbers})
        return
    module.load_state_dict({"up": numbers})
    assert torch.equal(param, numbers)
    module.up = 2 * numbers  # type: ignore[assignment]
    assert coded_parameter(module, "up") is param
    assert torch.equal(param, 2 * numbers)


def test_fit_holds_for_all_dense_numbers_that_come() -> None:
    fitted, dense = experts("linear3", fit="mse")
    numbers = Experts().state_dict()["up"]
    fitted.up = numbers
    expected = stacked(fitted).dense()
    assert not torch.equal(expected, dense)
    replace_parameter(plain := Experts(), "up", "linear3")
    plain.load_state_dict({"up": numbers})
    assert not torch.equal(stacked(plain).dense(), expected)
    with torch.device("meta"):
        empty = Experts()
    quantize_(empty, "linear3", parameters=["up"], fit="mse")
    for module in (empty, fitted, copy.deepcopy(fitted), copy.copy(fitted), pickled(fitted)):
        if module is not empty:
            module.load_state_dict({"up": torch.zeros(4, 64, 64)})
        module.load_state_dict({"up": numbers}, assign=module is empty)
        assert torch.equal(stacked(module.to("cpu")).dense(), expected)  # type: ignore[arg-type]
    with torch.device("meta"), pytest.raises(OptionError, match="fit='msee'; expected one of"):
        replace_parameter(Experts(), "up", fit="msee")


def test_tensors_are_quantized_where_they_are_assigned() -> None:
    module, dense = experts("int8")
    param = coded_parameter(module, "up")
    numbers = torch.randn(4, 64, 64)
    module.up = numbers  # type: ignore[assignment]
    assert coded_parameter(module, "up") is param
    torch.testing.assert_close(stacked(module).dense(), numbers, rtol=0, atol=0.05)
    kept = stacked(module).dense()
    module.up = module.up
    torch.testing.assert_close(stacked(module).dense(), kept)
    with pytest.raises(QuantizedDataError, match=r"shape \(3,\); expected \(4, 64, 64\)"):
        module.up = torch.ones(3)  # type: ignore[assignment]
    with pytest.raises(OptionError, match=r"Experts.up is kept in codes.*restore_parameter"):
        module.up = nn.Parameter(dense)
    module.other = nn.Parameter(dense)
    assert type(module.other) is nn.Parameter
    restore_parameter(module, "up")
    module.up = nn.Parameter(dense)
    assert torch.equal(module.up, dense)


def test_codes_are_freed_once_a_parameter_is_dense() -> None:
    module, _ = experts()
    codes = weakref.ref(coded_parameter(module, "up"))
    gc.disable()
    try:
        restore_parameter(module, "up")
        assert codes() is None
    finally:
        gc.enable()


def test_copies_and_conversions() -> None:
    module, dense = experts()
    again = copy.deepcopy(module)
    again.load_state_dict(experts("nf4", block_size=128)[0].state_dict())
    assert torch.equal(stacked(module).dense(), dense)
    assert not torch.equal(stacked(again).dense(), dense)
    assert module.half().up.dtype == torch.float16
    assert module(torch.randn(1, 64, dtype=torch.float16)).dtype == torch.float16
    assert "nf4" in repr(module)


def _pickled(found: Any) -> Any:
    return pickle.loads(pickle.dumps(found))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, _pickled])
@pytest.mark.parametrize("double", [False, True])
def test_what_was_read_can_be_copied(double: bool, copied: Any) -> None:
    """Modules keep what they read, and are copied with it."""
    module, _ = experts(double=double)
    whole = stacked(module)
    for read in (whole, whole[1], whole[1].t()):
        assert isinstance(read, Stacked)
        again = copied(read)
        assert isinstance(again, Stacked)
        assert again.dtype == read.dtype
        assert torch.equal(again.dense(), read.dense())
        assert again.parts[0].data_ptr() != read.parts[0].data_ptr()
    assert len(pickle.dumps(whole[1])) < len(pickle.dumps(whole)) / 2
    one, two = copy.deepcopy([whole, whole])
    assert one is two


def test_modules_that_keep_what_they_read_are_copied() -> None:
    module = nn.LSTM(64, 64)
    quantize_(module, "nf4", parameters=["weight_ih_l0"])
    x = torch.randn(2, 1, 64)
    expected = module(x)[0]
    assert torch.equal(copy.deepcopy(module)(x)[0], expected)


def test_what_was_read_becomes_numbers_of_python_and_numpy() -> None:
    module, dense = experts()
    assert (stacked(module).numpy() == dense.numpy()).all()
    assert (np.asarray(stacked(module)[1]) == dense[1].numpy()).all()
    assert stacked(module)[1].tolist() == dense[1].tolist()


def test_a_parameter_that_is_quantized_anew_is_saved_once() -> None:
    module, _ = experts()
    restore_parameter(module, "up")
    replace_parameter(module, "up", "int8")
    keys = ["up", "up.absmax", "up.quant_map", "up.quant_state.bitsandbytes__int8"]
    assert list(module.state_dict()) == keys


def test_restored_parameter_is_dense() -> None:
    module, dense = experts()
    restore_parameter(module, "up", torch.bfloat16)
    assert type(module) is Experts
    assert type(module.up) is nn.Parameter
    assert torch.equal(module.up, dense.bfloat16())
    assert list(module.state_dict()) == ["up"]
    with pytest.raises(UnknownNameError, match="no parameter 'up' in codes"):
        restore_parameter(module, "up")


def test_errors_name_the_parameter() -> None:
    module, _ = experts()
    with pytest.raises(OptionError, match=r"Experts.up is parametrized already"):
        replace_parameter(module, "up")
    with pytest.raises(UnknownNameError, match="no parameter 'upp'; did you mean 'up'"):
        replace_parameter(Experts(), "upp")
    assert isinstance(replace_parameter(Experts(), "up"), QuantParameter)


def test_a_copy_is_changed_alone() -> None:
    """Torch's copies share the class that it made for a parametrized module."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = (nn.Parameter(torch.randn(2, 64, 64)) for _ in range(2))

    module = Pair()
    replace_parameter(module, "up")
    up, down = module.up + 0, module.down
    restored, further = copy.deepcopy(module), copy.deepcopy(module)
    restore_parameter(restored, "up")
    replace_parameter(further, "down")
    assert type(restored) is Pair
    assert torch.equal(restored.up, up)
    assert torch.equal(module.up + 0, up)
    assert module.down is down
    assert isinstance(further.down, Stacked)
    assert torch.equal(further.up + 0, up)


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def pickled(module: nn.Module) -> nn.Module:
    loaded: nn.Module = pickle.loads(pickle.dumps(module))
    return loaded


@pytest.mark.parametrize("copied", [pickled, saved_and_loaded, copy.copy])
@pytest.mark.parametrize("double", [False, True])
def test_pickled_modules_are_as_before(double: bool, copied: Any) -> None:
    module, dense = experts("nf4", double=double)
    module.register_buffer("scale", torch.ones(3))
    again = copied(module)
    assert isinstance(again, Experts)
    assert torch.equal(stacked(again).dense(), dense)
    for key, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    other, coarser = experts("nf4", double=double, block_size=128)
    other.register_buffer("scale", torch.ones(3))
    again.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(stacked(again).dense(), coarser)
    restore_parameter(again, "up")
    assert type(again) is Experts
    assert torch.equal(stacked(copied(module)).dense(), dense)  # the first one is as it was


def test_pickled_modules_share_what_they_shared() -> None:
    first, second = Experts(), Experts()
    second.up = first.up
    both = nn.Sequential(first, second)
    quantize_(both, "nf4", parameters=["up"])
    params = [coded_parameter(module, "up") for module in pickled(both).children()]
    assert params[0] is params[1]
    assert params[0] is not coded_parameter(first, "up")


def test_pickle_refuses_what_others_parametrize() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
    replace_parameter(layer, "bias")
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(layer)
