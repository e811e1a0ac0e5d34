"""New memory is asked for in large pages, within the bounds of the tensor, where it pays."""

from __future__ import annotations

import mmap

import pytest
import torch

from bnbx.kernels import coding, memory
from bnbx.kernels.encoding import make_encoding
from bnbx.kernels.memory import LARGE_PAGE, in_large_pages

pytestmark = pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE"), reason="needs madvise with large pages, which Linux has"
)
Calls = list[tuple[int, int, int]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the system is asked."""
    found: Calls = []

    def advise(*arguments: int) -> int:
        found.append(arguments)  # type: ignore[arg-type]
        return -1  # refused, as it may be

    monkeypatch.setattr(memory, "_advise", lambda: advise)
    return found


@pytest.mark.parametrize("pages", [2, 3, 9.5])
def test_whole_pages_of_a_large_tensor(calls: Calls, pages: float) -> None:
    tensor = torch.empty(int(pages * LARGE_PAGE), dtype=torch.uint8)
    assert in_large_pages(tensor) is tensor
    ((first, size, what),) = calls
    assert what == mmap.MADV_HUGEPAGE
    assert first % LARGE_PAGE == size % LARGE_PAGE == 0
    assert tensor.data_ptr() <= first
    assert first + size <= tensor.data_ptr() + tensor.nbytes
    assert size >= tensor.nbytes - 2 * LARGE_PAGE


def test_small_tensors_stay_where_they_are(calls: Calls) -> None:
    for size in (0, 1, LARGE_PAGE, 2 * LARGE_PAGE - 1):
        in_large_pages(torch.empty(size, dtype=torch.uint8))
    assert calls == []


def test_results_of_coding_are_asked_for(calls: Calls) -> None:
    encoding = make_encoding("dynamic8")
    x = torch.ones(4 * LARGE_PAGE)
    parts = coding.encode(encoding, x)
    assert len(calls) == 1
    coding.decode(encoding, parts, x.shape, out=x)
    assert len(calls) == 1  # that memory is not new
    coding.decode(encoding, parts, x.shape)
    assert len(calls) == 2


def test_the_system_takes_the_call() -> None:
    advise = memory._advise()
    assert advise is not None
    tensor = torch.zeros(4 * LARGE_PAGE, dtype=torch.uint8)
    first = -(-tensor.data_ptr() // LARGE_PAGE) * LARGE_PAGE
    assert advise(first, LARGE_PAGE, mmap.MADV_NORMAL) == 0
    assert in_large_pages(tensor).sum() == 0
