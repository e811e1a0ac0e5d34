"""What a user asked for, in layers, becomes what the engine does, or an error that says why."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bnbx.errors import BnbxError, OptionError, SpecError, UnknownNameError
from bnbx.registry import (
    Catalog,
    Constraint,
    Optimizer,
    QuantType,
    State,
    flag,
    number,
    optimizers,
    positive,
    quant_types,
    rate,
    steps,
)
from bnbx.registry.config import Layer, Resolved, check_known, resolve
from bnbx.registry.options import OPTIONS, check_option, unaliased
from bnbx.registry.quant_type import FLOAT32

SPEC = Optimizer(
    name="r",
    summary="a rule",
    states=(State(name="m"), State(name="v", signed=False)),
    hyper=dict(
        lr=rate(),
        a=rate(0.5),
        b=rate(0.25),
        shift=number(-1.0),
        eps=positive(1e-8),
        fast=flag(False),
    ),
    packs=dict(pair=("a", "b")),
    element_code="""
        m = where(fast, m, a * m) + where(shift, g, -g)
        v = b * v + g * g
        p = p - lr * m / (sqrt(v) + eps) + shift
    """,
)
KNOWN = (
    "lr, pair, shift, eps, fast, bits, state_types, min_8bit_size, block_wise, "
    "percentile_clipping, skip_zeros, max_unorm, master, maximize, paged"
)


def merged(*layers: Mapping[str, Any], spec: Optimizer = SPEC) -> Resolved:
    named: list[Layer] = [(f"layer {number}", layer) for number, layer in enumerate(layers)]
    return resolve(spec, quant_types(), [("required", {"lr": 0.1}), *named])


def refusal(kind: type[BnbxError], *layers: Mapping[str, Any], spec: Optimizer = SPEC) -> str:
    with pytest.raises(kind) as caught:
        merged(*layers, spec=spec)
    assert type(caught.value) is kind
    return str(caught.value)


# ---- layers


def test_defaults() -> None:
    found = merged()
    assert found.hyper == dict(lr=0.1, a=0.5, b=0.25, shift=-1.0, eps=1e-8, fast=False)
    assert list(found.hyper) == list(SPEC.hyper)
    assert found.switches == dict(shift=True, fast=False)
    assert found.state_types == dict(m="dynamic8", v="dynamic8")
    assert found.min_8bit_size == 4096
    assert found.origins == {**dict.fromkeys(KNOWN.split(", "), "default"), "lr": "required"}


def test_a_later_layer_wins_and_is_remembered() -> None:
    found = merged(
        dict(lr=0.2, pair=(0.1, 0.2), bits=32),
        dict(lr=0.3, fast=True),
        dict(pair=[0.3, 0.4], min_8bit_size=0),
    )
    assert found.hyper == dict(lr=0.3, a=0.3, b=0.4, shift=-1.0, eps=1e-8, fast=True)
    assert found.switches == dict(shift=True, fast=True)
    assert found.state_types == dict(m=FLOAT32, v=FLOAT32)
    assert found.min_8bit_size == 0
    assert found.origins == {
        **dict.fromkeys(KNOWN.split(", "), "default"),
        "lr": "layer 1",
        "pair": "layer 2",
        "fast": "layer 1",
        "bits": "layer 0",
        "min_8bit_size": "layer 2",
    }


def test_resolving_changes_no_layer_and_no_default() -> None:
    layer = dict(pair=[0.1, 0.2], state_types={"m": "linear8"})
    first = merged(layer)
    assert layer == dict(pair=[0.1, 0.2], state_types={"m": "linear8"})
    assert merged(layer) == first
    assert merged().state_types == dict(m="dynamic8", v="dynamic8")
    assert OPTIONS == {
        "bits": 8,
        "state_types": None,
        "min_8bit_size": 4096,
        "block_wise": True,
        "percentile_clipping": 100,
        "skip_zeros": False,
        "max_unorm": 0.0,
        "master": "none",
        "maximize": False,
        "paged": False,
    }


def test_numbers_come_out_as_floats() -> None:
    found = merged(dict(lr=torch.tensor(0.5), shift=0, pair=(0, torch.tensor(1, dtype=torch.int8))))
    assert found.hyper == dict(lr=0.5, a=0.0, b=1.0, shift=0.0, eps=1e-8, fast=False)
    assert {type(value) for name, value in found.hyper.items() if name != "fast"} == {float}
    assert found.switches["shift"] is False


def test_every_built_in_resolves_with_a_learning_rate() -> None:
    for spec in optimizers():
        found = resolve(spec, quant_types(), [("test", {"lr": 1e-3})])
        assert set(found.hyper) == set(spec.hyper)
        assert set(found.switches) == set(spec.switches)
        assert set(found.state_types) == {state.name for state in spec.states}


# ---- names

HAS = f"; it has: {KNOWN}"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("pairs", "; did you mean 'pair'?"),
        ("Fast", "; did you mean 'fast'?"),
        ("bit", "; did you mean 'bits'?"),
        ("a", ""),
        ("weight_decay", ""),
        ("m", ""),
    ],
)
def test_an_unknown_argument(name: str, near: str) -> None:
    message = f"r has no argument {name!r}{near}{HAS}"
    assert refusal(UnknownNameError, {name: 1.0}) == f"layer 0: {message}"
    with pytest.raises(UnknownNameError) as caught:
        check_known(SPEC, ["lr", name])
    assert str(caught.value) == message


def test_known_arguments_pass() -> None:
    check_known(SPEC, KNOWN.split(", "))


# ---- values


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (dict(pair=None), "r: pair=None: expected 2 numbers (a, b)"),
        (dict(lr=-0.1), "r: lr=-0.1: expected a number >= 0"),
        (dict(lr="fast"), "r: lr='fast': expected a number >= 0"),
        (dict(lr=float("nan")), "r: lr=nan: expected a number >= 0"),
        (dict(lr=float("inf")), "r: lr=inf: expected a number >= 0"),
        (dict(lr=True), "r: lr=True: expected a number >= 0"),
        (dict(lr=(0.1,)), "r: lr=(0.1,): expected a number >= 0"),
        (dict(eps=0.0), "r: eps=0.0: expected a number > 0"),
        (dict(fast=1), "r: fast=1: expected True or False"),
        (dict(fast="yes"), "r: fast='yes': expected True or False"),
        (dict(pair=(0.5,)), "r: pair=(0.5,): expected 2 numbers (a, b)"),
        (dict(pair=(0.5, 0.5, 0.5)), "r: pair=(0.5, 0.5, 0.5): expected 2 numbers (a, b)"),
        (dict(pair=0.5), "r: pair=0.5: expected 2 numbers (a, b)"),
        (dict(pair="ab"), "r: pair='ab': expected 2 numbers (a, b)"),
        (dict(min_8bit_size=-1), "min_8bit_size=-1: expected a whole number >= 0"),
        (dict(min_8bit_size=1.5), "min_8bit_size=1.5: expected a whole number >= 0"),
        (dict(min_8bit_size=True), "min_8bit_size=True: expected a whole number >= 0"),
        (dict(min_8bit_size=None), "min_8bit_size=None: expected a whole number >= 0"),
    ],
)
def test_a_value_out_of_range(layer: dict[str, Any], message: str) -> None:
    """The error says which layer brought the value, unless it is that of the arguments."""
    assert refusal(OptionError, layer) == f"{message} (from layer 0)"
    assert refusal(OptionError, {}, layer) == f"{message} (from layer 1)"
    with pytest.raises(OptionError) as caught:
        resolve(SPEC, quant_types(), [("argument", {"lr": 0.1, **layer})])
    assert str(caught.value) == message


def test_a_value_out_of_range_in_a_pack() -> None:
    assert refusal(OptionError, dict(pair=(0.5, -1))).startswith("r: b=-1: expected a number >= 0")


def test_the_layer_to_blame_is_that_of_the_very_argument() -> None:
    spec = Optimizer(
        name="both",
        summary="a name that another ends with",
        hyper=dict(lr=rate(0.1), r=rate(0.1)),
        element_code="p = p - lr * r * g",
    )
    layers: list[Layer] = [("overrides['*']", {"r": 0.2}), ("param group", {"lr": -1.0})]
    with pytest.raises(OptionError, match=r"lr=-1\.0: .*\(from param group\)$"):
        resolve(spec, quant_types(), layers)


def test_a_required_value_that_is_taken_away() -> None:
    assert refusal(OptionError, dict(lr=None)) == "r: lr is required"


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ("bits", "state_types")])
def test_options_have_defaults_that_they_allow(name: str) -> None:
    assert check_option(name, OPTIONS[name]) == OPTIONS[name]
    assert merged({name: OPTIONS[name]}).options[name] == OPTIONS[name]


@pytest.mark.parametrize(
    ("name", "good", "bad", "words"),
    [
        ("block_wise", [True, False], [1, 0, None, "yes"], "True or False"),
        ("skip_zeros", [True, False], [1, 0, None, "yes"], "True or False"),
        ("maximize", [True, False], [1, 0, None, "yes"], "True or False"),
        ("percentile_clipping", [1, 5, 100], [0, 101, 5.0, True, None, "5"], "a whole number, 1"),
        ("max_unorm", [0, 0.5, 2], [-0.1, float("nan"), float("inf"), True, None, "1"], "a number"),
        ("master", ["none", "stochastic", "kahan", "residual"], ["", "Kahan", None, 1], "one of"),
        ("paged", [True, False, "managed"], [1, 0, None, "yes"], "True, False or 'managed'"),
    ],
)
def test_values_of_options(name: str, good: list[Any], bad: list[Any], words: str) -> None:
    clipping = Optimizer(
        name="r", summary="s", hyper=dict(lr=rate()), element_code="u = g", apply_code="p = p-lr*u"
    )
    for value in good:
        assert merged({name: value}, spec=clipping).options[name] == value
    for value in bad:
        message = refusal(OptionError, {name: value}, spec=clipping)
        assert message.startswith(f"{name}={value!r}: expected {words}")


def test_a_value_by_two_names() -> None:
    assert unaliased(dict(optim_bits=8, lr=1)) == dict(bits=8, lr=1)
    assert unaliased(dict(is_paged=True)) == dict(paged=True)
    with pytest.raises(OptionError, match="bits is given twice"):
        unaliased(dict(optim_bits=8, bits=8))


def test_max_unorm_clips_rules_that_can_be_clipped() -> None:
    assert refusal(OptionError, dict(max_unorm=1.0)).startswith("r: max_unorm needs a rule that")
    adamw = optimizers().get("adamw")
    found = merged(dict(max_unorm=1.0), spec=adamw)
    assert found.clip
    assert found.hyper["max_unorm"] == 1.0
    assert not merged(spec=adamw).clip
    assert "max_unorm" not in merged(spec=adamw).hyper
    lamb = merged(dict(max_unorm=0.0), spec=optimizers().get("lamb"))  # the rule's own
    assert "max_unorm" not in lamb.options
    assert not lamb.clip


def test_an_optional_hyperparameter_reads_as_zero() -> None:
    spec = Optimizer(
        name="r",
        summary="s",
        hyper=dict(lr=rate(), slow=steps(), pair=rate(0.5)),
        packs=dict(both=("pair", "slow")),
        step_code="c = where(slow, min(step / slow, 1), 1)",
        element_code="p = p - lr * c * pair * g",
    )
    assert spec.default("both") is None  # users see the pack whole, or not at all
    assert not spec.required("both")
    assert merged(dict(both=(0.5, None)), spec=spec).hyper["slow"] == 0.0
    assert merged(dict(both=(0.5, 10)), spec=spec).switches == {"slow": True}
    message = refusal(OptionError, dict(both=(0.5, -1)), spec=spec)
    assert message.startswith("r: slow=-1: expected a number >= 0, or None")


@pytest.mark.parametrize(
    "lr",
    [torch.tensor([0.1, 0.2]), [0.1], object(), {}, pytest.param(10**400, id="huge")],
    ids=type,
)
def test_what_is_no_number(lr: Any) -> None:
    assert refusal(OptionError, dict(lr=lr)).startswith("r: lr=")


def test_a_required_value_that_nobody_gave() -> None:
    with pytest.raises(OptionError, match=r"^r: lr is required$"):
        resolve(SPEC, quant_types(), [])


# ---- bits and quant types


@pytest.mark.parametrize(
    ("layer", "types"),
    [
        (dict(bits=8), dict(m="dynamic8", v="dynamic8")),
        (dict(bits=32), dict(m=FLOAT32, v=FLOAT32)),
        (dict(state_types="linear8"), dict(m="linear8", v="linear8")),
        (dict(state_types=FLOAT32), dict(m=FLOAT32, v=FLOAT32)),
        (dict(state_types={"m": "linear8"}), dict(m="linear8", v="dynamic8")),
        (dict(state_types={"v": "linear8"}, bits=32), dict(m=FLOAT32, v="linear8")),
        (dict(state_types={"v": FLOAT32}, bits=8), dict(m="dynamic8", v=FLOAT32)),
        (dict(state_types={}), dict(m="dynamic8", v="dynamic8")),
        (dict(state_types=None, bits=32), dict(m=FLOAT32, v=FLOAT32)),
    ],
)
def test_how_states_are_stored(layer: dict[str, Any], types: dict[str, str]) -> None:
    assert merged(layer).state_types == types


@pytest.mark.parametrize("bits", [0, 7, 16, 64, -8, None, "8", True, False, 8.5, [8], (), {}])
def test_bits_that_there_are_none_of(bits: Any) -> None:
    known = sorted({found.bits for found in quant_types() if found.state_default} | {32})
    listed = ", ".join(str(bits) for bits in reversed(known))
    assert refusal(OptionError, dict(bits=bits)) == (
        f"bits={bits!r}: expected one of {listed}; for other quant types pass state_types "
        "(from layer 0)"
    )


@pytest.mark.parametrize(
    ("state_types", "message"),
    [
        ("dynamic", "there is no quant type 'dynamic'; did you mean 'dynamic8'?; available: "),
        ({"m": "liner8"}, "there is no quant type 'liner8'; did you mean 'linear8'?; available: "),
        ({"m": None}, "there is no quant type None; available: "),
        ({"m": 8}, "there is no quant type 8; "),
        ({"m": ["dynamic8"]}, "there is no quant type ['dynamic8']"),
        ({"n": "linear8"}, "r has no state 'n' to quantize; it has: m, v"),
        ({"vv": FLOAT32}, "r has no state 'vv' to quantize; did you mean 'v'?; it has: m, v"),
        ({1: FLOAT32}, "r has no state 1 to quantize; it has: m, v"),
    ],
)
def test_unknown_states_and_quant_types(state_types: Any, message: str) -> None:
    found = refusal(UnknownNameError, dict(state_types=state_types))
    assert found.startswith(f"layer 0: {message}")
    with pytest.raises(UnknownNameError, match=rf"^{re.escape(message)}"):  # the caller knows
        resolve(SPEC, quant_types(), [("argument", dict(lr=0.1, state_types=state_types))])


@pytest.mark.parametrize("state_types", [8, ["linear8"], ("linear8", "linear8"), True])
def test_state_types_of_the_wrong_kind(state_types: Any) -> None:
    assert refusal(OptionError, dict(state_types=state_types)) == (
        f"state_types={state_types!r}: expected a quant type's name, or one by state (from layer 0)"
    )


@pytest.mark.parametrize("by_state", [False, True])
def test_a_spec_is_no_name_of_a_quant_type(by_state: bool) -> None:
    """And is not printed: 256 numbers take a page."""
    wide = QuantType(
        name="wide", summary="s", bits=8, values=tuple(n / 128 - 1 for n in range(256))
    )
    for spec, how in (
        (wide, "only registered types hold states, since checkpoints name them; register it by the "
         "hook register_quant_types (docs/plugins.md), then pass 'wide'"),
        (quant_types().get("linear8"), "pass 'linear8'"),
    ):  # fmt: skip
        state_types = {"m": spec} if by_state else spec
        assert refusal(OptionError, dict(state_types=state_types)) == (
            f"state_types=(the QuantType {spec.name!r} itself): expected a quant type's name; "
            f"{how} (from layer 0)"
        )


def test_bits_mean_a_default_type_of_the_catalog_given() -> None:
    four = QuantType(
        name="four", summary="s", bits=2, values=(-1.0, 0.0, 0.5, 1.0), state_default=True
    )
    types: Catalog[QuantType] = Catalog("quant type", lambda: False, dict)
    types.add(four, "test")
    found = resolve(SPEC, types, [("test", dict(lr=0.1, bits=2))])
    assert found.state_types == dict(m="four", v="four")
    with pytest.raises(OptionError, match="expected one of 32, 2;"):
        resolve(SPEC, types, [("test", dict(lr=0.1, bits=8))])


def test_a_rule_without_states_has_no_types() -> None:
    plain = Optimizer(name="r", summary="s", hyper=dict(lr=rate()), element_code="p = p - lr * g")
    assert merged(spec=plain).state_types == {}
    assert merged(dict(state_types="linear8"), spec=plain).state_types == {}
    message = "layer 0: r has no state 'm' to quantize; it has: (none)"
    assert refusal(UnknownNameError, dict(state_types={"m": FLOAT32}), spec=plain) == message


# ---- constraints: what the language allows must not fail once values are there


def constrained(condition: str) -> Optimizer:
    return Optimizer(
        name="r",
        summary="s",
        hyper=dict(a=number(0.0), b=number(0.0), fast=flag(False)),
        constraints=(Constraint(condition=condition, message="the message"),),
        element_code="p = p - a * g - b * where(fast, 1, 2)",
    )


def holds(condition: str, **values: Any) -> bool:
    """What resolve() makes of a constraint."""
    try:
        resolve(constrained(condition), quant_types(), [("test", values)])
    except OptionError as error:
        message = str(error)
    else:
        return True
    assert message == "r: the message"
    return False


def where(condition: Any, yes: Any, no: Any) -> Any:
    return yes if condition else no


VALUES: list[dict[str, Any]] = [
    dict(a=a, b=b, fast=fast)
    for a in (-2.0, 0.0, 1.0, 3.0)
    for b in (0.0, 1.0, 2.5)
    for fast in (False, True)
]
SUPPORTED = """
    a < 1
    a <= 1
    a > 1
    a >= 1
    a == 1
    a != 1
    fast == 1
    a
    fast
    1
    0
    where(fast, a, 1)
    where(fast, where(a > 0, where(b == 0, 1, 0), 0), 1)
    where(a != 0, b, fast)
"""
MORE = """
    a > -1
    1 > a
    a < b
    a == b
    a + b < 2
    a * a + b * b <= 9
    -a < 2
    abs(a) <= 2
    min(a, b) >= 0
    sqrt(b) < 1.1
    b ** 2 > 1
    exp(b) < 8
    where(a > b, a, b)
    where(a < b, -1, 0)
    where(fast, a - b, 1)
    where(where(fast, a, b) > 0, 1, 0)
    max(a, b)
    a - b
    -a
    -1
"""


@pytest.mark.parametrize("text", [line.strip() for line in SUPPORTED.strip().splitlines()])
def test_constraints(text: str) -> None:
    for values in VALUES:
        expected = bool(eval(text, {"__builtins__": {}}, {**values, "where": where}))
        assert holds(text, **values) is expected, values


@pytest.mark.parametrize("text", [line.strip() for line in MORE.strip().splitlines()])
def test_a_constraint_that_cannot_be_evaluated_is_refused_with_the_spec(text: str) -> None:
    """Or evaluated: an author must not hear of it from users."""
    import math

    try:
        constrained(text)
    except SpecError:
        return
    functions = dict(where=where, abs=abs, min=min, max=max, sqrt=math.sqrt, exp=math.exp)
    for values in VALUES:
        expected = bool(eval(text, {"__builtins__": {}}, {**values, **functions}))
        assert holds(text, **values) is expected, values


def conditions(depth: int) -> st.SearchStrategy[str]:
    leaves = st.sampled_from(["a", "b", "fast", "0", "1", "0.5"])
    if depth == 0:
        return leaves
    inner = conditions(depth - 1)
    compared = comparisons(depth - 1)
    names = st.sampled_from(["a", "b", "fast"])
    return (
        leaves
        | st.builds("where({}, {}, {})".format, names | compared, inner, inner)
        | st.builds("({} {} {})".format, inner, st.sampled_from("+-*"), inner)
        | st.builds("-{}".format, inner)
    )


def comparisons(depth: int) -> st.SearchStrategy[str]:
    operators = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
    return st.builds("{} {} {}".format, conditions(depth), operators, conditions(depth))


@given(conditions(2) | comparisons(1), st.sampled_from(VALUES))
def test_any_constraint_is_refused_with_the_spec_or_evaluated(
    text: str, values: dict[str, Any]
) -> None:
    try:
        constrained(text)
    except SpecError:
        return
    expected = bool(eval(text, {"__builtins__": {}}, {**values, "where": where}))
    assert holds(text, **values) is expected


def test_constraints_of_sgd() -> None:
    sgd = optimizers().get("sgd")
    message = "sgd: nesterov needs momentum > 0 and dampening = 0"
    for bad in (dict(nesterov=True), dict(nesterov=True, momentum=0.9, dampening=0.1)):
        assert refusal(OptionError, bad, spec=sgd) == message
    good = merged(dict(nesterov=True, momentum=0.9), spec=sgd)
    assert good.switches == dict(momentum=True, nesterov=True)
