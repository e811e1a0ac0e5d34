"""Every quant type of the catalog holds states: of either sign, saved, converted, touched by rows.

The rule is one that is nothing but its states, on the reference: that all targets have its bits
is the matter of tests/kernels.
"""

from __future__ import annotations

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from bnbx.errors import BnbxWarning
from bnbx.kernels.packing import packed_size
from bnbx.optimizers import engine
from bnbx.optimizers.engine import Optimizer8bit
from bnbx.optimizers.paging import Pages
from bnbx.optimizers.state import maker, new_state, storage_of, values_of
from bnbx.registry import Optimizer, QuantType, State, quant_types, rate
from optimizers.compare import assert_same, equal, parameters_of
from optimizers.saved import through_a_file, train
from optimizers.text import check_step, decoded, groups_of, held, unpacked
from optimizers.variants import TARGETS, copies, gradients, set_gradients

SHAPES: list[tuple[int, ...]] = [(5000,), (17, 241), (101,), (3,), ()]
TYPES = list(quant_types())
BOTH = Optimizer(
    name="both",
    summary="A state that has both signs, and one that is never negative.",
    states=(State(name="m"), State(name="v", signed=False)),
    hyper=dict(lr=rate(1e-2)),
    element_code="m = 0.9 * m + 0.1 * g\nv = 0.9 * v + 0.1 * abs(g)\np = p - lr * (m + v)",
)


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "launch", TARGETS["reference"])


def make(params: list[Tensor], quant_type: QuantType | None) -> Optimizer8bit:
    name = quant_type.name if quant_type else "float32"
    with warnings.catch_warnings():
        # Types without a table for what is never negative are named by a warning.
        warnings.simplefilter("ignore", BnbxWarning)
        return Optimizer8bit(params, BOTH, state_types=name, min_8bit_size=0)


def parameters(shapes: list[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    return [torch.randn(shape).requires_grad_() for shape in shapes]


each_type = pytest.mark.parametrize("quant_type", TYPES, ids=lambda t: t.name)


@each_type
def test_each_step_is_that_of_the_text(quant_type: QuantType) -> None:
    params = parameters()
    optimizer = make(params, quant_type)
    types = {"m": quant_type.name, "v": quant_type.name}
    determined = total = 0
    for _ in range(2):
        values = gradients(params)
        before = [held(optimizer, p, types) for p in params]
        set_gradients(params, values)
        optimizer.step()
        groups = groups_of(optimizer)
        for p, value, old in zip(params, values, before, strict=True):
            after = held(optimizer, p, types)
            counts = check_step(*groups[p], value, old, after)
            determined, total = determined + counts[0], total + counts[1]
    assert determined >= 0.99 * total, "the bounds are too wide to tell codes apart"


@each_type
def test_codes_take_their_bits_and_no_more(quant_type: QuantType) -> None:
    params = parameters()
    optimizer = make(params, quant_type)
    train(optimizer, params, 0, 1)
    for p in params:
        saved = optimizer.state[p]
        for name in ("m", "v"):
            assert saved[name].numel() == packed_size(quant_type, p.numel())
            assert saved[name].numel() == -(-p.numel() * quant_type.bits // 8)
            assert saved[f"{name}_absmax"].numel() == -(-p.numel() // quant_type.block_size)


@each_type
def test_a_fresh_state_is_zero(quant_type: QuantType) -> None:
    """Also in codes of an odd width, whose bytes repeat after a few."""
    for p in parameters():
        resolved = make([p], quant_type).resolved(p)
        for state in BOTH.states:
            fresh = new_state(p, state, resolved, maker(p, resolved, Pages()))
            codes = unpacked(quant_type, fresh[state.name], p.shape)
            assert (codes == quant_type.codebook(signed=state.signed).zero_code).all()


@each_type
def test_a_run_goes_on_from_a_file(quant_type: QuantType) -> None:
    params = parameters()
    straight = make(params, quant_type)
    train(straight, params, 0, 2)
    saved = through_a_file(straight.state_dict())
    second = make(copies(params), quant_type)
    second.load_state_dict(saved)
    assert_same(straight, second)
    train(straight, params, 2, 1)
    train(second, parameters_of(second), 2, 1)
    assert_same(straight, second)


@each_type
def test_a_state_is_converted_to_float32_and_back(quant_type: QuantType) -> None:
    params = parameters()
    first = make(params, quant_type)
    train(first, params, 0, 2)
    wide = make(copies(params), None)
    with pytest.warns(BnbxWarning, match=f"m from {quant_type.name} to float32"):
        wide.load_state_dict(through_a_file(first.state_dict()))
    for p, q in zip(params, parameters_of(wide), strict=True):
        for name, signed in (("m", True), ("v", False)):
            codes = unpacked(quant_type, first.state[p][name], p.shape)
            absmax = first.state[p][f"{name}_absmax"]
            assert equal(wide.state[q][name], decoded(quant_type, signed, codes, absmax))
    again = make(copies(params), quant_type)
    with pytest.warns(BnbxWarning, match=f"m from float32 to {quant_type.name}"):
        again.load_state_dict(through_a_file(wide.state_dict()))
    for p, q in zip(parameters_of(wide), parameters_of(again), strict=True):
        for state in BOTH.states:
            value = wide.state[p][state.name]
            storage = storage_of(state, again.resolved(q), q.numel())
            found = values_of(storage, again.state[q], q.shape)
            assert ((found - value).abs() <= room(quant_type, state.signed, value)).all()


def room(quant_type: QuantType, signed: bool, value: Tensor) -> Tensor:
    """How far a code's number may be from what it was made of: half of the largest gap."""
    codebook = quant_type.codebook(signed=signed)
    levels = np.array([codebook.levels[code] for code in codebook.codes])
    gap = max(high - low for low, high in pairwise(levels))
    ends = [1 - levels[-1], 1 + levels[0] if levels[0] < 0 and signed else 0]
    half = max(gap / 2, *ends)
    half += 1 / (quant_type.grid - 1) if quant_type.grid else 0  # of a point that comes between
    size = quant_type.block_size
    flat = torch.nn.functional.pad(value.reshape(-1), (0, -value.numel() % size)).view(-1, size)
    absmax = flat.abs().amax(1).repeat_interleave(size)[: value.numel()]
    found: Tensor = absmax.view(value.shape) * half * 1.0001
    return found


@each_type
def test_rows_that_a_sparse_gradient_touches_move_alone(quant_type: QuantType) -> None:
    (p,) = parameters([(40, 29)])
    optimizer = make([p], quant_type)
    p.grad = torch.randn(40, 29)
    optimizer.step()
    before = {s.name: value_in(optimizer, p, s) for s in BOTH.states}
    p_before = p.detach().clone()
    rows = torch.tensor([3, 4, 39])
    g = torch.randn(3, 29) * 3
    p.grad = torch.sparse_coo_tensor(rows[None], g, (40, 29), check_invariants=True)
    optimizer.step()
    expected = {name: value.clone() for name, value in before.items()}
    expected["m"][rows] = 0.9 * before["m"][rows] + 0.1 * g
    expected["v"][rows] = 0.9 * before["v"][rows] + 0.1 * g.abs()
    update = 1e-2 * (expected["m"] + expected["v"])[rows]
    assert torch.allclose(p.detach()[rows], p_before[rows] - update, rtol=1e-5, atol=1e-7)
    rest = torch.ones(40, dtype=torch.bool)
    rest[rows] = False
    assert equal(p.detach()[rest], p_before[rest])
    for state in BOTH.states:
        after = value_in(optimizer, p, state)
        # The absmax of a block may be the present one where that is larger than needed.
        most = torch.maximum(expected[state.name].abs(), before[state.name].abs())
        assert ((after - expected[state.name]).abs() <= room(quant_type, state.signed, most)).all()
        blocks = torch.arange(40 * 29).view(40, 29) // quant_type.block_size
        elsewhere = ~torch.isin(blocks, blocks[rows])
        assert equal(after[elsewhere], before[state.name][elsewhere])


def value_in(optimizer: Optimizer8bit, p: Tensor, state: State) -> Tensor:
    storage = storage_of(state, optimizer.resolved(p), p.numel())
    return values_of(storage, optimizer.state[p], p.shape).clone()
