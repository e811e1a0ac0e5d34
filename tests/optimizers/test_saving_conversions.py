"""States that are stored in one way are loaded by an optimizer that stores them in another.

The oracle decodes what was saved, element by element from the table, and asks of the result that
every code is a nearest one.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx.errors import BnbxWarning
from bnbx.optim import create
from bnbx.optimizers import engine
from bnbx.optimizers.engine import Optimizer8bit
from bnbx.optimizers.paging import is_paged
from bnbx.registry import quant_types
from optimizers.compare import equal, parameters_of
from optimizers.saved import through_a_file, train
from optimizers.text import unpacked
from optimizers.variants import TARGETS, copies, parameters

SHAPES = [(5000,), (63, 79), (100,), (), (0,)]
STORAGES: dict[str, dict[str, Any]] = {
    "float32": dict(bits=32),
    "8 bits": {},
    "8 bits of everything": dict(min_8bit_size=0),
    "8 bits of the largest": dict(min_8bit_size=5000),
    "4 bits": dict(bits=4),
    "4 bits of everything": dict(bits=4, min_8bit_size=0),
    "one absmax": dict(block_wise=False),
    "one absmax for 4 bits": dict(block_wise=False, bits=4),
    "blocks of 64": dict(state_types={"m": "nf4", "v": "linear8"}),
    "some of it": dict(state_types={"m": "float32", "v": "dynamic8"}),
}
SIGNED = {"m": True, "v": False}


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every target computes the same bits; this one need not be compiled for each case."""
    monkeypatch.setattr(engine, "launch", TARGETS["reference"])


def states_of(state_dict: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The states of a state dict, with the labels of types as the text that they are bytes of."""
    return {
        index: {k: bytes(v).decode() if k.endswith("_type") else v for k, v in saved.items()}
        for index, saved in state_dict["state"].items()
    }


def levels_of(label: str, name: str) -> tuple[Tensor, int | None]:
    """The numbers of a label's codes, and the block size (None for one absmax)."""
    type_name, whole, _ = label.partition("/tensor")
    quant_type = quant_types().get(type_name)
    values = quant_type.codebook(signed=SIGNED[name]).values
    return torch.tensor(values, dtype=torch.float32), None if whole else quant_type.block_size


def parts(saved: dict[str, Any], name: str, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """Of a quantized state: levels, codes and the absmax of each element, flat."""
    label = saved[f"{name}_type"]
    levels, size = levels_of(label, name)
    quant_type = quant_types().get(label.removesuffix("/tensor"))
    codes = unpacked(quant_type, saved[name], shape).reshape(-1).long()
    absmax = saved[f"{name}_absmax"]
    scale = absmax.expand(codes.numel()) if size is None else absmax.repeat_interleave(size)
    return levels, codes, scale[: codes.numel()]


def value_of(saved: dict[str, Any], name: str, shape: torch.Size) -> Tensor:
    """The values of a state, flat, float32."""
    if f"{name}_type" not in saved:
        value: Tensor = saved[name].reshape(-1)
        return value
    levels, codes, scale = parts(saved, name, shape)
    return levels[codes] * scale


def check_converted(new: dict[str, Any], name: str, value: Tensor, shape: torch.Size) -> None:
    """Assert that a state is the one that comes closest to these values."""
    if f"{name}_type" not in new:
        assert equal(new[name].reshape(-1), value)
        return
    levels, codes, scale = parts(new, name, shape)
    for block, most in zip(_blocks(value, new, name), _blocks(scale, new, name), strict=True):
        largest = block.abs().amax()
        assert (most == (largest if largest >= 2.0**-126 else 0)).all()
    known = scale > 0
    x, chosen = value[known].double(), levels[codes].double()[known] * scale[known]
    nearest = (levels.double()[None] * scale[known, None] - x[:, None]).abs().amin(1)
    # Of two numbers about as near, float32 may find either to be the nearer.
    assert ((chosen - x).abs() <= nearest + 4 * 2.0**-24 * scale[known]).all()


def _blocks(flat: Tensor, new: dict[str, Any], name: str) -> list[Tensor]:
    _, size = levels_of(new[f"{name}_type"], name)
    return list(torch.split(flat, size or flat.numel())) if flat.numel() else []


def differ(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return any(a.get(f"{name}_type") != b.get(f"{name}_type") for name in SIGNED)


@pytest.mark.parametrize(("source", "target"), [*itertools.product(STORAGES, STORAGES)])
def test_states_are_converted_to_what_is_asked_for(source: str, target: str) -> None:
    params = parameters(torch.float32, SHAPES)
    first: Optimizer8bit = create("adamw", params, lr=1e-2, **STORAGES[source])
    train(first, params, 0, 3)
    saved = through_a_file(first.state_dict())
    pattern: Optimizer8bit = create("adamw", copies(params), **STORAGES[target])
    train(pattern, parameters_of(pattern), 0, 1)
    second: Optimizer8bit = create("adamw", copies(params), lr=0.5, **STORAGES[target])
    wanted, olds = states_of(pattern.state_dict()), states_of(saved)
    if any(differ(olds[index], wanted[index]) for index in wanted):
        with pytest.warns(BnbxWarning, match=r"are converted.*\d x \w from .* to") as caught:
            second.load_state_dict(saved)
        assert [warning.filename for warning in caught] == [__file__]
    else:
        second.load_state_dict(saved)
    for index, p in enumerate(parameters_of(second)):
        old, new = olds[index], second.state[p]
        assert new["step"] == 3
        assert new.keys() == wanted[index].keys()
        for name in SIGNED:
            assert new.get(f"{name}_type") == wanted[index].get(f"{name}_type")
            if new.get(f"{name}_type") == old.get(f"{name}_type"):
                assert all(equal(new[k], old[k]) for k in old if k.startswith(name))
            else:
                check_converted(new, name, value_of(old, name, p.shape), p.shape)
    assert second.param_groups[0]["lr"] == 1e-2
    train(second, parameters_of(second), 3, 1)


def test_one_warning_names_every_conversion() -> None:
    params = parameters(torch.float32, SHAPES)
    first = create("adamw", params)
    train(first, params, 0, 1)
    second = create("adamw", copies(params), bits=4)
    expected = r"asks for: 1 x m from dynamic8 to state4, 1 x v from dynamic8 to state4$"
    params[1].grad = None
    saved = first.state_dict()
    del saved["state"][1]
    with pytest.warns(BnbxWarning, match=expected) as caught:
        second.load_state_dict(saved)
    assert len(caught) == 1


# ---- pages


@pytest.mark.parametrize("paged", [False, True])
def test_pages_hold_what_was_in_memory_and_back(paged: bool) -> None:
    params = [torch.randn(200_000).requires_grad_()]
    first = create("adamw", params, lr=1e-2, paged=paged)
    train(first, params, 0, 2)
    second = create("adamw", copies(params), lr=1e-2, paged=not paged)
    second.load_state_dict(through_a_file(first.state_dict()))
    (state,), (other,) = first.state.values(), second.state.values()
    assert is_paged(state["m"]) == paged
    assert is_paged(other["m"]) == (not paged)
    train(first, params, 2, 2)
    train(second, parameters_of(second), 2, 2)
    assert equal(params[0], parameters_of(second)[0])
    assert all(equal(value, other[key]) for key, value in state.items())


def test_pages_are_converted_too() -> None:
    params = [torch.randn(200_000).requires_grad_()]
    first = create("adamw", params, lr=1e-2)
    train(first, params, 0, 2)
    second = create("adamw", copies(params), bits=32, paged=True)
    with pytest.warns(BnbxWarning, match="1 x m from dynamic8 to float32"):
        second.load_state_dict(through_a_file(first.state_dict()))
    (state,), (other,) = first.state.values(), second.state.values()
    assert is_paged(other["m"])
    assert equal(other["m"], value_of(state, "m", params[0].shape))


# ---- what the engine keeps

MASTERS = ("none", "stochastic", "kahan", "residual")
DTYPES = {"kahan": torch.bfloat16, "residual": torch.int8}


@pytest.mark.parametrize(("source", "target"), [*itertools.product(MASTERS, MASTERS)])
def test_a_residual_is_taken_over_by_its_own_master_only(source: str, target: str) -> None:
    params = parameters(torch.bfloat16, SHAPES)
    first: Optimizer8bit = create("adamw", params, lr=1e-2, master=source)
    train(first, params, 0, 3)
    second: Optimizer8bit = create("adamw", copies(params), master=target)
    saved = through_a_file(first.state_dict())
    if source in DTYPES and source != target:
        with pytest.warns(BnbxWarning, match="5 x residual dropped"):
            second.load_state_dict(saved)
    else:
        second.load_state_dict(saved)
    assert second.param_groups[0]["master"] == target
    for index, p in enumerate(parameters_of(second)):
        residual = second.state[p].get("residual")
        if target not in DTYPES:
            assert residual is None
        elif source == target:
            assert equal(residual, saved["state"][index]["residual"])
        else:
            assert equal(residual, torch.zeros(p.shape, dtype=DTYPES[target]))
    train(second, parameters_of(second), 3, 1)


def test_a_float32_parameter_drops_the_residual_of_a_16_bit_one() -> None:
    params = parameters(torch.bfloat16, SHAPES)
    first = create("adamw", params, lr=1e-2, master="kahan")
    train(first, params, 0, 2)
    second = create("adamw", [p.detach().float() for p in params], master="kahan")
    with pytest.warns(BnbxWarning, match="5 x residual dropped"):
        second.load_state_dict(first.state_dict())


def test_another_half_dtype_begins_its_residual_anew() -> None:
    params = parameters(torch.bfloat16, SHAPES)
    first = create("adamw", params, lr=1e-2, master="kahan")
    train(first, params, 0, 2)
    second = create("adamw", [p.detach().half() for p in params], master="kahan")
    with pytest.warns(BnbxWarning, match="5 x residual dropped"):
        second.load_state_dict(first.state_dict())
    for p in parameters_of(second):
        assert equal(second.state[p]["residual"], torch.zeros_like(p))


def test_norms_are_begun_where_there_are_none() -> None:
    params = parameters(torch.float32, SHAPES)
    first = create("adamw", params)
    train(first, params, 0, 2)
    saved = first.state_dict()
    for group in saved["param_groups"]:
        group["percentile_clipping"] = 90
    second = create("adamw", copies(params))
    second.load_state_dict(saved)
    for p in parameters_of(second):
        assert equal(second.state[p]["gnorm_vec"], torch.zeros(100))
    train(second, parameters_of(second), 2, 1)


def test_states_that_are_switched_off_stay() -> None:
    """They can be switched on again in the middle of a run."""
    params = parameters(torch.float32, SHAPES)
    first = create("adamw", params, amsgrad=True)
    train(first, params, 0, 2)
    saved = first.state_dict()
    for group in saved["param_groups"]:
        group["amsgrad"] = False
    second = create("adamw", copies(params), bits=32)
    with pytest.warns(BnbxWarning, match="2 x vmax from dynamic8 to float32"):
        second.load_state_dict(saved)
    assert all("vmax" in state for state in second.state.values())
    train(second, parameters_of(second), 2, 1)
