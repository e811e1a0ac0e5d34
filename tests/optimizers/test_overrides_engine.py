"""Overrides by name reach the states and the update, or say at once why they cannot."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnbx.errors import OptionError, UnknownNameError
from bnbx.optim import AdamW8bit, create
from bnbx.optimizers.manager import GlobalOptimManager
from optimizers.compare import equal
from optimizers.managing import forgetful_manager


@pytest.fixture(autouse=True)
def manager() -> Iterator[GlobalOptimManager]:
    with forgetful_manager() as found:
        yield found


def model() -> nn.Module:
    return nn.ModuleDict(
        {"embed": nn.Embedding(100, 50), "body": nn.Linear(50, 100), "head": nn.Linear(100, 50)}
    )


def step(optimizer: torch.optim.Optimizer, value: float = 1.0) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.full_like(p, value)
    optimizer.step()


def dtypes(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, torch.dtype]:
    """Of the first moments, by name."""
    return {name: optimizer.state[p]["m"].dtype for name, p in module.named_parameters()}


FULL, CODES = torch.float32, torch.uint8
EXPECTED = {
    "embed.weight": FULL,
    "body.weight": CODES,
    "body.bias": FULL,
    "head.weight": CODES,
    "head.bias": FULL,
}


@pytest.mark.parametrize("pattern", ["*embed*", "embed.weight", r"regex:^embed\."])
def test_bits_by_name(pattern: str) -> None:
    module = model()
    optimizer = create(
        "adamw", module.named_parameters(), bits=8, overrides={pattern: {"bits": 32}}
    )
    step(optimizer)
    assert dtypes(optimizer, module) == EXPECTED


def test_by_factory_and_by_class() -> None:
    overrides = {"*embed*": {"bits": 32}}
    factory = create("adamw", overrides=overrides)
    for make in (factory, lambda params: AdamW8bit(params, overrides=overrides)):
        module = model()
        optimizer = make(module.named_parameters())
        step(optimizer)
        assert dtypes(optimizer, module) == EXPECTED


def test_values_of_the_update_by_name() -> None:
    """Each parameter steps as it would in a group of its own; the later pattern wins."""
    module, other = model(), model()
    other.load_state_dict(module.state_dict())
    overridden = create(
        "adamw",
        module.named_parameters(),
        lr=0.1,
        overrides={
            "*.bias": {"lr": 0.9, "weight_decay": 0.0},
            r"regex:\.bias$": {"lr": 0.5},
            "head.*": {"betas": (0.5, 0.5)},
        },
    )
    named = dict(other.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [named["embed.weight"], named["body.weight"]]},
        {"params": [named["body.bias"]], "lr": 0.5, "weight_decay": 0.0},
        {"params": [named["head.weight"]], "betas": (0.5, 0.5)},
        {"params": [named["head.bias"]], "betas": (0.5, 0.5), "lr": 0.5, "weight_decay": 0.0},
    ]
    grouped = create("adamw", groups, lr=0.1)
    for value in (1.0, -0.5, 0.25):
        step(overridden, value)
        step(grouped, value)
    for name, p in module.named_parameters():
        assert equal(p, named[name]), name


def test_what_was_said_by_object_wins(manager: GlobalOptimManager) -> None:
    module = model()
    manager.override_config(module.get_parameter("embed.weight"), "bits", 8)
    optimizer = create("adamw", module.named_parameters(), overrides={"*": {"bits": 32}})
    step(optimizer)
    assert dtypes(optimizer, module) == {**dict.fromkeys(EXPECTED, FULL), "embed.weight": CODES}


def test_overrides_win_over_the_group() -> None:
    module = model()
    groups: list[dict[str, Any]] = [
        {"params": module.get_submodule("embed").named_parameters(), "bits": 8},
        {"params": module.get_submodule("body").named_parameters("body"), "bits": 32},
    ]
    optimizer = create("adamw", groups, overrides={"weight": {"bits": 32}, "body.w*": {"bits": 8}})
    step(optimizer)
    embed, body = (group["params"][0] for group in optimizer.param_groups)
    assert [optimizer.state[p]["m"].dtype for p in (embed, body)] == [FULL, CODES]


def test_groups_added_later_have_names_too() -> None:
    module = model()
    optimizer = create(
        "adamw",
        module.get_submodule("body").named_parameters("body"),
        overrides={"*.weight": {"bits": 32}},
    )
    head = module.get_submodule("head")
    optimizer.add_param_group({"params": head.named_parameters("head")})
    step(optimizer)
    for p in (module.get_parameter("body.weight"), module.get_parameter("head.weight")):
        assert optimizer.state[p]["m"].dtype is FULL
    embed = module.get_submodule("embed")
    with pytest.raises((OptionError, ValueError), match="names"):
        optimizer.add_param_group({"params": list(embed.parameters())})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize(
    ("error", "words", "overrides"),
    [
        (OptionError, "nearest: 'embed.weight'", {"*embd*": {"bits": 32}}),
        (OptionError, "no regular expression", {"regex:(": {"bits": 32}}),
        (OptionError, "expected arguments by name", {"*embed*": 32}),
        (OptionError, "overrides=", ["*embed*"]),
        (OptionError, "bits=7: expected one of", {"*embed*": {"bits": 7}}),
        (OptionError, "weight_decay=-1", {"*": {"weight_decay": -1}}),
        (UnknownNameError, "did you mean 'bits'", {"*embed*": {"bit": 32}}),
        (UnknownNameError, "'momentum'", {"*": {"momentum": 0.9}}),
        (UnknownNameError, "did you mean 'linear8'", {"*": {"state_types": "liner8"}}),
    ],
)
def test_mistakes_are_named_when_the_optimizer_is_made(
    error: type[Exception], words: str, overrides: Any
) -> None:
    with pytest.raises(error, match=words):
        create("adamw", model().named_parameters(), overrides=overrides)


def test_parameters_without_names() -> None:
    with pytest.raises(OptionError, match=r"pass model\.named_parameters\(\)"):
        create("adamw", model().parameters(), overrides={"*": {"bits": 32}})
    create("adamw", model().parameters(), overrides={})


def test_names_without_overrides() -> None:
    """With every torch: before 2.6 it takes no names itself."""
    module = model()
    optimizer = create("adamw", module.named_parameters())
    step(optimizer)
    assert optimizer.param_groups[0]["param_names"] == list(EXPECTED)
    assert dtypes(optimizer, module) == {**EXPECTED, "embed.weight": CODES}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_keep_overrides(copied: Callable[[Any], Any]) -> None:
    module = model()
    optimizer = create(
        "adamw",
        module.named_parameters(),
        lr=0.5,
        weight_decay=0.0,
        overrides={"*.bias": {"lr": 0.0}, "embed.*": {"bits": 32}},
    )
    other = copied(optimizer)
    params: list[Tensor] = other.param_groups[0]["params"]
    before = [p.detach().clone() for p in params]
    step(other)
    moved = [not torch.equal(p, q) for p, q in zip(params, before, strict=True)]
    assert moved == [True, True, False, True, False]
    assert other.state[params[0]]["m"].dtype is FULL


def test_a_checkpoint_is_loaded_under_the_same_overrides() -> None:
    first, second = model(), model()
    overrides: dict[str, dict[str, float]] = {"*embed*": {"bits": 32}, "*.bias": {"lr": 0.5}}
    one, two = (
        create("adamw", m.named_parameters(), lr=0.1, overrides=overrides) for m in (first, second)
    )
    step(one)
    second.load_state_dict(first.state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert dtypes(two, second) == EXPECTED
    step(one)
    step(two)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert equal(p, q)


@pytest.mark.parametrize("given", ["nf44", {"m": "nf44"}, {"momentum": "nf4"}])
def test_an_override_of_types_that_misses_a_name_is_named(given: Any) -> None:
    with pytest.raises(UnknownNameError, match=r"^overrides\['\*embed\*'\]: "):
        create("adamw", model().named_parameters(), overrides={"*embed*": {"state_types": given}})
