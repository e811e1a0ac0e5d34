"""Training and evaluation modes, of the rule whose parameters are not those to evaluate."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx.errors import CheckpointError, OptionError
from bnbx.kernels.master import load
from bnbx.optimizers.engine import Optimizer8bit
from bnbx.optimizers.paging import is_paged
from bnbx.registry import optimizers
from optimizers.compare import assert_same, equal
from optimizers.saved import refuse
from optimizers.variants import CASES, copies, gradients, make, parameters, set_gradients

SHAPES = ((), (257,), (17, 241))
BETA1 = 0.8
ARGUMENTS: dict[str, Any] = {"lr": 1e-2, "betas": (BETA1, 0.95), "min_8bit_size": 0}
RULE = "schedule_free_adamw"
WITH_MODES = [name for name in optimizers().names() if optimizers().get(name).eval_code]


def trained(params: list[Tensor], steps: int = 4, **arguments: Any) -> Optimizer8bit:
    optimizer = Optimizer8bit(params, RULE, **{**ARGUMENTS, **arguments})
    for _ in range(steps):
        set_gradients(params, [torch.randn(p.shape).to(p.dtype) for p in params])
        optimizer.step()
    return optimizer


def ulp(x: Tensor) -> Tensor:
    """The distance of neighbors at x, in its own dtype."""
    info = torch.finfo(x.dtype)
    magnitude = x.abs().double().clamp(min=info.tiny)
    return torch.pow(2.0, magnitude.log2().floor()) * info.eps


def test_the_rule_is_found() -> None:
    assert WITH_MODES == [RULE]


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_evaluation_is_on_the_average(bits: int) -> None:
    """The average x is (y - (1 - beta1) z) / beta1, in float64; p holds y in training."""
    params = parameters(torch.float32, SHAPES)
    optimizer = trained(params, bits=bits)
    y = [p.detach().double() for p in params]
    optimizer.eval()
    assert optimizer.mode == "eval"
    for p, before in zip(params, y, strict=True):
        z = optimizer.state[p]["z"].double()
        x = (before - (1 - BETA1) * z) / BETA1
        bound = ulp(x.float()) + ulp(((z - before) * (1 / BETA1 - 1)).float())
        assert ((p.detach().double() - x).abs() <= bound).all()
        assert not torch.equal(p.detach().double(), before)


def test_the_average_is_that_of_the_paper() -> None:
    """Algorithm 1 in float64 on one parameter, with the average kept by itself."""
    p = torch.randn(50, requires_grad=True)
    lr, beta2, eps = 1e-2, 0.95, 1e-8
    optimizer = Optimizer8bit([p], RULE, lr=lr, betas=(BETA1, beta2), eps=eps, bits=32)
    x = z = p.detach().double()
    v = torch.zeros(50, dtype=torch.float64)
    for step in range(1, 9):
        p.grad = torch.randn(50)
        g = p.grad.double()
        v = beta2 * v + (1 - beta2) * g * g
        z = z - lr * g / ((v / (1 - beta2**step)).sqrt() + eps)
        x = x + (z - x) / step
        optimizer.step()
    optimizer.eval()
    torch.testing.assert_close(p.detach().double(), x, rtol=0, atol=8 * 2**-22)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_round_trip_is_within_rounding(dtype: torch.dtype) -> None:
    params = parameters(dtype, SHAPES)
    optimizer = trained(params)
    before = [p.detach().clone() for p in params]
    optimizer.eval()
    between = [p.detach().clone() for p in params]
    optimizer.train()
    for p, y, x in zip(params, before, between, strict=True):
        # Each way rounds once to p's dtype, and a few times to float32.
        bound = ulp(y) + ulp(x) + 8 * ulp(x.float()) + 8 * ulp(y.float())
        assert ((p.detach().double() - y.double()).abs() <= bound).all()
    assert optimizer.mode == "train"
    optimizer.step()


@pytest.mark.parametrize("master", ["kahan", "residual"])
def test_masters_come_along(master: str) -> None:
    """With a master the round trip is as precise as the master, not as its parameter."""
    params = parameters(torch.bfloat16, [(5000,)])
    optimizer = trained(params, master=master)
    p, saved = params[0], optimizer.state[params[0]]
    before = load(master, p.detach(), saved["residual"]).clone()
    z = saved["z"].double()
    optimizer.eval()
    x = (before.double() - (1 - BETA1) * z) / BETA1
    fine = 2.0**-7 if master == "residual" else 2.0**-8  # of a step of bfloat16
    now = load(master, p.detach(), saved["residual"])
    assert ((now.double() - x).abs() <= ulp(p.detach()) * fine + 1e-6).all()
    optimizer.train()
    after = load(master, p.detach(), saved["residual"])
    assert ((after - before).abs() <= 2 * ulp(p.detach()) * fine + 1e-6).all()


def test_a_parameter_of_another_dtype_comes_along() -> None:
    params = parameters(torch.bfloat16, [(5000,)])
    optimizer = trained(params, master="kahan")
    params[0].grad, params[0].data = None, params[0].data.half()
    optimizer.eval()
    assert optimizer.state[params[0]]["residual"].dtype is torch.float16


def test_stochastic_rounding_is_for_steps() -> None:
    params = parameters(torch.bfloat16, [(5000,)])
    other = copies(params)
    runs = [trained(each, master=m) for each, m in ((params, "stochastic"), (other, "none"))]
    with torch.no_grad():
        other[0].copy_(params[0])
        runs[1].state[other[0]]["z"].copy_(runs[0].state[params[0]]["z"])
    for optimizer in runs:
        optimizer.eval()
    assert equal(params[0].detach(), other[0].detach())


def test_modes_change_no_state_but_residuals() -> None:
    params = parameters(torch.float32, SHAPES)
    optimizer = trained(params)
    before = [
        {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, Tensor)}
        for p in params
    ]
    optimizer.eval()
    optimizer.train()
    for p, saved in zip(params, before, strict=True):
        assert all(equal(optimizer.state[p][k], v) for k, v in saved.items())
        assert optimizer.state[p]["step"] == 4


def test_switching_twice_is_switching_once() -> None:
    params = parameters(torch.float32, SHAPES)
    optimizer = trained(params)
    before = [p.detach().clone() for p in params]
    optimizer.train()
    assert all(equal(p.detach(), old) for p, old in zip(params, before, strict=True))
    optimizer.eval()
    once = [p.detach().clone() for p in params]
    optimizer.eval()
    assert all(equal(p.detach(), old) for p, old in zip(params, once, strict=True))


def test_a_step_in_evaluation_mode_is_an_error() -> None:
    params = parameters(torch.float32, SHAPES)
    optimizer = trained(params)
    optimizer.eval()
    before = [p.detach().clone() for p in params]
    called = []

    def closure() -> None:
        called.append(1)

    with pytest.raises(OptionError, match=r"optimizer\.train\(\)"):
        optimizer.step(closure)
    with pytest.raises(OptionError, match=r"optimizer\.train\(\)"):
        optimizer.update([params[0]], [torch.ones(())], [0])
    assert not called
    assert optimizer.state[params[0]]["step"] == 4
    assert all(equal(p.detach(), old) for p, old in zip(params, before, strict=True))


@pytest.mark.parametrize("storage", ["float32", "dynamic8"])
@pytest.mark.parametrize(("rule", "variant"), [c for c in CASES if c[0] not in WITH_MODES])
def test_other_rules_have_one_mode(rule: str, variant: str, storage: str) -> None:
    params = parameters(torch.float32, [(10,)])
    optimizer = make(rule, variant, params, storage)
    before = params[0].detach().clone()
    optimizer.eval()
    assert optimizer.mode == "train"
    assert equal(params[0].detach(), before)
    set_gradients(params, gradients(params))
    optimizer.step()
    optimizer.train()


def test_parameters_without_gradients_are_their_own_average() -> None:
    params = parameters(torch.float32, [(300,), (300,)])
    optimizer = Optimizer8bit(params, RULE, **ARGUMENTS)
    before = [p.detach().clone() for p in params]
    optimizer.eval()
    optimizer.train()
    params[0].grad = torch.ones(300)
    optimizer.step()
    assert params[1] not in optimizer.state
    optimizer.eval()
    assert params[1] not in optimizer.state
    assert equal(params[1].detach(), before[1])
    optimizer.train()
    params[1].grad = torch.ones(300)
    optimizer.step()
    assert optimizer.state[params[1]]["step"] == 1
    assert not equal(params[1].detach(), before[1])


def test_paged_states() -> None:
    params = parameters(torch.float32, [(300, 301)])
    other = copies(params)
    torch.manual_seed(0)
    paged = trained(params, paged=True)
    torch.manual_seed(0)
    plain = trained(other)
    assert is_paged(paged.state[params[0]]["z"])
    paged.eval()
    plain.eval()
    assert_same(paged, plain)


def test_parameters_that_are_not_contiguous() -> None:
    p = torch.randn(20, 30).t().requires_grad_()
    q = p.detach().contiguous().requires_grad_()
    for each in (p, q):
        torch.manual_seed(0)
        trained([each]).eval()
    assert equal(p.detach().contiguous(), q.detach())


def test_autograd_sees_a_switch() -> None:
    params = parameters(torch.float32, [(300,)])
    optimizer = trained(params)
    loss = params[0].square().sum()
    optimizer.eval()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_a_damaged_state_is_found_before_anything_changes() -> None:
    params = parameters(torch.float32, [(300,), (300,)])
    optimizer = trained(params)
    before = [p.detach().clone() for p in params]
    optimizer.state[params[1]]["z"] = torch.zeros(299)
    with pytest.raises(CheckpointError, match="'z'"):
        optimizer.eval()
    assert optimizer.mode == "train"
    assert all(equal(p.detach(), old) for p, old in zip(params, before, strict=True))


# ---- kept


def test_a_state_dict_of_evaluation_mode_restores_the_mode() -> None:
    params = parameters(torch.float32, SHAPES)
    optimizer = trained(params)
    optimizer.eval()
    state_dict = optimizer.state_dict()
    resumed = copies(params)
    other = Optimizer8bit(resumed, RULE, **ARGUMENTS)
    other.load_state_dict(state_dict)
    assert other.mode == "eval"
    set_gradients(resumed, gradients(resumed))
    with pytest.raises(OptionError, match="evaluation mode"):
        other.step()
    optimizer.train()
    other.train()
    assert_same(optimizer, other)
    fresh = Optimizer8bit(copies(params), RULE, **ARGUMENTS)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.mode == "train"


@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_have_a_mode_of_their_own(way: Any) -> None:
    params = parameters(torch.float32, SHAPES)
    optimizer = trained(params)
    optimizer.eval()
    other = way(optimizer)
    assert other.mode == "eval"
    other.train()
    assert other.mode == "train"
    assert optimizer.mode == "eval"
    assert not equal(other.param_groups[0]["params"][1].detach(), params[1].detach())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_states_and_groups_alone_restore_the_mode(mode: str) -> None:
    """torch.distributed.checkpoint hands on nothing else."""
    params = parameters(torch.float32, SHAPES)
    optimizer = trained(params)
    getattr(optimizer, mode)()
    saved = optimizer.state_dict()
    assert [group["train_mode"] for group in saved["param_groups"]] == [mode == "train"]
    other = Optimizer8bit(copies(params), RULE, **ARGUMENTS)
    other.load_state_dict({key: saved[key] for key in ("state", "param_groups")})
    assert other.mode == mode
    optimizer.train()
    other.train()
    assert_same(optimizer, other)


def test_a_state_dict_from_before_groups_knew_the_mode() -> None:
    params = parameters(torch.float32, SHAPES)
    optimizer = trained(params)
    optimizer.eval()
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["train_mode"]
    optimizer.train()
    optimizer.load_state_dict(saved)
    assert optimizer.mode == "eval"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (True, "two modes: 'eval' by its header and 'train' by group 0"),
        ("no", "group 0: 'train_mode' is 'no'; expected True or False"),
    ],
)
def test_a_state_dict_of_two_modes_is_refused(change: Any, message: str) -> None:
    optimizer = trained(parameters(torch.float32, SHAPES))
    optimizer.eval()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["train_mode"] = change
    refuse(optimizer, saved, message)
    assert optimizer.mode == "eval"


def test_a_new_group_is_in_the_mode_of_the_others() -> None:
    optimizer = trained(parameters(torch.float32, SHAPES))
    optimizer.eval()
    new = {"params": torch.zeros(5, requires_grad=True), "train_mode": True}
    optimizer.add_param_group(new)
    assert [group["train_mode"] for group in optimizer.param_groups] == [False, False]
    optimizer.train()
    assert [group["train_mode"] for group in optimizer.param_groups] == [True, True]


def test_groups_of_rules_with_one_mode_do_not_tell_it() -> None:
    params = parameters(torch.float32, [(10,)])
    optimizer = Optimizer8bit([{"params": params, "train_mode": False}], "adamw")
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.mode == "train"
    assert "train_mode" not in Optimizer8bit(params, "adamw").param_groups[0]
