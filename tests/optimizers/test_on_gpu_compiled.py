"""torch.compile of a step on a GPU: one graph, the bits of an eager step."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import on_gpu
from bnbx.optim import create
from on_gpu import (
    all_there,
    assert_same_optimizers,
)
from optimizers.gpu_runs import (
    DENSE,
    give,
)
from optimizers.variants import (
    parameters,
)

pytestmark = [
    pytest.mark.gpu,
    # PyTorch warns of itself when it traces an optimizer, and while inductor starts.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Profiler.*will be ignored:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*TensorFloat32.*:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_grad_enabled(True)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_step(backend: str) -> None:
    params = parameters(torch.float32, [(5,), (300,), (17, 241)])
    here, gpu = (create("adamw", each, **DENSE) for each in (params, all_there(params)))
    step: Callable[[], None] = torch.compile(gpu.step, fullgraph=True, backend=backend)
    for _ in range(4):
        give([torch.randn(p.shape) for p in params], here, gpu)
        step()
        here.step()
    assert_same_optimizers(gpu, here)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_trains(backend: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1)).to(on_gpu.DEVICE)
    optimizer = create("adamw", model.parameters(), lr=1e-2, min_8bit_size=0)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    step: Callable[[], None] = torch.compile(optimizer.step, backend=backend, fullgraph=True)
    x = torch.randn(64, 8, device=on_gpu.DEVICE)
    y = x.sum(1, keepdim=True)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (compiled(x) - y).square().mean()
        loss.backward()
        step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


IN_CUDA_GRAPHS = """
import copy, torch
from bnbx.optim import create

torch.manual_seed(0)
model = torch.nn.Linear(70, 90).cuda()
other = copy.deepcopy(model)
runs = [create("adamw", m.parameters(), lr=1e-2, min_8bit_size=0) for m in (model, other)]
step = torch.compile(runs[0].step, fullgraph=True, mode="reduce-overhead")
for _ in range(8):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        value = torch.randn_like(p)
        if p.grad is None:
            p.grad, q.grad = value, value.clone()
        p.grad.copy_(value)
        q.grad.copy_(value)
    step()
    runs[1].step()
torch.cuda.synchronize()
for p, q in zip(model.parameters(), other.parameters(), strict=True):
    assert torch.equal(p, q)
    assert runs[0].state[p]["step"] == runs[1].state[q]["step"] == 8
"""


def test_reduce_overhead_leaves_the_step_out_of_cuda_graphs() -> None:
    """A replay would repeat its scalars, from memory that is gone: in a process of its own."""
    if on_gpu.DEVICE.type == "cpu":
        pytest.skip("there are no graphs on a CPU")
    done = subprocess.run(
        [sys.executable, "-c", IN_CUDA_GRAPHS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
