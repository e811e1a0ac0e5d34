"""Contract 4.2 and 4.8: how libraries make, subclass, inspect and change 4-bit layers."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import bnbx
from bnbx.nn import (
    Embedding4bit,
    Embedding8bit,
    Int8Params,
    Linear4bit,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
    Params4bit,
    QuantState,
)
from oracles import bitsandbytes_functional

NAMES = (
    "Linear4bit LinearNF4 LinearFP4 Linear8bitLt Params4bit Int8Params Embedding StableEmbedding "
    "Embedding4bit Embedding8bit EmbeddingNF4 EmbeddingFP4 OutlierAwareLinear"
).split()
MORE = {"memory_efficient_backward", "dtype"}  # arguments that bitsandbytes' classes lack


def _theirs(name: str) -> Any:
    bitsandbytes_functional()
    return getattr(pytest.importorskip("bitsandbytes.nn"), name)


def _arguments(kind: Any) -> dict[str, Any]:
    make = kind.__new__ if "__new__" in vars(kind) else kind.__init__
    found = list(inspect.signature(make).parameters.values())[1:]
    return {each.name: each.default for each in found}


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_those_of_bitsandbytes_in_its_order(name: str) -> None:
    ours, theirs = _arguments(getattr(bnbx.nn, name)), _arguments(_theirs(name))
    theirs.pop("kwargs", None)
    ours.pop("others", None)
    assert [each for each in ours if each not in MORE - theirs.keys()] == list(theirs)
    for each, default in theirs.items():
        assert ours[each] == default, each


def test_compute_dtype_is_the_fourth_position() -> None:
    found = Linear4bit(64, 32, True, torch.bfloat16)
    assert found.compute_dtype == torch.bfloat16
    assert found.compute_type_is_set
    assert not Linear4bit(64, 32).compute_type_is_set
    assert "quant_storage" in inspect.signature(Linear4bit).parameters  # diffusers looks


def test_attributes_of_a_4bit_layer() -> None:
    found = Linear4bit(64, 32, quant_type="nf4", quant_storage=torch.bfloat16)
    assert isinstance(found, nn.Linear)
    assert (found.in_features, found.out_features) == (64, 32)
    assert found.quant_storage == torch.bfloat16
    assert found.quant_state is None
    assert hasattr(found, "quant_state")  # peft's loraga
    found.source_cls = nn.Linear
    assert found.source_cls is nn.Linear
    found.to("cpu")
    assert isinstance(found.quant_state, QuantState)
    assert found.quant_state is found.weight.quant_state
    assert not found.weight.requires_grad
    assert found.bias.requires_grad
    found.quant_state = None
    assert found(torch.randn(1, 64)).shape == (1, 32)


def test_subclasses_may_override_the_constructor() -> None:
    """As lightning's do: they are made on the meta device and take weights later."""

    class Own(Linear4bit):
        def __init__(self, columns: int, rows: int, device: Any = None, **named: Any) -> None:
            super().__init__(columns, rows, device="meta", **named)
            self.own_device = device
            self.compute_dtype = torch.float32
            self.compute_type_is_set = False

    found = Own(64, 32, quant_type="nf4")
    assert found.weight.is_meta
    weight = torch.randn(32, 64)
    found.weight = Params4bit(
        weight, requires_grad=False, quant_type="nf4", module=found, compress_statistics=True
    ).to("cpu")
    found.bias = nn.Parameter(torch.zeros(32))
    x = torch.randn(2, 64)
    torch.testing.assert_close(found(x), x @ found.dequantized_weight().T)
    assert found(x.bfloat16()).dtype == torch.bfloat16


def test_a_weight_that_lost_its_class_is_found_again() -> None:
    """FSDP puts plain parameters back; the layer still has the quantization state."""
    found = LinearNF4(64, 32).to("cpu")
    x = torch.randn(2, 64)
    expected = found(x)
    found.weight = nn.Parameter(found.weight.detach(), requires_grad=False)
    assert type(found.weight) is nn.Parameter
    assert torch.equal(found(x), expected)
    assert "weight.absmax" in found.state_dict()


def test_weights_may_be_replaced_by_codes_of_another_layer() -> None:
    """Peft's olora: the class of a weight makes another from dense numbers and its settings."""
    found = LinearNF4(64, 32).to("cpu")
    old = found.weight
    dense = torch.randn(32, 64)
    found.weight = type(old)(
        dense,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
        compress_statistics=old.compress_statistics,
        module=old.module,
    ).to("cpu")
    torch.testing.assert_close(found.dequantized_weight(), dense, rtol=0, atol=0.6)
    assert found.quant_state is found.weight.quant_state
    assert found.quant_state is not old.quant_state


def test_parameters_are_counted_by_storage() -> None:
    """Transformers and peft count two numbers for each element of a byte."""
    weight = LinearNF4(64, 32).to("cpu").weight
    assert weight.numel() * 2 * weight.quant_storage.itemsize == 64 * 32
    assert weight.element_size() == weight.quant_storage.itemsize


def test_states_are_indexed_as_lists_once_were() -> None:
    weight = LinearNF4(64, 32).to("cpu").weight
    state = weight.quant_state
    absmax, shape, dtype, blocksize, (offset, second), quant_type = (state[i] for i in range(6))
    assert absmax is state.absmax
    assert (shape, dtype, blocksize, quant_type) == ((32, 64), torch.float32, 64, "nf4")
    assert offset is state.offset
    assert second is state.state2
    plain = Linear4bit(64, 32, compress_statistics=False).to("cpu").weight.quant_state
    assert plain[4] is None
    assert not plain.nested
    about = json.loads(bytes(state.bitsandbytes__nf4.tolist()))
    assert about["shape"] == [32, 64]
    with pytest.raises(AttributeError, match="bitsandbytes__fp4"):
        state.bitsandbytes__fp4  # noqa: B018 - the access is what is tested


def test_named_layers_are_of_their_types() -> None:
    assert LinearNF4(4, 4).weight.quant_type == "nf4"
    assert LinearFP4(4, 4).weight.quant_type == "fp4"
    assert Embedding4bit(4, 64).weight.quant_type == "fp4"
    assert not Embedding4bit(4, 64).weight.compress_statistics
    assert isinstance(Embedding8bit(4, 4).weight, Int8Params)
    assert isinstance(Linear8bitLt(4, 4).weight, Int8Params)


def test_importing_layers_compiles_nothing_and_starts_nothing() -> None:
    code = """
import sys
import torch
seen = []

def audit(event, arguments):
    if event in ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.system", "socket.connect"):
        seen.append(event)
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        seen.append(arguments)

sys.dont_write_bytecode = True
sys.addaudithook(audit)
import bnbx.nn
assert not torch.cuda.is_initialized()
assert "cupy" not in sys.modules
assert "torch._dynamo" not in sys.modules
print(seen)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
