"""Contradictions in rules of two passes, in how states begin, and in modes, are named."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest

from bnbx.errors import SpecError
from bnbx.registry import Optimizer, State, fraction, optimizers, rate, steps

VALID: Mapping[str, Any] = dict(
    name="r",
    summary="a rule",
    states=(State(name="m"),),
    hyper=dict(lr=rate(1e-3), beta=fraction(0.9)),
    step_code="c = 1 - beta**step",
    element_code="m = beta * m + g\nu = m / c",
    tensor_code="trust = where(norm_u > 0, norm_p / norm_u, 1)\nshare = trust / numel",
    apply_code="p = p - lr * share * u",
)


def spec(**changes: Any) -> Optimizer:
    return Optimizer(**{**VALID, **changes})


def refusal(**changes: Any) -> str:
    with pytest.raises(SpecError) as caught:
        spec(**changes)
    message = str(caught.value)
    assert message.startswith("Optimizer spec 'r': ")
    return message.removeprefix("Optimizer spec 'r': ")


def test_the_spec_that_the_others_vary_is_valid() -> None:
    made = spec()
    assert made.tensor.writes == ("trust", "share")
    assert made.apply.reads == ("p", "lr", "share", "u")
    assert [code.writes for code in made.sections] == [
        ("c",),
        ("m", "u"),
        made.tensor.writes,
        ("p",),
    ]
    assert made.can_clip
    assert not made.clips_itself


# ---- what each section knows

SCALARS = "beta, c, lr, norm_g, norm_m, norm_p, norm_u, numel, step"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(tensor_code="share = norm_w"),
            f"tensor_code: 'norm_w' is not known here; did you mean 'norm_u'?; known: {SCALARS}",
        ),
        (
            dict(tensor_code="share = sqrt(p)"),
            f"tensor_code: 'p' is not known here; known: {SCALARS}",
        ),
        (dict(tensor_code="share = m"), f"tensor_code: 'm' is not known here; known: {SCALARS}"),
        (dict(tensor_code="share = norm_c"), "tensor_code: 'norm_c' is not known here; "),
        (dict(tensor_code="share = norm_lr"), "tensor_code: 'norm_lr' is not known here; "),
        (dict(apply_code="p = p - lr * norm_u * u * share"), "apply_code: 'norm_u' is not known"),
        (dict(apply_code="p = p - lr * share * u / numel"), "apply_code: 'numel' is not known"),
        (dict(apply_code="p = p - lr * share * w"), "apply_code: 'w' is not known here"),
        (dict(element_code="m = beta * m + g\nu = m / c * share"), "element_code: 'share' is not"),
        (dict(element_code="m = beta * m + g\nu = m / c * norm_g"), "element_code: 'norm_g' is"),
        (dict(element_code="m = beta * m + g\nu = m / c * numel"), "element_code: 'numel' is not"),
        (dict(step_code="c = 1 - beta**step + numel"), "step_code: 'numel' is not known here"),
        (dict(step_code="c = 1 - beta**step + norm_g"), "step_code: 'norm_g' is not known here"),
        (dict(tensor_code="share = norm_u ** 2"), "tensor_code line 1: 'norm_u ** 2': '**' belong"),
        (dict(tensor_code="share = exp(norm_u)"), "tensor_code line 1: 'exp(norm_u)': 'exp' belo"),
    ],
)
def test_a_name_that_a_section_does_not_know(changes: dict[str, Any], message: str) -> None:
    assert refusal(**changes).startswith(message)


# ---- what each section may write

INPUTS = "a rule may not assign to its inputs"


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        (dict(tensor_code="share = norm_u\np = share"), "'p'"),
        (dict(tensor_code="share = norm_u\nm = share"), "'m'"),
        (dict(tensor_code="share = norm_u\nu = share"), "'u'"),
        (dict(tensor_code="share = norm_u\nlr = share"), "'lr'"),
        (dict(tensor_code="share = norm_u\nc = share"), "'c'"),
        (dict(tensor_code="share = norm_u\nnumel = share"), "'numel'"),
        (dict(tensor_code="share = norm_u\nnorm_u = share"), "'norm_u'"),
        (dict(tensor_code="share = norm_u\nnorm_x = share"), "'norm_x'"),
        (dict(apply_code="m = u\np = p - lr * share * u"), "'m'"),
        (dict(apply_code="share = 1\np = p - lr * share * u"), "'share'"),
        (dict(apply_code="c = u\np = p - lr * share * c"), "'c'"),
        (dict(apply_code="step = u\np = p - lr * share * u"), "'step'"),
        (dict(apply_code="numel = u\np = p - lr * share * u"), "'numel'"),
        (dict(apply_code="norm_x = u\np = p - lr * share * norm_x"), "'norm_x'"),
        (dict(element_code="m = beta * m + g\nnorm_m = m\nu = m / c"), "'norm_m'"),
        (dict(element_code="m = beta * m + g\nnumel = m\nu = m / c"), "'numel'"),
        (dict(step_code="c = 1 - beta**step\nnorm_c = c"), "'norm_c'"),
    ],
)
def test_inputs_are_not_written(changes: dict[str, Any], culprit: str) -> None:
    assert refusal(**changes) == f"{culprit}: {INPUTS}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(apply_code="w = p - lr * share * u"), "apply_code never writes 'p'"),
        (
            dict(element_code="m = beta * m + g\nu = m / c\np = p - u"),
            "element_code writes 'p', which apply_code has to write",
        ),
        (
            dict(element_code="m = beta * m + g\nu = m / c\np = p - lr * u", apply_code=""),
            "tensor_code without apply_code: nothing could read what it computes",
        ),
        (dict(element_code="u = beta * m + g / c"), "element_code never writes 'm'"),
        (
            dict(element_code="m = beta * m + g\nu = m / c", apply_code="", tensor_code=""),
            "element_code never writes 'p'",
        ),
        (
            dict(tensor_code="share = norm_u\nspare = norm_p"),
            "'spare': declared or computed, but never read",
        ),
        (dict(apply_code="p = p - lr * u"), "'share': declared or computed, but never read"),
    ],
)
def test_what_must_be_written_and_read(changes: dict[str, Any], message: str) -> None:
    assert refusal(**changes) == message


def test_the_update_may_be_read_and_changed_in_the_second_pass() -> None:
    made = spec(apply_code="u = share * u\np = p - lr * u")
    assert made.apply.writes == ("u", "p")


@pytest.mark.parametrize("name", ["norm_x", "norm_p", "numel"])
def test_names_of_measurements_are_taken(name: str) -> None:
    words = "is used twice" if name == "numel" else "names that begin with 'norm_' are"
    assert words in refusal(states=(State(name="m"), State(name=name)))
    assert words in refusal(hyper={**VALID["hyper"], name: rate(1.0)})


@pytest.mark.parametrize("name", ["residual", "gnorm_vec", "m_absmax", "m_type"])
def test_names_that_the_engine_keeps_beside_states_are_taken(name: str) -> None:
    message = refusal(
        states=(State(name="m"), State(name=name)),
        element_code=f"{VALID['element_code']}\n{name} = g",
    )
    taken = "gnorm_vec, residual, step"
    assert message == f"state {name!r}: the endings _absmax and _type are taken, and {taken}"


# ---- states that begin somewhere, that are never quantized, and that come and go


def test_where_a_state_may_begin() -> None:
    assert spec(states=(State(name="m", initial="beta"),)).states[0].initial == "beta"
    assert spec(states=(State(name="m", initial="p", quantized=False),)).states[0].initial == "p"
    message = refusal(states=(State(name="m", initial="beat"),))
    assert message == (
        "state 'm': initial='beat' is no hyperparameter; did you mean 'beta'?; expected the name "
        "of one whose value it begins with (or 'p'; without it, zero); there are lr, beta"
    )
    with pytest.raises(
        SpecError, match=r"'m': initial: 1.0 is a number; expected the name of a hy"
    ):
        State(name="m", initial=1.0)  # type: ignore[arg-type]
    message = refusal(states=(State(name="m", initial="1.0"),))
    assert message.startswith("state 'm': initial='1.0' is no hyperparameter; expected the name")
    message = refusal(states=(State(name="m", initial="p"),))
    assert message == "a state that begins as the parameter has to be quantized=False"


def test_a_hyperparameter_that_only_begins_a_state_is_read() -> None:
    hyper = {**VALID["hyper"], "start": rate(0.5)}
    assert refusal(hyper=hyper) == "'start': declared or computed, but never read"
    assert spec(hyper=hyper, states=(State(name="m", initial="start"),)).hyper["start"].default


def test_an_absent_state_is_not_read_by_the_second_pass_either() -> None:
    states = (State(name="m", when="beta"),)
    code = "m = where(beta, beta * m + g, g)\nu = m / c"
    assert spec(states=states, element_code=code, apply_code="p = p - lr * share * m + u").switches
    message = refusal(states=states, element_code="w = m\nm = g\nu = w / c")
    assert message == "state 'm' does not exist when beta is off, but is read\n    w = m"


def test_a_switch_may_be_in_any_section() -> None:
    assert spec(tensor_code="share = where(beta, norm_u, norm_p)").switches == ("beta",)
    assert spec(apply_code="p = p - lr * share * where(beta, u, g)").switches == ("beta",)


# ---- modes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(eval_code="p = p + m"), "eval_code and train_code undo each other: a rule has both"),
        (dict(train_code="p = p + m"), "eval_code and train_code undo each other: a rule has both"),
        (dict(eval_code="p = p + v", train_code="p = p"), "eval_code: 'v' is not known here"),
        (dict(eval_code="p = p + g", train_code="p = p"), "eval_code: 'g' is not known here"),
        (dict(eval_code="p = p + u", train_code="p = p"), "eval_code: 'u' is not known here"),
        (dict(eval_code="p = p + c", train_code="p = p"), "eval_code: 'c' is not known here"),
        (dict(eval_code="p = p", train_code="p = p * step"), "train_code: 'step' is not known"),
        (dict(eval_code="p = p", train_code="w = p"), "train_code never writes 'p'"),
        (dict(eval_code="m = p\np = m", train_code="p = p"), "eval_code may write 'p' and names"),
        (dict(eval_code="lr = p\np = m", train_code="p = p"), "eval_code may write 'p' and names"),
        (dict(eval_code="p = p**2", train_code="p = p"), "eval_code line 1: 'p**2': '**' belongs"),
    ],
)
def test_modes_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    assert refusal(**changes).startswith(message)


def test_a_mode_may_have_variables_of_its_own() -> None:
    made = spec(eval_code="w = lr * m\np = p + w", train_code="p = p - lr * m")
    assert [len(code.statements) for code in made.modes.values()] == [2, 1]


# ---- clipping


def test_the_clipped_form_bounds_the_update() -> None:
    made = spec().clipped
    assert "max_unorm" in made.hyper
    assert made.tensor.writes[-1] == "clip_u"
    assert made.apply.statements[0].target == "u"
    assert spec().digest != made.digest


@pytest.mark.parametrize("rule", list(optimizers()), ids=lambda rule: rule.name)
def test_every_clipped_form_is_a_valid_spec(rule: Optimizer) -> None:
    """`clipped` is made without the checks: they must hold all the same."""
    if not rule.can_clip:
        assert rule.clips_itself or "u" not in rule.element.writes or not rule.apply_code
        return
    made = rule.clipped
    fields = {name: getattr(made, name) for name in Optimizer.model_fields}
    assert Optimizer(**fields) == made


def test_a_rule_whose_own_names_are_those_of_clipping() -> None:
    """A name of the clipped form that the rule has too must not change what either means."""
    made = spec(
        element_code="m = beta * m + g\nu = m / c\nclip_u = g",
        apply_code="p = p - lr * share * u * clip_u",
    )
    if made.can_clip:
        fields = {name: getattr(made.clipped, name) for name in Optimizer.model_fields}
        assert Optimizer(**fields) == made.clipped


# ---- optional hyperparameters


def test_optional_hyperparameters_are_not_required() -> None:
    made = spec(hyper={**VALID["hyper"], "slow": steps()}, step_code="c = 1 - beta**step + slow")
    assert made.default("slow") is None
    assert not made.required("slow")
    assert made.hyper["slow"].check("slow", None) == 0.0
    assert made.hyper["slow"].check("slow", 3) == 3.0
    assert made.hyper["slow"].range == ">= 0, or None"


def test_states_that_are_off_are_off_for_every_setting() -> None:
    for rule in optimizers():
        for truth in itertools.product((False, True), repeat=len(rule.switches)):
            switches = dict(zip(rule.switches, truth, strict=True))
            active = {state.name for state in rule.active_states(switches)}
            for state in rule.states:
                assert (state.name in active) is (state.when is None or switches[state.when])
