"""Runs whose states do not fit into the memory a process may have: paged they do, and lose nothing.

Linux counts private writable memory against RLIMIT_DATA: ordinary tensors, and no page file. Each
run sets the limit when all but its states is there, with room for a part of them.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bnbx.optim import create
from bnbx.optimizers.paging import is_paged
from compiled import shared_cache

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is Linux's")

COMMON = """
import hashlib, resource, sys, torch

directory, memory, kind = sys.argv[1:]
torch.set_num_threads(1)  # threads have stacks, which count

def limit(megabytes):
    if memory == "limited":
        with open("/proc/self/status") as status:
            used = int(status.read().split("VmData:")[1].split()[0]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (used + (megabytes << 20),) * 2)

def digest(tensors):
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()

def tell(run):
    try:
        print(digest(run()))
    except RuntimeError as error:
        assert "not enough memory" in str(error) or "can't allocate" in str(error), error
        print("not enough memory")
"""

PLAIN = """
from bnbx.optimizers.paging import Pages

elements, count = 1_000_000, 10  # 90 MB of states: codes and two moments
g = torch.linspace(-1, 1, elements)
work = torch.empty_like(g)
pages = Pages(directory)

def ordinary(shape, dtype, fill):
    return torch.full(shape, fill, dtype=dtype)

make = pages.zeros if kind == "paged" else ordinary

def run():
    states = [
        (make((elements,), torch.uint8, 127), *(make((elements,), torch.float32, 0) for _ in "mv"))
        for _ in range(count)
    ]
    for step in range(3):
        for k, (codes, m, v) in enumerate(states):
            torch.mul(g, k + step, out=work)
            m.mul_(0.9).add_(work, alpha=0.1)
            v.mul_(0.999).addcmul_(work, work, value=0.001)
            codes.add_(step + k)
    return [tensor for group in states for tensor in group]

limit(24)
tell(run)
"""

ENGINE = """
from bnbx.optim import create

elements, count = 2_000_000, 12  # 49 MB of states
params = [torch.linspace(-1, 1, elements).requires_grad_() for _ in range(count)]
for k, p in enumerate(params):
    p.grad = torch.linspace(k - 4, k, elements)
small = torch.ones(5000, requires_grad=True)
small.grad = torch.ones(5000)
create("adamw", [small], bits=8).step()  # compiles the kernel

def run():
    optimizer = create("adamw", params, bits=8, lr=1e-2, paged=kind == "paged")
    for _ in range(3):
        optimizer.step()
    states = [s for p in params for s in optimizer.state[p].values() if isinstance(s, torch.Tensor)]
    return params + states

limit(12)
tell(run)
"""


def told(script: str, directory: Path, memory: str, kind: str) -> str:
    """What a run in a process of its own says: a digest of all results, or that memory ended."""
    ended = subprocess.run(
        [sys.executable, "-c", COMMON + script, str(directory), memory, kind],
        env={**os.environ, "BNBX_PAGE_DIR": str(directory)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def check_runs(script: str, directory: Path) -> None:
    expected = told(script, directory, "unlimited", "ordinary")
    assert len(expected) == 64
    assert told(script, directory, "limited", "ordinary") == "not enough memory"
    assert told(script, directory, "limited", "paged") == expected
    assert not list(directory.iterdir())


def test_tensors_beyond_the_limit_of_memory(tmp_path: Path) -> None:
    check_runs(PLAIN, tmp_path)


@pytest.fixture(scope="module", autouse=True)
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with shared_cache(tmp_path_factory):
        yield


def test_an_optimizer_beyond_the_limit_of_memory(tmp_path: Path) -> None:
    check_runs(ENGINE, tmp_path)


def trained(steps: int, *, paged: bool, resume: bytes | None = None) -> tuple[Any, torch.Tensor]:
    """An optimizer after some steps, from a checkpoint if there is one, and its parameter."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(300, 1000, generator=generator).requires_grad_()
    optimizer = create("adamw", [p], bits=8, lr=1e-2, paged=paged)
    begin = 0
    if resume is not None:
        saved = torch.load(io.BytesIO(resume), weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        p.data.copy_(saved["p"])
        begin = saved["steps"]
    for step in range(begin, steps):
        p.grad = torch.randn(p.shape, generator=generator.manual_seed(step))
        optimizer.step()
    return optimizer, p


def checkpoint(optimizer: Any, p: torch.Tensor, steps: int) -> bytes:
    file = io.BytesIO()
    saved = {"optimizer": optimizer.state_dict(), "p": p.detach(), "steps": steps}
    torch.save(saved, file)
    return file.getvalue()


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_a_run_resumes_paged_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool, after: bool
) -> None:
    monkeypatch.setenv("BNBX_PAGE_DIR", str(tmp_path))
    expected, p_expected = trained(6, paged=False)
    saved = checkpoint(*trained(3, paged=before), 3)
    resumed, p = trained(6, paged=after, resume=saved)
    assert torch.equal(p, p_expected)
    assert resumed.state[p].keys() == expected.state[p_expected].keys()
    for key, value in resumed.state[p].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, expected.state[p_expected][key])
            assert is_paged(value) == (after and value.nbytes >= 64 << 10), key
        else:
            assert value == expected.state[p_expected][key]
