"""Sparse gradients: touched rows get the bits of a dense step, all else stays as it is."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnbx.errors import OptionError, UnsupportedTensorError
from bnbx.kernels import reference
from bnbx.optimizers import engine
from bnbx.optimizers.engine import Optimizer8bit
from bnbx.optimizers.state import storage_of, values_of
from bnbx.registry import optimizers
from optimizers.compare import assert_same, equal
from optimizers.variants import CASES, STORAGES, VARIANTS, state_types

pytestmark = pytest.mark.usefixtures("reference_target")

ROWS, WIDTH = 40, 24  # rows share blocks, and blocks share rows
TOUCHED = (3, 4, 17, 39)
REST = [row for row in range(ROWS) if row not in TOUCHED]


@pytest.fixture
def reference_target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler where the catalog is the subject: all targets have the same bits."""
    if "variant" in request.fixturenames:
        monkeypatch.setattr(engine, "launch", reference.run)


def sparse(rows: Any, values: Tensor, shape: tuple[int, ...] = (ROWS, WIDTH)) -> Tensor:
    indices = torch.tensor([list(rows)], dtype=torch.int64)
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=True)


def of_rows(rows: Any, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return sparse(rows, (torch.randn(len(rows), WIDTH) * scale).to(dtype))


def made(
    rule: str, variant: str = "", *params: Tensor, storage: str = "float32", **arguments: Any
) -> Optimizer8bit:
    spec = optimizers().get(rule)
    types = state_types(spec, storage)
    hyper = {**VARIANTS[rule][variant][0], "min_8bit_size": 0, **arguments}
    return Optimizer8bit(params, spec, state_types=types, **hyper)


def parameter(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (ROWS, WIDTH)) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def values(optimizer: Optimizer8bit, p: Tensor) -> dict[str, Tensor]:
    """The states of a parameter in float32, by name."""
    resolved, saved = optimizer.resolved(p), optimizer.state[p]
    return {
        state.name: values_of(storage_of(state, resolved, p.numel()), saved, p.shape).clone()
        for state in optimizer.spec.active_states(resolved.switches)
    }


# ---- against the dense step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rule", "variant"), CASES)
def test_touched_rows_move_as_a_parameter_of_just_these_rows(
    rule: str, variant: str, dtype: torch.dtype
) -> None:
    """The rows alone, as a dense parameter of their own: bit for bit, norms included."""
    p = parameter(dtype)
    before = p.detach().clone()
    rows = p.detach()[list(TOUCHED)].clone().requires_grad_()
    ours, dense = made(rule, variant, p), made(rule, variant, rows)
    for _ in range(4):
        p.grad = of_rows(TOUCHED, dtype=dtype)
        rows.grad = p.grad.coalesce().values().clone()
        ours.step()
        dense.step()
    assert equal(p.detach()[list(TOUCHED)], rows.detach())
    assert not torch.equal(before[list(TOUCHED)], rows.detach())
    assert equal(p.detach()[REST], before[REST])
    fresh = values(made_states(made(rule, variant, q := parameter_like(before)), q), q)
    for name, value in values(ours, p).items():
        assert equal(value[list(TOUCHED)], values(dense, rows)[name])
        assert equal(value[REST], fresh[name][REST])


def parameter_like(value: Tensor) -> Tensor:
    return value.clone().requires_grad_()


def made_states(optimizer: Optimizer8bit, p: Tensor) -> Optimizer8bit:
    """The optimizer with states as they are before any step: none of the rows is touched."""
    p.grad = of_rows((), dtype=p.dtype)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("options", [{}, {"block_wise": False}], ids=["blocks", "tensor"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("rule", "variant"), CASES)
def test_all_rows_at_once_are_a_dense_step(
    rule: str, variant: str, storage: str, options: dict[str, Any]
) -> None:
    """With an odd width, so that a last byte and a last block are not full."""
    p = parameter(shape=(ROWS, 23))
    q = parameter_like(p.detach())
    ours = made(rule, variant, p, storage=storage, **options)
    dense = made(rule, variant, q, storage=storage, **options)
    for _ in range(3):
        q.grad = torch.randn(ROWS, 23)
        p.grad = sparse(range(ROWS), q.grad, (ROWS, 23))
        ours.step()
        dense.step()
    assert_same(ours, dense)


@pytest.mark.parametrize("master", ["kahan", "residual"])
@pytest.mark.parametrize("storage", ["float32", "dynamic8"])
def test_masters_of_all_rows_at_once_are_a_dense_step(master: str, storage: str) -> None:
    p = parameter(torch.bfloat16)
    q = parameter_like(p.detach())
    ours, dense = (made("adamw", "", t, storage=storage, master=master) for t in (p, q))
    for _ in range(5):
        q.grad = torch.randn(ROWS, WIDTH).bfloat16()
        p.grad = sparse(range(ROWS), q.grad)
        ours.step()
        dense.step()
    assert ours.state[p]["residual"].any()
    assert_same(ours, dense)


@pytest.mark.parametrize("master", ["stochastic", "kahan", "residual"])
def test_masters_of_untouched_rows_stay(master: str) -> None:
    p = parameter(torch.bfloat16)
    before = p.detach().clone()
    optimizer = made("adamw", "", p, storage="dynamic8", master=master)
    for _ in range(3):
        p.grad = of_rows(TOUCHED, dtype=torch.bfloat16)
        optimizer.step()
    assert equal(p.detach()[REST], before[REST])
    assert not torch.equal(p.detach()[list(TOUCHED)], before[list(TOUCHED)])
    if master != "stochastic":
        residual = optimizer.state[p]["residual"]
        assert residual[list(TOUCHED)].any()
        assert not residual[REST].any()


def test_stochastic_noise_differs_between_parameters() -> None:
    """Two parameters with equal values: equal noise would round both alike everywhere."""
    p = parameter(torch.bfloat16)
    q = parameter_like(p.detach())
    optimizer = made("adamw", "", p, q, master="stochastic", lr=1e-4)
    p.grad = of_rows(TOUCHED, dtype=torch.bfloat16)
    q.grad = p.grad.clone()
    optimizer.step()
    assert not torch.equal(p, q)


# ---- against torch


def test_adam_is_sparse_adam_of_torch() -> None:
    """In 32 bits, against torch.optim.SparseAdam in float64; it scales eps another way."""
    p = parameter()
    q = p.detach().double().requires_grad_()
    ours = Optimizer8bit([p], "adam", bits=32, lr=1e-2, eps=1e-20)
    theirs = torch.optim.SparseAdam([q], lr=1e-2, eps=1e-20)
    for step in range(20):
        p.grad = of_rows([step % 7, 11, (3 * step) % ROWS, 11])
        q.grad = p.grad.double()
        ours.step()
        theirs.step()  # type: ignore[no-untyped-call]
    # 20 steps of length lr, each of which rounds p (below 4 here) and a quotient.
    torch.testing.assert_close(p.detach().double(), q.detach(), rtol=0, atol=20 * 2**-23)
    for name, key in (("m", "exp_avg"), ("v", "exp_avg_sq")):
        state = theirs.state[q][key]
        torch.testing.assert_close(ours.state[p][name].double(), state, rtol=1e-5, atol=1e-7)


def test_an_embedding_learns() -> None:
    torch.manual_seed(1)
    embedding = nn.Embedding(1000, 16, padding_idx=0, sparse=True)
    before = embedding.weight.detach().clone()
    optimizer = Optimizer8bit(embedding.parameters(), "adam", lr=5e-2, min_8bit_size=0)
    words = torch.tensor([[0, 5, 6, 5], [999, 0, 7, 5]])
    target = torch.randn(2, 4, 16)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        real = (words != 0)[..., None]
        loss = ((embedding(words) - target) * real).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    touched = torch.zeros(1000, dtype=torch.bool)
    touched[[5, 6, 7, 999]] = True
    assert losses[-1] < losses[0] / 2
    assert equal(embedding.weight.detach()[~touched], before[~touched])
    assert not embedding.weight[0].any()
    assert (embedding.weight.detach()[touched] != before[touched]).any(1).all()


# ---- what untouched rows of a shared block may see


@pytest.mark.parametrize("options", [{}, {"block_wise": False}], ids=["blocks", "tensor"])
@pytest.mark.parametrize("storage", ["dynamic8", "linear8", "state4"])
@pytest.mark.parametrize(("rule", "variant"), CASES)
def test_untouched_states_are_rounded_by_half_a_step_at_most(
    rule: str, variant: str, storage: str, options: dict[str, Any]
) -> None:
    p = parameter()
    optimizer = made(rule, variant, p, storage=storage, **options)
    p.grad = torch.randn(ROWS, WIDTH)
    optimizer.step()
    for scale in (1e-3, 1.0, 30.0):
        before, absmax = values(optimizer, p), absmaxes(optimizer, p)
        codes = {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, Tensor)}
        p.grad = of_rows(TOUCHED, scale)
        optimizer.step()
        touched = torch.zeros(ROWS, WIDTH, dtype=torch.bool)
        touched[list(TOUCHED)] = True
        for state in optimizer.spec.active_states(optimizer.resolved(p).switches):
            held = storage_of(state, optimizer.resolved(p), p.numel())
            name = state.name
            after = values(optimizer, p)[name]
            if held.quant_type is None:
                assert equal(after[~touched], before[name][~touched])
                continue
            now = absmaxes(optimizer, p)[name]
            same = (now == absmax[name]) & ~touched
            assert equal(after[same], before[name][same])
            gap = max_gap(held.codebook.levels) * now
            assert ((after - before[name]).abs() <= gap / 2 * 1.0001)[~touched].all()
            size = ROWS * WIDTH if held.whole else held.block_size
            block = torch.arange(ROWS * WIDTH).view(ROWS, WIDTH) // size
            elsewhere = ~torch.isin(block, block[list(TOUCHED)])
            assert equal(after[elsewhere], before[name][elsewhere])
            if codes[name].shape == p.shape:
                assert equal(optimizer.state[p][name][elsewhere], codes[name][elsewhere])


def max_gap(table: tuple[float, ...]) -> float:
    """The largest distance of neighbors, and twice what is beyond the shorter end."""
    ascending = sorted(table)
    gaps = [high - low for low, high in pairwise(ascending)]
    return max(*gaps, 2 * (1 - ascending[-1]), 2 * (1 + ascending[0]) if ascending[0] < 0 else 0)


def absmaxes(optimizer: Optimizer8bit, p: Tensor) -> dict[str, Tensor]:
    """The absmax of each element, by state."""
    found = {}
    resolved = optimizer.resolved(p)
    for state in optimizer.spec.active_states(resolved.switches):
        held = storage_of(state, resolved, p.numel())
        if held.quant_type is not None:
            absmax = optimizer.state[p][f"{state.name}_absmax"]
            size = p.numel() if held.whole else held.block_size
            found[state.name] = absmax.repeat_interleave(size)[: p.numel()].view(p.shape).clone()
    return found


@pytest.mark.parametrize("storage", ["dynamic8", "state4"])
def test_untouched_states_do_not_drift(storage: str) -> None:
    """The two ends of a table differ: rounded anew each time, the shorter end would shrink."""
    p = parameter(shape=(8, 16))
    optimizer = made("lion", "", p, storage=storage)
    p.grad = torch.randn(8, 16)
    p.grad[5, 5] = -50  # the largest of its block, and negative
    optimizer.step()
    before = values(optimizer, p)["m"]
    for _ in range(100):
        p.grad = sparse([0], torch.randn(1, 16) * 0.1, (8, 16))
        optimizer.step()
    assert equal(values(optimizer, p)["m"][1:], before[1:])


# ---- shapes, dtypes and mixtures


def test_repeated_rows_are_summed() -> None:
    p = parameter()
    q = parameter_like(p.detach())
    ours, other = (made("adamw", "", t, storage="dynamic8") for t in (p, q))
    two = torch.randn(2, WIDTH)
    for _ in range(2):
        p.grad = sparse([5, 5], two)
        assert not p.grad.is_coalesced()
        q.grad = sparse([5], two.sum(0, keepdim=True))
        ours.step()
        other.step()
    assert_same(ours, other)


@pytest.mark.parametrize("storage", ["float32", "dynamic8", "state4"])
def test_no_rows_move_nothing_but_the_count_of_steps(storage: str) -> None:
    p = parameter()
    before = p.detach().clone()
    optimizer = made("adamw", "", p, storage=storage)
    p.grad = of_rows(())
    optimizer.step()
    assert equal(p.detach(), before)
    assert optimizer.state[p]["step"] == 1
    assert not values(optimizer, p)["m"].any()


@pytest.mark.parametrize("storage", ["float32", "dynamic8", "state4"])
def test_one_dimension(storage: str) -> None:
    p = parameter(shape=(700,))
    before = p.detach().clone()
    optimizer = made("adamw", "", p, storage=storage)
    for _ in range(3):
        p.grad = sparse([0, 699], torch.randn(2), (700,))
        optimizer.step()
    moved = (p.detach() != before).nonzero()[:, 0].tolist()
    assert moved == [0, 699]


def test_rows_without_elements() -> None:
    p = torch.zeros(5, 0, requires_grad=True)
    optimizer = made("adamw", "", p)
    p.grad = sparse([1], torch.zeros(1, 0), (5, 0))
    optimizer.step()
    assert optimizer.state[p]["step"] == 1


def test_a_parameter_that_is_not_contiguous() -> None:
    p = torch.randn(WIDTH, ROWS).t().requires_grad_()
    q = parameter_like(p.detach().contiguous())
    assert not p.is_contiguous()
    ours, other = (made("adamw", "", t, storage="dynamic8") for t in (p, q))
    p.grad = of_rows(TOUCHED)
    q.grad = p.grad.clone()
    ours.step()
    other.step()
    assert equal(p.detach().contiguous(), q.detach())


def test_sparse_and_dense_steps_take_turns() -> None:
    p = parameter()
    q = parameter_like(p.detach())
    ours, dense = (made("adamw", "", t) for t in (p, q))
    for step in range(6):
        q.grad = torch.randn(ROWS, WIDTH)
        p.grad = q.grad.clone() if step % 2 else sparse(range(ROWS), q.grad)
        ours.step()
        dense.step()
    assert_same(ours, dense)


def test_sparse_and_dense_parameters_side_by_side() -> None:
    params = [parameter(), parameter(), parameter(shape=(7,))]
    alone = [parameter_like(p.detach()) for p in params]
    together = made("adamw", "", *params, storage="dynamic8")
    each = [made("adamw", "", p, storage="dynamic8") for p in alone]
    for _ in range(3):
        for number, (p, q) in enumerate(zip(params, alone, strict=True)):
            p.grad = of_rows(TOUCHED) if number == 0 else torch.randn_like(p)
            q.grad = p.grad.clone()
        together.step()
        for optimizer in each:
            optimizer.step()
    for p, q, optimizer in zip(params, alone, each, strict=True):
        assert equal(p, q)
        for name, value in together.state[p].items():
            assert equal(value, optimizer.state[q][name])


def test_float32_rows_for_a_bfloat16_parameter() -> None:
    p = parameter(torch.bfloat16)
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch gives gradients the dtype of their parameter")
    q = parameter_like(p.detach())
    p.grad_dtype = None
    ours, other = (made("adamw", "", t) for t in (p, q))
    exact = torch.randn(len(TOUCHED), WIDTH).bfloat16()
    p.grad, q.grad = sparse(TOUCHED, exact.float()), sparse(TOUCHED, exact)
    ours.step()
    other.step()
    assert_same(ours, other)


def test_maximize_and_grad_scale() -> None:
    p = parameter()
    q = parameter_like(p.detach())
    ours = made("adamw", "", p, maximize=True)
    other = made("adamw", "", q)
    for _ in range(2):
        p.grad = of_rows(TOUCHED)
        q.grad = -p.grad
        p.grad *= 1024
        ours.step(grad_scale=1024)
        other.step()
    assert_same(ours, other)


def test_paged_states() -> None:
    p = parameter(shape=(3000, 64))
    q = parameter_like(p.detach())
    ours, other = (made("adamw", "", t, storage="dynamic8", paged=t is p) for t in (p, q))
    for _ in range(2):
        p.grad = sparse([0, 2999], torch.randn(2, 64), (3000, 64))
        q.grad = p.grad.clone()
        ours.step()
        other.step()
    assert ours.pages.nbytes
    assert_same(ours, other)


def test_autograd_sees_that_the_parameter_has_changed() -> None:
    p = parameter()
    optimizer = made("sgd", "plain", p)
    p.grad = of_rows(TOUCHED)
    loss = (p * p).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_reaches_no_other_block(bad: float) -> None:
    p = parameter()
    before = p.detach().clone()
    optimizer = made("adamw", "", p, storage="dynamic8")
    for value in (bad, 1.0):
        p.grad = of_rows([3])
        p.grad._values()[0, 0] = value
        optimizer.step()
    assert p.detach()[3].isnan().any()
    assert equal(p.detach()[4:], before[4:])
    block = 3 * WIDTH // 256
    assert optimizer.state[p]["m_absmax"].isnan().tolist() == [i == block for i in range(4)]


# ---- what is refused


def hybrid() -> Tensor:
    return torch.sparse_coo_tensor(
        torch.tensor([[1], [2]]), torch.ones(1), (ROWS, WIDTH), check_invariants=True
    )


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (hybrid, "2 sparse dimensions.*whole rows"),
        (lambda: torch.ones(ROWS, WIDTH).to_sparse_csr(), "sparse_csr.*whole rows"),
    ],
    ids=["elements", "csr"],
)
def test_other_layouts_are_refused_before_anything_changes(bad: Any, match: str) -> None:
    p, q = parameter(), parameter()
    before = p.detach().clone()
    optimizer = made("adamw", "", p, q)
    with pytest.raises(UnsupportedTensorError, match=match):
        optimizer.update([p, q], [of_rows(TOUCHED), bad()], [0, 1])
    assert equal(p.detach(), before)
    assert not optimizer.state


def test_a_changed_storage_is_refused() -> None:
    p = parameter()
    optimizer = made("adamw", "", p, storage="dynamic8")
    p.grad = of_rows(TOUCHED)
    optimizer.step()
    optimizer.param_groups[0]["min_8bit_size"] = 10**6
    with pytest.raises(OptionError, match="cannot change during a run"):
        optimizer.step()
