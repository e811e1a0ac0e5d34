"""Paged states of parameters on a GPU: the bits of states that are there all the time."""

from __future__ import annotations

import pytest
import torch

import on_gpu
from bnbx.optim import create, explain
from on_gpu import (
    all_there,
    assert_same_optimizers,
    assert_there,
    keep_busy,
)
from optimizers.compare import parameters_of
from optimizers.gpu_runs import (
    BIG,
    DENSE,
    STEPS,
    check,
    give,
    grads_of,
    through_a_file,
    train,
)
from optimizers.variants import (
    parameters,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_paged_states_have_the_same_bits(bits: int, dtype: torch.dtype) -> None:
    params = parameters(dtype, BIG)
    here, gpu, paged = (
        create("adamw", each, bits=bits, paged=way, **DENSE)
        for each, way in (
            (params, False),
            (all_there(params), False),
            (all_there(params), True),
        )
    )
    train(STEPS, here, gpu, paged)
    assert_same_optimizers(gpu, here)
    assert_same_optimizers(paged, here)
    for p in parameters_of(paged):
        assert_there(p)
        assert paged.state[p]["m"].device.type == "cpu"
    assert explain(paged)["group 0, parameter 0"].target == on_gpu.DEVICE.type


@pytest.mark.parametrize("rule", ["lamb", "lars", "ademamix"])
def test_paged_states_of_rules_that_measure(rule: str) -> None:
    params = parameters(torch.float32, BIG)
    gpu, paged = (
        create(rule, all_there(params), paged=way, max_unorm=0.1, **DENSE) for way in (False, True)
    )
    train(4, gpu, paged)
    assert_same_optimizers(paged, gpu)


def test_paged_states_in_many_pieces() -> None:
    """More than two buffers hold, on a stream that is busy."""
    params = parameters(torch.float32, [(1 << 20,), (300_007,), (5,), (1 << 19,)])
    here = create("adamw", params, bits=32, **DENSE)
    paged = create("adamw", all_there(params), bits=32, paged=True, **DENSE)
    paged._staging.piece_bytes = 1 << 20
    for _ in range(3):
        give(grads_of(here), here, paged)
        keep_busy()
        here.step()
        paged.step()
    assert_same_optimizers(paged, here)


@pytest.mark.parametrize("bits", [32, 8])
def test_managed_memory(bits: int) -> None:
    if on_gpu.DEVICE.type == "cpu":
        pytest.skip("there is no managed memory on a CPU")
    params = parameters(torch.float32, BIG)
    here = create("adamw", params, bits=bits, **DENSE)
    managed = create("adamw", all_there(params), bits=bits, paged="managed", **DENSE)
    check(STEPS, here, managed)
    p = parameters_of(managed)[0]
    assert_there(managed.state[p]["m"])
    other = create("adamw", [q.detach().clone().requires_grad_() for q in parameters_of(managed)],
                   bits=bits, **DENSE)  # fmt: skip
    other.load_state_dict(through_a_file(managed.state_dict()))
    check(2, here, other)


@pytest.mark.parametrize("start", [False, True, "managed"])
@pytest.mark.parametrize("end", [False, True, "managed"])
def test_checkpoints_between_paged_and_other_states(start: bool | str, end: bool | str) -> None:
    if on_gpu.DEVICE.type == "cpu" and "managed" in (start, end):
        pytest.skip("there is no managed memory on a CPU")
    params = parameters(torch.float32, BIG)
    here = create("adamw", params, **DENSE)
    first = create("adamw", all_there(params), paged=start, **DENSE)
    train(3, here, first)
    again = [p.detach().clone().requires_grad_() for p in parameters_of(first)]
    second = create("adamw", again, paged=end, **DENSE)
    second.load_state_dict(through_a_file(first.state_dict()))
    check(3, here, second)
