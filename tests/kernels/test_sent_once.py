"""Tables that are kept serve whoever comes next, whatever was going on when they were made."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from bnbx.functional import maps
from bnbx.kernels import coding_reference
from bnbx.kernels.encoding import make_encoding
from bnbx.kernels.sent_once import sent_once

CPU = torch.device("cpu")


def test_a_table_is_made_once() -> None:
    made: list[int] = []

    @sent_once
    def table(number: int) -> torch.Tensor:
        made.append(number)
        return torch.full((2,), float(number), device="cpu")

    assert table(1) is table(1)
    assert table(2) is not table(1)
    assert made == [1, 2]


def test_none_is_of_inference_mode() -> None:
    @sent_once
    def table() -> torch.Tensor:
        return torch.zeros(2, device="cpu")

    with torch.inference_mode():
        assert not table().is_inference()
    with torch.inference_mode():
        assert not coding_reference.levels_on(make_encoding("nf3"), CPU).is_inference()


@pytest.mark.parametrize("before", [False, True], ids=["first", "later"])
def test_none_is_of_a_mode(before: bool) -> None:
    encoding = make_encoding("nf5", 4096 if before else 2048)
    if before:
        coding_reference.levels_on(encoding, CPU)
    with FakeTensorMode():
        assert isinstance(coding_reference.levels_on(encoding, CPU), FakeTensor)
        assert isinstance(coding_reference.search_on(encoding, CPU)[0], FakeTensor)
    assert not isinstance(coding_reference.levels_on(encoding, CPU), FakeTensor)
    assert not isinstance(coding_reference.search_on(encoding, CPU)[0], FakeTensor)


def test_familiar_tables_are_real_after_a_mode() -> None:
    numbers = (0.0, 0.25, 0.5, 1.0)
    with FakeTensorMode():
        assert isinstance(maps.table(numbers, CPU), FakeTensor)
    assert maps.table(numbers, CPU).tolist() == list(numbers)
    maps.table(numbers, CPU).zero_()  # the caller's own
    assert maps.table(numbers, CPU).tolist() == list(numbers)
