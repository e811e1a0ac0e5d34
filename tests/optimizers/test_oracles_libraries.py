"""Rules that torch.optim lacks, against other libraries and against their authors' formulas.

All oracles run in float64, ten steps and more, and are never corrected. How far the float32 run may
be from them is what `test_rules.Follower` derives from the rule's text; so both the text and the
kernel are held against code that nobody here wrote, or against a paper's algorithm written out.
Where a library deviates from the paper, the test says how, and what it leaves out because of it.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx.errors import OptionError
from bnbx.optimizers import engine
from bnbx.optimizers.engine import Optimizer8bit
from optimizers.rounding import UNIT, Bounded
from optimizers.text import Follower, check_within
from optimizers.variants import TARGETS, parameters, set_gradients

STEPS = 12
SHAPES = ((), (255,), (16, 16), (4, 16, 64))
LARGEST_BOUND = 1e-4
PEERS = "from the extra `test`, is the oracle"

Make = Callable[[list[Tensor]], Any]


@pytest.fixture(params=TARGETS, autouse=True)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(engine, "launch", TARGETS[request.param])
    return str(request.param)


def moderate_gradients(params: list[Tensor]) -> list[Tensor]:
    """Gradients over a few magnitudes, none of them zero."""
    return [torch.randn(p.shape).sign() * 10 ** (torch.rand(p.shape) * 2 - 2) for p in params]


class Race:
    """An optimizer of bnbx, the text beside it, and an oracle on copies in float64."""

    def __init__(self, rule: str, make: Make, **hyper: Any) -> None:
        self.params = parameters(torch.float32, SHAPES)
        self.doubles = [p.detach().double().requires_grad_() for p in self.params]
        self.optimizer = Optimizer8bit(self.params, rule, bits=32, **hyper)
        self.follower = Follower(self.optimizer)
        self.theirs = make(self.doubles)
        self.largest = LARGEST_BOUND

    def step(self) -> None:
        values = moderate_gradients(self.params)
        set_gradients(self.params, values)
        set_gradients(self.doubles, [value.double() for value in values])
        self.optimizer.step()
        self.theirs.step()
        self.follower.step()

    def run(self, steps: int = STEPS) -> Race:
        for _ in range(steps):
            self.step()
        self.check()
        return self

    def check(self) -> None:
        for p, double in zip(self.params, self.doubles, strict=True):
            error = self.follower.values[p]["p"].error
            assert float(error.max()) < self.largest, "a bound as wide as this proves little"
            check_within(Bounded(double.detach(), error + 1e-14), p.detach())


class Authors:
    """A paper's algorithm: `rule(p, g, state, step)` returns the new parameter, in float64."""

    def __init__(self, params: list[Tensor], rule: Callable[..., Tensor]) -> None:
        self.params, self.rule, self.count = params, rule, 0
        self.states: list[dict[str, Tensor]] = [{} for _ in params]

    def step(self) -> None:
        self.count += 1
        for p, state in zip(self.params, self.states, strict=True):
            assert p.grad is not None
            p.data = self.rule(p.detach(), p.grad, state, self.count)


def authors(rule: Callable[..., Tensor]) -> Make:
    return lambda params: Authors(params, rule)


def pytorch_optimizer() -> Any:
    return pytest.importorskip("pytorch_optimizer", reason=f"pytorch_optimizer, {PEERS}")


def moments(
    g: Tensor, state: dict[str, Tensor], beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    """Adam's two averages, which most papers build on."""
    zero = torch.zeros_like(g)
    state["m"] = beta1 * state.get("m", zero) + (1 - beta1) * g
    state["v"] = beta2 * state.get("v", zero) + (1 - beta2) * g**2
    return state["m"], state["v"]


# ---- Lion, arXiv:2302.06675


def test_lion() -> None:
    """As the paper's algorithm 2 throughout."""
    hyper: dict[str, Any] = dict(lr=1e-3, betas=(0.8, 0.95), weight_decay=0.1)
    lion = pytorch_optimizer().Lion
    Race("lion", lambda ps: lion(ps, weight_decouple=True, **hyper), **hyper).run()


# ---- LAMB, arXiv:1904.00962


def lamb_of_the_paper(lr: float, beta1: float, beta2: float, eps: float, decay: float) -> Make:
    """Algorithm 2, phi the identity."""

    def rule(p: Tensor, g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        m, v = moments(g, state, beta1, beta2)
        r = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
        u = r + decay * p
        moved: Tensor = lr * p.norm() / u.norm() * u
        return p - moved

    return authors(rule)


def test_lamb_of_the_paper() -> None:
    theirs = lamb_of_the_paper(1e-2, 0.8, 0.95, 1e-6, 0.1)
    hyper: dict[str, Any] = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    Race("lamb", theirs, max_unorm=0.0, **hyper).run()


def test_lamb_of_the_library() -> None:
    """Without bias correction, of which it has that of the first moment or none.

    It adds eps to the norm
    of the update, so eps is 0; it holds the parameter's norm to `clamp`, which is far away here.
    """
    hyper: dict[str, Any] = dict(lr=1e-2, betas=(0.8, 0.95), eps=0.0, weight_decay=0.1)

    def make(params: list[Tensor]) -> Any:
        made = pytorch_optimizer().Lamb(params, weight_decouple=False, **hyper)
        made.clamp = 1e9
        for group in made.param_groups:
            group["adam_debias"] = True
        return made

    Race("lamb", make, max_unorm=0.0, bias_correction=False, **hyper).run()


def test_lamb_of_bitsandbytes_is_adam_whose_update_is_bounded() -> None:
    """Its documented form: Adam with the update no longer than max_unorm times the parameter."""
    lr, beta1, beta2, eps, decay, most = 1e-2, 0.8, 0.95, 1e-6, 0.1, 0.4

    def rule(p: Tensor, g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        m, v = moments(g, state, beta1, beta2)
        u = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps) + decay * p
        return p - lr * min(1.0, float(most * p.norm() / u.norm())) * u

    Race(
        "lamb",
        authors(rule),
        lr=lr,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=decay,
        max_unorm=most,
    ).run()


# ---- LARS, arXiv:1708.03888


@pytest.fixture
def lars_in_double(monkeypatch: pytest.MonkeyPatch) -> Any:
    """PytorchLARS of bitsandbytes in float64.

    It asserts that parameters are float32: here the name means float64. Without momentum it fails
    (its `update` is unbound), so all tests of it have some.
    """
    module = pytest.importorskip(
        "bitsandbytes.optim.lars", reason="bitsandbytes, from the extra `peers`, is the oracle"
    )
    names = {name: getattr(torch, name) for name in ("norm", "clone", "enable_grad")}
    monkeypatch.setattr(module, "torch", types.SimpleNamespace(float32=torch.float64, **names))
    return module.PytorchLARS


@pytest.mark.parametrize("max_unorm", [0.0, 1e-3, 0.3, 100.0])
@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_is_that_of_bitsandbytes(
    nesterov: bool, max_unorm: float, lars_in_double: Any
) -> None:
    hyper: dict[str, Any] = dict(
        lr=1e-2, momentum=0.9, dampening=0.0 if nesterov else 0.1, weight_decay=0.1,
        nesterov=nesterov, max_unorm=max_unorm,
    )  # fmt: skip
    Race("lars", lambda ps: lars_in_double(ps, **hyper), **hyper).run()


def test_lars_leaves_zero_where_bitsandbytes_stays(lars_in_double: Any) -> None:
    """A parameter of norm 0 allows an update of norm 0 there: it could never be trained."""
    hyper: dict[str, Any] = dict(lr=0.5, momentum=0.9, max_unorm=0.02)
    ours, theirs = (torch.zeros(8, dtype=dtype) for dtype in (torch.float32, torch.float64))
    for p, make in ((ours, Optimizer8bit), (theirs, lars_in_double)):
        p.requires_grad_().grad = torch.ones_like(p)
        more: dict[str, Any] = {"rule": "lars", "bits": 32} if make is Optimizer8bit else {}
        make([p], **hyper, **more).step()
    assert (theirs == 0).all()
    assert (ours == -0.5).all()


# ---- AdEMAMix, arXiv:2409.03137


@pytest.mark.parametrize(("t_alpha", "t_beta3"), [(None, None), (5, None), (None, 7), (5, 30)])
def test_ademamix_is_that_of_bitsandbytes(t_alpha: int | None, t_beta3: int | None) -> None:
    """With an optimizer for each parameter.

    Its schedule of alpha compounds from parameter to parameter within a group, which is no part of
    the paper; so each has an optimizer of its own.
    """
    module = pytest.importorskip(
        "bitsandbytes.optim.ademamix", reason="bitsandbytes, from the extra `peers`, is the oracle"
    )
    hyper: dict[str, Any] = dict(
        lr=1e-2, betas=(0.8, 0.95, 0.999), alpha=3.0, eps=1e-6, weight_decay=0.1,
        t_alpha=t_alpha, t_beta3=t_beta3,
    )  # fmt: skip
    assert "betas" in Optimizer8bit([torch.ones(1)], "ademamix", **hyper).param_groups[0]
    Race("ademamix", lambda ps: Each(module._ReferenceAdEMAMix, ps, hyper), **hyper).run()


class Each:
    """An optimizer for each parameter."""

    def __init__(self, kind: Any, params: list[Tensor], hyper: dict[str, Any]) -> None:
        self.optimizers = [kind([p], **hyper) for p in params]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


@pytest.mark.parametrize("warm", [None, 8])
def test_ademamix_is_that_of_the_library(warm: int | None) -> None:
    """It has one length for both schedules."""
    hyper: dict[str, Any] = dict(
        lr=1e-2, betas=(0.8, 0.95, 0.999), alpha=3.0, eps=1e-6, weight_decay=0.1
    )
    kind = pytorch_optimizer().AdEMAMix
    more = dict(weight_decouple=True, t_alpha_beta3=warm)
    Race(
        "ademamix", lambda ps: kind(ps, **hyper, **more), t_alpha=warm, t_beta3=warm, **hyper
    ).run()


# ---- ADOPT, arXiv:2411.02853


def test_adopt_of_the_library() -> None:
    """Without decay, and with the clipping of the authors.

    It decays the weights in the first step too, where the authors' code only takes the second
    moment; so there is no decay here, and some in the next test. It counts steps from 1 where they
    clip to step**(1/4), counted from 0; so it gets another function.
    """
    hyper: dict[str, Any] = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0)
    kind = pytorch_optimizer().ADOPT
    Race(
        "adopt", lambda ps: kind(ps, clip_lambda=lambda n: (n - 1) ** 0.25, **hyper), **hyper
    ).run()


def test_adopt_of_the_authors() -> None:
    lr, beta1, beta2, eps, decay = 1e-2, 0.8, 0.95, 1e-6, 0.1

    def rule(p: Tensor, g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        if step == 1:
            state["m"], state["v"] = torch.zeros_like(g), g**2
            return p
        most = (step - 1) ** 0.25
        normed = (g / state["v"].sqrt().clamp(min=eps)).clamp(-most, most)
        state["m"] = beta1 * state["m"] + (1 - beta1) * normed
        state["v"] = beta2 * state["v"] + (1 - beta2) * g**2
        return p - lr * decay * p - lr * state["m"]

    Race("adopt", authors(rule), lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay).run()


# ---- Schedule-Free AdamW, arXiv:2405.15682


@pytest.mark.parametrize("warmup", [0, 5, 100])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_schedule_free_is_that_of_its_authors(warmup: int, decay: float) -> None:
    """Training, evaluation in between (twice over changes nothing), and training on."""
    free = pytest.importorskip("schedulefree", reason=f"schedulefree, {PEERS}")
    hyper: dict[str, Any] = dict(
        lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay, warmup_steps=warmup
    )
    race = Race("schedule_free_adamw", lambda ps: free.AdamWScheduleFree(ps, **hyper), **hyper)
    # The text adds up c (z - p), whose errors the bound counts as if they were not p's own; in
    # warm-up c is large.
    race.largest = 5 * LARGEST_BOUND
    race.theirs.train()
    race.run(6)
    for _ in range(2):
        race.optimizer.eval()
        race.theirs.eval()
        for p, double in zip(race.params, race.doubles, strict=True):
            values = race.follower.values[p]
            # x = y + (1 - 1 / beta1) (z - y), so errors of y and z count 1.25 and 0.25 fold, and
            # three float32 operations round.
            size = 1.5 * (values["p"].value.abs() + values["z"].value.abs())
            error = 1.25 * values["p"].error + 0.25 * values["z"].error + 3 * UNIT * size
            check_within(Bounded(double.detach(), error + 1e-14), p.detach())
    with pytest.raises(OptionError, match=r"train\(\)"):
        race.optimizer.step()
    # Train on from the exact values, for a round trip rounds a few bits more than the text does.
    race.optimizer.train()
    race.theirs.train()
    for p, double in zip(race.params, race.doubles, strict=True):
        values = race.follower.values[p]
        size = 4 * (values["p"].value.abs() + values["z"].value.abs())
        values["p"] = Bounded(values["p"].value, values["p"].error + 8 * UNIT * size)
        check_within(Bounded(double.detach(), values["p"].error + 1e-14), p.detach())
    race.run(6)


# ---- Cautious optimizers, arXiv:2411.16085


def cautious(update: Tensor, g: Tensor) -> Tensor:
    """As the authors' code: the mask over its mean, which is at least 1e-3.

    The paper, and the library, have (number of elements) / (number kept + 1) instead; for all but
    small tensors that is the same within a part in a thousand.
    """
    mask = (update * g > 0).to(g.dtype)
    found: Tensor = update * mask / mask.mean().clamp(min=1e-3)
    return found


def test_cautious_adamw_of_the_authors() -> None:
    lr, beta1, beta2, eps, decay = 1e-2, 0.8, 0.95, 1e-6, 0.1

    def rule(p: Tensor, g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        m, v = moments(g, state, beta1, beta2)
        update = cautious(m, g) / (1 - beta1**step)
        return p - lr * decay * p - lr * update / ((v / (1 - beta2**step)).sqrt() + eps)

    Race(
        "cautious_adamw", authors(rule), lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay
    ).run()


def test_cautious_lion_of_the_authors() -> None:
    lr, beta1, beta2, decay = 1e-3, 0.8, 0.95, 0.1

    def rule(p: Tensor, g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        m = state.get("m", torch.zeros_like(g))
        update = (beta1 * m + (1 - beta1) * g).sign()
        state["m"] = beta2 * m + (1 - beta2) * g
        return p - lr * decay * p - lr * cautious(update, g)

    Race("cautious_lion", authors(rule), lr=lr, betas=(beta1, beta2), weight_decay=decay).run()


def test_cautious_lion_of_the_library() -> None:
    """It divides by the number kept plus one: so the shares differ, and what is kept does not."""
    n, lr = 4096, 1e-2
    p = torch.zeros(n).requires_grad_()
    q = torch.zeros(n, dtype=torch.float64).requires_grad_()
    ours = Optimizer8bit([p], "cautious_lion", bits=32, lr=lr, weight_decay=0.0, betas=(0.9, 0.99))
    theirs = pytorch_optimizer().Lion(
        [q], lr=lr, weight_decay=0.0, betas=(0.9, 0.99), cautious=True
    )
    for _ in range(STEPS):
        value = torch.randn(n).sign() * (0.1 + torch.rand(n))
        before, theirs_before = p.detach().clone(), q.detach().clone()
        p.grad, q.grad = value, value.double()
        ours.step()
        theirs.step()
        moved, kept = p.detach() - before, (p.detach() != before)
        assert 0.25 * n < int(kept.sum()) <= n
        expected = (q.detach() - theirs_before) * (float(kept.sum()) + 1) / float(kept.sum())
        assert bool(((expected != 0) == kept).all())
        # Each step is at most 4 lr long, and rounds to the float32 grid around p, once there, once
        # in its own product and once in the difference.
        most = float(before.abs().max()) + 4 * lr
        assert float((moved - expected).abs().max()) <= 3 * UNIT * (most + 4 * lr)


# ---- clipped forms, which bitsandbytes calls max_unorm


@pytest.mark.parametrize("most", [1e-3, 0.5, 1e3])
def test_a_clipped_adam(most: float) -> None:
    """Adam whose update, before lr, is no longer than max_unorm times the parameter."""
    lr, beta1, beta2, eps = 1e-2, 0.8, 0.95, 1e-6

    def rule(p: Tensor, g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        m, v = moments(g, state, beta1, beta2)
        u = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
        longest = most * float(p.norm())
        return p - lr * (u * longest / u.norm() if u.norm() > longest > 0 else u)

    Race("adam", authors(rule), lr=lr, betas=(beta1, beta2), eps=eps, max_unorm=most).run()
