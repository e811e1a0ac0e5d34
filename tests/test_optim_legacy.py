"""`Optimizer1State`, `Optimizer2State` and `Optimizer8bit` as third parties use them.

They subclass them with arguments by position, in two orders, and call or override the methods that
handle one parameter.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx import optim
from bnbx.errors import BnbxWarning, CheckpointError, OptionError, UnknownNameError
from bnbx.optim.legacy_names import betas_of, rule_of
from bnbx.optimizers.manager import GlobalOptimManager
from bnbx.registry import optimizers
from compiled import shared_cache
from optimizers.compare import assert_same, equal

# By bitsandbytes' name: what it is here.
TRANSLATED: dict[str, tuple[str, tuple[float, ...], dict[str, Any]]] = {
    "adam": ("adamw", (0.8, 0.9), {"betas": (0.8, 0.9), "eps": 1e-4}),
    "lamb": ("lamb", (0.8, 0.9), {"betas": (0.8, 0.9), "eps": 1e-4, "max_unorm": 0.0}),
    "lion": ("lion", (0.8, 0.9), {"betas": (0.8, 0.9)}),
    "momentum": ("sgd", (0.8, 0.1), {"momentum": 0.8, "dampening": 0.1}),
    "lars": ("lars", (0.8, 0.1), {"momentum": 0.8, "dampening": 0.1, "max_unorm": 0.0}),
    "rmsprop": ("rmsprop", (0.8, 0.5), {"alpha": 0.8, "momentum": 0.5, "eps": 1e-4}),
    "adagrad": ("adagrad", (0.0, 0.0), {"eps": 1e-4}),
    "ademamix": ("ademamix", (0.8, 0.9, 0.99), {"betas": (0.8, 0.9, 0.99), "eps": 1e-4}),
    "adopt": ("adopt", (0.8, 0.9), {"betas": (0.8, 0.9), "eps": 1e-4}),
}


@pytest.fixture(scope="module", autouse=True)
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_cache(tmp_path_factory):
        yield


def parameters(numbers: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5000, generator=generator).requires_grad_() for _ in range(numbers)]


def trained(optimizer: Any, steps: int = 3) -> Any:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
    return optimizer


# ---- names and arguments


@pytest.mark.parametrize("name", TRANSLATED)
@pytest.mark.parametrize("base", [optim.Optimizer1State, optim.Optimizer2State])
def test_names_are_translated(name: str, base: Any) -> None:
    rule, betas, values = TRANSLATED[name]
    more: dict[str, Any] = (
        {"alpha": 3.0} if name == "ademamix" and base is optim.Optimizer2State else {}
    )
    if name == "ademamix" and not more:
        values = {**values, "alpha": 5.0}  # one that Optimizer1State does not take
    given: dict[str, Any] = {"eps": 1e-4} if "eps" in values else {}
    ours = base(name, parameters(), 1e-2, betas, weight_decay=0.1, optim_bits=8, **given, **more)
    other = optim.create(rule, parameters(), lr=1e-2, weight_decay=0.1, bits=8, **values, **more)
    assert ours.optimizer_name == (name if rule != "adopt" else "adopt")
    assert_same(trained(ours), trained(other))


def test_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match=r"'momentun'.*did you mean 'momentum'.*rules: ad"):
        optim.Optimizer1State("momentun", parameters())
    with pytest.raises(UnknownNameError, match="optimizer_name=3: no rule of this name"):
        optim.Optimizer1State(3, parameters())  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="no argument 'learning_rate'"):
        optim.Optimizer1State("lion", parameters(), learning_rate=1)  # type: ignore[call-arg]


def test_wrong_betas() -> None:
    with pytest.raises(OptionError, match=r"sgd: betas=\(0.9,\): expected 2 numbers \(momentum"):
        optim.Optimizer1State("momentum", parameters(), betas=(0.9,))
    with pytest.raises(OptionError, match=r"ademamix: betas=.*expected 3 numbers"):
        optim.Optimizer2State("ademamix", parameters())
    with pytest.raises(OptionError, match=r"adagrad: betas=.*but the rule has no betas"):
        optim.Optimizer1State("adagrad", parameters(), betas=(0.5, 0.5))


@pytest.mark.parametrize("rule", optimizers().names())
def test_every_rule_can_be_named(rule: str) -> None:
    members = betas_of(rule_of(rule))
    given: dict[str, Any] = {"betas": (0.9, 0.5, 0.99)[: len(members)]} if members else {}
    trained(optim.Optimizer2State(rule, parameters(), **given), 1)


def test_groups_have_betas_of_their_own() -> None:
    first, second = parameters()
    groups: list[dict[str, Any]] = [{"params": [first], "betas": (0.5, 0.25)}, {"params": [second]}]
    optimizer = optim.Optimizer1State("momentum", groups, betas=(0.9, 0.0))
    assert [group["momentum"] for group in optimizer.param_groups] == [0.5, 0.9]
    assert [group["dampening"] for group in optimizer.param_groups] == [0.25, 0.0]
    with pytest.raises(OptionError, match=r"eps=0\.5, but the rule has no eps"):
        optimizer.add_param_group({"params": parameters(1), "eps": 0.5})
    again = optim.Optimizer1State("momentum", [dict(group) for group in optimizer.param_groups])
    assert [group["momentum"] for group in again.param_groups] == [0.5, 0.9]
    adam = optim.Optimizer2State("adam", [{"params": parameters(1), "betas": (0.5, 0.25)}])
    assert adam.param_groups[0]["betas"] == (0.5, 0.25)


# ---- the order of arguments before 0.50


class Before(optim.Optimizer2State):
    """Made for 0.49: percentile_clipping and block_wise by position."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        *more: Any,
    ) -> None:
        base: Any = super().__init__
        base("adam", params, lr, (0.9, 0.99), 1e-8, 0.1, 8, None, 4096, percentile_clipping,
             block_wise, *more)  # fmt: skip


def now(params: Any, **arguments: Any) -> Any:
    values = dict(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, bits=8)
    return optim.create("adamw", params, **{**values, **arguments})


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ((), {}),
        ((100, False), {"block_wise": False}),
        ((5, True), {"percentile_clipping": 5}),
        ((5, True, 0.5), {"percentile_clipping": 5, "max_unorm": 0.5}),
        ((100, True, 0.0, True), {"skip_zeros": True}),
        ((100, True, 0.0, False, True), {"paged": True}),
    ],
)
def test_order_before_0_50(given: tuple[Any, ...], meant: dict[str, Any]) -> None:
    """Taken for max_unorm=100 and skip_zeros=True, as it was, it trains nothing."""
    with pytest.warns(BnbxWarning, match=r"Before: (100|5) after min_8bit_size is taken for perce"):
        old = Before(parameters(), 1e-2, *given)
    expected = now(parameters(), **meant)
    assert old.defaults == {**expected.defaults, "paged": meant.get("paged", False)}
    start = parameters()[0]
    assert_same(trained(old), trained(expected))
    assert not equal(old.param_groups[0]["params"][0], start)


def test_order_since_0_50() -> None:
    first = ("adam", parameters(), 1e-2, (0.9, 0.99), 1e-8, 0.1, 8, None, 4096)
    made: Any = optim.Optimizer2State
    for number in (0.5, 1, 1.0, 100.0, 0):
        optimizer = made(*first, number, True, True)
        args = optimizer.args
        assert (args.max_unorm, args.skip_zeros, optimizer.is_paged) == (number, True, True)
    mixes = optim.Optimizer2State(
        "ademamix", parameters(), 1e-2, (0.9, 0.99, 0.999), 1e-8, 0.1, 8, None, 4096, 0.0, False,
        False, 2.0, 10, 20,
    )  # fmt: skip
    assert [mixes.defaults[name] for name in ("alpha", "t_alpha", "t_beta3")] == [2.0, 10, 20]


# ---- one parameter at a time


class ByHand(optim.Optimizer2State):
    """As unsloth's QGaLore: a step of its own, over the methods of the base."""

    def __init__(self, params: Any, **arguments: Any) -> None:
        super().__init__("adam", params, 1e-2, (0.9, 0.99), 1e-8, 0.1, 8, **arguments)

    @torch.no_grad()
    def step(self, closure: Any = None, *, grad_scale: Any = None) -> Any:
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        for gindex, group in enumerate(self.param_groups):
            for pindex, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                state = self.state[p]
                state.setdefault("step", 0)
                state.setdefault("projector", "mine")
                if "state1" not in state:
                    self.init_state(group, p, gindex, pindex)
                self.prefetch_state(p)
                self.update_step(group, p, gindex, pindex)


@pytest.mark.parametrize("arguments", [{}, {"is_paged": True}, {"percentile_clipping": 5}])
def test_a_step_by_hand_is_the_step(arguments: dict[str, Any]) -> None:
    by_hand, plain = ByHand(parameters(), **arguments), now(parameters(), **arguments)
    trained(by_hand)
    trained(plain)
    for p in by_hand.param_groups[0]["params"]:
        assert by_hand.state[p].pop("projector") == "mine"
    for a, b in zip(by_hand.state.values(), plain.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert all(equal(a[key], b[key]) for key in a)
        assert a["step"] == 3


def test_low_rank_updates() -> None:
    """GaLore gives p other data for the time of the update, and states that fit it."""
    (p,) = parameters(1)
    (small,) = parameters(1)
    with torch.no_grad():
        small.set_(small[:4500].clone())  # type: ignore[call-overload]
    optimizer, plain = ByHand([p]), now([small])
    for _ in range(3):
        grad = torch.randn(4500)
        whole, p.data = p.data, torch.zeros(4500)
        small.data = torch.zeros(4500)
        p.grad, small.grad = grad.clone(), grad.clone()
        optimizer.step()
        plain.step()
        assert equal(p, small)
        p.grad = None
        p.data = whole
    assert optimizer.state[p]["m"].shape == (4500,)


def test_update_step_updates_one_parameter() -> None:
    first, second = params = parameters()
    optimizer = ByHand(params)
    group = optimizer.param_groups[0]
    for p in params:
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in params]
    version = first._version
    optimizer.init_state(group, first, 0, 0)
    assert optimizer.state[first]["step"] == 0
    optimizer.update_step(group, first, 0, 0)
    assert not equal(first, before[0])
    assert first._version > version
    assert equal(second, before[1])
    assert second not in optimizer.state
    second.grad = None
    with pytest.raises(OptionError, match=r"shape \(5000,\) has no grad"):
        optimizer.update_step(group, second, 0, 1)


def test_init_state_keeps_what_is_there() -> None:
    optimizer = trained(ByHand(parameters(1)))
    (p,) = optimizer.param_groups[0]["params"]
    before = copy.deepcopy(optimizer.state[p])
    optimizer.init_state(optimizer.param_groups[0], p, 0, 0)
    assert all(equal(before[key], optimizer.state[p][key]) for key in before)


def test_get_config_tells_what_holds() -> None:
    first, second = parameters()
    manager = GlobalOptimManager.get_instance()
    try:
        manager.override_config(second, "optim_bits", 32)
        groups: list[dict[str, Any]] = [{"params": [first], "lr": 0.5}, {"params": [second]}]
        optimizer = optim.Optimizer2State("adam", groups, 0.25, (0.8, 0.9), 1e-4, 0.1, 8)
        told = [optimizer.get_config(i, 0, optimizer.param_groups[i]) for i in (0, 1)]
        assert [each["optim_bits"] for each in told] == [8, 32]
        assert [each["lr"] for each in told] == [0.5, 0.25]
        expected = dict(betas=(0.8, 0.9), eps=1e-4, weight_decay=0.1, min_8bit_size=4096)
        expected |= dict(max_unorm=0.0, skip_zeros=False, alpha=0.0, t_alpha=None, t_beta3=None)
        assert told[0].items() >= expected.items()
    finally:
        manager.initialize()
    momentum = optim.Optimizer1State("momentum", [first], betas=(0.8, 0.1))
    assert momentum.get_config(0, 0, momentum.param_groups[0])["betas"] == (0.8, 0.1)
    mixes = optim.AdEMAMix([first], alpha=2.0, t_alpha=10)
    config = mixes.get_config(0, 0, mixes.param_groups[0])
    assert config.items() >= {"alpha": 2.0, "t_alpha": 10, "t_beta3": None}.items()
    lamb = optim.LAMB([first])
    assert lamb.get_config(0, 0, lamb.param_groups[0])["max_unorm"] == 1.0


class Counted(optim.Lion8bit):
    """Overrides one method: the step goes through it."""

    calls: int = 0

    def update_step(self, group: Any, p: Any, gindex: int, pindex: int) -> None:
        assert self.param_groups[gindex]["params"][pindex] is p
        self.calls += 1
        super().update_step(group, p, gindex, pindex)


def test_overridden_methods_are_called() -> None:
    counted, plain = Counted(parameters()), optim.Lion8bit(parameters())
    calls = []
    counted.register_step_post_hook(lambda *_: calls.append(1))
    assert_same(trained(counted), trained(plain))
    assert counted.calls == 6
    assert len(calls) == 3


def test_an_overridden_update_leaves_unscaling_to_the_scaler() -> None:
    counted, plain = Counted(parameters(1)), optim.Lion8bit(parameters(1))
    for optimizer in (counted, plain):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for factor in (1.0, float("inf"), 2.0):
            (p,) = optimizer.param_groups[0]["params"]
            p.grad = None
            scaler.scale((p * torch.arange(5000) * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
    assert_same(counted, plain)
    assert counted.calls == 2


def test_subclasses_pickle_and_tell_their_arguments() -> None:
    by_hand = trained(ByHand(parameters()))
    again = pickle.loads(pickle.dumps(by_hand))
    assert again.optimizer_name == "adam"
    assert again.args == by_hand.args
    assert list(inspect.signature(ByHand).parameters) == ["params", "arguments"]
    assert "betas" in inspect.signature(optim.Optimizer2State).parameters


# ---- bitsandbytes' abstract base


class Halving(optim.Optimizer8bit):
    """An update of its own, on states of its own, one of which is codes."""

    def __init__(self, params: Any, lr: float = 0.5, **more: Any) -> None:
        super().__init__(params, dict(lr=lr, betas=(0.9, 0.99)), 8, **more)

    def init_state(self, group: Any, p: Any, gindex: int, pindex: int) -> None:
        codes = self.get_state_buffer(p, dtype=torch.uint8)
        self.state[p].update(step=0, state1=codes, absmax1=torch.zeros(3, dtype=torch.float64))

    @torch.no_grad()
    def update_step(self, group: Any, p: Any, gindex: int, pindex: int) -> None:
        assert self.get_config(gindex, pindex, group)["betas"] == (0.9, 0.99)
        self.state[p]["step"] += 1
        self.state[p]["state1"] += 3
        p.mul_(group["lr"])


def test_the_abstract_base() -> None:
    params = [p.bfloat16().detach().requires_grad_() for p in parameters()]
    halving = Halving(params, 0.25)
    start = params[0].detach().clone()
    trained(halving, 2)
    assert equal(params[0], start / 16)
    assert halving.optim_bits == 8
    saved = copy.deepcopy(halving.state_dict())
    other = Halving([p.detach().clone().requires_grad_() for p in params], 0.5)
    seen: list[Any] = []
    other.register_load_state_dict_pre_hook(lambda optimizer, given: seen.append(given.keys()))
    other.register_load_state_dict_post_hook(lambda optimizer: seen.append(len(optimizer.state)))
    other.load_state_dict(saved)
    assert seen == [saved.keys(), len(params)]
    assert other.param_groups[0]["lr"] == 0.25
    for a, b in zip(halving.state.values(), other.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert all(equal(a[key], b[key]) for key in a)
        assert a["state1"] is not b["state1"]
    other.add_param_group({"params": parameters(1)})
    assert other.param_groups[1]["lr"] == 0.5
    with pytest.raises(CheckpointError, match="groups of"):
        other.load_state_dict(saved)
    assert pickle.loads(pickle.dumps(halving)).param_groups[0]["lr"] == 0.25
    paged = Halving(parameters(), is_paged=True)
    assert paged.is_paged


def test_the_abstract_base_is_abstract() -> None:
    with pytest.raises(OptionError, match="is for subclasses that define update_step"):
        optim.Optimizer8bit(parameters(), dict(lr=1.0))
    with pytest.raises(OptionError, match="is for subclasses that define update_step"):
        optim.Optimizer8bit(parameters(), defaults={}, optim_bits=8)
    with pytest.raises(OptionError, match="rule=None: expected a name"):
        optim.Optimizer8bit(parameters())
    assert optim.Optimizer8bit(parameters(), "lion", 32, True).is_paged
