"""Layers leave torch's dispatcher out only where nobody would see the difference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import bnbx
from bnbx.errors import NotYetError
from bnbx.functional.registration import names as functions
from bnbx.kernels import operation
from bnbx.kernels.fakes import registered

CPU = torch.profiler.ProfilerActivity.CPU
OPERATIONS = {
    "linear": (lambda: bnbx.nn.Linear4bit(64, 32), lambda: torch.randn(3, 64)),
    "llm_int8_linear": (
        lambda: bnbx.nn.Linear8bitLt(64, 32, has_fp16_weights=False, threshold=6.0),
        lambda: torch.randn(3, 64),
    ),
    "embedding": (lambda: bnbx.nn.Embedding4bit(10, 64), lambda: torch.arange(3)),
}


class Calls(TorchDispatchMode):
    """Remembers the operations that reach torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Changes nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


class Own(Tensor):
    """A class of someone's own."""


@pytest.fixture(params=OPERATIONS)
def called(request: pytest.FixtureRequest) -> tuple[str, torch.nn.Module, Tensor]:
    torch.manual_seed(0)
    make, inputs = OPERATIONS[request.param]
    return request.param, make().to("cpu").eval(), inputs()  # type: ignore[no-untyped-call]


def test_modes_see_the_operation(called: tuple[str, torch.nn.Module, Tensor]) -> None:
    name, layer, x = called
    with torch.no_grad():
        expected = layer(x)
        with Calls() as calls:
            found = layer(x)
    assert any(name in each for each in calls.names)
    assert torch.equal(found, expected)


def test_profilers_see_the_operation(called: tuple[str, torch.nn.Module, Tensor]) -> None:
    name, layer, x = called
    with torch.no_grad(), torch.profiler.profile(activities=[CPU]) as profile:
        layer(x)
    assert f"bnbx::{name}" in {event.key for event in profile.key_averages()}


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_trace_holds_the_operation(called: tuple[str, torch.nn.Module, Tensor]) -> None:
    name, layer, x = called
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)  # type: ignore[no-untyped-call]
        assert f"bnbx::{name}" in str(traced.graph)
        assert torch.equal(traced(x.flip(0)), layer(x.flip(0)))


def test_results_are_the_same_without_the_dispatcher(
    called: tuple[str, torch.nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, layer, x = called
    with torch.no_grad():
        directly = layer(x)
        monkeypatch.setattr(operation, "unwatched", lambda arguments: False)
        assert torch.equal(layer(x), directly)


def test_transforms_are_seen() -> None:
    seen: list[bool] = []

    def product(x: Tensor) -> Tensor:
        seen.append(operation.unwatched((x,)))
        return x * 2

    with torch.no_grad():
        torch.func.vmap(product)(torch.randn(3, 64))
        torch.func.functionalize(product)(torch.randn(3, 64))
    assert seen == [False, False]


def test_batched_gradients_go_by_the_operation() -> None:
    """Torch's older vmap, which `is_grads_batched` is made of, leaves no interpreter to see."""
    layer = bnbx.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
    x = torch.randn(3, 64, requires_grad=True)
    grads = torch.randn(5, 3, 32)
    (batched,) = torch.autograd.grad(layer(x), x, grads, is_grads_batched=True)
    for grad, found in zip(grads, batched, strict=True):
        torch.testing.assert_close(torch.autograd.grad(layer(x), x, grad)[0], found)


def test_a_negative_view_is_its_numbers(called: tuple[str, torch.nn.Module, Tensor]) -> None:
    """Its memory holds them with the other sign."""
    _, layer, x = called
    if x.is_floating_point():
        with torch.no_grad():
            assert torch.equal(layer(torch._neg_view(x)), layer(-x))


def test_a_tensor_without_memory_is_zeros(called: tuple[str, torch.nn.Module, Tensor]) -> None:
    _, layer, x = called
    with torch.no_grad():
        assert torch.equal(
            layer(torch._efficientzerotensor(x.shape, dtype=x.dtype)), layer(torch.zeros_like(x))
        )


def test_a_torch_that_cannot_tell_goes_by_the_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        monkeypatch.setattr(operation, "_TELLING", False)
        assert not operation.unwatched((torch.randn(3),))


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")  # torch's, of what it has
def test_who_may_watch() -> None:
    x, w = torch.randn(3), torch.randn(3, requires_grad=True)
    assert operation.unwatched((x, [x, x], None, "nf4", 1, 1.5, True, torch.int8, x.shape))
    assert not operation.unwatched((x, w))
    assert not operation.unwatched((x, [w]))
    assert not operation.unwatched((x, x.as_subclass(Own)))
    assert not operation.unwatched((x, torch.empty(3, device="meta")))
    assert not operation.unwatched((x, torch._neg_view(x)))
    assert not operation.unwatched((x, torch._efficientzerotensor((3,))))
    assert not operation.unwatched((x, torch.nested.nested_tensor([x, x])))
    with torch.no_grad():
        assert operation.unwatched((x, w))
        assert operation.unwatched((torch.nn.Parameter(x),))
        with Functions():
            assert not operation.unwatched((x,))
        with torch.device("cpu"):
            assert not operation.unwatched((x,))
        with torch.profiler.profile(activities=[CPU]):
            assert not operation.unwatched((x,))
    with torch.inference_mode():
        assert operation.unwatched((torch.randn(3),))


def test_functions_leave_the_dispatcher_out_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what they write to counts as written either way."""
    x, out = torch.randn(4, 64), torch.empty(4, 64)
    found = []
    answers: list[bool] = []
    ask = operation.unwatched

    def asked(arguments: Any) -> bool:
        answers.append(ask(arguments))
        return answers[-1]

    for direct in (True, False):
        monkeypatch.setattr(operation, "unwatched", asked if direct else lambda arguments: False)
        tensor = bnbx.functional.quantize(x, "nf4")
        written = out._version
        bnbx.functional.dequantize(tensor, out=out)
        assert out._version > written
        found.append(out.tolist())
        found.append(bnbx.functional.int8_vectorwise_quant(x)[1].tolist())
    assert found[:2] == found[2:]
    assert len(answers) == 3
    assert all(answers)
    monkeypatch.setattr(operation, "unwatched", ask)
    with Calls() as calls:
        bnbx.functional.quantize(x, "nf4").dequantize()
    assert [name for name in calls.names if "bnbx" in name] == [
        "bnbx.quantize.default",
        "bnbx.dequantize.default",
    ]


def test_layers_and_functions_share_their_operations() -> None:
    shared = {"bnbx::dequantize", "bnbx::int8_quantize_rows", "bnbx::int8_dequantize_rows"}
    assert shared <= set(registered)
    assert not {f"bnbx::{name}" for name in functions} & shared


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own use
@pytest.mark.parametrize("gradients", [False, True])
def test_a_forward_derivative_is_refused_and_not_zero(gradients: bool) -> None:
    layer = bnbx.nn.Linear4bit(64, 32).to("cpu")
    x, tangent = torch.randn(3, 64), torch.randn(3, 64)
    with torch.set_grad_enabled(gradients):
        with pytest.raises(NotYetError, match=r"bnbx::linear.*forward-mode.*backward"):
            torch.func.jvp(layer, (x,), (tangent,))
        with forward_ad.dual_level():
            with pytest.raises(NotYetError):
                layer(forward_ad.make_dual(x, tangent))  # type: ignore[no-untyped-call]
            assert torch.equal(layer(x), layer(x.clone()))
