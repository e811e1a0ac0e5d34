"""Real checkpoints of bitsandbytes go on here: it trains on a CPU and saves a file."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx.errors import BnbxWarning, CheckpointError
from bnbx.optim import create
from bnbx.optimizers import engine
from bnbx.registry import quant_types
from optimizers.bitsandbytes_cases import (
    CASES,
    EQUAL,
    LR,
    NEST,
    SHAPES,
    SIGNED,
    bitsandbytes,
    compare_steps,
    ours_of,
    same_states,
    theirs_of,
    theirs_with,
    values_of,
)
from optimizers.compare import equal, parameters_of
from optimizers.rounding import Bounded, exact
from optimizers.saved import through_a_file, train
from optimizers.text import check_within, decoded, hyperparameters, step_of_text
from optimizers.variants import TARGETS, copies, gradients, parameters, set_gradients


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every target computes the same bits; this one need not be compiled for each case."""
    monkeypatch.setattr(engine, "launch", TARGETS["reference"])


# ---- theirs, here


@pytest.mark.parametrize(("rule", "bits"), EQUAL)
def test_their_run_goes_on_here(rule: str, bits: int) -> None:
    case, params = CASES[rule], parameters(torch.float32, SHAPES)
    theirs = theirs_of(case, params, bits)
    train(theirs, params, 0, 5)
    for step in range(5, 8):
        saved = through_a_file(theirs.state_dict())
        ours = ours_of(case, copies(params), bits)
        ours.load_state_dict(saved)  # without a warning, since nothing is converted
        assert same_states(case, ours, theirs) == (2 * len(case.state_keys) if bits == 8 else 0)
        assert [group["lr"] for group in ours.param_groups] == [LR, 5 * LR]
        for name, value in case.theirs.items():
            assert ours.param_groups[1][name] == value, name
        compare_steps(case, ours, theirs, step)


@pytest.mark.parametrize("rule", SIGNED)
def test_a_table_with_signs_for_a_state_without(rule: str) -> None:
    """Half of the codes are of no use there; here they get the table without signs.

    Gradients are normal numbers: of zeros its quantizer may make the lowest code, and of very small
    ones too, which decodes to a second moment below zero.
    """
    case, params = CASES[rule], [torch.randn(shape).requires_grad_() for shape in SHAPES[:2]]
    theirs = theirs_with(case, params, 8, lr=LR, **case.theirs)
    for _ in range(5):
        set_gradients(params, [torch.randn(p.shape) for p in params])
        theirs.step()
    file = through_a_file(theirs.state_dict())
    wide, ours = (ours_of(case, copies(params), bits) for bits in (32, 8))
    with pytest.warns(BnbxWarning, match=r"2 x v from qmap_\w+ to float32"):
        wide.load_state_dict(file)
    with pytest.warns(BnbxWarning, match=r"2 x v from qmap_\w+ to dynamic8"):
        ours.load_state_dict(file)
    # Half of the largest gap of the table, and what float32 rounds of numbers up to 1.
    room = 0.5 * 0.9 / 128 + 4 * 2.0**-24
    for p, q, r in zip(params, parameters_of(wide), parameters_of(ours), strict=True):
        saved = theirs.state[p]
        value = saved["qmap1"][saved["state1"].long()].view(-1)
        value *= saved["absmax1"].repeat_interleave(256)[: value.numel()]
        assert equal(wide.state[q]["v"].view(-1), value)
        mine = values_of(case, ours, r)["v"].view(-1)
        scale = ours.state[r]["v_absmax"].repeat_interleave(256)[: value.numel()]
        assert ((mine - value).abs() <= room * scale).all()
    grads = [torch.randn(p.shape) for p in params]
    set_gradients(params, grads)
    before = [values_of(case, wide, q) for q in parameters_of(wide)]
    theirs.step()
    for p, g, start, group in zip(params, grads, before, wide.param_groups[:1] * 2, strict=True):
        values = {name: exact(value) for name, value in start.items()}
        hyper = hyperparameters(wide.spec, group)
        text = step_of_text(wide.spec, hyper, 6, {**values, "g": exact(g)})
        check_within(Bounded(text["p"].value, 2 * text["p"].error), p.detach())


@pytest.mark.parametrize("rule", [rule for rule in CASES if rule not in SIGNED])
def test_flat_states_are_those_of_the_nest(rule: str) -> None:
    """Before 0.46, states lay side by side."""
    case, params = CASES[rule], parameters(torch.float32, SHAPES)
    theirs = theirs_of(case, params, 8)
    train(theirs, params, 0, 2)
    saved = theirs.state_dict()
    assert all(NEST in entry for entry in saved["state"].values())
    saved["state"] = {
        index: {"step": entry["step"], **entry[NEST]} for index, entry in saved["state"].items()
    }
    ours = ours_of(case, copies(params))
    ours.load_state_dict(saved)
    same_states(case, ours, theirs)


@pytest.mark.parametrize("rule", CASES)
def test_before_the_first_step(rule: str) -> None:
    case, params = CASES[rule], parameters(torch.float32, SHAPES)
    theirs = theirs_of(case, params, 8)
    ours = ours_of(case, params)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    assert not ours.state
    assert ours.param_groups[1]["lr"] == 5 * LR


def test_some_parameters_have_no_states_yet() -> None:
    case, params = CASES["adamw"], parameters(torch.float32, SHAPES)
    theirs = theirs_of(case, params, 8)
    set_gradients(params[:1], gradients(params[:1]))
    theirs.step()
    ours = ours_of(case, copies(params))
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    assert list(ours.state) == parameters_of(ours)[:1]


@pytest.mark.parametrize("bits", [4, 32])
def test_states_of_8_bits_become_what_is_asked_for(bits: int) -> None:
    case, params = CASES["adamw"], parameters(torch.float32, SHAPES)
    theirs = theirs_of(case, params, 8)
    train(theirs, params, 0, 3)
    ours, same = (ours_of(case, copies(params), b) for b in (bits, 8))
    name = "float32" if bits == 32 else "state4"
    with pytest.warns(BnbxWarning, match=rf"2 x m from dynamic8 to {name}, 2 x v from") as caught:
        ours.load_state_dict(through_a_file(theirs.state_dict()))
    assert [w.filename for w in caught] == [__file__]
    same.load_state_dict(theirs.state_dict())
    if bits == 32:
        for p, q in zip(parameters_of(ours), parameters_of(same), strict=True):
            assert equal(ours.state[p]["v"], values_of(case, same, q)["v"])


def test_another_table_and_another_block_size_are_read() -> None:
    """As `bnb.functional.create_quantile_map` gives, and as blocks were before 0.44."""
    case, params = CASES["lion"], [torch.randn(5000).requires_grad_()]
    theirs = bitsandbytes.optim.Lion8bit(params, lr=LR)
    train(theirs, params, 0, 2)
    saved = through_a_file(theirs.state_dict())
    nest = saved["state"][0][NEST]
    table = torch.linspace(-1, 1, 256).tanh() / torch.ones(()).tanh()
    nest["qmap1"], nest["absmax1"] = table, torch.tensor([3.0, 0.5, 1.0])
    wanted = table[nest["state1"].long()] * nest["absmax1"].repeat_interleave(2048)[:5000]
    for bits in (8, 32):
        ours = create(case.rule, copies(params), bits=bits)
        with pytest.warns(BnbxWarning, match=r"1 x m from qmap_\w{8} to (dynamic8|float32)"):
            ours.load_state_dict(saved)
        (state,) = ours.state.values()
        if bits == 32:
            assert equal(state["m"], wanted)
        else:
            assert state["m_absmax"].shape == (20,)
            value = decoded(quant_types().get("dynamic8"), True, state["m"], state["m_absmax"])
            assert ((value - wanted).abs() <= 0.02 * wanted.abs().max()).all()


def test_dynamic_codes_in_blocks_of_2048() -> None:
    params = [torch.randn(5000).requires_grad_()]
    theirs = bitsandbytes.optim.Lion8bit(params, lr=LR)
    train(theirs, params, 0, 2)
    saved = through_a_file(theirs.state_dict())
    nest = saved["state"][0][NEST]
    nest["absmax1"] = torch.tensor([3.0, 0.5, 1.0])
    ours = create("lion", copies(params), bits=32)
    with pytest.warns(BnbxWarning, match="1 x m from qmap"):
        ours.load_state_dict(saved)
    scale = nest["absmax1"].repeat_interleave(2048)[:5000]
    (state,) = ours.state.values()
    assert equal(state["m"], nest["qmap1"][nest["state1"].long()] * scale)


def test_keys_of_schedulers_and_tags_of_both_are_kept() -> None:
    case, params = CASES["adamw"], parameters(torch.float32, SHAPES)
    theirs = theirs_of(case, params, 8)
    torch.optim.lr_scheduler.LambdaLR(theirs, lambda _: 0.5)
    theirs.param_groups[0]["mine"] = "theirs"
    saved = through_a_file(theirs.state_dict())
    ours = ours_of(case, params)
    with pytest.raises(CheckpointError, match=r"AdamW: its groups have no 'mine'"):
        ours.load_state_dict(saved)
    ours.param_groups[0]["mine"] = "ours"
    ours.load_state_dict(saved)
    assert ours.param_groups[0]["mine"] == "theirs"
    assert ours.param_groups[1]["initial_lr"] == 5 * LR


# ---- what is of another rule


def dict_of(rule: str, bits: int = 8, **arguments: Any) -> tuple[dict[str, Any], list[Tensor]]:
    case, params = CASES[rule], parameters(torch.float32, SHAPES)
    theirs = theirs_with(case, params, bits, **{"lr": LR, **case.theirs, **arguments})
    train(theirs, params, 0, 2)
    found: dict[str, Any] = theirs.state_dict()
    return found, params


# Rules whose groups and states look the same to bitsandbytes, by the one that was trained.
SAME = {("adam", "adamw"), ("adam", "lamb"), ("lamb", "adam"), ("lamb", "adamw")}
SAME |= {("sgd", "lars"), ("lars", "sgd"), ("adamw", "lamb")}


@pytest.mark.parametrize("rule", CASES)
@pytest.mark.parametrize("other", CASES)
def test_another_rule_is_told_where_it_can_be(rule: str, other: str) -> None:
    if rule == other or (other, rule) in SAME:
        return
    saved, params = dict_of(other)
    ours = ours_of(CASES[rule], copies(params))
    with pytest.raises(CheckpointError, match=rf"{rule!r}.*It fits the rule .*\b{other}\b"):
        ours.load_state_dict(saved)
    assert not ours.state


def test_decoupled_weight_decay_is_not_that_of_adam() -> None:
    saved, params = dict_of("adam", weight_decay=0.1)
    ours = ours_of(CASES["adam"], copies(params))
    expected = r"bitsandbytes.Adam: its weight_decay is 0.0, not 0.1.*It fits the rule adamw"
    with pytest.raises(CheckpointError, match=expected):
        ours.load_state_dict(saved)
    ours = ours_of(CASES["adamw"], copies(params))
    ours.load_state_dict(saved)
    assert ours.param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("rule", "arguments"), [("sgd", dict(dampening=0.3)), ("adagrad", dict(betas=(0.0, 0.1)))]
)
def test_values_without_a_counterpart(rule: str, arguments: dict[str, Any]) -> None:
    saved, params = dict_of(rule)
    betas = arguments.get("betas", (0.9, 0.3))
    saved["param_groups"][0]["betas"] = betas
    with pytest.raises(CheckpointError, match=rf"its betas is .*not {re.escape(repr(betas))}"):
        ours_of(CASES[rule], copies(params)).load_state_dict(saved)


def test_momentum_of_rmsprop_has_no_effect_there() -> None:
    saved, params = dict_of("rmsprop", 32, momentum=0.9)
    assert saved["param_groups"][0]["betas"] == (0.9, 0.9)
    ours = ours_of(CASES["rmsprop"], copies(params), 32)
    ours.load_state_dict(saved)
    assert ours.param_groups[0]["momentum"] == 0


# ---- damage

Damage = Callable[[dict[str, Any]], Any]


def _nest(key: str, change: Callable[[Any], Any]) -> Damage:
    def damage(saved: dict[str, Any]) -> None:
        nest = saved["state"][0][NEST]
        nest[key] = change(nest[key])

    return damage


DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated codes": (_nest("state1", lambda t: t[:-1].clone()), r"'m'.*4999.*5000"),
    "truncated absmax": (_nest("absmax1", lambda t: t[:-1].clone()), r"'m_absmax' is \(19,\)"),
    "absmax of no tensor": (_nest("absmax1", lambda _: [1.0]), "absmax1"),
    "half an absmax": (_nest("absmax2", lambda t: t.half()), "'v_absmax' has dtype torch.float16"),
    "short table": (_nest("qmap1", lambda t: t[:-1].clone()), "'qmap1' is no table.*255"),
    "long table": (_nest("qmap1", lambda t: t.repeat(1000)), "'qmap1' is no table.*257"),
    "table with NaN": (_nest("qmap2", lambda t: t.log()), "'qmap2' is no table"),
    "table too large": (_nest("qmap2", lambda t: 3 * t), "'qmap2' is no table"),
    "table of whole numbers": (_nest("qmap2", lambda t: t.int()), "'qmap2' is no table"),
    "no table": (lambda s: s["state"][0][NEST].pop("qmap1"), "'qmap1' and 'absmax1'"),
    "no absmax": (lambda s: s["state"][0][NEST].pop("absmax1"), "'qmap1' and 'absmax1'"),
    "no second state": (
        lambda s: [s["state"][0][NEST].pop(k) for k in ("state2", "qmap2", "absmax2")],
        "AdamW: its parameters have a state 'state2'",
    ),
    "signed codes": (_nest("state1", lambda t: t.to(torch.int8)), "'state1' is torch.int8"),
    "codes like a transposed parameter": (
        _nest("state1", lambda t: t.repeat_interleave(2)[::2]),
        "'state1' is not contiguous",
    ),
    "a nest that is none": (lambda s: s["state"].update({0: {NEST: 3}}), "expected a dict"),
    "states that are none": (lambda s: s["state"].update({0: 3}), "expected a dict"),
    "no step": (lambda s: s["state"][0].pop("step"), "'step' is None"),
    "half a step": (lambda s: s["state"][0].update(step=1.5), "'step' is 1.5"),
    "no number of steps": (lambda s: s["state"][0].update(step=float("nan")), "'step' is nan"),
    "endless steps": (lambda s: s["state"][0].update(step=float("inf")), "'step' is inf"),
    "steps back": (lambda s: s["state"][0].update(step=-1), "'step' is -1"),
    "norms of another size": (
        lambda s: s["state"][0][NEST].update(gnorm_vec=torch.zeros(7)),
        r"'gnorm_vec' is \(7,\)",
    ),
    "a group too few": (lambda s: s["param_groups"].pop(), r"\[2\].*\[2, 2\]"),
    "no learning rate": (lambda s: s["param_groups"][0].pop("lr"), "its groups have 'lr'"),
    "betas that are none": (
        lambda s: s["param_groups"][0].update(betas=3),
        "its betas is 2 numbers, not 3",
    ),
    "three betas": (
        lambda s: s["param_groups"][0].update(betas=(0.1, 0.2, 0.3)),
        "its betas is 2 numbers",
    ),
    "a learning rate below zero": (lambda s: s["param_groups"][0].update(lr=-1.0), "lr=-1.0"),
    "another alpha": (lambda s: s["param_groups"][0].update(alpha=5.0), "its alpha is 0.0, not 5"),
    "a group that is none": (lambda s: s["param_groups"].__setitem__(0, 3), "malformed"),
    "groups that are none": (lambda s: s.update(param_groups=3), "malformed"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_dict_changes_nothing(what: str) -> None:
    damage, message = DAMAGES[what]
    saved, params = dict_of("adamw")
    damage(saved)
    ours = ours_of(CASES["adamw"], copies(params))
    train(ours, parameters_of(ours), 0, 1)
    held = dict(ours.state)
    groups = [dict(group) for group in ours.param_groups]
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        ours.load_state_dict(saved)
    assert all(ours.state[p] is state for p, state in held.items())
    assert ours.param_groups == groups


def test_a_stack_of_another_height() -> None:
    saved, params = dict_of("ademamix")
    nest = saved["state"][0][NEST]
    nest["state1"] = nest["state1"][:1].clone()
    with pytest.raises(CheckpointError, match=r"'state1' has shape \(1, 5000\); expected 2"):
        ours_of(CASES["ademamix"], copies(params)).load_state_dict(saved)
