"""Every contradiction in an optimizer spec is found when the spec is made, and named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from bnbx.errors import BnbxError, OptionError, SpecError
from bnbx.registry import (
    Constraint,
    Hyper,
    Optimizer,
    State,
    flag,
    fraction,
    number,
    positive,
    rate,
)

RULE = """
    m = beta * m + (1 - beta) * g
    p = p - lr * m
"""
VALID: Mapping[str, Any] = dict(
    name="r",
    summary="a rule",
    states=(State(name="m"),),
    hyper=dict(lr=rate(1e-3), beta=fraction(0.9)),
    element_code=RULE,
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
    assert made.element.reads == ("beta", "m", "g", "p", "lr")
    assert made.element.writes == ("m", "p")
    assert made.step.statements == ()
    assert made.switches == ()
    assert made.arguments == ("lr", "beta")


# ---- names that are read


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(element_code="m = bta * m + g\np = p - lr * m * beta"),
            "element_code: 'bta' is not known here; did you mean 'beta'?; "
            "known: beta, g, lr, m, p, step\n    m = bta * m + g",
        ),
        (
            dict(step_code="c = g", element_code=RULE + "p = p * c"),
            "step_code: 'g' is not known here; known: beta, lr, step\n    c = g",
        ),
        (
            dict(step_code="c = m", element_code=RULE + "p = p * c"),
            "step_code: 'm' is not known here; known: beta, lr, step\n    c = m",
        ),
        (
            dict(step_code="c = d\nd = lr", element_code=RULE + "p = p * c * d"),
            "step_code: 'd' is not known here; known: beta, lr, step\n    c = d",
        ),
        (
            dict(element_code="u = u + g\n" + RULE),
            "element_code: 'u' is not known here; known: beta, g, lr, m, p, step\n    u = u + g",
        ),
    ],
)
def test_a_name_that_is_not_known(changes: dict[str, Any], message: str) -> None:
    assert refusal(**changes) == message


def test_a_syntax_error_names_its_line() -> None:
    message = refusal(element_code="m = beta * m + g\np = p - lr * m.data")
    assert message.startswith("element_code line 2: 'm.data': not in the rule language")


UNREAD = "declared or computed, but never read"


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        (dict(element_code="m = lr * g\np = p - m"), "'beta'"),
        (dict(element_code="m = g\np = p - m"), "'beta', 'lr'"),
        (dict(element_code="m = beta * lr\np = m"), "'g'"),
        (dict(step_code="c = beta * step"), "'c'"),
        (dict(step_code="c = lr\nd = c"), "'d'"),
        (
            dict(
                hyper=dict(lr=rate(1e-3), beta=fraction(0.9), z=rate(0.0)),
                constraints=(Constraint(condition="z < 1", message="z"),),
            ),
            "'z'",
        ),
    ],
)
def test_what_is_never_read(changes: dict[str, Any], culprit: str) -> None:
    assert refusal(**changes) == f"{culprit}: {UNREAD}"


# ---- names that are written


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("p = p - lr * beta * m * g", "element_code never writes 'm'"),
        ("m = beta * m + lr * g", "element_code never writes 'p'"),
        ("u = beta * lr * g * m", "element_code never writes 'm', 'p'"),
        ("", "element_code never writes 'm', 'p'"),
    ],
)
def test_what_must_be_written(code: str, message: str) -> None:
    assert refusal(element_code=code) == message


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        (dict(step_code="p = lr"), "'p'"),
        (dict(step_code="g = lr"), "'g'"),
        (dict(step_code="m = lr"), "'m'"),
        (dict(step_code="step = lr"), "'step'"),
        (dict(step_code="beta = lr"), "'beta'"),
        (dict(element_code=RULE + "lr = g"), "'lr'"),
        (dict(element_code=RULE + "step = g"), "'step'"),
        (dict(step_code="c = lr", element_code=RULE + "c = g * c"), "'c'"),
        (dict(step_code="p = lr\nm = lr"), "'m', 'p'"),
    ],
)
def test_inputs_are_not_written(changes: dict[str, Any], culprit: str) -> None:
    assert refusal(**changes) == f"{culprit}: a rule may not assign to its inputs"


# ---- names that are declared

INPUTS = "g, numel, p, step"
TWICE = "is used twice ({} are taken)"
TWO_STATES = RULE + "b = b + g"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(states=(State(name="m"), State(name="m"))),
            f"the name 'm' {TWICE.format('g, m, numel, p, step')}",
        ),
        (
            dict(states=(State(name="m"), State(name="lr"))),
            f"the name 'lr' {TWICE.format('g, lr, m, numel, p, step')}",
        ),
        (dict(states=(State(name="p"),)), f"the name 'p' {TWICE.format(INPUTS)}"),
        (dict(states=(State(name="g"),)), f"the name 'g' {TWICE.format(INPUTS)}"),
        (
            dict(hyper=dict(step=rate(1.0))),
            f"the name 'step' {TWICE.format('g, m, numel, p, step')}",
        ),
        (dict(states=(State(name="numel"),)), f"the name 'numel' {TWICE.format(INPUTS)}"),
        (dict(packs=dict(lr=("beta",))), "pack 'lr' has the name of something else"),
        (dict(packs=dict(m=("beta",))), "pack 'm' has the name of something else"),
        (dict(packs=dict(p=("beta",))), "pack 'p' has the name of something else"),
        (
            dict(packs=dict(pair=("beta", "bta"))),
            "'bta': no such hyperparameter; did you mean 'beta'?",
        ),
        (dict(packs=dict(a=("beta",), b=("beta",))), "a hyperparameter is in two packs"),
        (dict(packs=dict(a=("beta", "beta"))), "a hyperparameter is in two packs"),
        (
            dict(states=(State(name="m", when="momentum"),)),
            "state 'm': when='momentum' is no hyperparameter; expected the name of one that it "
            "exists with; there are lr, beta",
        ),
        (
            dict(states=(State(name="m", when="beat"),)),
            "state 'm': when='beat' is no hyperparameter; did you mean 'beta'?; expected the name "
            "of one that it exists with; there are lr, beta",
        ),
        (
            dict(constraints=(Constraint(condition="where(bta, 1, gama)", message="x"),)),
            "constraint reads 'bta', 'gama': no such hyperparameter",
        ),
        (
            dict(constraints=(Constraint(condition="step > 1", message="x"),)),
            "constraint reads 'step': no such hyperparameter",
        ),
    ],
)
def test_declared_names(changes: dict[str, Any], message: str) -> None:
    assert refusal(**changes) == message


@pytest.mark.parametrize("name", ["M", "_m", "m_", "1m", "", "m n", "int", "sqrt", "µ"])
def test_names_that_no_rule_could_use(name: str) -> None:
    assert refusal(states=(State(name=name),)).startswith(f"name {name!r}")
    assert refusal(hyper={name: rate(1.0)}).startswith(f"name {name!r}")


@pytest.mark.parametrize("name", ["Pair", "the pair", "", "pair_", "1st"])
def test_packs_are_arguments_so_their_names_are_checked_too(name: str) -> None:
    assert repr(name) in refusal(packs={name: ("beta",)})


@pytest.mark.parametrize("name", ["R", "", "r r", "r-1", "1r", "r\n", "rµ"])
def test_names_of_specs(name: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec(name=name)
    rule = "name: a name is lower-case letters, digits and underscores, letter first"
    assert str(caught.value) == f"Optimizer spec {name!r}: {rule}"


OPTIONS = """
    params rule paged is_paged bits optim_bits state_types min_8bit_size block_wise
    percentile_clipping skip_zeros master maximize overrides page_dir args capturable foreach fused
    differentiable
""".split()


@pytest.mark.parametrize("name", OPTIONS)
def test_no_hyperparameter_takes_the_place_of_an_option(name: str) -> None:
    """Users pass both as keywords, and parameter groups keep both under one key."""
    code = RULE.replace("lr", name)
    assert repr(name) in refusal(hyper={name: rate(0.1), "beta": rate(0.9)}, element_code=code)
    assert repr(name) in refusal(packs={name: ("beta",)})


def test_no_state_takes_the_place_of_the_scale_of_another() -> None:
    """A quantized state m keeps its scales under m_absmax."""
    states = (State(name="m"), State(name="m_absmax"))
    assert "'m_absmax'" in refusal(states=states, element_code=RULE + "m_absmax = g")


# ---- defaults


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        (rate(-1.0), "default of lr=-1.0: expected a number >= 0"),
        (fraction(1.0), "default of lr=1.0: expected a number >= 0 and < 1"),
        (fraction(-0.1), "default of lr=-0.1: expected a number >= 0 and < 1"),
        (positive(0.0), "default of lr=0.0: expected a number > 0"),
        (Hyper(default=True), "default of lr=True: expected a number (finite)"),
        (Hyper(default=0.5, flag=True), "default of lr=0.5: expected True or False"),
    ],
)
def test_defaults_obey_their_own_bounds(hyper: Hyper, message: str) -> None:
    assert refusal(hyper=dict(lr=hyper, beta=fraction(0.9))) == message


@pytest.mark.parametrize(
    "hyper", [rate(0.0), fraction(0.0), fraction(), positive(1e-30), number(-5.0), rate(None)]
)
def test_defaults_at_the_edge_of_their_bounds(hyper: Hyper) -> None:
    assert spec(hyper=dict(lr=hyper, beta=fraction(0.9))).default("lr") == hyper.default


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        (Hyper, dict(default=float("inf"))),
        (Hyper, dict(default=float("nan"))),
        (Hyper, dict(default="many")),
        (rate, dict(default="1e-3")),
        (Hyper, dict(default=0.5, below="1")),
        (Hyper, dict(default=0.5, minimum=float("-inf"))),
        (Hyper, dict(default=0.5, maximum=1.0)),
        (State, dict(name=1)),
        (Constraint, dict(condition="a > 0")),
    ],
)
def test_parts_of_a_spec_raise_errors_of_bnbx(part: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(BnbxError):
        part(**fields)


CHECKED: list[tuple[Hyper, Any, bool]] = [
    (rate(), 0.0, True),
    (rate(), 5, True),
    (rate(), -1e-30, False),
    (fraction(), 0.0, True),
    (fraction(), 1.0, False),
    (positive(), 1e-300, True),
    (positive(), 0.0, False),
    (number(), -1e300, True),
    (number(), float("inf"), False),
    (number(), float("nan"), False),
    (number(), True, False),
    (number(), None, False),
    (number(), "much", False),
    (number(), (1.0,), False),
    (number(), 1j, False),
    (number(), 10**400, False),
    (flag(True), True, True),
    (flag(True), False, True),
    (flag(True), 1, False),
    (flag(True), 0.0, False),
    (flag(True), None, False),
]


@pytest.mark.parametrize(("hyper", "value", "fits"), CHECKED, ids=lambda x: repr(x)[:20])
def test_values_are_checked(hyper: Hyper, value: Any, fits: bool) -> None:
    if fits:
        assert hyper.check("x", value) == value
        return
    with pytest.raises(OptionError) as caught:
        hyper.check("x", value)
    assert str(caught.value).startswith(f"x={value!r}: expected ")
    assert str(caught.value).endswith(hyper.range)


def test_a_number_comes_back_as_float_and_a_flag_as_bool() -> None:
    assert type(rate().check("x", 1)) is float
    assert type(flag(False).check("x", True)) is bool


# ---- switches and states that come and go

SWITCHED = """
    m = where(beta, beta * m + g, g)
    p = p - lr * where(fast, m, g) * where(lr > 1, 1, 2)
"""
HYPER = dict(lr=rate(1e-3), beta=rate(0.9), fast=flag(False))


def test_switches_are_flags_and_bare_conditions_and_reasons_for_states() -> None:
    made = spec(hyper=HYPER, states=(State(name="m", when="beta"),), element_code=SWITCHED)
    assert made.switches == ("beta", "fast")
    assert [s.name for s in made.active_states({"beta": True, "fast": False})] == ["m"]
    assert made.active_states({"beta": False, "fast": True}) == ()


def test_a_switch_may_be_in_step_code_or_deep_in_an_expression() -> None:
    deep = "p = p - lr * (1 - sqrt(-g * where(g < where(beta, 1, 2), 1, 2)))"
    assert spec(states=(), element_code=deep).switches == ("beta",)
    in_step = spec(states=(), step_code="c = where(beta, lr, 1)", element_code="p = p - c * g")
    assert in_step.switches == ("beta",)
    computed = spec(states=(), step_code="c = lr * beta", element_code="p = p - where(c, g, c)")
    assert computed.switches == ()


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("m = beta * m + g\np = p - lr * m", "m = beta * m + g"),
        ("u = m\nm = where(beta, m, g)\np = p - lr * m * u", "u = m"),
        ("m = where(beta, g, m)\np = p - lr * m", "m = where(beta, g, m)"),
        ("m = where(beta > 0, m, g)\np = p - lr * m", "m = where(beta > 0, m, g)"),
    ],
)
def test_a_state_that_is_absent_is_not_read(code: str, line: str) -> None:
    message = refusal(states=(State(name="m", when="beta"),), element_code=code)
    expected = "state 'm' does not exist when beta is off, but is read"
    assert message == f"{expected}\n    {line}"


def test_a_state_that_is_absent_is_a_variable_once_written() -> None:
    code = "m = g\nm = where(beta, beta * m, m) + m\np = p - lr * m"
    assert spec(states=(State(name="m", when="beta"),), element_code=code).switches == ("beta",)


@pytest.mark.parametrize("count", [6, 7])
def test_switches_are_few_since_each_doubles_the_kernels(count: int) -> None:
    flags = {f"f{number}": flag(True) for number in range(count)}
    code = "p = p - g * (" + " + ".join(f"where({name}, 1, 2)" for name in flags) + ")"
    changes = dict(hyper=flags, states=(), element_code=code)
    if count > 6:
        assert refusal(**changes) == f"7 switches; at most 6: {tuple(flags)}"
    else:
        assert spec(**changes).switches == tuple(flags)


# ---- arguments


def test_a_pack_stands_where_its_first_member_is() -> None:
    hyper = dict(lr=rate(1.0), a=rate(0.5), b=rate(), c=rate(0.25))
    code = "p = p - lr * g * a * b * c"
    made = spec(states=(), hyper=hyper, packs=dict(pair=("c", "a")), element_code=code)
    assert made.arguments == ("lr", "pair", "b")
    assert [made.default(name) for name in made.arguments] == [1.0, (0.25, 0.5), None]
    required = spec(states=(), hyper=hyper, packs=dict(pair=("a", "b")), element_code=code)
    assert required.default("pair") is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "'(no name)': name: Field required; summary: Field required"),
        ({**VALID, "extra": 1}, "'r': extra: no such field; there are name, summary, source, "),
        (
            {**VALID, "elementcode": ""},
            "'r': elementcode: no such field; did you mean 'element_code'?",
        ),
        (
            {**VALID, "hyper": dict(lr=0.01, warm=True, k=None)},
            "'r': hyper.lr: 0.01 is no Hyper; write rate(0.01), or by the values it may take: "
            "fraction, positive, number, steps; hyper.warm: True is no Hyper; write flag(True); "
            "hyper.k: None is no Hyper; write rate(1e-3), or",
        ),
        (
            {**VALID, "states": State(name="m")},
            "'r': states: a single State; write a tuple, with a comma: (State(...),)",
        ),
        ({**VALID, "states": ("m",)}, "'r': states.0: 'm' is no State; write State(name='m')"),
        (
            {**VALID, "constraints": ("lr > 0",)},
            "'r': constraints.0: 'lr > 0' is no Constraint; write Constraint(condition='lr > 0', ",
        ),
        ({**VALID, "hyper": 1}, "'r': hyper: Input should be a valid dictionary"),
        ({**VALID, "states": "m"}, "'r': states: "),
        ({**VALID, "element_code": None}, "'r': element_code: Input should be a valid string"),
    ],
)
def test_fields_of_the_wrong_kind(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        Optimizer(**fields)
    assert f"Optimizer spec {message}" in str(caught.value)
