"""Which tensors the engine updates, wherever their elements lie, and which it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnbx.errors import UnsupportedTensorError
from bnbx.optim import create, explain
from bnbx.optimizers.engine import Optimizer8bit
from optimizers.compare import assert_same, equal
from optimizers.variants import copies, fill, gapped, gradients, parameters, set_gradients

ARGUMENTS: dict[str, Any] = dict(lr=1e-2, weight_decay=0.1, min_8bit_size=0)


def dense(params: list[Tensor]) -> list[Tensor]:
    """The same values, each tensor in memory of its own."""
    return [
        p.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for p in params
    ]


def check_against_dense(params: list[Tensor], steps: int = 3) -> None:
    """Assert that the layout of `params` makes no difference, and that they stay where they are."""
    others = dense(params)
    pointers = [(p.data_ptr(), p.stride()) for p in params]
    optimizer, other = (create("adamw", ps, **ARGUMENTS) for ps in (params, others))
    for _ in range(steps):
        values = gradients(params)
        set_gradients(params, values)
        set_gradients(others, values)
        optimizer.step()
        other.step()
    assert_same(optimizer, other)
    assert [(p.data_ptr(), p.stride()) for p in params] == pointers


# ---- layouts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parameters_are_updated_in_place(dtype: torch.dtype) -> None:
    params = parameters(dtype) + gapped(dtype)
    aliases = [p.detach() for p in params]
    check_against_dense(params)
    for p, alias in zip(params, aliases, strict=True):
        assert equal(p, alias)


def test_gaps_between_elements_are_left_alone() -> None:
    whole = torch.full((60, 200), 7.0)
    p = fill(whole[10:50, 20:180:2].detach())
    check_against_dense([p])
    outside = torch.ones_like(whole, dtype=torch.bool)
    outside[10:50, 20:180:2] = False
    assert (whole[outside] == 7).all()


def test_channels_last() -> None:
    model = torch.nn.Conv2d(16, 32, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert not model.weight.is_contiguous()
    check_against_dense(list(model.parameters()))
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


def test_gradients_may_have_any_layout() -> None:
    params = parameters(torch.float32, [(64, 70)] * 3)
    others = dense(params)
    value = gradients(params[:1])[0]
    wide = torch.empty(64, 140)[:, ::2].copy_(value)
    set_gradients(others, [value] * 3)
    params[0].grad, params[1].grad = value.t().contiguous().t(), wide
    params[2].grad = torch.full((), 0.25).expand(64, 70)
    others[2].grad = torch.full((64, 70), 0.25)
    optimizer, other = (create("adamw", ps, **ARGUMENTS) for ps in (params, others))
    optimizer.step()
    other.step()
    assert_same(optimizer, other)


@pytest.mark.parametrize(
    "arguments", [{}, {"percentile_clipping": 5}, {"block_wise": False}], ids=str
)
@pytest.mark.parametrize("shape", [(), (5000,), (64, 70)])
def test_gradients_may_be_negative_views(shape: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """What is_neg has the other sign in memory."""
    params = parameters(torch.float32, [shape])
    others = dense(params)
    optimizer, other = (
        create("adamw", ps, **{**ARGUMENTS, **arguments}) for ps in (params, others)
    )
    for _ in range(3):
        values = gradients(params)
        set_gradients(others, values)
        params[0].grad = torch._neg_view(-values[0])
        assert params[0].grad.is_neg()
        optimizer.step()
        other.step()
    assert_same(optimizer, other)


def test_gradient_of_a_conjugate_descends() -> None:
    """Autograd makes a negative view of it."""
    p = torch.tensor([0.5], requires_grad=True)
    loss = (torch.complex(torch.ones(1), p).conj() * (1 + 2j)).real.sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert p.grad is not None
    assert p.grad.is_neg()
    create("sgd", [p], lr=0.1).step()
    assert p.item() == pytest.approx(0.5 - 0.1 * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parameters_that_share_a_buffer_at_odd_offsets(dtype: torch.dtype) -> None:
    """As sharded training has it: no pointer is aligned, and neighbors belong to others."""
    flat = torch.full((20_000,), 7.0, dtype=dtype)
    grads = torch.zeros(20_000, dtype=dtype)
    spans = [(1, 2), (3, 260), (261, 518), (519, 4616), (4617, 4700), (4701, 15_003)]
    params = [fill(flat[start:end].detach()) for start, end in spans]
    others = dense(params)
    assert any(p.data_ptr() % 16 for p in params)
    optimizer, other = (create("adamw", ps, **ARGUMENTS) for ps in (params, others))
    for _ in range(3):
        values = gradients(params)
        set_gradients(others, values)
        for p, value, (start, end) in zip(params, values, spans, strict=True):
            p.grad = grads[start:end].copy_(value)
        optimizer.step()
        other.step()
    assert_same(optimizer, other)
    outside = torch.ones(20_000, dtype=torch.bool)
    for start, end in spans:
        outside[start:end] = False
    assert outside.sum() > 5000
    assert (flat[outside] == 7).all()


def test_zero_dimensional_and_empty_parameters() -> None:
    params = parameters(torch.float32, [(), (0,), (3, 0, 2), (1, 1)])
    check_against_dense(params)
    optimizer = create("adamw", params, **ARGUMENTS)
    set_gradients(params, gradients(params))
    optimizer.step()
    assert [optimizer.state[p]["step"] for p in params] == [1] * 4
    assert [tuple(optimizer.state[p]["m"].shape) for p in params] == [(), (0,), (3, 0, 2), (1, 1)]


def test_no_parameter_has_a_gradient() -> None:
    params = parameters(torch.float32)
    optimizer = create("adamw", params)
    optimizer.step()
    assert not any(optimizer.state[p] for p in params)


def test_data_may_be_replaced_by_the_user() -> None:
    """Memory moves (`model.share_memory()`, a new dtype): the next step goes to where it is."""
    params = parameters(torch.float32, [(5000,)])
    others = dense(params)
    optimizer, other = (create("adamw", ps, **ARGUMENTS) for ps in (params, others))
    values = gradients(params)
    for _ in range(2):
        set_gradients(params, values)
        set_gradients(others, values)
        optimizer.step()
        other.step()
        left = params[0].data
        kept = left.clone()
        params[0].data = left.clone()
    assert_same(optimizer, other)
    assert equal(left, kept)
    params[0].data = params[0].data.bfloat16()
    set_gradients(params, [values[0].bfloat16()])
    optimizer.step()
    assert params[0].dtype == torch.bfloat16
    assert torch.isfinite(params[0]).all()


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch ties a gradient's dtype to p's"
)
def test_gradient_of_another_dtype() -> None:
    p = fill(torch.empty(5000, dtype=torch.bfloat16))
    wide = p.detach().float().requires_grad_()
    p.grad_dtype = None
    value = gradients([wide])[0]
    p.grad, wide.grad = value.clone(), value.clone()
    optimizer, other = create("adamw", [p], **ARGUMENTS), create("adamw", [wide], **ARGUMENTS)
    optimizer.step()
    other.step()
    assert equal(p.detach(), wide.detach().bfloat16())
    assert equal(optimizer.state[p]["m"], other.state[wide]["m"])


@pytest.mark.parametrize("arguments", [{}, {"percentile_clipping": 5}], ids=str)
def test_gradients_may_be_zeros_that_torch_has_not_written(arguments: dict[str, Any]) -> None:
    params = parameters(torch.float32, [(5000,), (3,), (64, 70)])
    others = dense(params)
    optimizer, other = (
        create("adamw", ps, **{**ARGUMENTS, **arguments}) for ps in (params, others)
    )
    for _ in range(2):
        value = gradients(params[:1])[0]
        params[0].grad = value
        params[1].grad = torch._efficientzerotensor((3,))
        params[2].grad = torch._efficientzerotensor((64, 70))
        set_gradients(others, [value, torch.zeros(3), torch.zeros(64, 70)])
        optimizer.step()
        other.step()
    assert_same(optimizer, other)


FROZEN = (torch.float64, torch.complex64, torch.int8, torch.bool, torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", FROZEN, ids=str)
def test_frozen_parameters_may_have_any_dtype(dtype: torch.dtype) -> None:
    frozen = nn.Parameter(torch.zeros(8, 8).to(dtype), requires_grad=False)
    p = torch.ones(8, requires_grad=True)
    optimizer = create("adamw", [frozen, p], **ARGUMENTS)
    p.grad = torch.ones(8)
    optimizer.step()
    assert (p < 1).all()
    assert frozen not in optimizer.state
    assert explain(optimizer).parameters[0].target == "none"


def test_parameter_that_is_no_longer_frozen_is_refused_in_the_step() -> None:
    p = nn.Parameter(torch.zeros(8, dtype=torch.float64), requires_grad=False)
    optimizer = create("adamw", [p], **ARGUMENTS)
    p.requires_grad_()
    p.grad = torch.ones(8, dtype=torch.float64)
    with pytest.raises(UnsupportedTensorError, match=r"a parameter of .* has dtype torch\.float64"):
        optimizer.step()


# ---- refused


class Wrapper(Tensor):
    """A tensor without memory, as a DTensor is one: it stands for another."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made: Wrapper = Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, requires_grad=False
        )
        return made

    def __init__(self, inner: Tensor) -> None:
        self.wrapped = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return Wrapper(args[0].wrapped)
        raise NotImplementedError(f"{func} of a wrapper")


class Sub(Tensor):
    """A tensor like any other."""


def test_subclass_with_memory_is_updated() -> None:
    p = nn.Parameter(torch.ones(5000).as_subclass(Sub))
    optimizer = create("adamw", [p], **ARGUMENTS)
    p.grad = torch.ones(5000)
    optimizer.step()
    assert (p < 1).all()


def test_gradient_without_memory_is_refused() -> None:
    p = torch.zeros(5000, requires_grad=True)
    optimizer = create("adamw", [p], **ARGUMENTS)
    p.grad = Wrapper(torch.ones(5000))
    with pytest.raises(UnsupportedTensorError, match=r"the gradient of .* is a .*\.Wrapper, which"):
        optimizer.step()
    assert not p.any()


@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_of_a_lazy_module_are_refused_until_it_has_run(frozen: bool) -> None:
    model = nn.LazyLinear(3)
    for p in model.parameters():
        p.requires_grad = not frozen
    with pytest.raises(UnsupportedTensorError, match="lazy module has no shape yet; run the model"):
        create("adamw", model.parameters())
    model(torch.ones(2, 5))
    create("adamw", model.parameters())


def sparse_gradient(p: Tensor) -> None:
    p.grad = p.detach().to_sparse()


def test_gradient_sparse_in_both_dimensions_is_refused_before_anything_changes() -> None:
    params = parameters(torch.float32, [(5000,), (50, 10)])
    optimizer = create("adamw", params, **ARGUMENTS)
    set_gradients(params, gradients(params))
    optimizer.step()
    before = snapshot(optimizer, params)
    sparse_gradient(params[1])
    with pytest.raises(UnsupportedTensorError, match=r"\(50, 10\).*2 sparse dimensions"):
        optimizer.step()
    after = snapshot(optimizer, params)
    assert all(equal(a, b) for a, b in zip(before, after, strict=True))


def snapshot(optimizer: Optimizer8bit, params: list[Tensor]) -> list[Any]:
    held = [value for p in params for value in [p.detach(), *optimizer.state[p].values()]]
    return [value.clone() if isinstance(value, Tensor) else value for value in held]


REFUSED: dict[str, Callable[[], Tensor]] = {
    "complex64": lambda: torch.zeros(10, dtype=torch.complex64, requires_grad=True),
    "int64": lambda: torch.zeros(10, dtype=torch.int64),
    "float64": lambda: torch.zeros(10, dtype=torch.float64, requires_grad=True),
    "sparse_coo": lambda: torch.eye(3).to_sparse().requires_grad_(),
    "negative view": lambda: torch._neg_view(torch.zeros(10)).requires_grad_(),
    "Wrapper, which stands": lambda: nn.Parameter(Wrapper(torch.zeros(10))),
    "expanded": lambda: torch.zeros(1).expand(10).detach().requires_grad_(),
}


@pytest.mark.parametrize("what", REFUSED)
def test_unsupported_parameters_are_refused_by_name(what: str) -> None:
    fine = torch.zeros(10, requires_grad=True)
    with pytest.raises(UnsupportedTensorError, match=what):
        create("adamw", [fine, REFUSED[what]()])
    optimizer = create("adamw", [fine])
    with pytest.raises(UnsupportedTensorError, match=what):
        optimizer.add_param_group({"params": REFUSED[what]()})
    assert len(optimizer.param_groups) == 1


def test_replaced_data_of_another_shape_is_refused() -> None:
    p = torch.zeros(5000, requires_grad=True)
    optimizer = create("adamw", [p])
    p.grad = torch.ones(5000)
    optimizer.step()
    p.grad = None
    p.data = torch.zeros(6000)
    p.grad = torch.ones(6000)
    with pytest.raises(UnsupportedTensorError, match="6000"):
        optimizer.step()
    assert not p.any()


def test_copies_are_independent() -> None:
    """Guards this module's own helper: what it compares must not share memory."""
    params = gapped(torch.float32)
    for made in (dense(params), copies(params)):
        for p, q in zip(params, made, strict=True):
            assert equal(p, q)
            assert p.data_ptr() != q.data_ptr()
