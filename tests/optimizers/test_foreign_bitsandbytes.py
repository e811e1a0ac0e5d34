"""Real checkpoints of bitsandbytes go on here, and ours there.

bitsandbytes trains on a CPU and saves a file; the states that are loaded from it are the same bits.
A next step is held against the text of the rule: both libraries compute the same formula with
about as many float32 operations in another order, so each lies within the text's own rounding
bound, which for bitsandbytes is doubled.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx.errors import BnbxWarning, CheckpointError, OptionError
from bnbx.optim import create
from bnbx.optimizers import engine
from bnbx.optimizers.engine import Optimizer8bit
from bnbx.registry import QuantType, quant_types
from optimizers.compare import equal, parameters_of
from optimizers.rounding import Bounded, exact
from optimizers.saved import through_a_file, train
from optimizers.text import check_within, decoded, hyperparameters, step_of_text
from optimizers.variants import TARGETS, copies, gradients, parameters, set_gradients

bitsandbytes: Any = pytest.importorskip("bitsandbytes", reason="the extra `peers` has it")

SHAPES = [(5000,), (64, 70), (100,), ()]
NEST = "__bnb_optimizer_quant_state__"
BETAS = (0.8, 0.95)


@dataclass(frozen=True)
class Case:
    """A rule with the class of bitsandbytes that has it, and the arguments of both."""

    rule: str
    name: str
    theirs: dict[str, Any]
    state_keys: dict[str, str] = field(default_factory=dict)


M1 = {"m": "state1"}
V1 = {"v": "state1"}
TWO = {"m": "state1", "v": "state2"}
SIGNED = ("rmsprop", "adagrad")  # their states have no sign, and the table of those that have
HUGE = 1e30  # a bound on norms that bounds nothing: its 8-bit kernels on a CPU leave it out
CASES = {
    case.rule: case
    for case in (
        Case("adamw", "AdamW", dict(betas=BETAS, eps=1e-6, weight_decay=0.1), state_keys=TWO),
        Case("adam", "Adam", dict(betas=BETAS, eps=1e-6), state_keys=TWO),
        Case(
            "ademamix",
            "AdEMAMix",
            dict(betas=(*BETAS, 0.999), alpha=3.0, t_alpha=20, t_beta3=20, weight_decay=0.1),
            state_keys={"m1": "state1[0]", "m2": "state1[1]", "v": "state2"},
        ),
        Case("lion", "Lion", dict(betas=BETAS, weight_decay=0.1), state_keys=M1),
        Case("lamb", "LAMB", dict(betas=BETAS, max_unorm=HUGE), state_keys=TWO),
        Case("lars", "LARS", dict(momentum=0.9, weight_decay=0.1, max_unorm=HUGE), state_keys=M1),
        Case("sgd", "SGD", dict(momentum=0.9, weight_decay=0.1), state_keys=M1),
        Case("rmsprop", "RMSprop", dict(alpha=0.9, eps=1e-6, weight_decay=0.1), state_keys=V1),
        Case("adagrad", "Adagrad", dict(eps=1e-6, weight_decay=0.1), state_keys=V1),
    )
}
BITS = (8, 32)
EVERY = [(rule, bits) for rule in CASES for bits in BITS]
EQUAL = [(rule, bits) for rule, bits in EVERY if bits == 32 or rule not in SIGNED]
LR = 1e-3


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every target computes the same bits; this one need not be compiled for each case."""
    monkeypatch.setattr(engine, "launch", TARGETS["reference"])


def theirs_of(case: Case, params: list[Tensor], bits: int) -> Any:
    return theirs_with(case, params, bits, lr=LR, **case.theirs)


def theirs_with(case: Case, params: list[Tensor], bits: int, **arguments: Any) -> Any:
    made: Any = getattr(bitsandbytes.optim, case.name)
    return made(groups_of(params), optim_bits=bits, **arguments)


def groups_of(params: list[Tensor]) -> list[dict[str, Any]]:
    """Two groups, the second with a learning rate of its own."""
    return [{"params": params[:2]}, {"params": params[2:], "lr": 5 * LR}]


def ours_of(case: Case, params: list[Tensor], bits: int = 8, **arguments: Any) -> Optimizer8bit:
    """An optimizer whose values all have to come from the checkpoint, but for max_unorm."""
    kept = {k: v for k, v in case.theirs.items() if k == "max_unorm"}
    made: Optimizer8bit = create(case.rule, groups_of(params), bits=bits, **kept, **arguments)
    return made


def part(saved: dict[str, Any], key: str) -> Any:
    """An entry of bitsandbytes' states, or the i-th of a stack: `key[i]`."""
    found = re.fullmatch(r"(\w+)(?:\[(\d)\])?", key)
    assert found
    value = saved.get(found[1])
    return value if value is None or found[2] is None else value[int(found[2])]


def same_states(case: Case, ours: Optimizer8bit, theirs: Any) -> int:
    """Assert that both hold the same bits; returns how many states are quantized."""
    quantized = 0
    for p, q in zip(parameters_of(ours), parameters_of(theirs), strict=True):
        saved, other = ours.state[p], theirs.state[q]
        assert saved["step"] == other["step"] > 0
        for name, key in case.state_keys.items():
            assert equal(saved[name], part(other, key)), name
            absmax = part(other, key.replace("state", "absmax"))
            assert (absmax is None) == (f"{name}_absmax" not in saved)
            if absmax is not None:
                assert equal(saved[f"{name}_absmax"], absmax), name
                quantized += 1
    return quantized


Values = dict[str, Tensor]


def values_of(case: Case, ours: Optimizer8bit, p: Tensor) -> Values:
    """What the text starts from: the parameter and its states, decoded."""
    found = {"p": p.detach().clone()}
    signed = {state.name: state.signed for state in ours.spec.states}
    for name in case.state_keys:
        value = ours.state[p][name].clone()
        if f"{name}_absmax" in ours.state[p]:
            quant_type = quant_types().get(ours.state[p][f"{name}_type"])
            absmax = ours.state[p][f"{name}_absmax"]
            value = decoded(quant_type, signed[name], value, absmax)
        found[name] = value
    return found


def compare_steps(case: Case, ours: Optimizer8bit, theirs: Any, first: int) -> None:
    """Step both from the same states, and hold both against the text."""
    params, others = parameters_of(ours), parameters_of(theirs)
    before = [values_of(case, ours, p) for p in params]
    groups = [group for group in ours.param_groups for _ in group["params"]]
    grads = train(theirs, others, first, 1)
    train(ours, params, first, 1)
    for p, q, g, start, group in zip(params, others, grads, before, groups, strict=True):
        hyper = hyperparameters(ours.spec, group)
        values = {name: exact(value) for name, value in start.items()}
        step = ours.state[p]["step"]
        text = step_of_text(ours.spec, hyper, step, {**values, "g": exact(g)})
        check_within(text["p"], p.detach())
        check_within(Bounded(text["p"].value, 2 * text["p"].error), q.detach())
        after = values_of(case, ours, p)
        for name, key in case.state_keys.items():
            theirs_now = part(theirs.state[q], key)
            if theirs_now.dtype == torch.float32:
                check_within(Bounded(text[name].value, 2 * text[name].error), theirs_now)
            else:
                check_codes(case, ours, name, text[name], after[name], theirs.state[q])


def check_codes(
    case: Case, ours: Optimizer8bit, name: str, text: Bounded, mine: Tensor, saved: dict[str, Any]
) -> None:
    """Their code is that of a point on a grid of 65536 at most half its step away (and a little).

    So it is farther from the value than ours by a step at most, in units of absmax; see
    test_bitsandbytes_codes.
    """
    key = case.state_keys[name]
    quant_type = quant_types().get("dynamic8")
    signed = next(state.signed for state in ours.spec.states if state.name == name)
    absmax = part(saved, key.replace("state", "absmax"))
    value = decoded(quant_type, signed, part(saved, key), absmax).double()
    scale = absmax.repeat_interleave(256)[: value.numel()].view_as(value).double()
    room = scale * (1 + 2.0**-6) / 32767.5 + 4 * text.error
    usable = scale >= 2.0**-126  # the inverse of a subnormal number may be infinite
    near = (value - text.value).abs() <= (mine.double() - text.value).abs() + room
    assert near[usable].all()


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


# ---- ours, there


@pytest.mark.parametrize(("rule", "bits"), EVERY)
def test_our_run_goes_on_there(rule: str, bits: int) -> None:
    case, params = CASES[rule], parameters(torch.float32, SHAPES)
    ours: Optimizer8bit = create(case.rule, groups_of(params), bits=bits, lr=LR, **case.theirs)
    train(ours, params, 0, 5)
    for step in range(5, 8):
        saved = through_a_file(ours.state_dict(save_as="bitsandbytes"))
        others = copies(params)
        theirs = theirs_with(case, others, bits, **{"lr": 9.0, **case.theirs})
        theirs.load_state_dict(saved)
        same_states(case, ours, theirs)
        assert [group["lr"] for group in theirs.param_groups] == [LR, 5 * LR]
        compare_steps(case, ours, theirs, step)


@pytest.mark.parametrize(("rule", "bits"), EVERY)
def test_there_and_back(rule: str, bits: int) -> None:
    case, params = CASES[rule], parameters(torch.float32, SHAPES)
    ours: Optimizer8bit = create(case.rule, groups_of(params), bits=bits, lr=LR, **case.theirs)
    train(ours, params, 0, 2)
    ours.param_groups[0]["initial_lr"] = 0.5
    again = ours_of(case, copies(params), bits)
    again.load_state_dict(through_a_file(ours.state_dict(save_as="bitsandbytes")))
    for p, q in zip(params, parameters_of(again), strict=True):
        assert ours.state[p].keys() == again.state[q].keys()
        assert all(equal(value, again.state[q][key]) for key, value in ours.state[p].items())
    for group, other in zip(ours.param_groups, again.param_groups, strict=True):
        values = {k: v for k, v in group.items() if k != "params"}
        assert values == {k: v for k, v in other.items() if k != "params"}


@pytest.mark.parametrize(
    "arguments",
    [
        dict(bits=4),
        dict(block_wise=False),
        dict(state_types={"m": "linear8", "v": "float32"}),
        dict(state_types={"m": "dynamic8", "v": "state4"}),
    ],
    ids=str,
)
def test_what_it_has_no_form_for_is_written_in_float32(
    arguments: dict[str, Any],
) -> None:
    case, params = CASES["adamw"], parameters(torch.float32, SHAPES)
    ours: Optimizer8bit = create("adamw", params, lr=LR, **arguments)
    train(ours, params, 0, 2)
    with pytest.warns(BnbxWarning, match="8 bits in blocks of 256") as caught:
        saved = through_a_file(ours.state_dict(save_as="bitsandbytes"))
    assert [w.filename for w in caught] == [__file__]
    wide = create("adamw", copies(params), bits=32)
    with pytest.warns(BnbxWarning, match="converted"):
        wide.load_state_dict(ours.state_dict())
    theirs = bitsandbytes.optim.AdamW8bit(copies(params), lr=1.0)
    theirs.load_state_dict(saved)
    same_states(case, wide, theirs)
    train(theirs, parameters_of(theirs), 2, 1)


def test_another_table_of_8_bits_is_written_as_it_is() -> None:
    params = parameters(torch.float32, SHAPES)
    ours: Optimizer8bit = create("adamw", params, lr=LR, state_types="linear8")
    train(ours, params, 0, 2)
    theirs = bitsandbytes.optim.AdamW8bit(copies(params), lr=1.0)
    theirs.load_state_dict(through_a_file(ours.state_dict(save_as="bitsandbytes")))
    same_states(CASES["adamw"], ours, theirs)
    linear8: QuantType = quant_types().get("linear8")
    tables = theirs.state[parameters_of(theirs)[0]]
    assert tables["qmap1"].tolist() == list(linear8.values)
    assert tables["qmap2"].tolist() == list(linear8.unsigned_values or ())
    train(theirs, parameters_of(theirs), 2, 1)


def test_room_for_the_norm_of_updates() -> None:
    """It is read wherever it clips."""
    for rule, clips in (("lars", True), ("sgd", False)):
        params = parameters(torch.float32, SHAPES)
        ours: Optimizer8bit = create(rule, params, momentum=0.9)
        train(ours, params, 0, 1)
        saved = ours.state_dict(save_as="bitsandbytes")
        assert all(("unorm_vec" in entry) == clips for entry in saved["state"].values())


@pytest.mark.parametrize(
    ("rule", "arguments", "message"),
    [
        ("adam", dict(weight_decay=0.1), "weight_decay=0.0 alone.*weight_decay=0.1"),
        ("adamw", dict(amsgrad=True), "amsgrad=True"),
        ("adamw", dict(maximize=True), "maximize=True"),
        ("sgd", dict(momentum=0.9, nesterov=True), "nesterov=True"),
        ("sgd", dict(momentum=0.9, dampening=0.5), "dampening=0.5"),
        ("rmsprop", dict(centered=True), "centered=True"),
        ("adagrad", dict(lr_decay=0.1), "lr_decay=0.1"),
        ("lamb", dict(adam_w_mode=False), "adam_w_mode=False"),
        ("adopt", {}, "bitsandbytes has no 'adopt'"),
    ],
)
def test_what_it_has_no_rule_for_is_refused(
    rule: str, arguments: dict[str, Any], message: str
) -> None:
    params = parameters(torch.float32, SHAPES)
    ours: Optimizer8bit = create(rule, params, **arguments)
    train(ours, params, 0, 1)
    with pytest.raises(CheckpointError, match=f"{message}.*save_as='bnbx'"):
        ours.state_dict(save_as="bitsandbytes")


@pytest.mark.parametrize("save_as", ["torch", "safetensors", None, ["bitsandbytes"]])
def test_other_formats_are_not_written(save_as: Any) -> None:
    with pytest.raises(OptionError, match=r"save_as=.*expected one of bnbx, bitsandbytes"):
        create("adamw", [torch.zeros(3)]).state_dict(save_as=save_as)


def test_the_low_bits_of_a_master_are_named_when_they_are_lost() -> None:
    params = parameters(torch.bfloat16, SHAPES)
    ours: Optimizer8bit = create("adamw", params, master="residual")
    train(ours, params, 0, 1)
    with pytest.warns(BnbxWarning, match="keeps no residual"):
        saved = ours.state_dict(save_as="bitsandbytes")
    theirs = bitsandbytes.optim.AdamW8bit(copies(params), lr=1.0)
    theirs.load_state_dict(saved)
    same_states(CASES["adamw"], ours, theirs)
    train(theirs, parameters_of(theirs), 1, 1)


def test_a_learning_rate_in_a_tensor_becomes_a_number() -> None:
    ours: Optimizer8bit = create("adamw", [torch.zeros(3)], lr=torch.tensor(0.5))
    saved = ours.state_dict(save_as="bitsandbytes")
    assert saved["param_groups"][0]["lr"] == 0.5
    assert isinstance(saved["param_groups"][0]["lr"], float)
