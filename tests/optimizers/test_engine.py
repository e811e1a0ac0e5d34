"""The engine keeps the contract of torch.optim: closures, groups, schedulers, hooks, memory."""

from __future__ import annotations

import gc
import itertools
import math
import tracemalloc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bnbx.errors import CheckpointError
from bnbx.kernels import cpu
from bnbx.optim import create
from bnbx.optimizers.engine import Optimizer8bit
from optimizers.compare import assert_same, equal, parameters_of
from optimizers.variants import copies, gradients, parameters, set_gradients

LARGE = [(5000,), (40, 130)]


def steps(pairs: list[tuple[torch.optim.Optimizer, list[Tensor]]], count: int = 1) -> None:
    """Step optimizers side by side, with the same gradients."""
    for _ in range(count):
        values = gradients(pairs[0][1])
        for optimizer, params in pairs:
            set_gradients(params, values)
            optimizer.step()


# ---- the step


def test_closure_runs_under_grad_and_its_loss_is_returned() -> None:
    p = torch.ones(10, requires_grad=True)
    optimizer = create("adamw", [p], lr=0.1)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (p * p).sum()
        torch.autograd.backward(loss)
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert loss.item() == 10
    assert (p < 1).all()
    assert optimizer.step() is None


def test_zero_grad() -> None:
    params = parameters(torch.float32)
    optimizer = create("adamw", params)
    set_gradients(params, gradients(params))
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


def test_parameters_without_gradient_are_skipped() -> None:
    params = parameters(torch.float32, [(5000,), (5000,)])
    alone = copies(params[1:])
    optimizer, single = create("adamw", params), create("adamw", alone)
    before = params[0].detach().clone()
    for value in (gradients(alone), gradients(alone)):
        set_gradients(params[1:], value)
        set_gradients(alone, value)
        optimizer.step()
        single.step()
    assert equal(params[0].detach(), before)
    assert not optimizer.state[params[0]]
    # It steps for the first time two steps after the other.
    first, other = copies(params[:1]), gradients(params[:1])
    set_gradients([params[0], *first], [other[0], other[0]])
    params[1].grad = None
    lone = create("adamw", first)
    optimizer.step()
    lone.step()
    assert equal(params[0], first[0])
    assert [optimizer.state[p]["step"] for p in params] == [1, 2]


def test_gradient_is_only_read() -> None:
    params = parameters(torch.float32, LARGE)
    optimizer = create("adam", params, weight_decay=0.1)
    values = gradients(params)
    set_gradients(params, values)
    optimizer.step()
    for p, value in zip(params, values, strict=True):
        assert p.grad is not None
        assert equal(p.grad, value)


def test_autograd_is_told_of_the_update() -> None:
    """A graph that saved the old values must refuse to go backward over the new ones."""
    p = torch.ones(5000, requires_grad=True)
    optimizer = create("adamw", [p])
    loss = (p * p).sum()
    torch.autograd.backward(loss, retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)


def test_one_native_call_whatever_the_number_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = cpu.kernel

    def counted(plan: Any) -> Any:
        kernel = real(plan)

        def run(table: int, jobs: int, *rest: Any) -> None:
            calls.append(jobs)
            kernel.library.bnbx_run(table, jobs, *rest)

        library = SimpleNamespace(bnbx_run=run)
        return SimpleNamespace(**{**vars(kernel), "library": library})

    monkeypatch.setattr(cpu, "kernel", counted)
    params = parameters(torch.float32, [(5000,)] * 40 + [(100,)] * 40)
    params += parameters(torch.bfloat16, [(5000,)] * 10)
    groups: list[dict[str, Any]] = [{"params": params[::2]}, {"params": params[1::2], "lr": 1e-4}]
    optimizer = create("adamw", groups)
    set_gradients(params, gradients(params))
    optimizer.step()
    # Two groups, each with 8-bit and 32-bit states in float32, and 8-bit ones in bfloat16.
    assert calls == [6]


def test_results_do_not_depend_on_how_tensors_are_gathered() -> None:
    params = parameters(torch.float32, [(5000,), (300,), (4096,), (1,), (9000,)])
    together = create("adamw", params)
    singles = [([q], create("adamw", [q])) for q in copies(params)]
    for _ in range(3):
        values = gradients(params)
        set_gradients(params, values)
        together.step()
        for (own, optimizer), value in zip(singles, values, strict=True):
            set_gradients(own, [value])
            optimizer.step()
    for p, (own, _) in zip(params, singles, strict=True):
        assert equal(p, own[0])


# ---- groups


def test_groups_override_arguments_and_options() -> None:
    params = parameters(torch.float32, [(5000,)] * 4)
    others = copies(params)
    chosen: list[dict[str, Any]] = [
        {},
        {"lr": 1e-2, "betas": (0.5, 0.6)},
        {"bits": 32, "weight_decay": 0.0},
        {"state_types": {"m": "linear8"}, "min_8bit_size": 0},
    ]
    groups: list[dict[str, Any]] = [
        {"params": [p], **group} for p, group in zip(params, chosen, strict=True)
    ]
    grouped = create("adamw", groups, lr=1e-3)
    singles = [
        create("adamw", [q], **{"lr": 1e-3, **g}) for q, g in zip(others, chosen, strict=True)
    ]
    for _ in range(3):
        values = gradients(params)
        set_gradients(params, values)
        set_gradients(others, values)
        grouped.step()
        for single in singles:
            single.step()
    for p, q, single in zip(params, others, singles, strict=True):
        assert equal(p, q)
        assert list(grouped.state[p]) == list(single.state[q])
    assert grouped.state[params[2]]["m"].dtype == torch.float32


def test_added_group_starts_at_its_own_first_step() -> None:
    params = parameters(torch.float32, [(5000,)] * 2)
    late = copies(params[1:])
    optimizer = create("adamw", params[:1], lr=1e-2)
    steps([(optimizer, params[:1])], 3)
    optimizer.add_param_group({"params": params[1], "lr": 5e-3, "bits": 32})
    single = create("adamw", late, lr=5e-3, bits=32)
    for _ in range(3):
        values = gradients(params)
        set_gradients(params, values)
        set_gradients(late, values[1:])
        optimizer.step()
        single.step()
    assert equal(params[1], late[0])
    assert [optimizer.state[p]["step"] for p in params] == [6, 3]
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.999)


def test_named_parameters() -> None:
    model = torch.nn.Linear(100, 50)
    optimizer = create("adamw", model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    model(torch.randn(3, 100)).sum().backward()
    optimizer.step()
    other = create("adamw", torch.nn.Linear(100, 50).named_parameters())
    other.load_state_dict(optimizer.state_dict())
    assert other.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_changes_of_a_group_take_effect_at_the_next_step() -> None:
    params, others = [parameters(torch.float32, [(5000,)]) for _ in range(2)]
    others = copies(params)
    optimizer = create("adamw", params, lr=1e-2)
    other = create("adamw", others, lr=1e-2)
    steps([(optimizer, params), (other, others)])
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.param_groups[0]["weight_decay"] = 0.0
    before = params[0].detach().clone()
    steps([(optimizer, params), (other, others)])
    assert equal(params[0].detach(), before)
    assert not equal(others[0].detach(), before)
    optimizer.param_groups[0]["betas"] = (0.9, 1.0)
    with pytest.raises(ValueError, match="beta2"):
        optimizer.step()
    assert equal(params[0].detach(), before)


# ---- learning rates


def schedulers() -> dict[str, Any]:
    schedule = torch.optim.lr_scheduler
    return {
        "StepLR": lambda o: schedule.StepLR(o, step_size=2, gamma=0.5),
        "CosineAnnealingLR": lambda o: schedule.CosineAnnealingLR(o, T_max=5),
        "OneCycleLR": lambda o: schedule.OneCycleLR(o, max_lr=1e-2, total_steps=10),
    }


@pytest.mark.parametrize("name", schedulers())
def test_schedulers_steer_it_as_they_steer_torch(name: str) -> None:
    params = parameters(torch.float32, LARGE)
    steered, by_hand, torchs = params, copies(params), copies(params)
    optimizer, other = create("adamw", steered), create("adamw", by_hand)
    theirs = torch.optim.AdamW(torchs)
    ours, model = schedulers()[name](optimizer), schedulers()[name](theirs)
    seen = set()
    for _ in range(8):
        group, expected = optimizer.param_groups[0], theirs.param_groups[0]
        assert (group["lr"], group["betas"]) == (expected["lr"], expected["betas"])
        other.param_groups[0].update(lr=expected["lr"], betas=expected["betas"])
        seen.add((group["lr"], group["betas"]))
        steps([(optimizer, steered), (other, by_hand), (theirs, torchs)])
        ours.step()
        model.step()
    assert_same(optimizer, other)
    assert len(seen) > 3
    assert len({betas for _, betas in seen}) == (len(seen) if name == "OneCycleLR" else 1)


def test_learning_rate_may_be_a_tensor() -> None:
    params = parameters(torch.float32, LARGE)
    others = copies(params)
    rate = torch.tensor(1e-2)
    optimizer, other = create("adamw", params, lr=rate), create("adamw", others, lr=rate.item())
    pairs: list[Any] = [(optimizer, params), (other, others)]
    steps(pairs)
    assert_same(optimizer, other)
    rate.fill_(3e-2)  # as schedulers do
    other.param_groups[0]["lr"] = rate.item()
    steps(pairs)
    assert_same(optimizer, other)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    for _ in range(2):
        steps(pairs)
        scheduler.step()
        other.param_groups[0]["lr"] = float(optimizer.param_groups[0]["lr"])
    assert other.param_groups[0]["lr"] < 1e-2
    assert_same(optimizer, other)


# ---- hooks


def test_hooks_run_around_the_step() -> None:
    params = parameters(torch.float32)
    optimizer = create("adamw", params)
    set_gradients(params, gradients(params))
    events: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: events.append("before"))
    optimizer.register_step_post_hook(lambda *_: events.append(f"after {progress(optimizer)}"))
    optimizer.step()
    optimizer.step()
    assert events == ["before", "after 1", "before", "after 2"]


def progress(optimizer: Optimizer8bit) -> int:
    return int(optimizer.state[parameters_of(optimizer)[0]]["step"])


# ---- memory


def states_of(optimizer: Optimizer8bit) -> list[Tensor]:
    return [
        value
        for saved in optimizer.state.values()
        for value in saved.values()
        if isinstance(value, Tensor)
    ]


@pytest.mark.parametrize(("rule", "states"), [("adamw", 2), ("lion", 1)])
@pytest.mark.parametrize("numel", [4096, 4097, 1_000_000])
def test_a_state_takes_a_byte_per_element_and_a_float_per_block(
    rule: str, states: int, numel: int
) -> None:
    params = parameters(torch.bfloat16, [(numel,)])
    optimizer = create(rule, params)
    steps([(optimizer, params)])
    size = sum(t.untyped_storage().nbytes() for t in states_of(optimizer))
    assert size == states * (numel + 4 * math.ceil(numel / 256))
    if rule == "adamw" and numel == 1_000_000:
        assert round(size / numel, 2) == 2.03


def test_nothing_but_states_grows_with_the_model() -> None:
    def outlasting(numel: int) -> int:
        params = parameters(torch.float32, [(numel,)])
        set_gradients(params, gradients(params))
        gc.collect()
        before = {id(t) for t in live_tensors()}
        optimizer = create("adamw", params)
        optimizer.step()
        gc.collect()
        made = [t for t in live_tensors() if id(t) not in before]
        assert {t.data_ptr() for t in made} >= {t.data_ptr() for t in states_of(optimizer)}
        return sum(t.untyped_storage().nbytes() for t in made) - sum(
            t.untyped_storage().nbytes() for t in states_of(optimizer)
        )

    factor = 4  # bytes: the one number that gradients are multiplied by
    assert outlasting(1_000_000) == outlasting(10_000) == factor


def test_python_memory_does_not_grow_with_the_model() -> None:
    """Tables and row lists of numpy and Python objects, which are no tensors."""

    def kept(numel: int) -> int:
        params = parameters(torch.float32, [(numel,)])
        set_gradients(params, gradients(params))
        tracemalloc.start()
        optimizer = create("adamw", params)
        optimizer.step()
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert optimizer.state
        return size

    kept(10_000)  # compiles, and fills what is cached for good
    assert abs(kept(2_000_000) - kept(10_000)) < 10_000


def live_tensors() -> list[Tensor]:
    return [o for o in gc.get_objects() if type(o) in (Tensor, torch.nn.Parameter)]


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The sizes of all tensors that torch makes meanwhile."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in itertools.chain(result if isinstance(result, (tuple, list)) else [result]):
            if isinstance(value, Tensor):
                self.sizes.append(value.numel())
        return result


def test_a_step_makes_no_temporary_tensors() -> None:
    params = parameters(torch.float32, LARGE)
    optimizer = create("adamw", params)
    steps([(optimizer, params)])
    with Allocations() as made:
        optimizer.step()
    assert made.sizes == []
    with Allocations() as made:  # the instrument does see temporaries
        torch.zeros(7)
    assert made.sizes == [7]


@pytest.mark.parametrize("step", [5.0, torch.tensor(5.0), torch.tensor([5]), np.int64(5)], ids=repr)
@pytest.mark.parametrize("percentile", [100, 5])
def test_steps_may_be_counted_in_a_number_of_any_kind(step: Any, percentile: int) -> None:
    """torch.optim keeps a tensor; a user who sets the count may write one too."""
    moved = []
    for count in (5, step):
        p = torch.ones(5000, requires_grad=True)
        optimizer = create("adamw", [p], percentile_clipping=percentile)
        p.grad = torch.ones(5000)
        optimizer.step()
        optimizer.state[p]["step"] = count
        optimizer.step()
        assert type(optimizer.state[p]["step"]) is int
        assert optimizer.state[p]["step"] == 6
        moved.append(p.detach())
    assert torch.equal(*moved)


@pytest.mark.parametrize("step", [5.5, None, True, "5", torch.tensor([1.0, 2.0])], ids=repr)
def test_what_is_no_count_of_steps_is_refused(step: Any) -> None:
    p = torch.ones(5000, requires_grad=True)
    optimizer = create("adamw", [p])
    p.grad = torch.ones(5000)
    optimizer.step()
    before = p.detach().clone()
    optimizer.state[p]["step"] = step
    with pytest.raises(CheckpointError, match=r"a parameter of shape \(5000,\): 'step' is .*whole"):
        optimizer.step()
    assert torch.equal(p, before)
