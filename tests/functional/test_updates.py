"""The optimizer_update functions: bitsandbytes' numbers, the optimizers' bits, every order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx import functional, optim
from bnbx.registry import optimizers
from oracles import bitsandbytes_functional
from same_bits import FLOATS, same_bits

N, STEPS = 3000, 4
TWO = ("adam", "lamb", "ademamix")
NAMES = ("adam", "lion", "momentum", "rmsprop", "adagrad", "lars", "lamb", "ademamix")
# Those whose beta2 is something else than a decay rate, or that have none.
ONE_BETA = ("momentum", "lars", "rmsprop", "adagrad")


@pytest.fixture(scope="module")
def theirs() -> Any:
    return bitsandbytes_functional()


def numbers(seed: int) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed))


def run32(
    module: Any, name: str, dtype: torch.dtype = torch.float32, **options: Any
) -> list[Tensor]:
    """Some steps; p, the states, and the norm of the last update."""
    p, norm = numbers(0).to(dtype), torch.zeros(1)
    mixing = name == "ademamix"
    state1 = torch.zeros((2, N) if mixing else N)
    state2 = torch.zeros(N) if name in TWO else None
    for step in range(1, STEPS + 1):
        module.optimizer_update_32bit(
            name,
            numbers(step).to(dtype),
            p,
            state1,
            0.9,
            1e-8,
            step,
            1e-2,
            state2,
            0.0 if name in ONE_BETA else 0.99,
            0.999 if mixing else 0.0,
            5.0 if mixing else 0.0,
            unorm_vec=norm,
            **options,
        )
    return [t for t in (p, state1, state2, norm) if t is not None]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "lamb"])
def test_32_bits(theirs: Any, name: str, decay: float) -> None:
    """Bitsandbytes' LAMB without max_unorm is AdamW, not LAMB: it is left out."""
    options: dict[str, Any] = dict(weight_decay=decay, gnorm_scale=0.5)
    expected, found = run32(theirs, name, **options), run32(functional, name, **options)
    for a, b in zip(expected, found, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["momentum", "lars", "rmsprop"])
def test_bounded_updates(theirs: Any, name: str, decay: float) -> None:
    """On a CPU, bitsandbytes ignores max_unorm in other rules, or leaves the corrections out."""
    options: dict[str, Any] = dict(weight_decay=decay, max_unorm=0.05)
    expected, found = run32(theirs, name, **options), run32(functional, name, **options)
    for a, b in zip(expected, found, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=2e-6)
    assert float(found[-1]) > 0


@pytest.mark.parametrize("name", ["adam", "lion", "adagrad", "lamb", "ademamix"])
def test_bounded_updates_of_other_rules(name: str) -> None:
    """The step is lr times the update, as long as the bound, whose norm before is told."""
    p, g, norm = numbers(0), numbers(1), torch.zeros(1)
    before = p.clone()
    state1 = torch.zeros((2, N) if name == "ademamix" else N)
    state2 = torch.zeros(N) if name in TWO else None
    functional.optimizer_update_32bit(
        name, g, p, state1, 0.9, 1e-8, 1, 0.1, state2, 0.99, unorm_vec=norm, max_unorm=0.01
    )
    assert float(norm) > 0.02 * float(before.norm())
    assert torch.allclose((p - before).norm(), 0.1 * 0.01 * before.norm(), rtol=1e-3)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_bits_of_the_optimizer(dtype: torch.dtype) -> None:
    """32 and 8 bits: what `bnbx.optim` makes of the same gradients."""
    for bits in (32, 8):
        p = torch.nn.Parameter(numbers(0).to(dtype))
        optimizer = optim.create(
            "adamw", [p], bits=bits, lr=1e-2, weight_decay=0.1, min_8bit_size=0
        )
        q = numbers(0).to(dtype)
        blocks = -(-N // 256)
        tables = [functional.create_dynamic_map(), functional.create_dynamic_map(signed=False)]
        states = [torch.zeros(N), torch.zeros(N)]
        scales = [torch.zeros(blocks), torch.zeros(blocks)]
        codes = [torch.full((N,), 127, dtype=torch.uint8), torch.zeros(N, dtype=torch.uint8)]
        for step in range(1, STEPS + 1):
            p.grad = numbers(step).to(dtype)
            optimizer.step()
            rest: tuple[Any, ...] = (0.1, 1.0)
            if bits == 32:
                functional.optimizer_update_32bit(
                    "adam", p.grad, q, states[0], 0.9, 1e-8, step, 1e-2, states[1], 0.999,
                    0.0, 0.0, *rest,
                )  # fmt: skip
            else:
                update: Any = functional.optimizer_update_8bit_blockwise
                update(
                    "adam", p.grad, q, *codes, 0.9, 0.999, 0.0, 0.0, 1e-8, step, 1e-2,
                    *tables, *scales, *rest,
                )  # fmt: skip
        assert same_bits(q, p.detach())
        saved = optimizer.state[p]
        if bits == 32:
            assert same_bits(states[0], saved["m"])
        else:
            assert same_bits(codes[1], saved["v"])
            assert same_bits(scales[1], saved["v_absmax"])


def run8(module: Any, name: str, *, old: bool = False, named: bool = False) -> list[Tensor]:
    p, blocks, mixing = numbers(0), -(-N // 256), name == "ademamix"
    unsigned = name in ("rmsprop", "adagrad")
    state1 = torch.full((2, N) if mixing else (N,), 0 if unsigned else 127, dtype=torch.uint8)
    scale1 = torch.zeros((2, blocks) if mixing else blocks)
    table1 = functional.create_dynamic_map(signed=not unsigned)
    two = name in TWO
    state2 = torch.zeros(N, dtype=torch.uint8) if two else None
    scale2 = torch.zeros(blocks) if two else None
    table2 = functional.create_dynamic_map(signed=False) if two else None
    beta2 = 0.0 if name in ONE_BETA else 0.99
    third = () if old else (0.999, 5.0) if mixing else (0.0, 0.0)
    for step in range(1, STEPS + 1):
        first = (name, numbers(step), p, state1, state2)
        if named:
            module.optimizer_update_8bit_blockwise(
                *first, beta1=0.9, beta2=beta2, eps=1e-8, step=step, lr=1e-2, qmap1=table1,
                qmap2=table2, absmax1=scale1, absmax2=scale2, gnorm_scale=0.5,
            )  # fmt: skip
        else:
            module.optimizer_update_8bit_blockwise(
                *first, 0.9, beta2, *third, 1e-8, step, 1e-2, table1, table2, scale1, scale2,
                0.0, 0.5,
            )  # fmt: skip
    return [t for t in (p, state1, scale1, state2, scale2) if t is not None]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("lamb", "lars")])
def test_8_bits(theirs: Any, name: str) -> None:
    """Within what its coarser codes are off by."""
    expected, found = run8(theirs, name), run8(functional, name)
    far = (expected[0] - found[0]).abs()
    assert float(far.mean()) < 1e-4
    assert float((expected[1] != found[1]).float().mean()) < 0.02
    assert torch.allclose(expected[2], found[2], rtol=1e-3)


@pytest.mark.parametrize("name", ["adam", "lion", "adagrad"])
def test_orders_of_blockwise_updates(name: str) -> None:
    expected = run8(functional, name)
    for found in (run8(functional, name, old=True), run8(functional, name, named=True)):
        assert all(map(same_bits, found, expected))


def test_orders_of_32bit_updates() -> None:
    """0.0.24: (..., state2, beta2, weight_decay, gnorm_scale, unorm_vec, max_unorm)."""
    found = []
    for form in range(4):
        p, m, v, norm = numbers(0), torch.zeros(N), torch.zeros(N), torch.zeros(1)
        first: tuple[Any, ...] = ("adam", numbers(1), p, m, 0.9, 1e-8, 1, 1e-2)
        rest = dict(state2=v, beta2=0.99, weight_decay=0.1, gnorm_scale=0.5, max_unorm=0.02)
        update: Any = functional.optimizer_update_32bit
        if form == 0:  # new, all in order
            update(*first, v, 0.99, 0.0, 0.0, 0.1, 0.5, norm, 0.02, False)
        elif form == 1:  # old, all in order
            update(*first, v, 0.99, 0.1, 0.5, norm, 0.02)
        elif form == 2:
            update(*first, unorm_vec=norm, **rest)
        else:
            update(*first, v, 0.99, 0.1, 0.5, None, 0.02)
        found.append((p, m, v))
    for other in found[1:]:
        assert all(map(same_bits, other, found[0]))
    with pytest.raises(ValueError, match="pass them by name"):
        update(*first, v, 0.99, 0.1, 0.5)


@pytest.mark.parametrize("name", ["adam", "momentum"])
def test_one_scale_for_a_tensor(name: str) -> None:
    """0.0.24's own: old scales are read, new ones written beside them."""
    p, q = numbers(0), numbers(0)
    two = name in TWO
    codes = [torch.full((N,), 127, dtype=torch.uint8), torch.zeros(N, dtype=torch.uint8)]
    tables = [functional.create_dynamic_map(), functional.create_dynamic_map(signed=False)]
    scales, new = [torch.zeros(1), torch.zeros(1)], [torch.zeros(1), torch.zeros(1)]
    states = [torch.zeros(N), torch.zeros(N)]
    norm = torch.zeros(1)
    for step in range(1, STEPS + 1):
        kept = [scale.clone() for scale in scales]
        functional.optimizer_update_8bit(
            name,
            numbers(step),
            p,
            codes[0],
            codes[1] if two else None,
            0.9,
            0.99 if two else 0.0,
            1e-8,
            step,
            1e-2,
            tables[0],
            tables[1] if two else None,
            scales[0],
            scales[1] if two else None,
            new[0],
            new[1] if two else None,
            0.1,
            0.5,
            norm,
            1.0,
        )
        assert all(map(torch.equal, scales, kept))
        functional.optimizer_update_32bit(
            name, numbers(step), q, states[0], 0.9, 1e-8, step, 1e-2, states[1] if two else None,
            0.99 if two else 0.0, weight_decay=0.1, gnorm_scale=0.5, max_unorm=1.0,
        )  # fmt: skip
        scales, new = new, scales
        # The largest number of a state keeps its code, so the scale is that of the new state.
        decoded = tables[0][codes[0].long()] * scales[0]
        assert torch.allclose(decoded, states[0], atol=0.02 * float(states[0].abs().max()))
    assert float(norm) > 0
    assert float((p - q).abs().mean()) < 2e-3
    assert torch.allclose(scales[0], states[0].abs().max(), rtol=0.03)


def test_factors_may_be_tensors() -> None:
    """As percentile_clipping returns them, without a synchronization."""
    found = []
    for factor in (0.25, torch.tensor(0.25), torch.tensor([0.25], dtype=torch.float64)):
        p = numbers(0)
        functional.optimizer_update_32bit(
            "lion", numbers(1), p, torch.zeros(N), 0.9, 0.0, 1, 0.1, gnorm_scale=factor, beta2=0.9
        )
        found.append(p)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_zeros_may_be_left_alone() -> None:
    g = numbers(1)
    g[::3] = 0
    p, m = numbers(0), numbers(2)
    before = p.clone(), m.clone()
    functional.optimizer_update_32bit("momentum", g, p, m, 0.9, 0.0, 2, 0.1, skip_zeros=True)
    zero = g == 0
    assert torch.equal(p[zero], before[0][zero])
    assert torch.equal(m[zero], before[1][zero])
    assert bool((p[~zero] != before[0][~zero]).all())


def test_any_registered_rule() -> None:
    """Also those that bitsandbytes does not have: states in their order."""
    tried = 0
    for spec in optimizers():
        states = [state for state in spec.states if state.when in (None, "momentum")]
        if spec.name in ("ademamix", "rmsprop") or len(states) > 2:
            continue
        p = numbers(0)
        held = [p.clone() if state.initial == "p" else torch.zeros(N) for state in states]
        second = held[1] if len(held) > 1 else None
        beta2 = 0.0 if spec.name in (*ONE_BETA, "sgd") else 0.99
        functional.optimizer_update_32bit(
            spec.name, numbers(1), p, held[0], 0.9, 1e-8, 1, 1e-2, second, beta2
        )
        assert bool(p.isfinite().all()), spec.name
        assert any(bool(tensor.any()) for tensor in held), spec.name
        tried += 1
    assert tried >= 10


def test_memory_of_any_layout_and_autograd() -> None:
    p = numbers(0).view(60, 50)
    expected = p.clone()
    m = torch.zeros(60, 50)
    functional.optimizer_update_32bit(
        "momentum", numbers(1).view(60, 50), expected, m, 0.9, 0, 1, 0.1
    )
    turned = p.t().clone().t().requires_grad_()
    state = torch.zeros(50, 60).t()
    version = turned._version
    functional.optimizer_update_32bit(
        "momentum", numbers(1).view(60, 50), turned, state, 0.9, 0, 1, 0.1
    )
    assert torch.equal(turned.detach(), expected)
    assert torch.equal(state, m)
    assert turned._version > version
    assert turned.grad_fn is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(optimizer_name="adamm"), "did you mean 'adam'"),
        (dict(optimizer_name=3), "expected a name"),
        (dict(state2=None), "state2 is missing"),
        (dict(optimizer_name="lion"), "more is given"),
        (dict(state1=torch.zeros(N - 1)), "one per element"),
        (dict(state1=torch.zeros(N).half()), "float32"),
        (dict(g=torch.zeros(N - 1)), "shape"),
        (dict(g=torch.zeros(N).long()), "expected float32"),
        (dict(p=torch.zeros(N).double()), "expected float32"),
        (dict(step=0), "step"),
        (dict(beta1=1.0), "beta1"),
        (dict(lr=float("nan")), "lr"),
        (dict(lr=-1.0), "lr"),
        (dict(alpha=1.0), "no alpha"),
        (dict(unorm_vec=torch.zeros(2)), "unorm_vec"),
        (dict(gnorm_scale=torch.ones(2)), "gnorm_scale"),
        (dict(optimizer_name="ademamix", beta3=0.5), "stack"),
        (dict(state1=torch.zeros(N, device="meta")), "device"),
        (dict(optimizer_name="cautious_adamw", max_unorm=-0.5), "max_unorm"),
    ],
)
def test_mistakes(change: dict[str, Any], text: str) -> None:
    """Nothing is changed then."""
    good: dict[str, Any] = dict(
        optimizer_name="adam",
        g=numbers(1),
        p=numbers(0),
        state1=torch.zeros(N),
        beta1=0.9,
        eps=1e-8,
        step=1,
        lr=1e-2,
        state2=torch.zeros(N),
        beta2=0.99,
    )
    given = {**good, **change}
    with pytest.raises(ValueError, match=text):
        functional.optimizer_update_32bit(**given)
    assert torch.equal(good["p"], numbers(0))
    assert not good["state1"].any()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(state1=torch.zeros(N)), "uint8"),
        (dict(absmax1=torch.zeros(7)), "blocks of 256"),
        (dict(absmax1=torch.zeros(12).double()), "float32"),
        (dict(qmap1=torch.zeros(255)), "2\\*\\*bits"),
        (dict(qmap1=torch.full((256,), float("nan"))), "finite"),
        (dict(qmap1=torch.linspace(-3, 3, 256)), "something else than 1"),
        (dict(absmax1=None), "one each"),
        (dict(qmap2=functional.create_linear_map()), "one each"),
    ],
)
def test_mistakes_of_8_bits(change: dict[str, Any], text: str) -> None:
    good: dict[str, Any] = dict(
        optimizer_name="lion",
        g=numbers(1),
        p=numbers(0),
        state1=torch.full((N,), 127, dtype=torch.uint8),
        state2=None,
        beta1=0.9,
        beta2=0.99,
        beta3=0.0,
        alpha=0.0,
        eps=0.0,
        step=1,
        lr=1e-2,
        qmap1=functional.create_dynamic_map(),
        qmap2=None,
        absmax1=torch.zeros(12),
        absmax2=None,
    )
    with pytest.raises(ValueError, match=text):
        functional.optimizer_update_8bit_blockwise(**{**good, **change})
    assert torch.equal(good["p"], numbers(0))


def test_block_size_by_the_number_of_scales() -> None:
    """2048, as in bitsandbytes before 0.44."""
    p, state = numbers(0), torch.full((N,), 127, dtype=torch.uint8)
    scales, table = torch.zeros(2), functional.create_dynamic_map()
    functional.optimizer_update_8bit_blockwise(
        "momentum", numbers(1), p, state, None, 0.9, 0, 0, 0, 0, 1, 1, table, None, scales, None
    )
    assert torch.equal(scales[0], numbers(1)[:2048].abs().max())
    assert torch.equal(scales[1], numbers(1)[2048:].abs().max())
