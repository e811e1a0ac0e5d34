"""Scaled gradients: GradScaler, the argument grad_scale, and steps that an overflow leaves out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from bnbx.errors import OptionError
from bnbx.kernels import reference
from bnbx.optimizers import engine, scaling
from bnbx.optimizers.engine import Optimizer8bit
from bnbx.optimizers.scaling import Scaling, combined, overflow_flag
from optimizers.compare import assert_same, equal
from optimizers.variants import CASES, copies, gradients, make, parameters, set_gradients
from plans import Case, cases, make_batch
from plans import copy as copy_of_batch

SHAPES = ((5,), (300,), (17, 241))
OVERFLOWS = (0, 3, 4)  # the very first step is one of them


def scaler_of(scale: float = 1024.0) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)


def in_double(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().double().requires_grad_() for p in params]


def scaled_gradients(params: Sequence[Tensor], scale: float, overflow: bool) -> list[Tensor]:
    values = [torch.randn(p.shape) * scale for p in params]
    if overflow:
        values[1][7] = torch.inf
    return values


# ---- torch.amp.GradScaler


def test_a_grad_scaler_against_torch_in_float64() -> None:
    params = parameters(torch.float32, SHAPES)
    double = in_double(params)
    ours = Optimizer8bit(params, "adamw", bits=32, lr=1e-2)
    theirs = torch.optim.AdamW(double, lr=1e-2)
    scaler = scaler_of()
    for step in range(8):
        scale = scaler.get_scale()
        values = scaled_gradients(params, scale, step in OVERFLOWS)
        set_gradients(params, values)
        scaler.scale(torch.zeros(()))  # which makes the scale
        scaler.step(ours)
        scaler.update()
        if step not in OVERFLOWS:
            set_gradients(double, [value.double() / scale for value in values])
            theirs.step()
        assert (scaler.get_scale() < scale) == (step in OVERFLOWS)
        for p, value in zip(params, values, strict=True):
            assert equal(p.grad, value)  # they stay as they are
    for p, q in zip(params, double, strict=True):
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=0, atol=2e-6)
        assert ours.state[p]["step"] == 8 - len(OVERFLOWS)


def test_a_grad_scaler_against_the_fused_one_of_torch() -> None:
    params = parameters(torch.float32, SHAPES)
    other = copies(params)
    runs: list[tuple[Any, list[Tensor], torch.amp.GradScaler]] = [
        (Optimizer8bit(params, "adamw", bits=32, lr=1e-2), params, scaler_of()),
        (torch.optim.AdamW(other, lr=1e-2, fused=True), other, scaler_of()),
    ]
    for step in range(8):
        values = scaled_gradients(params, runs[0][2].get_scale(), step in OVERFLOWS)
        for optimizer, each, scaler in runs:
            set_gradients(each, values)
            scaler.scale(torch.zeros(()))
            scaler.step(optimizer)
            scaler.update()
    assert runs[0][2].get_scale() == runs[1][2].get_scale()
    for p, q in zip(params, other, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-6)
        assert runs[0][0].state[p]["step"] == int(runs[1][0].state[q]["step"])


def test_a_first_step_that_overflows_leaves_no_state() -> None:
    params = parameters(torch.float32, SHAPES)
    optimizer = Optimizer8bit(params, "adamw", percentile_clipping=5)
    before = [p.detach().clone() for p in params]
    scaler = scaler_of()
    set_gradients(params, scaled_gradients(params, 1.0, overflow=True))
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    assert not optimizer.state
    assert all(equal(p.detach(), old) for p, old in zip(params, before, strict=True))


def test_clipping_between_unscale_and_step() -> None:
    """Gradients that were unscaled are not unscaled again."""
    params = parameters(torch.float32, SHAPES)
    other = copies(params)
    ours, plain = (Optimizer8bit(each, "adamw", bits=32) for each in (params, other))
    scaler = scaler_of()
    for _ in range(4):
        scale = scaler.get_scale()
        values = [torch.randn(p.shape) * scale for p in params]
        set_gradients(params, values)
        scaler.scale(torch.zeros(()))
        scaler.unscale_(ours)
        nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(ours)
        scaler.update()
        set_gradients(other, [value / scale for value in values])
        nn.utils.clip_grad_norm_(other, 1.0)
        plain.step()
    assert_same(ours, plain)


def test_two_optimizers_on_one_scaler() -> None:
    """Each leaves out its own overflows; the scale shrinks for both."""
    params = parameters(torch.float32, [(300,), (300,)])
    first, second = (Optimizer8bit([p], "adamw", bits=32) for p in params)
    scaler = scaler_of()
    for step in range(4):
        scale = scaler.get_scale()
        set_gradients(params, [torch.randn(300) * scale for _ in params])
        if step == 1:
            params[0].grad[0] = torch.nan  # type: ignore[index]
        scaler.scale(torch.zeros(()))
        scaler.step(first)
        scaler.step(second)
        scaler.update()
    assert first.state[params[0]]["step"] == 3
    assert second.state[params[1]]["step"] == 4


def test_a_scaler_for_parameters_without_gradients() -> None:
    params = parameters(torch.float32, [(300,), (300,)])
    with_gradient, without = (Optimizer8bit([p], "adamw") for p in params)
    scaler = scaler_of()
    scaler.scale(torch.zeros(()))
    params[0].grad = torch.ones(300)
    scaler.step(with_gradient)
    scaler.step(without)
    assert not without.state
    assert with_gradient.state[params[0]]["step"] == 1


def test_a_model_trains_under_a_scaler() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = Optimizer8bit(model.parameters(), "adamw", lr=1e-2, min_8bit_size=0)
    scaler = torch.amp.GradScaler("cpu")
    x = torch.randn(64, 8)
    y = x.sum(1, keepdim=True)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


@pytest.mark.parametrize(("rule", "variant"), CASES)
def test_every_rule_unscales(rule: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power of two costs no bits."""
    monkeypatch.setattr(engine, "launch", reference.run)
    params = parameters(torch.float32, SHAPES)
    other = copies(params)
    ours, plain = (make(rule, variant, each, "dynamic8") for each in (params, other))
    for step in range(3):
        torch.manual_seed(step)
        values = [v.nan_to_num() for v in gradients(params)]
        values = [torch.where(v.abs() > 1e-18, v, 0 * v) for v in values]  # products stay normal
        set_gradients(other, values)
        set_gradients(params, [value * 4096 for value in values])
        ours.step(grad_scale=4096)
        plain.step()
    assert_same(ours, plain)


# ---- the argument


@pytest.mark.parametrize(
    "scale",
    [
        4,
        4.0,
        torch.tensor(4.0),
        torch.tensor([4.0]),
        torch.tensor([[4.0]]),
        torch.tensor(4),
        torch.tensor(4.0, dtype=torch.float64),
        torch.tensor(4.0, dtype=torch.bfloat16),
        torch.tensor(4.0, requires_grad=True),
    ],
    ids=repr,
)
@pytest.mark.parametrize("target", ["cpu", "reference"])
def test_grad_scale(scale: Any, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if target == "reference":
        monkeypatch.setattr(engine, "launch", reference.run)
    params = parameters(torch.float32, SHAPES)
    other = copies(params)
    ours, plain = (Optimizer8bit(each, "adamw") for each in (params, other))
    values = [torch.randn(p.shape) for p in params]
    set_gradients(params, [value * 4 for value in values])
    set_gradients(other, values)
    ours.step(grad_scale=scale)
    plain.step()
    assert_same(ours, plain)


@pytest.mark.parametrize(
    "scale",
    [
        0,
        -1.0,
        float("nan"),
        float("inf"),
        True,
        "2",
        [2.0],
        2j,
        torch.tensor([1.0, 2.0]),
        torch.empty(0),
        torch.tensor(0.0),
        torch.tensor(float("nan")),
        torch.tensor(-3.0),
        torch.tensor(2j),
        torch.tensor(True),
    ],
    ids=repr,
)
def test_wrong_grad_scales_are_refused_before_anything_changes(scale: Any) -> None:
    params = parameters(torch.float32, SHAPES)
    optimizer = Optimizer8bit(params, "adamw", percentile_clipping=5)
    before = [p.detach().clone() for p in params]
    set_gradients(params, gradients(params))
    with pytest.raises(OptionError, match="grad_scale"):
        optimizer.step(grad_scale=scale)
    assert not optimizer.state
    assert all(equal(p.detach(), old) for p, old in zip(params, before, strict=True))


def test_a_grad_scale_beside_that_of_a_scaler_multiplies() -> None:
    params = parameters(torch.float32, SHAPES)
    other = copies(params)
    ours, plain = (Optimizer8bit(each, "adamw") for each in (params, other))
    values = [torch.randn(p.shape) for p in params]
    scaler = scaler_of(1024.0)
    scaler.scale(torch.zeros(()))
    set_gradients(params, [value * 1024 * 8 for value in values])
    scaler.step(ours, grad_scale=8)
    set_gradients(other, values)
    plain.step()
    assert_same(ours, plain)
    assert combined(None, None) is None


# ---- flags on a device, with fakes: there is none here


class FakeEvent:
    """Remembers whether the host has waited for it."""

    made: ClassVar[list[FakeEvent]] = []

    def __init__(self) -> None:
        self.waited = False
        FakeEvent.made.append(self)

    def record(self, stream: Any) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        self.waited = True


class FakeCuda:
    Event = FakeEvent

    @staticmethod
    def current_stream(device: torch.device) -> str:
        return f"stream of {device}"


class OnCuda(Tensor):
    """A CPU tensor that says it is on CUDA."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


def on_cuda(value: float) -> Tensor:
    return torch.tensor([value]).as_subclass(OnCuda)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> type[FakeEvent]:
    """CUDA's events faked, and pinned memory ordinary."""
    empty = torch.empty
    monkeypatch.setattr(scaling, "_cuda", FakeCuda)

    def unpinned(*shape: int, pin_memory: bool, **arguments: Any) -> Tensor:
        assert pin_memory
        return empty(*shape, **arguments)

    monkeypatch.setattr(torch, "empty", unpinned)
    FakeEvent.made = []
    return FakeEvent


def test_a_flag_on_a_device_is_read_when_the_next_step_begins(cuda: type[FakeEvent]) -> None:
    book = Scaling()
    states = [{"step": 5}, {"step": 9}]
    flag = on_cuda(1.0)
    assert not book.overflowed(flag)
    book.remember(flag, states)
    assert [event.waited for event in cuda.made] == [False]
    assert cuda.made[0].stream == "stream of cuda:0"
    assert [s["step"] for s in states] == [5, 9]
    book.settle()
    assert [event.waited for event in cuda.made] == [True]
    assert [s["step"] for s in states] == [4, 8]
    book.settle()
    assert [s["step"] for s in states] == [4, 8]


def test_a_flag_that_is_not_set_takes_nothing_back(cuda: type[FakeEvent]) -> None:
    book = Scaling()
    states = [{"step": 5}]
    book.remember(on_cuda(0.0), states)
    book.settle()
    assert states == [{"step": 5}]


def test_a_flag_is_taken_as_it_was_when_the_step_ran(cuda: type[FakeEvent]) -> None:
    """The scaler sets its flag to zero for the next step; the copy is our own."""
    book = Scaling()
    states = [{"step": 5}]
    flag = on_cuda(1.0)
    book.remember(flag, states)
    flag.zero_()
    book.settle()
    assert states == [{"step": 4}]


@pytest.mark.parametrize("look", ["step", "state_dict", "deepcopy"])
def test_the_count_is_right_wherever_it_is_looked_at(look: str, cuda: type[FakeEvent]) -> None:
    p = torch.zeros(10, requires_grad=True)
    optimizer = Optimizer8bit([p], "adamw")
    p.grad = torch.ones(10)
    optimizer.step()
    optimizer.step()
    optimizer._scaling.remember(on_cuda(1.0), [optimizer.state[p]])
    if look == "step":
        optimizer.step()
        assert optimizer.state[p]["step"] == 2
    elif look == "state_dict":
        assert optimizer.state_dict()["state"][0]["step"] == 1
    else:
        other = copy.deepcopy(optimizer)
        assert [saved["step"] for saved in other.state.values()] == [1]


def test_flags_elsewhere_than_on_cuda_are_read_at_once() -> None:
    book = Scaling()
    assert book.overflowed(torch.ones(1))
    assert book.overflowed(torch.ones(()))
    assert not book.overflowed(torch.zeros(()))
    assert not book.overflowed(None)
    assert not book.overflowed(0)
    assert overflow_flag(0) is None
    assert overflow_flag(None) is None
    flag = overflow_flag(torch.tensor(1.0, dtype=torch.float64))
    assert flag is not None
    assert flag.dtype is torch.float32
    assert flag.shape == (1,)


def test_the_history_of_norms_waits_for_the_flag() -> None:
    """What a kernel leaves out enters no history either, although the host goes on."""
    p = torch.zeros(10, requires_grad=True)
    optimizer = Optimizer8bit([p], "sgd", percentile_clipping=5)
    p.grad = torch.ones(10)
    optimizer._scaling.overflowed = lambda found_inf: False  # type: ignore[method-assign]
    optimizer.found_inf = torch.ones(1)  # type: ignore[attr-defined]
    optimizer.step()
    assert not optimizer.state[p]["gnorm_vec"].any()
    assert not p.any()
    del optimizer.found_inf  # type: ignore[attr-defined]
    optimizer.state[p]["step"] = 0
    optimizer.step()
    assert (optimizer.state[p]["gnorm_vec"] == 10).all()


def test_rows_of_a_sparse_gradient_wait_for_the_flag() -> None:
    p = torch.randn(20, 30, requires_grad=True)
    optimizer = Optimizer8bit([p], "adamw", min_8bit_size=0)
    rows = torch.sparse_coo_tensor(
        torch.tensor([[3, 7]]), torch.randn(2, 30), (20, 30), check_invariants=True
    )
    p.grad = rows
    optimizer.step()
    before = p.detach().clone()
    saved = {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, Tensor)}
    optimizer._scaling.overflowed = lambda found_inf: False  # type: ignore[method-assign]
    optimizer.found_inf = torch.ones(1)  # type: ignore[attr-defined]
    optimizer.step()
    assert equal(p.detach(), before)
    assert all(equal(optimizer.state[p][k], v) for k, v in saved.items())


# ---- kernels


KERNELS = [made for made in cases() if "amsgrad" not in made.name]


@pytest.mark.parametrize("made", KERNELS, ids=[made.name for made in KERNELS])
def test_the_reference_leaves_everything_where_a_flag_is_set(made: Case) -> None:
    check_untouched(made, reference.run)


EMULATED = [made for made in KERNELS if made.name.split("-")[0] in ("adamw", "lamb", "sgd")]


@pytest.mark.slow
@pytest.mark.parametrize("made", EMULATED, ids=[made.name for made in EMULATED])
def test_cuda_kernels_leave_everything_where_a_flag_is_set(made: Case) -> None:
    import emulated

    check_untouched(made, emulated.run)


def check_untouched(made: Case, run: Any) -> None:
    batch = make_batch(made, (1, 255, 1000))
    before = copy_of_batch(batch)
    batch.found_inf = torch.tensor([2.0])  # as many as there were devices with an overflow
    run([batch])
    for row, old in zip(batch.tensors, before.tensors, strict=True):
        assert all(equal(a, b) for a, b in zip(row, old, strict=True))
    batch.found_inf = torch.zeros(1)
    run([batch])
    assert any(
        not equal(row[0], old[0]) for row, old in zip(batch.tensors, before.tensors, strict=True)
    )
