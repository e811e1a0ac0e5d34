"""The familiar classes take what bitsandbytes and torch.optim take, in their orders.

The signatures of the installed bitsandbytes are the oracle for the present order; those of 0.49.1,
which are not installed, are written down here.
"""

from __future__ import annotations

import inspect
from inspect import Parameter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx import optim
from bnbx.errors import BnbxWarning, OptionError

bnb = pytest.importorskip("bitsandbytes", reason="it is the oracle; from the extra `peers`")
THEIRS = sorted(
    name
    for name, each in vars(bnb.optim).items()
    if isinstance(each, type) and issubclass(each, torch.optim.Optimizer)
)
BASES = ("Optimizer1State", "Optimizer2State")
# By class (or all) and argument: how a default differs, and why.
DIFFERENT: dict[tuple[str, str], tuple[Any, Any, str]] = {
    ("LARS", "lr"): (Parameter.empty, 1e-3, "required there; every rule has a default here"),
    ("LARS8bit", "lr"): (Parameter.empty, 1e-3, "as LARS"),
    ("LARS32bit", "lr"): (Parameter.empty, 1e-3, "as LARS"),
    ("SGD", "lr"): (Parameter.empty, 1e-3, "required there; torch has this default"),
    ("SGD8bit", "lr"): (Parameter.empty, 1e-3, "as SGD"),
    ("SGD32bit", "lr"): (Parameter.empty, 1e-3, "as SGD"),
    ("Adam8bit", "optim_bits"): (32, 8, "there it says 32 and means 8; 32 is taken with a warning"),
    ("AdamW8bit", "optim_bits"): (32, 8, "as Adam8bit"),
    ("PagedAdam8bit", "optim_bits"): (32, 8, "as Adam8bit"),
    ("PagedAdamW8bit", "optim_bits"): (32, 8, "as Adam8bit"),
    ("PagedAdam", "is_paged"): (False, True, "there it is ignored; here it is what the class does"),
    ("PagedAdam8bit", "is_paged"): (False, True, "as PagedAdam"),
    ("PagedAdam32bit", "is_paged"): (False, True, "as PagedAdam"),
}


def parameter() -> Tensor:
    return torch.zeros(5000, requires_grad=True)


def theirs(name: str) -> Any:
    return getattr(bnb.optim.optimizer if name in BASES else bnb.optim, name)


def by_place(made: Any) -> list[Parameter]:
    parameters = inspect.signature(made).parameters.values()
    return [p for p in parameters if p.kind is Parameter.POSITIONAL_OR_KEYWORD]


@pytest.mark.parametrize("name", [*THEIRS, *BASES])
def test_order_and_defaults_are_those_of_bitsandbytes(name: str) -> None:
    ours = {p.name: p for p in by_place(getattr(optim, name))}
    expected = by_place(theirs(name))
    # amsgrad and the like come before the tail in both: the whole order is the same.
    assert list(ours)[: len(expected)] == [p.name for p in expected]
    for p in expected:
        known = DIFFERENT.get((name, p.name))
        assert (p.default, ours[p.name].default) == (known[:2] if known else (p.default,) * 2)


def test_differences_are_of_classes_that_exist() -> None:
    assert {name for name, _ in DIFFERENT} <= set(THEIRS)


def test_classes_derive_from_each_other_as_in_bitsandbytes() -> None:
    """Trainers ask `isinstance(optimizer, (AdamW, AdamW32bit))` and mean neither AdamW8bit."""
    for name in THEIRS:
        for base in THEIRS:
            ours = issubclass(getattr(optim, name), getattr(optim, base))
            assert ours == issubclass(theirs(name), theirs(base)), (name, base)


TORCHS = ("Adam", "AdamW", "Adagrad", "RMSprop", "SGD")


@pytest.mark.parametrize("name", TORCHS)
def test_every_argument_of_torch_is_there(name: str) -> None:
    ours = inspect.signature(getattr(optim, name)).parameters
    for argument, parameter in inspect.signature(getattr(torch.optim, name)).parameters.items():
        if argument != "params":
            assert ours[argument].default == parameter.default


@pytest.mark.parametrize("name", TORCHS)
def test_calls_by_position_written_for_torch_work(name: str) -> None:
    expected = by_place(getattr(torch.optim, name))
    values = [p.default for p in expected[1:]]
    values[0] = 0.5
    optimizer = getattr(optim, name)([parameter()], *values)
    reference = getattr(torch.optim, name)([parameter()], *values)
    for argument in optimizer.spec.arguments:
        assert optimizer.defaults[argument] == reference.defaults[argument], argument
    assert optimizer.optim_bits == 32


def test_orders_that_part_are_told_apart_by_type() -> None:
    """After `centered` torch has capturable, foreach, maximize; bitsandbytes has optim_bits."""
    first = (1e-2, 0.99, 1e-8, 0, 0, False)
    assert optim.RMSprop([parameter()], *first, 8).optim_bits == 8
    like_torch: Any = optim.RMSprop
    assert like_torch([parameter()], *first, False, None, True).defaults["maximize"] is True
    with pytest.raises(NotImplementedError, match="capturable"):
        like_torch([parameter()], *first, True)
    assert like_torch([parameter()], *first, maximize=True).defaults["maximize"] is True


def test_decoupled_weight_decay_of_torchs_adam() -> None:
    p, q = parameter(), parameter()
    ours = optim.Adam([p], 0.1, weight_decay=0.5, decoupled_weight_decay=True)
    theirs = torch.optim.Adam([q], 0.1, weight_decay=0.5, decoupled_weight_decay=True)
    for each in (p, q):
        with torch.no_grad():
            each.fill_(1.0)
        each.grad = torch.ones_like(each)
    ours.step()
    theirs.step()
    torch.testing.assert_close(p, q)
    assert float(p.detach()[0]) == pytest.approx(0.95 - 0.1)
    assert optim.Adam([p], decoupled_weight_decay=True).defaults["weight_decay"] == 0.0


# 0.49.1: what followed min_8bit_size in each class, and the values of a call that fills it.
OLD_TAILS: dict[str, dict[str, Any]] = {
    "Adam AdamW8bit PagedAdam32bit Lion8bit": dict(
        percentile_clipping=5, block_wise=False, is_paged=False
    ),
    "PagedAdamW8bit Lion32bit PagedLion SGD8bit Adagrad RMSprop32bit": dict(
        percentile_clipping=5, block_wise=False
    ),
    "LAMB LAMB8bit": dict(percentile_clipping=5, block_wise=False, max_unorm=0.5),
    "LARS LARS32bit": dict(percentile_clipping=5, max_unorm=0.5),
}


@pytest.mark.parametrize(
    ("name", "tail"), [(name, tail) for names, tail in OLD_TAILS.items() for name in names.split()]
)
def test_calls_by_position_written_for_0_49_work(name: str, tail: dict[str, Any]) -> None:
    made = getattr(optim, name)
    expected = [p.name for p in by_place(made)]
    places = expected[1 : expected.index("min_8bit_size") + 1]
    before = [inspect.signature(made).parameters[place].default for place in places]
    before[-1] = 1000
    if made.__name__.startswith("PagedAdam3"):
        tail = {**tail, "is_paged": True}
    with pytest.warns(BnbxWarning, match="5 after min_8bit_size is taken for percentile_clipping"):
        optimizer = made([parameter()], *before, *tail.values())
    assert optimizer.args.min_8bit_size == 1000
    assert optimizer.args.percentile_clipping == 5
    assert optimizer.args.block_wise == tail.get("block_wise", True)
    assert optimizer.args.max_unorm == tail.get("max_unorm", 0.0)
    assert made([parameter()], percentile_clipping=5).args.percentile_clipping == 5


# ---- args


@pytest.mark.parametrize("made", [optim.AdamW, optim.LAMB, optim.SGD])
def test_args_are_taken_and_told(made: Any) -> None:
    values = dict(
        optim_bits=8,
        min_8bit_size=100,
        percentile_clipping=50,
        block_wise=False,
        max_unorm=0.5,
        skip_zeros=True,
    )
    optimizer = made([parameter()], args=SimpleNamespace(**values, lr=7, other="thing"))
    assert vars(optimizer.args) == values
    assert (optimizer.optim_bits, optimizer.is_paged) == (8, False)
    assert optimizer.defaults["lr"] != 7
    for name, value in values.items():
        one = made([parameter()], args=SimpleNamespace(**{name: value}))
        default = made([parameter()]).args
        assert vars(one.args) == {**vars(default), name: value}
        assert made([parameter()], **{name: value}).args == one.args
    with pytest.raises(AttributeError):  # it is what was asked for; changing it changes nothing
        optimizer.args.optim_bits = 32


def test_wrong_args() -> None:
    with pytest.raises(OptionError, match="AdamW: args=3: expected an object with any of"):
        optim.AdamW([parameter()], args=3)
    with pytest.raises(OptionError, match="min_8bit_size is 1 by argument and 2 in args"):
        optim.AdamW([parameter()], min_8bit_size=1, args=SimpleNamespace(min_8bit_size=2))
    with pytest.raises(OptionError, match="bits=4 contradicts the class"):
        optim.AdamW8bit([parameter()], args=SimpleNamespace(optim_bits=4))
    with pytest.raises(OptionError, match="bits=7: expected one of"):
        optim.AdamW([parameter()], args=SimpleNamespace(optim_bits=7))


def test_args_of_created_optimizers() -> None:
    created = optim.create("lion", [parameter()], bits=8, max_unorm=0.5)
    assert (created.args.optim_bits, created.args.max_unorm, created.optim_bits) == (8, 0.5, 8)


@pytest.mark.parametrize("text", ["(0.5, 0.25)", "0.5,0.25", "[0.5, 0.25]", " ( 0.5 , 0.25 ) "])
def test_betas_in_a_string(text: str) -> None:
    for optimizer in (
        optim.AdamW([parameter()], betas=text),
        optim.create("adamw", [parameter()], betas=text),
        optim.create("adamw")([parameter()], betas=text),
        optim.Optimizer2State("adam", [parameter()], betas=text),
        optim.Optimizer1State("lion", [parameter()], betas=text),
    ):
        assert tuple(optimizer.defaults["betas"]) == (0.5, 0.25)
    momentum = optim.Optimizer1State("momentum", [parameter()], betas=text)
    assert (momentum.defaults["momentum"], momentum.defaults["dampening"]) == (0.5, 0.25)
    with pytest.raises(OptionError, match=r"betas='0\.9; 0\.99': expected numbers"):
        optim.AdamW([parameter()], betas="0.9; 0.99")


def test_create_knows_both_names() -> None:
    assert optim.create("adamw", [parameter()], optim_bits=32).optim_bits == 32
    assert optim.create("adamw", [parameter()], is_paged=True).is_paged
    with pytest.raises(OptionError, match="bits is given twice"):
        optim.create("adamw", [parameter()], optim_bits=32, bits=8)
