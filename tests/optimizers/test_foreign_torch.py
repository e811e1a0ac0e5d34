"""Checkpoints of torch.optim go on here: the same states, and a next step that is the same rule's.

A next step is held against the text of the rule. Torch computes the same formula in float32 with
about as many operations in another order, so its own lies within twice the text's bound.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx.errors import BnbxWarning, CheckpointError
from bnbx.optim import create
from bnbx.optimizers import engine
from bnbx.optimizers.engine import Optimizer8bit
from optimizers.compare import equal, parameters_of
from optimizers.rounding import Bounded, exact
from optimizers.saved import through_a_file, train
from optimizers.text import check_within, hyperparameters, step_of_text
from optimizers.variants import TARGETS, copies, gradients, parameters, set_gradients

SHAPES = [(5000,), (64, 70), (100,), ()]
ADAM = {"m": "exp_avg", "v": "exp_avg_sq"}
MAX = {**ADAM, "vmax": "max_exp_avg_sq"}
VALUES: dict[str, Any] = dict(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
BUFFER = {"m": "momentum_buffer"}


def variance(theirs: Mapping[str, Tensor]) -> Tensor:
    """What a centered RMSprop keeps here, of which torch keeps the parts."""
    return torch.clamp(theirs["square_avg"] - theirs["grad_avg"] * theirs["grad_avg"], min=0)


Place = str | Callable[[Mapping[str, Tensor]], Tensor]
# By name: the rule, torch's class, its arguments, and by our states' keys theirs, or what makes
# our state of theirs.
CASES: dict[str, tuple[str, Any, dict[str, Any], Mapping[str, Place]]] = {
    "adam": ("adam", torch.optim.Adam, VALUES, ADAM),
    "adam, amsgrad": ("adam", torch.optim.Adam, dict(VALUES, amsgrad=True), MAX),
    "adam, maximize": ("adam", torch.optim.Adam, dict(VALUES, maximize=True), ADAM),
    "adam, foreach": ("adam", torch.optim.Adam, dict(VALUES, foreach=True), ADAM),
    "adamw": ("adamw", torch.optim.AdamW, VALUES, ADAM),
    "adamw, amsgrad": ("adamw", torch.optim.AdamW, dict(VALUES, amsgrad=True), MAX),
    "adamw, fused": ("adamw", torch.optim.AdamW, dict(VALUES, fused=True), ADAM),
    "sgd": ("sgd", torch.optim.SGD, dict(weight_decay=0.1), {}),
    "sgd, momentum": ("sgd", torch.optim.SGD, dict(momentum=0.9, weight_decay=0.1), BUFFER),
    "sgd, dampening": ("sgd", torch.optim.SGD, dict(momentum=0.9, dampening=0.2), BUFFER),
    "sgd, nesterov": ("sgd", torch.optim.SGD, dict(momentum=0.9, nesterov=True), BUFFER),
    "rmsprop": ("rmsprop", torch.optim.RMSprop, dict(alpha=0.9, eps=1e-6), {"v": "square_avg"}),
    "rmsprop, momentum": (
        "rmsprop",
        torch.optim.RMSprop,
        dict(alpha=0.9, eps=1e-6, momentum=0.9, weight_decay=0.1),
        {"v": "square_avg", **BUFFER},
    ),
    "rmsprop, centered": (
        "rmsprop",
        torch.optim.RMSprop,
        dict(alpha=0.9, eps=1e-3, centered=True),
        {"v": variance, "mean": "grad_avg"},
    ),
    "adagrad": (
        "adagrad",
        torch.optim.Adagrad,
        dict(lr_decay=0.1, initial_accumulator_value=0.5, eps=1e-6, weight_decay=0.1),
        {"v": "sum"},
    ),
}
LR = 1e-3


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every target computes the same bits; this one need not be compiled for each case."""
    monkeypatch.setattr(engine, "launch", TARGETS["reference"])


def groups_of(params: list[Tensor]) -> list[dict[str, Any]]:
    return [{"params": params[:2]}, {"params": params[2:], "lr": 5 * LR}]


def theirs_of(name: str, params: list[Tensor]) -> Any:
    _, made_by, arguments, _ = CASES[name]
    return made_by(groups_of(params), **{"lr": LR, **arguments})


def same_states(name: str, ours: Optimizer8bit, theirs: Any) -> None:
    """Assert that both hold the same bits."""
    for p, q in zip(parameters_of(ours), parameters_of(theirs), strict=True):
        saved, other = ours.state[p], theirs.state[q]
        for key, place in CASES[name][3].items():
            expected = place(other) if callable(place) else other[place]
            assert equal(saved[key], expected), key
        assert set(saved) == ({"step", *CASES[name][3]} if saved else set())
        if "step" in other:
            assert saved["step"] == int(other["step"])


@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on_here(name: str) -> None:
    rule, _, arguments, keys = CASES[name]
    params = parameters(torch.float32, SHAPES)
    theirs = theirs_of(name, params)
    train(theirs, params, 0, 5)
    for step in range(5, 8):
        ours = create(rule, groups_of(copies(params)), bits=32)
        ours.load_state_dict(through_a_file(theirs.state_dict()))
        same_states(name, ours, theirs)
        for key, value in {**arguments, "lr": LR}.items():
            if key not in ("foreach", "fused"):
                assert ours.param_groups[0][key] == value, key
        assert ours.param_groups[1]["lr"] == 5 * LR
        assert "foreach" not in ours.param_groups[0]
        before = [
            {"p": p.detach().clone(), **{key: ours.state[p][key].clone() for key in keys}}
            for p in parameters_of(ours)
        ]
        grads = train(theirs, params, step, 1)
        train(ours, parameters_of(ours), step, 1)
        sign = -1 if arguments.get("maximize") else 1
        groups = [group for group in ours.param_groups for _ in group["params"]]
        for number, group in enumerate(groups):
            p, q = parameters_of(ours)[number], params[number]
            values = {key: exact(value) for key, value in before[number].items()}
            values["g"] = exact(sign * grads[number])
            text = step_of_text(ours.spec, hyperparameters(ours.spec, group), step + 1, values)
            check_within(text["p"], p.detach())
            check_within(Bounded(text["p"].value, 2 * text["p"].error), q.detach())
            for key, place in keys.items():
                check_within(text[key], ours.state[p][key])
                doubled = Bounded(text[key].value, 2 * text[key].error)
                if not callable(place):
                    check_within(doubled, theirs.state[q][place])


@pytest.mark.parametrize("name", CASES)
def test_states_are_quantized_with_a_warning(name: str) -> None:
    rule, *_, keys = CASES[name]
    params = parameters(torch.float32, SHAPES)
    theirs = theirs_of(name, params)
    train(theirs, params, 0, 3)
    ours, wide = (create(rule, groups_of(copies(params)), bits=bits) for bits in (8, 32))
    saved = through_a_file(theirs.state_dict())
    wide.load_state_dict(saved)
    if not keys:
        ours.load_state_dict(saved)
        return
    with pytest.warns(BnbxWarning, match="are converted") as caught:
        ours.load_state_dict(saved)
    (warning,) = caught
    assert warning.filename == __file__
    assert all(f"2 x {key} from float32 to dynamic8" in str(warning.message) for key in keys)
    # As if ours had been converted.
    again = create(rule, groups_of(copies(params)), bits=8)
    with pytest.warns(BnbxWarning):
        again.load_state_dict(wide.state_dict())
    for p, q in zip(parameters_of(ours), parameters_of(again), strict=True):
        assert all(equal(value, again.state[q][key]) for key, value in ours.state[p].items())
    train(ours, parameters_of(ours), 3, 1)


@pytest.mark.parametrize("name", CASES)
def test_before_the_first_step(name: str) -> None:
    """Torch's Adagrad has states by then, of step 0."""
    params = parameters(torch.float32, SHAPES)
    theirs = theirs_of(name, params)
    ours = create(CASES[name][0], groups_of(copies(params)), bits=32)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    assert bool(ours.state) == (name == "adagrad")
    assert all(saved["step"] == 0 for saved in ours.state.values())
    fresh = create(CASES[name][0], groups_of(copies(params)), bits=32, lr=LR, **hyper_of(name))
    fresh.param_groups[1]["lr"] = 5 * LR
    train(ours, parameters_of(ours), 0, 2)
    train(fresh, parameters_of(fresh), 0, 2)
    assert all(map(equal, parameters_of(ours), parameters_of(fresh)))


def hyper_of(name: str) -> dict[str, Any]:
    return {k: v for k, v in CASES[name][2].items() if k not in ("foreach", "fused")}


def test_some_parameters_have_no_states_yet() -> None:
    for name in ("adamw", "sgd, momentum"):
        params = parameters(torch.float32, SHAPES)
        theirs = theirs_of(name, params)
        set_gradients(params[:1], gradients(params[:1]))
        theirs.step()
        ours = create(CASES[name][0], groups_of(copies(params)), bits=32)
        ours.load_state_dict(theirs.state_dict())
        assert list(ours.state) == parameters_of(ours)[:1]


def test_a_momentum_of_none_does_not_exist_yet() -> None:
    """As it is in dicts of SGD that ran without momentum."""
    params = parameters(torch.float32, SHAPES)
    theirs = theirs_of("sgd", params)
    train(theirs, params, 0, 2)
    saved = theirs.state_dict()
    saved["state"] = {index: {"momentum_buffer": None} for index in range(len(params))}
    ours = create("sgd", groups_of(params))
    ours.load_state_dict(saved)
    assert not ours.state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_states_of_other_widths_become_float32(dtype: torch.dtype) -> None:
    params = [p.detach().to(dtype).requires_grad_() for p in parameters(torch.float32, SHAPES)]
    theirs = theirs_of("adamw", params)
    set_gradients(params, [torch.randn(p.shape).to(dtype) for p in params])
    theirs.step()
    own = dtype if dtype != torch.float64 else torch.float32
    ours = create("adamw", groups_of([p.detach().to(own) for p in params]), bits=32)
    ours.load_state_dict(theirs.state_dict())
    for p, q in zip(parameters_of(ours), params, strict=True):
        assert equal(ours.state[p]["m"], theirs.state[q]["exp_avg"].float())


def test_states_with_strides_of_their_own() -> None:
    """Torch makes them like the parameter, in its memory format."""
    p = torch.randn(65, 64).t().requires_grad_()
    theirs = torch.optim.AdamW([p], lr=LR)
    set_gradients([p], [torch.randn(p.shape)])
    theirs.step()
    ours = create("adamw", copies([p]), bits=32)
    ours.load_state_dict(theirs.state_dict())
    (state,) = ours.state.values()
    assert not theirs.state[p]["exp_avg"].is_contiguous()
    assert state["m"].is_contiguous()
    assert torch.equal(state["m"], theirs.state[p]["exp_avg"])


def test_the_step_may_be_a_number() -> None:
    """Before torch 1.12 it was."""
    params = parameters(torch.float32, SHAPES)
    theirs = theirs_of("adam", params)
    train(theirs, params, 0, 3)
    saved = copy.deepcopy(theirs.state_dict())
    for entry in saved["state"].values():
        entry["step"] = 3
    for group in saved["param_groups"]:  # as they were then
        for (
            key
        ) in "foreach fused capturable differentiable maximize decoupled_weight_decay".split():
            del group[key]
    ours = create("adam", groups_of(copies(params)), bits=32)
    ours.load_state_dict(saved)
    same_states("adam", ours, theirs)


def test_sparse_adam_goes_on_as_adam_without_weight_decay() -> None:
    params = [torch.randn(20, 8).requires_grad_()]
    theirs = torch.optim.SparseAdam(params, lr=LR)
    grad = torch.zeros(20, 8)
    grad[::3] = torch.randn(7, 8)
    params[0].grad = grad.to_sparse(1)
    theirs.step()  # type: ignore[no-untyped-call]
    ours = create("adam", copies(params), bits=32, weight_decay=0.3)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["weight_decay"] == 0.0
    (state,), (other,) = ours.state.values(), theirs.state.values()
    assert state["step"] == 1
    assert equal(state["m"], other["exp_avg"])
    assert equal(state["v"], other["exp_avg_sq"])


def test_a_parameter_that_was_scheduled() -> None:
    params = parameters(torch.float32, SHAPES)
    theirs = theirs_of("adamw", params)
    scheduler = torch.optim.lr_scheduler.StepLR(theirs, 1, gamma=0.5)
    train(theirs, params, 0, 1)
    scheduler.step()
    ours = create("adamw", groups_of(copies(params)), bits=32)
    second = torch.optim.lr_scheduler.StepLR(ours, 1, gamma=0.5)
    ours.load_state_dict(theirs.state_dict())
    second.load_state_dict(scheduler.state_dict())
    assert ours.param_groups[0]["initial_lr"] == LR
    second.step()
    scheduler.step()
    assert ours.param_groups[1]["lr"] == theirs.param_groups[1]["lr"] == 5 * LR / 4


def test_named_parameters() -> None:
    named = [(f"layer.{n}", p) for n, p in enumerate(parameters(torch.float32, SHAPES))]
    theirs = torch.optim.AdamW(named, lr=LR)
    train(theirs, [p for _, p in named], 0, 1)
    ours = create("adamw", [p for _, p in named], bits=32)
    ours.load_state_dict(theirs.state_dict())
    same_states("adamw", ours, theirs)


# ---- what is of another rule

OTHERS: dict[str, Callable[[list[Tensor]], Any]] = {
    "RAdam": torch.optim.RAdam,
    "NAdam": torch.optim.NAdam,
    "Adamax": torch.optim.Adamax,
    "Adadelta": torch.optim.Adadelta,
    "ASGD": torch.optim.ASGD,
    "Rprop": torch.optim.Rprop,
}
RULES = sorted({rule for rule, *_ in CASES.values()} | {"lars", "lion", "lamb"})


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rule", RULES)
def test_another_rule_is_refused(rule: str, name: str, steps: int) -> None:
    """By the groups alone, too: before the first step there is nothing else."""
    if CASES[name][0] == rule:
        return
    params = parameters(torch.float32, SHAPES)
    theirs = theirs_of(name, params)
    train(theirs, params, 0, steps)
    ours = create(rule, groups_of(copies(params)))
    with pytest.raises(CheckpointError, match=rf"{rule!r}.* It fits the rule {CASES[name][0]}$"):
        ours.load_state_dict(theirs.state_dict())
    assert not ours.state


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("rule", RULES)
def test_rules_that_are_not_here_are_refused(rule: str, name: str, steps: int) -> None:
    """RAdam has the states and nearly the groups of Adam."""
    params = parameters(torch.float32, SHAPES)
    theirs = OTHERS[name](groups_of(params))  # type: ignore[arg-type]
    train(theirs, params, 0, steps)
    ours = create(rule, groups_of(copies(params)))
    with pytest.raises(CheckpointError, match=rf"{rule!r} can go on from\. (?!.*It fits)"):
        ours.load_state_dict(theirs.state_dict())


def test_adam_and_adamw_are_told_apart() -> None:
    params = parameters(torch.float32, SHAPES)
    theirs = theirs_of("adamw", params)
    train(theirs, params, 0, 1)
    expected = "torch.Adam: its decoupled_weight_decay is False, not True"
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        create("adam", groups_of(params)).load_state_dict(theirs.state_dict())


# ---- damage

Damage = Callable[[dict[str, Any]], Any]


def _state(key: str, value: Any) -> Damage:
    def damage(saved: dict[str, Any]) -> None:
        old = saved["state"][0][key]
        saved["state"][0][key] = value(old) if callable(value) else value

    return damage


DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated": (_state("exp_avg", lambda t: t[:-1]), r"'m' is \(4999,\)"),
    "whole numbers": (_state("exp_avg", lambda t: t.int()), "'exp_avg' is torch.int32"),
    "complex": (_state("exp_avg", lambda t: t + 0j), "'exp_avg' is torch.complex64"),
    "a list": (_state("exp_avg", lambda t: t.tolist()), "'exp_avg' is list"),
    "on meta": (_state("exp_avg", lambda t: t.to("meta")), "'m'.* on meta"),
    "sparse": (_state("exp_avg", lambda t: t.to_sparse()), "'m' is .*sparse"),
    "NaN steps": (_state("step", torch.tensor(float("nan"))), "'step' is nan"),
    "two steps": (_state("step", torch.ones(2)), "'step' has shape"),
    "steps in words": (_state("step", "three"), "'step' is 'three'"),
    "true steps": (_state("step", True), "'step' is True"),
    "too many steps": (_state("step", torch.tensor(1e30)), "'step' is 9007.* or more"),
    "no steps": (lambda s: s["state"][0].pop("step"), "'step'"),
    "no second moment": (lambda s: s["state"][0].pop("exp_avg_sq"), "'exp_avg_sq'"),
    "states of a stranger": (lambda s: s["state"].update({9: s["state"][0]}), "parameter 9"),
    "one parameter twice": (lambda s: s["param_groups"][0].update(params=[0, 0]), "twice"),
    "a parameter too many": (
        lambda s: s["param_groups"][0]["params"].append(9),
        r"\[3, 2\].*\[2, 2\]",
    ),
    "no parameters": (lambda s: s["param_groups"][0].pop("params"), "params"),
    "states of none": (lambda s: s["state"].update({0: None}), "expected a dict"),
    "no dict of states": (lambda s: s.update(state=[]), "malformed"),
    "no learning rate": (lambda s: s["param_groups"][0].pop("lr"), "its groups have 'lr'"),
    "NaN learning rate": (lambda s: s["param_groups"][0].update(lr=float("nan")), "lr=nan"),
    "a hyperparameter more": (lambda s: s["param_groups"][0].update(rho=0.5), "no 'rho'"),
    "an option of ours": (lambda s: s["param_groups"][0].update(bits=4), "no 'bits'"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_dict_changes_nothing(what: str) -> None:
    params = parameters(torch.float32, SHAPES)
    theirs = theirs_of("adamw", params)
    train(theirs, params, 0, 2)
    saved = copy.deepcopy(theirs.state_dict())
    damage, message = DAMAGES[what]
    damage(saved)
    ours = create("adamw", groups_of(copies(params)))
    train(ours, parameters_of(ours), 0, 1)
    held, groups = dict(ours.state), [dict(group) for group in ours.param_groups]
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        ours.load_state_dict(saved)
    assert all(ours.state[p] is state for p, state in held.items())
    assert ours.param_groups == groups


@pytest.mark.parametrize("saved", [None, [], 3, {}, {"state": {}}, {"param_groups": []}], ids=repr)
def test_no_state_dict_at_all(saved: Any) -> None:
    with pytest.raises(CheckpointError, match="expected"):
        create("adamw", parameters(torch.float32, SHAPES)).load_state_dict(saved)
