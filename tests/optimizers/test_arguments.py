"""What users pass: defaults, factories, classes, and errors that name the nearest choice."""

from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bnbx import optim
from bnbx.errors import BnbxError, BnbxWarning, NotYetError, OptionError, UnknownNameError
from bnbx.optim import create
from bnbx.optimizers import state
from bnbx.optimizers.engine import Optimizer8bit
from bnbx.registry import optimizers
from bnbx.registry.options import ALIASES, options_of
from optimizers.compare import assert_same, equal
from optimizers.variants import copies, gradients, parameters, set_gradients

AdamW8bit: Any = optim.AdamW8bit
NAMES = "Adam AdamW AdEMAMix LAMB LARS Lion Adagrad RMSprop SGD".split()
CLASSES = [
    (f"{prefix}{name}{suffix}", name.lower(), bits, bool(prefix))
    for prefix in ("", "Paged")
    for name in NAMES
    for suffix, bits in (("", 32), ("8bit", 8), ("32bit", 32))
]
STATEFUL: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}, "lars": {"momentum": 0.9}}


def parameter(numel: int = 5000) -> Tensor:
    return torch.zeros(numel, requires_grad=True)


# ---- errors


class NothingIsMade(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails a test in which torch makes or changes a tensor meanwhile."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was called")


def nothing_is_made() -> Any:
    return NothingIsMade()  # type: ignore[no-untyped-call]


def untouched() -> Iterator[Tensor]:
    """Parameters that nobody may even look at."""
    raise AssertionError("the parameters were read")
    yield


# By mistake: the error, words of its message, and the call.
MISTAKES: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "rule": (
        UnknownNameError,
        "'admw'; did you mean 'adamw'.*available: adagrad, adam, ",
        {"rule": "admw"},
    ),
    "no rule": (UnknownNameError, "available: adagrad, adam, ", {"rule": "xyz"}),
    "bits": (OptionError, "bits=7: expected one of 32, 8", {"bits": 7}),
    "bits in words": (OptionError, "bits='8': expected one of 32, 8", {"bits": "8"}),
    "negative lr": (OptionError, "lr=-1: expected a number >= 0", {"lr": -1}),
    "lr in words": (OptionError, "lr='x': expected a number >= 0", {"lr": "x"}),
    "lr of NaN": (OptionError, "lr=nan: expected a number >= 0", {"lr": float("nan")}),
    "infinite lr": (OptionError, "lr=inf: expected a number >= 0", {"lr": float("inf")}),
    "no lr": (OptionError, "lr=None: expected a number >= 0", {"lr": None}),
    "one beta": (
        OptionError,
        r"betas=\(0.9,\): expected 2 numbers \(beta1, beta2\)",
        {"betas": (0.9,)},
    ),
    "three betas": (OptionError, "expected 2 numbers", {"betas": (0.9, 0.9, 0.9)}),
    "a beta of 1": (
        OptionError,
        "beta2=1.0: expected a number >= 0 and < 1",
        {"betas": (0.9, 1.0)},
    ),
    "a number for betas": (OptionError, "betas=0.9: expected 2 numbers", {"betas": 0.9}),
    "unknown argument": (
        UnknownNameError,
        "'weight_decya'; did you mean 'weight_decay'.*it has: lr, betas, eps, weight_decay",
        {"weight_decya": 0.1},
    ),
    "another rule's": (UnknownNameError, "'centered'.*it has: lr, betas", {"centered": True}),
    "misspelled option": (UnknownNameError, "did you mean 'bits'", {"bit": 8}),
    "unknown state": (
        UnknownNameError,
        r"no state 'mm' to quantize; did you mean 'm'\?; it has: m, v, vmax",
        {"state_types": {"mm": "linear8"}},
    ),
    "unknown type": (
        UnknownNameError,
        "no quant type 'dynamic'; did you mean 'dynamic8'.*linear8",
        {"state_types": "dynamic"},
    ),
    "unknown type of a state": (
        UnknownNameError,
        "did you mean 'linear8'",
        {"state_types": {"v": "liner8"}},
    ),
    "state types in a list": (OptionError, "state_types=", {"state_types": ["linear8"]}),
    "size": (OptionError, "min_8bit_size=-1: expected a whole number", {"min_8bit_size": -1}),
    "size of a fraction": (OptionError, "min_8bit_size=0.5", {"min_8bit_size": 0.5}),
    "paged": (OptionError, "paged='yes': expected True, False or 'managed'", {"paged": "yes"}),
    "option of the engine": (UnknownNameError, "did you mean 'overrides'", {"overides": {}}),
    "betas in words": (OptionError, "betas='x': expected numbers, such as", {"betas": "x"}),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_named_before_anything_is_made(what: str) -> None:
    error, message, call = MISTAKES[what]
    rule = call.get("rule", "adamw")
    arguments = {name: value for name, value in call.items() if name != "rule"}
    for params in (untouched(), None):
        with nothing_is_made(), pytest.raises(error, match=f"(?s){message}") as caught:
            create(rule, params, **arguments)
        assert isinstance(caught.value, BnbxError)
        assert isinstance(caught.value, ValueError)


# The rest are no mistakes in a group: no argument of it, or a tag that somebody else may want.
ELSEWHERE = {"rule", "no rule", "another rule's", "option of the engine", "betas in words"}
IN_A_GROUP = sorted(MISTAKES.keys() - ELSEWHERE)


@pytest.mark.parametrize("what", IN_A_GROUP)
def test_mistakes_in_a_group_are_named_and_leave_no_group(what: str) -> None:
    error, message, call = MISTAKES[what]
    optimizer = create("adamw", [parameter()])
    with pytest.raises(error, match=f"(?s){message.split('.*')[0]}"):
        optimizer.add_param_group({"params": parameter(), **call})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(error):
        create("adamw", [{"params": parameter(), **call}])


def test_groups_may_carry_tags() -> None:
    """Schedulers and trainers keep notes of their own in groups."""
    tags = dict(name="head", lr_scale=0.5, initial_lr=0.1, max_lr=0.2, min_lr=0.0, swa_lr=0.1)
    tags |= dict(no_weight_decay=1.0, weight_decay_mult=0.5, max_norm=1.0, steps=3, lr_x=0.1)
    optimizer = create("adamw", [{"params": parameter(), **tags}])
    assert optimizer.param_groups[0].items() >= tags.items()


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_groups_of_a_scheduled_optimizer_can_be_used_again(rule: str) -> None:
    p = parameter()
    arguments: dict[str, Any] = {"momentum": 0.9} if rule == "sgd" else {}
    first = create(rule, [p], **arguments)
    torch.optim.lr_scheduler.OneCycleLR(first, max_lr=0.1, total_steps=10)
    second = create(rule, [dict(group) for group in first.param_groups])
    assert second.param_groups[0]["max_momentum"] == 0.95


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(nesterov=True), "nesterov needs momentum > 0 and dampening = 0"),
        (dict(nesterov=True, momentum=0.9, dampening=0.1), "nesterov needs momentum"),
        (dict(nesterov="yes", momentum=0.9), "nesterov='yes': expected True or False"),
        (dict(momentum=-0.1), "momentum=-0.1: expected a number >= 0"),
    ],
)
def test_mistakes_between_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        create("sgd", untouched(), **arguments)


def test_no_parameters() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        create("adamw", [])


def test_rule_of_another_type() -> None:
    with pytest.raises(OptionError, match="rule=3: expected a name or"):
        create(3)  # type: ignore[call-overload]


# ---- defaults and factories


@pytest.mark.parametrize("rule", optimizers().names())
def test_defaults_are_those_of_the_spec(rule: str) -> None:
    spec = optimizers().get(rule)
    optimizer = create(rule, [parameter()])
    expected = {name: spec.default(name) for name in spec.arguments}
    expected |= options_of(spec)
    assert optimizer.defaults == expected
    assert {name: optimizer.param_groups[0][name] for name in expected} == expected


@pytest.mark.parametrize(
    ("rule", "model"),
    [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)],
)
def test_defaults_are_those_of_torch(rule: str, model: Any) -> None:
    defaults = create(rule, [parameter()]).defaults
    theirs = inspect.signature(model).parameters
    common = defaults.keys() & theirs.keys()
    assert common >= {"lr", "weight_decay"}
    for name in common:
        assert defaults[name] == theirs[name].default


def test_small_tensors_keep_float32_states() -> None:
    params = [parameter(4095), parameter(4096)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = create("adamw", params)
    optimizer.step()
    assert [optimizer.state[p]["m"].dtype for p in params] == [torch.float32, torch.uint8]


def test_repr_tells_the_values() -> None:
    optimizer = AdamW8bit([parameter()], lr=0.125, state_types={"m": "linear8"})
    text = repr(optimizer)
    assert text.startswith("AdamW8bit (")
    for words in ("lr: 0.125", "betas: (0.9, 0.999)", "bits: 8", "state_types: {'m': 'linear8'}"):
        assert words in text


def test_repr_tells_the_rule_where_the_class_does_not() -> None:
    text = repr(create("lion", [parameter()]))
    assert text.startswith("Optimizer8bit of lion (\nParameter Group 0")


IMPLEMENTATIONS = {
    "capturable": (NotYetError, True, "capturable=True: a captured CUDA graph would freeze"),
    "differentiable": (OptionError, True, "differentiable=True: steps write parameters in place"),
    "foreach": (OptionError, "yes", "foreach='yes': expected one of None, True, False"),
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_implementations_are_refused_with_the_reason(name: str) -> None:
    error, value, message = IMPLEMENTATIONS[name]
    with pytest.raises(error, match=message):
        AdamW8bit([parameter()], **{name: value})
    with pytest.raises(error, match=message):
        AdamW8bit([{"params": [parameter()], name: value}])


def test_groups_of_an_optimizer_of_torch_can_be_used() -> None:
    groups = torch.optim.AdamW([parameter()]).param_groups
    assert groups[0]["capturable"] is False
    AdamW8bit(groups)


def test_factory() -> None:
    factory = create("adam", bits=8, lr=0.5)
    first, second = parameters(torch.float32, [(5000,)] * 2)
    optimizer = factory([first])
    assert isinstance(optimizer, Optimizer8bit)
    assert optimizer.spec.name == "adam"
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert factory([second], lr=0.25, betas=(0.5, 0.5)).param_groups[0]["lr"] == 0.25
    with pytest.raises(UnknownNameError, match="did you mean 'lr'"):
        factory([first], lrr=1)
    with pytest.raises(AttributeError):
        factory.spec = None  # type: ignore[misc, assignment]


def test_a_spec_may_stand_for_its_name() -> None:
    spec = optimizers().get("lion")
    assert create(spec, [parameter()]).spec is spec


# ---- classes


@pytest.mark.parametrize(("name", "rule", "bits", "paged"), CLASSES)
def test_class_is_its_rule(name: str, rule: str, bits: int, paged: bool) -> None:
    made = getattr(optim, name)
    params = parameters(torch.float32, [(5000,)])
    others = copies(params)
    values = {"lr": 1e-2, **STATEFUL.get(rule, {})}
    optimizer = made(params, **values)
    other = create(rule, others, bits=bits, paged=paged, **values)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer, Optimizer8bit)
    assert made.__name__ == made.__qualname__ == name
    assert made.__module__ == "bnbx.optim"
    assert optimizer.defaults == other.defaults
    grads = gradients(params)
    set_gradients(params, grads)
    set_gradients(others, grads)
    optimizer.step()
    other.step()
    assert_same(optimizer, other)
    assert pickle.loads(pickle.dumps(made)) is made


def test_all_classes_are_listed() -> None:
    listed = {
        name
        for name in optim.__all__
        if isinstance(getattr(optim, name), type)
        and issubclass(getattr(optim, name), Optimizer8bit)
    }
    bases = "Optimizer8bit Optimizer1State Optimizer2State RuleOptimizer PytorchLARS".split()
    assert listed == {name for name, *_ in CLASSES} | {*bases}
    assert {rule for _, rule, *_ in CLASSES} <= set(optimizers().names())


@pytest.mark.parametrize(("name", "rule", "bits", "paged"), CLASSES)
def test_signature_tells_the_arguments(name: str, rule: str, bits: int, paged: bool) -> None:
    spec = optimizers().get(rule)
    found = inspect.signature(getattr(optim, name)).parameters
    assert found.keys() >= {"params", "args", *spec.arguments, *options_of(spec), *ALIASES}
    own = [argument for argument in found if argument in spec.arguments]
    assert sorted(own) == sorted(spec.arguments)
    for option, value in (("bits", bits), ("paged", paged)):
        assert found[option].default == value
        assert found[option].kind is inspect.Parameter.KEYWORD_ONLY
    for argument in spec.arguments:
        assert found[argument].default == spec.default(argument)


@pytest.mark.parametrize(("name", "rule", "bits", "paged"), CLASSES)
def test_docstring_tells_arguments_and_rule(name: str, rule: str, bits: int, paged: bool) -> None:
    spec, made = optimizers().get(rule), getattr(optim, name)
    text = inspect.getdoc(made) or ""
    assert ("paged" in text.splitlines()[0]) == paged
    assert (f"{bits}-bit" in text.splitlines()[0]) == name.endswith("bit")
    for argument, parameter in inspect.signature(made).parameters.items():
        entry = re.search(rf"^    {argument}: (.*?)\.$", text, re.DOTALL | re.MULTILINE)
        assert entry, argument
        if argument != "params":
            told = re.sub(r"\s+", " ", entry[1])
            assert told.endswith(f"(default {parameter.default!r})")
            assert not told.startswith("(default"), f"{argument} is not described"
    for line in spec.element_code.strip().splitlines():
        assert f"    {line.strip()}\n" in text


def test_what_a_class_fixes() -> None:
    for made, arguments in (
        (optim.AdamW8bit, {"bits": 4}),
        (optim.AdamW32bit, {"optim_bits": 8}),
        (optim.Adagrad32bit, {"bits": 8}),
        (optim.Lion8bit, {"bits": 32}),
        (optim.PagedAdamW, {"paged": False}),
        (optim.PagedLion8bit, {"is_paged": False}),
    ):
        with pytest.raises(OptionError, match=rf"{made.__name__}: .*contradicts the class"):
            made(untouched(), **arguments)
    assert optim.AdamW8bit([parameter()], optim_bits=8).optim_bits == 8
    assert optim.AdamW([parameter()], optim_bits=8).optim_bits == 8
    assert optim.AdamW([parameter()], bits=4).optim_bits == 4
    assert optim.AdamW([parameter()], paged=True).is_paged
    assert optim.PagedAdamW([parameter()], is_paged=True).is_paged
    with pytest.raises(OptionError, match="bits is given twice"):
        optim.AdamW(untouched(), bits=8, optim_bits=8)


def test_the_default_that_bitsandbytes_has_in_8_bit_classes() -> None:
    """`Adam8bit(optim_bits=32)` is all that bitsandbytes allows, and 8 bits there."""
    for made in (optim.Adam8bit, optim.AdamW8bit, optim.PagedAdam8bit, optim.PagedAdamW8bit):
        with pytest.warns(BnbxWarning, match=r"bits=32, the default.*stands for bits=8"):
            optimizer = made([parameter()], 1e-3, (0.9, 0.99), 1e-8, 0.0, False, 32)
        assert optimizer.optim_bits == 8


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_positional_arguments_are_those_of_torch(name: str) -> None:
    """Up to where the two lists part."""
    ours = list(inspect.signature(getattr(optim, name)).parameters)[1:5]
    theirs = list(inspect.signature(getattr(torch.optim, name)).parameters)[1:5]
    assert ours == theirs
    values = [0.5, 0.25, 0.0, 0.125] if name == "SGD" else [0.5, (0.5, 0.25), 1e-3, 0.125]
    optimizer = getattr(optim, name)([parameter()], *values)
    assert [optimizer.param_groups[0][argument] for argument in ours] == values


def test_wrong_calls_of_a_class() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'betas'"):
        AdamW8bit(untouched(), beta=(0.9, 0.9))
    with pytest.raises(TypeError, match=r"AdamW8bit.*too many positional arguments"):
        AdamW8bit(untouched(), 1e-3, (0.9, 0.9), 1e-8, 0.1, False, 8, None, 4096, False, 8)
    with pytest.raises(UnknownNameError, match=r"AdamW8bit has no argument 'page_dri'.*'page_dir'"):
        AdamW8bit(untouched(), page_dri="x")
    with pytest.raises(TypeError, match=r"AdamW8bit.*multiple values for argument 'lr'"):
        AdamW8bit(untouched(), 1e-3, lr=1e-3)
    with pytest.raises(TypeError, match="params"):
        AdamW8bit()


def test_subclass() -> None:
    class Slow(AdamW8bit):  # type: ignore[misc]
        """One tenth of the learning rate."""

        def __init__(self, params: Any, lr: float = 1e-2) -> None:
            super().__init__(params, lr / 10, weight_decay=0.0)

        def step(self, closure: Any = None) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            return super().step(closure)

    params = parameters(torch.float32, [(5000,)])
    others = copies(params)
    slow, plain = Slow(params), AdamW8bit(others, lr=1e-3, weight_decay=0.0)
    set_gradients(params, gradients(params))
    others[0].grad = params[0].grad
    slow.step()
    plain.step()
    assert slow.calls == 1
    assert equal(params[0], others[0])
    assert repr(slow).startswith("Slow (")


def test_a_second_moment_in_a_type_without_a_table_for_it_is_warned_of() -> None:
    """Half of the codes wasted, small values zero: such runs explode."""
    with pytest.warns(BnbxWarning, match=r"'v' is never negative.*'nf4' has no table"):
        create("adamw", [torch.zeros(5000, requires_grad=True)], state_types="nf4")
    create("adamw", [torch.zeros(5000, requires_grad=True)], state_types={"m": "nf4"})
    create("adamw", [torch.zeros(10, requires_grad=True)], state_types="nf4")  # stays in float32


@pytest.mark.parametrize(("name", "meant"), [("nf4", "state4"), ("nf8", "dynamic8")])
def test_the_type_proposed_is_one_that_a_width_of_states_stands_for(name: str, meant: str) -> None:
    """And not the first of the list, which has two bits."""
    state._warn_once.cache_clear()
    with pytest.warns(BnbxWarning, match=rf"choose by state: state_types={{'v': '{meant}', ...}}"):
        create("adamw", [torch.zeros(5000, requires_grad=True)], state_types=name)


def test_other_names_of_options_work_in_groups_and_overrides() -> None:
    p, q = (torch.zeros(5000, requires_grad=True) for _ in range(2))
    groups: list[dict[str, Any]] = [{"params": [p], "optim_bits": 32}, {"params": [q]}]
    optimizer = create("adamw", groups)
    assert set(optimizer.resolved(p).state_types.values()) == {"float32"}
    assert "float32" not in optimizer.resolved(q).state_types.values()
    optimizer = create("adamw", [("p", p), ("q", q)], overrides={"q": {"optim_bits": 32}})
    assert set(optimizer.resolved(q).state_types.values()) == {"float32"}


@pytest.mark.parametrize("bits", [8.0, 32.0, True])
def test_bits_are_a_whole_number(bits: Any) -> None:
    with pytest.raises(OptionError, match="bits="):
        create("adamw", [torch.zeros(3, requires_grad=True)], bits=bits)
