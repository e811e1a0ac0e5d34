"""Overrides from GlobalOptimManager reach the states and the update, whenever they are given."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnbx.errors import OptionError, UnknownNameError
from bnbx.optim import create
from bnbx.optimizers.manager import GlobalOptimManager
from optimizers.compare import equal
from optimizers.managing import forgetful_manager


@pytest.fixture(autouse=True)
def manager() -> Iterator[GlobalOptimManager]:
    with forgetful_manager() as found:
        yield found


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 50, dtype=dtype)
        self.body = nn.Linear(50, 100, dtype=dtype)
        self.head = nn.Linear(100, 50, dtype=dtype)


def step(optimizer: torch.optim.Optimizer, value: float = 1.0) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.full_like(p, value)
    optimizer.step()


def dtypes(optimizer: torch.optim.Optimizer, *params: Tensor) -> list[torch.dtype]:
    """Of the first moments."""
    return [optimizer.state[p]["m"].dtype for p in params]


FULL, CODES = torch.float32, torch.uint8
Say = Callable[[GlobalOptimManager, Model], None]
WAYS: Mapping[str, Say] = {
    "parameter": lambda manager, model: manager.override_config(model.embed.weight, "bits", 32),
    "old name": lambda manager, model: manager.override_config(
        [model.embed.weight], key_value_dict={"optim_bits": 32}
    ),
    "module": lambda manager, model: manager.register_module_override(
        model.embed, "weight", {"optim_bits": 32}
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("when", ["before .to", "after .to", "after create", "moved after create"])
def test_an_override_is_heard_whenever_it_is_given(
    manager: GlobalOptimManager, way: str, when: str
) -> None:
    """The documented order of bitsandbytes, in which 0.4x did nothing, is among them."""
    model = Model()
    manager.register_parameters(model.parameters())
    say = WAYS[way]
    if when == "before .to":
        say(manager, model)
    if when != "moved after create":
        model = model.to(torch.bfloat16)
    if when == "after .to":
        say(manager, model)
    optimizer = create("adamw", model.parameters(), bits=8)
    if when in ("after create", "moved after create"):
        say(manager, model)
    if when == "moved after create":
        model = model.to(torch.bfloat16)
    step(optimizer)
    params = (model.embed.weight, model.body.weight, model.head.weight)
    assert dtypes(optimizer, *params) == [FULL, CODES, CODES]


def test_other_rules_of_the_parameter(manager: GlobalOptimManager) -> None:
    """Values of the update itself: each parameter steps as it would in a group of its own."""
    model, other = Model(), Model()
    other.load_state_dict(model.state_dict())
    manager.override_config(model.embed.weight, "lr", 0.5)
    manager.register_module_override(
        model.body, "weight", {"betas": (0.5, 0.5), "weight_decay": 0.3}
    )
    overridden = create("adamw", model.parameters(), lr=0.1)
    groups: list[dict[str, Any]] = [
        {"params": [other.embed.weight], "lr": 0.5},
        {"params": [other.body.weight], "betas": (0.5, 0.5), "weight_decay": 0.3},
        {"params": [other.body.bias, other.head.weight, other.head.bias]},
    ]
    grouped = create("adamw", groups, lr=0.1)
    for value in (1.0, -0.5, 0.25):
        step(overridden, value)
        step(grouped, value)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert equal(p, q), name
        for key, saved in overridden.state[p].items():
            assert equal(saved, grouped.state[q][key]), (name, key)


def test_an_override_wins_over_the_group(manager: GlobalOptimManager) -> None:
    model = Model()
    manager.override_config(model.embed.weight, "lr", 0.0)
    manager.override_config(model.embed.weight, "weight_decay", 0.0)
    optimizer = create("adamw", [{"params": list(model.parameters()), "lr": 0.5}])
    before = [p.detach().clone() for p in model.parameters()]
    step(optimizer)
    changed = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert changed == [False, True, True, True, True]


def test_hyperparameters_may_be_overridden_in_a_run(manager: GlobalOptimManager) -> None:
    model = Model()
    optimizer = create("adamw", model.parameters(), lr=0.1, weight_decay=0.0)
    step(optimizer)
    manager.override_config(model.head.bias, "lr", 0.0)
    before = model.head.bias.detach().clone()
    step(optimizer)
    assert torch.equal(model.head.bias, before)
    manager.initialize()
    step(optimizer)
    assert not torch.equal(model.head.bias, before)


def test_bits_cannot_change_in_a_run(manager: GlobalOptimManager) -> None:
    """Nor is any parameter updated by the step that says so."""
    model = Model()
    optimizer = create("adamw", model.parameters())
    step(optimizer)
    manager.register_module_override(model.embed, "weight", {"bits": 32})
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(OptionError, match="cannot change during a run"):
        step(optimizer)
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("error", "words", "key", "value"),
    [
        (OptionError, r"bits=7: expected one of", "bits", 7),
        (OptionError, r"lr=-1", "lr", -1),
        (OptionError, r"betas=0\.9", "betas", 0.9),
        (UnknownNameError, "'momentum'", "momentum", 0.9),  # of other rules
    ],
)
def test_wrong_values_are_errors_of_whoever_asks(
    manager: GlobalOptimManager, error: type[Exception], words: str, key: str, value: Any
) -> None:
    model = Model()
    optimizer = create("adamw", model.parameters())
    manager.override_config(model.head.bias, key, value)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(error, match=words):
        step(optimizer)
    assert not any(optimizer.state.values())
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
    with pytest.raises(error, match=words):
        create("adamw", model.parameters())
    create("adamw", model.body.parameters())  # has none of it


def test_replaced_parameters(manager: GlobalOptimManager) -> None:
    model = Model()
    manager.register_module_override(model.embed, "weight", {"bits": 32})
    first = create("adamw", model.parameters())
    step(first)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.to(torch.bfloat16)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    second = create("adamw", model.parameters())
    step(second)
    assert dtypes(second, model.embed.weight, model.body.weight) == [FULL, CODES]
    step(first)  # goes on with the parameters it has


def test_a_parameter_that_is_replaced_between_optimizer_and_group(
    manager: GlobalOptimManager,
) -> None:
    model = Model()
    manager.register_module_override(model.embed, "weight", {"bits": 32})
    optimizer = create("adamw", model.body.parameters())
    step(optimizer)
    model.embed.weight = nn.Parameter(torch.zeros(100, 50))
    optimizer.add_param_group({"params": [model.embed.weight]})
    step(optimizer)
    assert dtypes(optimizer, model.embed.weight, model.body.weight) == [FULL, CODES]


def test_one_override_for_all_optimizers(manager: GlobalOptimManager) -> None:
    model = Model()
    manager.override_config(model.embed.weight, "bits", 32)
    for rule in ("adam", "adamw", "adam"):
        optimizer = create(rule, model.parameters())
        step(optimizer)
        assert dtypes(optimizer, model.embed.weight) == [FULL]


def test_an_optimizer_keeps_no_dead_model(manager: GlobalOptimManager) -> None:
    model = Model()
    manager.override_config(model.embed.weight, "bits", 32)
    manager.register_module_override(model.head, "weight", {"bits": 32})
    optimizer = create("adamw", model.parameters())
    step(optimizer)
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None
    step(optimizer)
    del optimizer
    gc.collect()
    assert manager.empty


COPIES = pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["deepcopy", "pickle"],
)


@COPIES
@pytest.mark.parametrize("way", WAYS)
def test_copies_have_the_overrides_of_the_original(
    manager: GlobalOptimManager, way: str, copied: Callable[[Any], Any]
) -> None:
    """Their states are as they were, so that no step could follow without."""
    model = Model()
    WAYS[way](manager, model)
    manager.override_config(model.body.weight, "lr", 0.0)
    optimizer = create("adamw", model.parameters(), lr=0.5, weight_decay=0.0)
    step(optimizer)
    twin, other = copied((model, optimizer))
    before = twin.body.weight.detach().clone()
    step(optimizer)
    step(other)
    assert dtypes(other, twin.embed.weight, twin.head.weight) == [FULL, CODES]
    assert equal(twin.body.weight, before)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert equal(p, q)
    origins = [manager.layers_for(p)[0][0] for p in (model.embed.weight, twin.embed.weight)]
    assert origins[0] == origins[1]
    later = create("adamw", twin.parameters())
    step(later)
    assert dtypes(later, twin.embed.weight) == [FULL]


@COPIES
def test_a_copy_of_a_copy(manager: GlobalOptimManager, copied: Callable[[Any], Any]) -> None:
    """Also in a process that knows nothing of the original."""
    model = Model()
    manager.override_config(model.embed.weight, "bits", 32)
    optimizer = create("adamw", model.parameters())
    step(optimizer)
    other = copied(copied(optimizer))
    step(other)
    kept = pickle.dumps(optimizer)
    manager.initialize()
    again = pickle.loads(kept)
    step(again)
    assert dtypes(again, again.param_groups[0]["params"][0]) == [FULL]


def test_what_was_said_of_a_parameter_stays(manager: GlobalOptimManager) -> None:
    """A shallow copy shares its parameters, and a pickle may be of before."""
    model = Model()
    manager.override_config(model.embed.weight, "lr", 0.5)
    optimizer = create("adamw", model.parameters())
    version, said = manager.version, manager.layers_for(model.embed.weight)
    assert copy.copy(optimizer).resolved(model.embed.weight).hyper["lr"] == 0.5
    assert manager.version == version
    assert manager.layers_for(model.embed.weight) == said


def test_overrides_of_others_stay_with_them(manager: GlobalOptimManager) -> None:
    model = Model()
    manager.override_config(model.embed.weight, "lr", 0.0)
    twin = copy.deepcopy(create("adamw", model.parameters()))
    p, q = twin.param_groups[0]["params"][:2]
    manager.override_config(model.embed.weight, "lr", 0.25)
    assert twin.resolved(p).hyper["lr"] == 0.0
    assert manager.layers_for(q) == ()


def test_a_checkpoint_of_overridden_states_is_loaded(manager: GlobalOptimManager) -> None:
    model, other = Model(), Model()
    other.load_state_dict(model.state_dict())
    for m in (model, other):
        manager.register_module_override(m.embed, "weight", {"bits": 32})
    first, second = (create("adamw", m.parameters(), lr=0.1) for m in (model, other))
    step(first)
    step(second, 3.0)
    other.load_state_dict(model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert dtypes(second, other.embed.weight, other.body.weight) == [FULL, CODES]
    step(first)
    step(second)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert equal(p, q)


def test_without_overrides_nobody_is_asked(
    manager: GlobalOptimManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where there are some, only until nothing changes."""
    model = Model()
    optimizer = create("adamw", model.parameters())
    asked: list[Tensor] = []
    real = GlobalOptimManager.layers_for

    def layers_for(self: GlobalOptimManager, p: Tensor) -> Any:
        asked.append(p)
        return real(self, p)

    monkeypatch.setattr(GlobalOptimManager, "layers_for", layers_for)
    step(optimizer)
    assert asked == []
    manager.override_config(model.embed.weight, "lr", 0.5)
    step(optimizer)
    assert len(asked) >= 5
    asked.clear()
    step(optimizer)
    assert asked == []
