"""percentile_clipping, max_unorm, skip_zeros and block_wise, against formulas in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bnbx.errors import OptionError
from bnbx.kernels.evaluate import HOST, evaluate, tensor_operations
from bnbx.optimizers.clipping import HISTORY, clip_factor
from bnbx.optimizers.engine import Optimizer8bit
from bnbx.registry import Optimizer, optimizers
from bnbx.registry.checks import NORM, select
from bnbx.registry.config import Resolved
from optimizers.compare import assert_same, equal
from optimizers.variants import CASES, VARIANTS, copies, gradients, parameters, set_gradients

CLIPPING = [case for case in CASES if optimizers().get(case[0]).can_clip]
SIZE = 3000
ONE = torch.ones(1)


# ---- percentiles


def history_of(norms: list[float], percentile: int) -> list[float]:
    """The factors that bitsandbytes' rule gives these norms, in float64."""
    kept = np.zeros(HISTORY)
    factors = []
    for step, norm in enumerate(norms, 1):
        if step == 1:
            kept[:] = norm**2
        kept[step % HISTORY] = norm**2
        allowed = np.sqrt(np.sort(kept)[percentile])
        factors.append(min(1.0, allowed / norm) if norm else 1.0)
    return factors


@pytest.mark.parametrize("percentile", [1, 5, 50, 99])
def test_gradients_are_held_to_a_percentile_of_their_norms(percentile: int) -> None:
    """SGD with lr 1 shows the gradient that it got; over more steps than the history has."""
    norms = torch.rand(250).mul(6).sub(3).exp().tolist()
    direction = torch.randn(1000)
    direction /= direction.norm()
    p = torch.zeros(1000, requires_grad=True)
    optimizer = Optimizer8bit([p], "sgd", lr=1.0, percentile_clipping=percentile)
    for norm, factor in zip(norms, history_of(norms, percentile), strict=True):
        before = p.detach().clone()
        p.grad = direction * norm
        optimizer.step()
        moved = (p.detach() - before).double().norm()
        torch.testing.assert_close(
            moved, torch.tensor(norm * factor).double(), rtol=1e-5, atol=2e-5
        )
        p.data.zero_()  # where the length of the next step can be read off


def test_the_history_is_per_parameter() -> None:
    params = parameters(torch.float32, [(100,), (100,)])
    optimizer = Optimizer8bit(params, "sgd", percentile_clipping=5)
    set_gradients(params, [torch.ones(100), torch.full((100,), 3.0)])
    optimizer.step()
    assert optimizer.state[params[0]]["gnorm_vec"].tolist() == [100.0] * HISTORY
    assert optimizer.state[params[1]]["gnorm_vec"].tolist() == [900.0] * HISTORY


def test_norms_are_those_of_unscaled_gradients() -> None:
    """A loss scale that changes from step to step is none of the gradient's business."""
    params = parameters(torch.float32, [(SIZE,)])
    other = copies(params)
    scaled, plain = (
        Optimizer8bit(each, "adamw", percentile_clipping=20, min_8bit_size=0)
        for each in (params, other)
    )
    for scale in (65536.0, 1024.0, 2.0, 2.0**-10, 512.0):
        values = [torch.randn(SIZE) * float(torch.rand(())) * 4]
        set_gradients(other, values)
        set_gradients(params, [values[0] * scale])
        scaled.step(grad_scale=scale)
        plain.step()
    assert_same(scaled, plain)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_does_not_enter_the_history(bad: float) -> None:
    p = torch.zeros(10, requires_grad=True)
    optimizer = Optimizer8bit([p], "sgd", percentile_clipping=5)
    for value in (bad, 1.0, bad, 2.0):
        p.grad = torch.ones(10)
        p.grad[0] = value
        optimizer.step()
    norms = optimizer.state[p]["gnorm_vec"]
    assert norms.isfinite().all()
    assert norms[4] == 13
    assert (norms[torch.arange(HISTORY) != 4] == 10).all()


def test_the_first_norm_of_zero_fills_nothing() -> None:
    """As there is no history, the first norm that is not zero is allowed."""
    factor, norms = clip_factor(torch.zeros(5), torch.zeros(HISTORY), 1, 5, scale=ONE)
    assert factor == 1
    factor, norms = clip_factor(torch.ones(5), norms, 2, 5, scale=ONE)
    assert factor == 1
    assert (norms == 5).all()


def test_a_history_begins_when_clipping_is_switched_on() -> None:
    p = torch.zeros(10, requires_grad=True)
    optimizer = Optimizer8bit([p], "sgd", lr=1.0)
    for value, percentile, moved in ((5.0, 100, 5.0), (1.0, 5, 1.0), (3.0, 5, 1.0)):
        optimizer.param_groups[0]["percentile_clipping"] = percentile
        p.grad = torch.full((10,), value)
        p.data.zero_()
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full((10,), -moved))


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 100_000])
def test_norms_of_any_size(size: int) -> None:
    g = torch.randn(size)
    _, norms = clip_factor(g, torch.zeros(HISTORY), 1, 5, scale=-2 * ONE)
    torch.testing.assert_close(norms[0].double(), 4 * g.double().square().sum(), rtol=1e-6, atol=0)


def test_norms_do_not_depend_on_threads() -> None:
    g = torch.randn(1_000_003)
    found = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        found.append(clip_factor(g, torch.zeros(HISTORY), 1, 5, scale=ONE)[1])
    assert equal(found[0], found[1])
    assert equal(found[0], found[2])


def test_a_history_is_saved_and_goes_on() -> None:
    params = parameters(torch.float32, [(SIZE,)])
    runs = [params, copies(params)]
    arguments: dict[str, Any] = {"percentile_clipping": 30, "min_8bit_size": 0}
    ours, other = (Optimizer8bit(each, "adamw", **arguments) for each in runs)
    for step in range(6):
        values = [torch.randn(SIZE) * (step + 1)]
        for optimizer, each in zip((ours, other), runs, strict=True):
            set_gradients(each, values)
            optimizer.step()
        if step == 2:
            state_dict = other.state_dict()
            other = Optimizer8bit(runs[1], "adamw", **arguments)
            other.load_state_dict(state_dict)
    assert_same(ours, other)


# ---- max_unorm, in float64


def step_in_float64(
    spec: Optimizer, resolved: Resolved, step: int, values: Mapping[str, Tensor], most: float
) -> tuple[dict[str, Tensor], bool]:
    """The spec's text with its update u shortened to `most` norms of p; whether it was."""
    host: dict[str, Any] = {**resolved.hyper, "step": step}
    for statement in spec.step.statements:
        host[statement.target] = evaluate(statement.value, host, HOST)
    known = {k: torch.tensor(float(v), dtype=torch.float64) for k, v in host.items()}
    known |= {state.name: torch.zeros(()).double() for state in spec.states}
    known |= values
    operations = tensor_operations(torch.float64, torch.device("cpu"))

    def run(code: Any) -> None:
        for statement in code.statements:
            value = select(statement.value, resolved.switches)
            known[statement.target] = evaluate(value, known, operations)

    run(spec.element)
    known["numel"] = torch.tensor(float(values["p"].numel()), dtype=torch.float64)
    for name in list(known):
        known[NORM + name] = known[name].norm()
    run(spec.tensor)
    norm_p, norm_u = known["p"].norm(), known["u"].norm()
    clipped = bool(most and norm_p > 0 and norm_u > most * norm_p)
    if clipped:
        known["u"] = known["u"] * (most * norm_p / norm_u)
    run(spec.apply)
    return {name: known[name] for name in ("p", *(s.name for s in spec.states))}, clipped


@pytest.mark.parametrize("most", [1e-3, 0.02, 1e3])
@pytest.mark.parametrize(("rule", "variant"), CLIPPING)
def test_updates_are_held_to_a_part_of_the_parameter(rule: str, variant: str, most: float) -> None:
    torch.manual_seed(3)
    spec = optimizers().get(rule)
    p = torch.randn(SIZE, requires_grad=True)
    arguments = {**VARIANTS[rule][variant][0], "max_unorm": most}
    optimizer = Optimizer8bit([p], rule, bits=32, **arguments)
    values: dict[str, Tensor] = {"p": p.detach().double()}
    values |= {
        s.name: values["p"].clone()
        if s.initial == "p"
        else torch.full(
            (SIZE,), float(optimizer.resolved(p).hyper[s.initial]) if s.initial else 0
        ).double()
        for s in spec.states
    }
    clips = 0
    for step in range(1, 5):
        p.grad = torch.randn(SIZE)
        g = p.grad.double()
        values, clipped = step_in_float64(
            spec, optimizer.resolved(p), step, {**values, "g": g}, most
        )
        clips += clipped
        optimizer.step()
    # Four steps, each of some tens of float32 operations; signs of sums near zero may differ.
    difference = (p.detach().double() - values["p"]).abs()
    if "sign" in spec.element_code:
        assert (difference > 1e-5).sum() <= 3
    else:
        assert difference.max() < 1e-5
    assert clips >= 3 if most == 1e-3 else clips == 0 or most < 1  # adopt begins without an update


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(
    ("rule", "arguments"),
    [
        ("lars", dict(momentum=0.9)),
        ("lamb", {}),
        ("lamb", dict(max_unorm=0.0)),
        ("adamw", dict(max_unorm=0.02)),
        ("rmsprop", dict(max_unorm=0.02)),
    ],
)
def test_a_bad_gradient_does_not_let_the_others_run_away(
    rule: str, arguments: dict[str, Any], zero: bool, bad: float
) -> None:
    """Its update has no norm that the bound could hold to something."""
    p = (torch.zeros if zero else torch.randn)(SIZE).mul(1e-3).requires_grad_()
    before = p.detach().clone()
    optimizer = Optimizer8bit([p], rule, bits=32, lr=0.1, weight_decay=0.0, **arguments)
    p.grad = torch.randn(SIZE)
    p.grad[7] = bad
    optimizer.step()
    moved = (p.detach() - before)[torch.arange(SIZE) != 7]
    assert moved.isfinite().all()
    if not zero:  # what is zero is never bound
        most = arguments.get("max_unorm", 0.02) or 1.0
        assert moved.norm() <= 0.1 * most * before.norm() * 1.001


def test_max_unorm_needs_an_update_with_a_name() -> None:
    p = torch.zeros(3, requires_grad=True)
    with pytest.raises(OptionError, match="max_unorm needs a rule that writes its update as 'u'"):
        Optimizer8bit([p], "schedule_free_adamw", max_unorm=0.1)


def test_a_parameter_of_zeros_may_leave_zero() -> None:
    p = torch.zeros(SIZE, requires_grad=True)
    optimizer = Optimizer8bit([p], "adamw", max_unorm=0.01)
    p.grad = torch.randn(SIZE)
    optimizer.step()
    assert p.any()


# ---- all together


# Those whose tensors are measured before they are updated, and one more.
MEASURED = [case for case in CASES if optimizers().get(case[0]).tensor_code or "clipped" in case[1]]


@pytest.mark.parametrize("block_wise", [True, False])
@pytest.mark.parametrize(("rule", "variant"), [*MEASURED, ("adopt", "")])
def test_runs_are_equal_on_one_thread_and_two(rule: str, variant: str, block_wise: bool) -> None:
    """Norms included: tensors are large enough for threads to share them."""
    shapes = [(70_000,), (300, 301)]
    params = parameters(torch.float32, shapes)
    arguments = {**VARIANTS[rule][variant][0], "block_wise": block_wise, "skip_zeros": True}
    arguments["percentile_clipping"] = 10
    if optimizers().get(rule).can_clip:
        arguments["max_unorm"] = 0.01
    steps = [gradients(params) for _ in range(2)]  # torch's own bits do depend on threads
    runs = []
    for threads, each in ((1, params), (2, copies(params)), (2, copies(params))):
        torch.set_num_threads(threads)
        optimizer = Optimizer8bit(each, rule, **arguments)
        for values in steps:
            set_gradients(each, values)
            optimizer.step()
        runs.append(optimizer)
    assert_same(runs[0], runs[1])
    assert_same(runs[1], runs[2])


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_zeros_are_skipped(bits: int) -> None:
    """Elements without a gradient stay, and so do their states; the others move as ever."""
    p = torch.randn(SIZE, requires_grad=True)
    q = p.detach().clone().requires_grad_()
    arguments: dict[str, Any] = {"bits": bits, "weight_decay": 0.1, "min_8bit_size": 0}
    skipping = Optimizer8bit([p], "adamw", skip_zeros=True, **arguments)
    plain = Optimizer8bit([q], "adamw", **arguments)
    zero = torch.arange(SIZE) % 3 == 0
    before = p.detach().clone()
    for _ in range(3):
        p.grad = torch.randn(SIZE).masked_fill(zero, 0)
        q.grad = p.grad.clone()
        skipping.step()
        plain.step()
    assert equal(p.detach()[zero], before[zero])
    assert (q.detach()[zero] != before[zero]).all()
    assert equal(p.detach()[~zero], q.detach()[~zero])


@pytest.mark.parametrize("bits", [8, 4])
def test_one_absmax_for_a_tensor(bits: int) -> None:
    """The quantized state is that of the same step in 32 bits, by one scale."""
    p = torch.randn(SIZE, requires_grad=True)
    q = p.detach().clone().requires_grad_()
    quantized = Optimizer8bit([p], "lion", bits=bits, block_wise=False, min_8bit_size=0)
    exact = Optimizer8bit([q], "lion", bits=32)
    p.grad = torch.randn(SIZE)
    q.grad = p.grad.clone()
    quantized.step()
    exact.step()
    saved = quantized.state[p]
    assert saved["m_absmax"].shape == (1,)
    assert saved["m_absmax"][0] == exact.state[q]["m"].abs().max()
    assert saved["m_type"].endswith("/tensor")
    assert equal(p.detach(), q.detach())
