"""What CPU steps do at once changes no bit: encoding beside the next update, asking for memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import bnbx.optim
from bnbx.kernels import cpu
from compiled import shared_cache

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
# Less than a block, whole ones and a bit more; nothing; chunks of several tensors in a row.
SIZES = (1, 255, 256, 257, 0, 512, 1000, 4097, 128, 40_000)
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"bits": 8},
    "adamw of two lengths": {"state_types": {"m": "nf4", "v": "dynamic8"}},
    "adamw of 4 bits": {"bits": 4},
    "adamw of blocks of 32": {"state_types": {"m": "mxfp8", "v": "dynamic8"}},
    "adamw with a float state": {"state_types": {"m": "float32", "v": "dynamic8"}},
    "adamw with whole tensors": {"bits": 8, "block_wise": False},
    "ademamix": {"bits": 8},
    "lamb": {"bits": 8},
    "adam that skips zeros": {"bits": 8, "skip_zeros": True},
    "cautious_lion of 3 bits": {"state_types": "dynamic3"},
    "sgd": {"bits": 8, "momentum": 0.9},
}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_cache(tmp_path_factory):
        yield
    cpu.kernel.cache_clear()


def steps(name: str, dtype: torch.dtype, threads: int) -> list[Tensor]:
    """Parameters and states after three steps, by kernels that are made anew."""
    cpu.kernel.cache_clear()
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(size).to(dtype)) for size in SIZES]
    rule = name.split(maxsplit=1)[0]
    optimizer = bnbx.optim.create(rule, params, lr=1e-2, min_8bit_size=0, **OPTIONS[name])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for step in range(3):
            for p in params:
                p.grad = torch.randn(p.shape).to(dtype)
                p.grad[step::7] = 0
            optimizer.step()
    finally:
        torch.set_num_threads(before)
    kept = [x for p in params for x in optimizer.state[p].values() if isinstance(x, Tensor)]
    return [p.detach() for p in params] + kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_chunks_may_be_encoded_late(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for overlap in (0, 1):
        monkeypatch.setenv("BNBX_CXX", f"g++ -DBNBX_OVERLAP={overlap}")
        found += [steps(name, dtype, threads) for threads in (1, 2)]
    first = found[0]
    assert len(first) > len(SIZES)
    assert any(x.dtype == torch.uint8 for x in first)
    for other in found[1:]:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
