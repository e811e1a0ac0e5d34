"""`PytorchLARS`, held against that of bitsandbytes, which is plain torch and runs anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bnbx import optim
from compiled import shared_cache

bnb = pytest.importorskip("bitsandbytes", reason="it is the oracle; from the extra `peers`")
SHAPES = ((7,), (33, 65), (4, 16, 64))


@pytest.fixture(scope="module", autouse=True)
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_cache(tmp_path_factory):
        yield


@pytest.mark.parametrize(
    "arguments",
    [
        dict(momentum=0.9),
        dict(lr=0.1, momentum=0.9, weight_decay=0.1),
        dict(lr=0.1, momentum=0.5, dampening=0.3),
        dict(lr=0.1, momentum=0.9, nesterov=True),
        dict(lr=0.1, momentum=0.9, max_unorm=0.0),
        dict(lr=0.1, momentum=0.9, max_unorm=100.0),
    ],
)
def test_it_trains_as_that_of_bitsandbytes(arguments: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    mine, oracle = optim.PytorchLARS(ours, **arguments), bnb.optim.PytorchLARS(theirs, **arguments)
    for _ in range(10):
        for p, q in zip(ours, theirs, strict=True):
            grad = torch.randn(p.shape, generator=generator)
            p.grad, q.grad = grad.clone(), grad.clone()
        mine.step()
        oracle.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        assert mine.state[p]["m"].dtype == torch.float32
        torch.testing.assert_close(mine.state[p]["m"], oracle.state[q]["momentum_buffer"])


def test_where_it_differs() -> None:
    """A parameter that is zero throughout stays zero there; no momentum is an error there."""
    moved = []
    for made in (optim.PytorchLARS, bnb.optim.PytorchLARS):
        p = torch.zeros(8, requires_grad=True)
        p.grad = torch.ones(8)
        made([p], momentum=0.9).step()
        moved.append(bool(p.detach().any()))
    assert moved == [True, False]
    p = torch.ones(8, requires_grad=True)
    p.grad = torch.ones(8)
    with pytest.raises(UnboundLocalError):
        bnb.optim.PytorchLARS([p]).step()
    optim.PytorchLARS([p], max_unorm=0.5).step()
    torch.testing.assert_close(p.detach(), torch.full((8,), 1 - 0.01 * 0.5))
