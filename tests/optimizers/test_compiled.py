"""torch.compile of a step: one graph, no break in it, the bits of an eager step."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnbx.errors import DeviceError, OptionError, UnsupportedTensorError
from bnbx.optimizers import compiled
from bnbx.optimizers.engine import Optimizer8bit
from optimizers.compare import assert_same, equal
from optimizers.variants import CASES, copies, make, parameters, set_gradients

pytestmark = [
    # PyTorch warns of itself when it traces an optimizer, and while inductor starts.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Profiler.*will be ignored:UserWarning"),
]

SHAPES = ((5,), (300,), (17, 241))
BACKENDS = ("eager", "aot_eager", "inductor")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    # Where an operation of a graph fails, the backend "eager" leaves gradients switched off.
    torch.set_grad_enabled(True)


class Backend:
    """Counts the graphs that a backend is given."""

    def __init__(self, name: str) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self._lookup = torch._dynamo.lookup_backend(name)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs.append(graph)
        made: Callable[..., Any] = self._lookup(graph, inputs)
        return made

    def operations(self, index: int = -1) -> list[str]:
        return [str(node.target) for node in self.graphs[index].graph.nodes]


def compile_step(optimizer: Optimizer8bit, backend: Any = "eager") -> Callable[[], None]:
    found: Callable[[], None] = torch.compile(optimizer.step, fullgraph=True, backend=backend)
    return found


def pair(count: int = 2, **arguments: Any) -> tuple[Any, ...]:
    """Two equal optimizers of two groups, with their parameters."""
    params = parameters(torch.float32, SHAPES)
    runs = []
    for each in (params, copies(params))[:count]:
        groups = [{"params": each[n::2], "lr": lr} for n, lr in enumerate((1e-3, 3e-3))]
        optimizer = Optimizer8bit(groups, "adamw", min_8bit_size=0, **arguments)
        runs += [optimizer, each]
    return tuple(runs)


def random(params: Sequence[Tensor]) -> list[Tensor]:
    return [torch.randn(p.shape) for p in params]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_step_has_the_bits_of_an_eager_one(backend: str) -> None:
    ours, params, eager, other = pair()
    counting = Backend(backend)
    step = compile_step(ours, counting)
    for _ in range(4):
        values = random(params)
        set_gradients(params, values)
        set_gradients(other, values)
        step()
        eager.step()
    assert_same(ours, eager)
    assert ours.state[params[0]]["step"] == 4
    assert len(counting.graphs) == 1
    assert "bnbx.optimizer_step" in counting.operations()


@pytest.mark.parametrize(("rule", "variant"), CASES)
def test_every_rule(rule: str, variant: str) -> None:
    params = parameters(torch.float32, [(300,), (300,)])
    other = copies(params)
    ours, eager = (make(rule, variant, each, "dynamic8") for each in (params, other))
    step = compile_step(ours)
    for _ in range(2):
        values = random(params)
        set_gradients(params, values)
        set_gradients(other, values)
        step()
        eager.step()
    assert_same(ours, eager)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_may_change_within_the_graph(backend: str) -> None:
    """Replaced, changed in place, and clipped by their norm; and parameters before the step."""
    ours, params, eager, other = pair()

    def change(optimizer: Optimizer8bit, each: Sequence[Tensor]) -> None:
        each[0].grad = each[0].grad * 2  # type: ignore[operator,assignment]
        each[1].grad.mul_(3)  # type: ignore[union-attr]
        with torch.no_grad():
            each[2].mul_(0.5)
        optimizer.step()
        with torch.no_grad():
            each[2].add_(1)

    counting = Backend(backend)
    step = torch.compile(lambda: change(ours, params), fullgraph=True, backend=counting)
    for _ in range(3):
        values = random(params)
        set_gradients(params, values)
        set_gradients(other, values)
        step()
        change(eager, other)
    assert_same(ours, eager)
    assert len(counting.graphs) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping_and_the_step_in_one_graph(backend: str) -> None:
    ours, params, eager, other = pair()

    def clipped(optimizer: Optimizer8bit, each: Sequence[Tensor]) -> None:
        torch.nn.utils.clip_grad_norm_(each, 1.0, foreach=False)
        optimizer.step()

    step = torch.compile(lambda: clipped(ours, params), fullgraph=True, backend=backend)
    values = random(params)
    set_gradients(params, values)
    set_gradients(other, values)
    step()
    clipped(eager, other)
    for p, q in zip(params, other, strict=True):
        # Inductor sums in an order of its own; a step is at most lr long.
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_learning_rates_change_without_a_compilation_each_step() -> None:
    """A scheduler wraps `step`, of any optimizer, in what torch.compile does not enter."""
    ours, params, eager, other = pair()
    counting = Backend("eager")
    step = compile_step(ours, counting)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(each, lambda step: 1 / (step + 1))
        for each in (ours, eager)
    ]
    for _ in range(12):
        values = random(params)
        set_gradients(params, values)
        set_gradients(other, values)
        step()
        eager.step()
        for scheduler in schedulers:
            scheduler.step()
    assert_same(ours, eager)
    assert len(counting.graphs) <= 2  # the second knows that rates change


def test_a_step_that_a_scheduler_has_wrapped() -> None:
    """The wrapper breaks the graph, and the step runs outside of it."""
    ours, params, eager, other = pair()
    torch.optim.lr_scheduler.LambdaLR(ours, lambda step: 1.0)
    step = torch.compile(lambda: ours.step(), backend="eager")  # noqa: PLW0108 - looked up late
    values = random(params)
    set_gradients(params, values)
    set_gradients(other, values)
    step()
    eager.step()
    assert_same(ours, eager)


def test_a_learning_rate_in_a_tensor() -> None:
    params = parameters(torch.float32, SHAPES)
    other = copies(params)
    rates = [torch.tensor(1e-3), torch.tensor(1e-3)]
    ours, eager = (
        Optimizer8bit(each, "adamw", lr=lr) for each, lr in zip((params, other), rates, strict=True)
    )
    counting = Backend("eager")
    step = compile_step(ours, counting)
    for number in range(6):
        values = random(params)
        set_gradients(params, values)
        set_gradients(other, values)
        for lr in rates:
            lr.fill_(1e-3 * (number + 1))
        step()
        eager.step()
    assert_same(ours, eager)
    assert float(ours.resolved(params[0]).hyper["lr"]) == pytest.approx(6e-3)
    assert len(counting.graphs) <= 2


def test_parameters_without_gradients_are_left_out_until_they_have_some() -> None:
    ours, params, eager, other = pair()
    step = compile_step(ours)
    for present in ([0], [0, 1], [], [0, 1, 2], [1]):
        values = random(params)
        for number in range(3):
            params[number].grad = values[number].clone() if number in present else None
            other[number].grad = values[number].clone() if number in present else None
        step()
        eager.step()
    assert_same(ours, eager)
    assert [ours.state[p]["step"] for p in params] == [3, 3, 1]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_whole_training_step_may_be_compiled() -> None:
    """Forward, backward and step: what is not traced is not ours."""
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = Optimizer8bit(model.parameters(), "adamw", lr=1e-2, min_8bit_size=0)
    x = torch.randn(64, 8)
    y = x.sum(1, keepdim=True)

    @torch.compile(backend="aot_eager")
    def train() -> Any:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    losses = [float(train()) for _ in range(40)]
    assert losses[-1] < losses[0] / 5


def test_a_closure() -> None:
    ours, params, _, _ = pair()
    set_gradients(params, random(params))

    @torch.compile(fullgraph=True, backend="eager")
    def step() -> Any:
        return ours.step(lambda: params[0].detach().sum() * 2)

    before = params[0].detach().sum() * 2
    assert equal(step(), before)


def test_a_scale_in_the_graph_is_refused() -> None:
    ours, params, _, _ = pair()
    set_gradients(params, random(params))
    with pytest.raises(Exception, match="scale gradients outside of the compiled function"):
        torch.compile(lambda: ours.step(grad_scale=2.0), fullgraph=True, backend="eager")()


def test_evaluation_mode_is_an_error_here_too() -> None:
    p = torch.randn(300, requires_grad=True)
    optimizer = Optimizer8bit([p], "schedule_free_adamw")
    step = compile_step(optimizer)
    p.grad = torch.ones(300)
    step()
    optimizer.eval()
    with pytest.raises(OptionError, match="evaluation mode"):
        step()
    optimizer.train()
    step()
    assert optimizer.state[p]["step"] == 2


# ---- which optimizer


def test_a_step_of_an_optimizer_that_is_gone() -> None:
    p = torch.zeros(3)
    optimizer = Optimizer8bit([p], "sgd")
    handle = optimizer._handle
    del optimizer
    gc.collect()
    with pytest.raises(OptionError, match="no longer exists"):
        torch.ops.bnbx.optimizer_step([p], [torch.ones(3)], [0], handle)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_step_on_their_own(way: Callable[[Any], Any]) -> None:
    ours, params, _, _ = pair()
    other = way(ours)
    assert other._handle != ours._handle
    before = [p.detach().clone() for p in params]
    copied = [p for group in other.param_groups for p in group["params"]]
    set_gradients(copied, random(copied))
    compile_step(other)()
    assert all(equal(p.detach(), old) for p, old in zip(params, before, strict=True))
    assert all(other.state[p]["step"] == 1 for p in copied)


def test_handles_are_forgotten_with_their_optimizers() -> None:
    optimizer = Optimizer8bit([torch.zeros(3)], "sgd")
    handle = optimizer._handle
    assert handle in compiled._optimizers
    del optimizer
    gc.collect()
    assert handle not in compiled._optimizers


# ---- the operation by itself


def arguments() -> tuple[Optimizer8bit, tuple[Any, ...]]:
    params = [torch.randn(300), torch.randn(5, 4)]
    optimizer = Optimizer8bit(params, "sgd", lr=0.5)
    return optimizer, (params, [torch.randn_like(p) for p in params], [0, 1], optimizer._handle)


def test_the_operation_passes_the_checks_of_torch() -> None:
    optimizer, given = arguments()
    checks = torch.library.opcheck(torch.ops.bnbx.optimizer_step.default, given)
    assert set(checks.values()) == {"SUCCESS"}
    assert optimizer.state


def test_memory_may_stand_for_parameters() -> None:
    """As where a graph has made a copy of a parameter: only the copy changes."""
    optimizer, (params, grads, places, handle) = arguments()
    before = [p.clone() for p in params]
    memory = [p.clone() for p in params]
    torch.ops.bnbx.optimizer_step(memory, grads, places, handle)
    for p, old, new, g in zip(params, before, memory, grads, strict=True):
        assert equal(p, old)
        assert equal(new, old - 0.5 * g)
    assert [optimizer.state[p]["step"] for p in params] == [1, 1]


@pytest.mark.parametrize(
    "change",
    [
        lambda p, g, at: (p, g, [0, 2]),
        lambda p, g, at: (p, g, [0, -1]),
        lambda p, g, at: (p, g, [0, 0]),
        lambda p, g, at: (p, g, [0]),
        lambda p, g, at: (p[:1], g, at),
        lambda p, g, at: (p, g[:1], at),
    ],
)
def test_wrong_places_are_refused(change: Any) -> None:
    optimizer, (params, grads, places, handle) = arguments()
    before = [p.clone() for p in params]
    with pytest.raises(OptionError, match="of 2 parameters"):
        torch.ops.bnbx.optimizer_step(*change(params, grads, places), handle)
    assert all(equal(p, old) for p, old in zip(params, before, strict=True))
    assert not optimizer.state


@pytest.mark.parametrize("place", [0, 1])
def test_gradient_on_the_meta_device_is_refused(place: int) -> None:
    """Else the fake form would run, and no parameter change."""
    _, (params, grads, places, handle) = arguments()
    before = [p.clone() for p in params]
    grads[place] = grads[place].to("meta")
    with pytest.raises(DeviceError, match=rf"grads\[{place}\] on the meta device.*params\[0\]"):
        torch.ops.bnbx.optimizer_step(params, grads, places, handle)
    assert all(equal(p, old) for p, old in zip(params, before, strict=True))


@pytest.mark.parametrize(
    "memory",
    [torch.zeros(5, 5), torch.zeros(4, 5), torch.zeros(5, 4).bfloat16(), torch.zeros(0)],
)
def test_wrong_memory_is_refused(memory: Tensor) -> None:
    optimizer, (params, grads, places, handle) = arguments()
    before = params[0].clone()
    with pytest.raises(UnsupportedTensorError, match=r"for a parameter of torch\.float32"):
        torch.ops.bnbx.optimizer_step([params[0], memory], grads, places, handle)
    assert equal(params[0], before)
    assert not optimizer.state
