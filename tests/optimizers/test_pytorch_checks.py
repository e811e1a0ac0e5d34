"""PyTorch's own inputs for its optimizers, run against ours and, in float64, against theirs."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal import common_optimizers as theirs

from bnbx.errors import BnbxError
from bnbx.optim import create
from bnbx.optimizers.engine import Optimizer8bit
from optimizers.rounding import Bounded
from optimizers.text import Follower, check_within

CPU = "cpu"
TORCH: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}
INPUTS = [
    pytest.param(rule, given.kwargs, id=f"{rule}-{given.desc}")
    for rule in TORCH
    for given in getattr(theirs, f"optim_inputs_func_{rule}")(CPU, torch.float32)
]
ERRORS = [
    pytest.param(rule, given, id=f"{rule}-{given.optimizer_error_input.desc}")
    for rule in TORCH
    for given in getattr(theirs, f"optim_error_inputs_func_{rule}")(CPU, torch.float32)
]
# What torch cannot do and we can: one implementation takes numbers and tensors alike.
NO_ERRORS_HERE = (
    "lr as Tensor doesn't work with foreach & not capturable",
    "betas must be either both floats or both Tensors",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True",
)
STEPS = 6
Make = Callable[..., Optimizer8bit]


def problem(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor, Tensor]:
    """A small regression, with a weight of enough elements to be quantized."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(65, 64), nn.Tanh(), nn.Linear(64, 1)).to(dtype)
    x = torch.randn(32, 65, dtype=dtype)
    return model, x, x.sum(1, keepdim=True).sin()


def backward(model: nn.Module, x: Tensor, y: Tensor, sign: float = 1.0) -> float:
    model.zero_grad()
    loss = (model(x) - y).square().mean()
    (sign * loss).backward()
    return float(loss.detach())


@pytest.fixture(params=[8, 32])
def make(request: pytest.FixtureRequest) -> Make:
    def made(rule: str, params: Any, **kwargs: Any) -> Optimizer8bit:
        optimizer: Optimizer8bit = create(rule, params, bits=request.param, **kwargs)
        return optimizer

    return made


@pytest.mark.parametrize(("rule", "kwargs"), INPUTS)
def test_the_loss_goes_down(rule: str, kwargs: dict[str, Any], make: Make) -> None:
    model, x, y = problem()
    sign = -1.0 if kwargs.get("maximize") else 1.0
    optimizer = make(rule, model.parameters(), **kwargs)
    losses = []
    for _ in range(20):
        losses.append(backward(model, x, y, sign))
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("rule", "kwargs"), INPUTS)
def test_32_bit_steps_are_torchs(rule: str, kwargs: dict[str, Any]) -> None:
    """Same gradients to both; torch's in float64. The rule's text says how far rounding may go."""
    model, *_ = problem()
    double, xx, yy = problem()
    double, xx, yy = double.double(), xx.double(), yy.double()
    ours: Optimizer8bit = create(rule, model.parameters(), bits=32, **kwargs)
    oracle = TORCH[rule](double.parameters(), **kwargs)
    follower = Follower(ours, sign=-1.0 if kwargs.get("maximize") else 1.0)
    for _ in range(STEPS):
        backward(double, xx, yy)
        for p, q in zip(model.parameters(), double.parameters(), strict=True):
            assert q.grad is not None
            p.grad = q.grad.float()
            q.grad = p.grad.double()
        ours.step()
        oracle.step()
        follower.step()
    for p, q in zip(model.parameters(), double.parameters(), strict=True):
        error = follower.values[p]["p"].error
        assert float(error.median()) < 1e-5, "a bound as wide as this would prove little"
        check_within(Bounded(q.detach(), error), p.detach())


@pytest.mark.parametrize(("rule", "kwargs"), INPUTS)
def test_nothing_happens_without_gradients(rule: str, kwargs: dict[str, Any], make: Make) -> None:
    model, *_ = problem()
    before = copy.deepcopy(model.state_dict())
    optimizer = make(rule, model.parameters(), **kwargs)
    optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not optimizer.state


@pytest.mark.parametrize(("rule", "kwargs"), INPUTS)
def test_zero_gradients_move_nothing_but_by_weight_decay(
    rule: str, kwargs: dict[str, Any], make: Make
) -> None:
    model, *_ = problem()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = make(rule, model.parameters(), **{**kwargs, "weight_decay": 0.0})
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(("rule", "kwargs"), INPUTS)
def test_state_dict_continues_exactly(rule: str, kwargs: dict[str, Any], make: Make) -> None:
    model, x, y = problem()
    optimizer = make(rule, model.parameters(), **kwargs)
    for _ in range(3):
        backward(model, x, y)
        optimizer.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, *_ = problem()
    other.load_state_dict(saved["model"])
    again = make(rule, other.parameters(), **kwargs)
    again.load_state_dict(saved["optimizer"])
    for _ in range(3):
        backward(model, x, y)
        backward(other, x, y)
        optimizer.step()
        again.step()
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize(("rule", "kwargs"), INPUTS)
def test_deepcopy_copies_everything(rule: str, kwargs: dict[str, Any], make: Make) -> None:
    model, x, y = problem()
    optimizer = make(rule, model.parameters(), **kwargs)
    backward(model, x, y)
    optimizer.step()
    public = {name for name in dir(optimizer) if not name.startswith("_")}
    twin = copy.deepcopy(optimizer)
    assert {name for name in dir(twin) if not name.startswith("_")} == public
    for p in (p for group in twin.param_groups for p in group["params"]):
        p.grad = torch.ones_like(p)
    twin.step()
    first, other = optimizer.param_groups[0]["params"][0], twin.param_groups[0]["params"][0]
    assert optimizer.state[first]["step"] == 1
    assert twin.state[other]["step"] == 2
    assert not torch.equal(first, other)


@pytest.mark.parametrize("rule", TORCH)
def test_hooks_run_around_a_step(rule: str, make: Make) -> None:
    model, x, y = problem()
    optimizer = make(rule, model.parameters(), lr=0.1)
    calls: list[str] = []
    seen: list[Tensor] = []

    def pre(*_: Any) -> None:
        calls.append("pre")
        seen.append(model[0].weight.detach().clone())  # type: ignore[index]

    def post(*_: Any) -> None:
        calls.append("post")
        seen.append(model[0].weight.detach().clone())  # type: ignore[index]

    handles = [optimizer.register_step_pre_hook(pre), optimizer.register_step_post_hook(post)]
    backward(model, x, y)
    optimizer.step()
    assert calls == ["pre", "post"]
    assert not torch.equal(*seen)
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert calls == ["pre", "post"]


@pytest.mark.parametrize("rule", TORCH)
def test_hooks_run_around_state_dicts(rule: str, make: Make) -> None:
    model, x, y = problem()
    optimizer = make(rule, model.parameters(), lr=0.1)
    backward(model, x, y)
    optimizer.step()
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, s: calls.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda o, s: calls.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["save", "saved", "load", "loaded"]


@pytest.mark.parametrize("rule", TORCH)
def test_groups_have_their_own_values(rule: str, make: Make) -> None:
    """A group with lr 0 stays; one with weight decay shrinks under zero gradients."""
    still, shrinking = nn.Parameter(torch.ones(70, 70)), nn.Parameter(torch.ones(70, 70))
    groups = [{"params": [still], "lr": 0.0}, {"params": [shrinking], "weight_decay": 0.9}]
    optimizer = make(rule, groups, lr=0.1)
    for p in (still, shrinking):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(still, torch.ones(70, 70))
    assert (shrinking < 1).all()


@pytest.mark.parametrize(("rule", "given"), ERRORS)
def test_errors_are_of_torchs_kind(rule: str, given: Any, make: Make) -> None:
    wrong = given.optimizer_error_input
    params = wrong.params or [nn.Parameter(torch.zeros(2, 2))]
    if wrong.desc in NO_ERRORS_HERE:
        make(rule, params, **wrong.kwargs)
        return
    with pytest.raises((given.error_type, BnbxError)) as caught:
        make(rule, params, **wrong.kwargs)
    assert isinstance(caught.value, (given.error_type, ValueError)), caught.value


def test_complex_and_integer_parameters_are_refused() -> None:
    for dtype in (torch.complex64, torch.int64, torch.float64, torch.bool):
        with pytest.raises(TypeError, match=f"dtype {dtype}; expected one of torch.float32"):
            create("adamw", [torch.zeros(3, dtype=dtype)])


def test_a_parameter_given_twice_is_refused() -> None:
    """Torch warns, and updates it twice; here both updates would run at once."""
    p = nn.Parameter(torch.zeros(3))
    with (
        pytest.warns(UserWarning, match="duplicate parameters"),
        pytest.raises(ValueError, match="given twice"),
    ):
        create("adamw", [p, p])
