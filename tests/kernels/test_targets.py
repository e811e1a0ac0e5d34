"""The choice of a target, and what is said of it."""

from __future__ import annotations

import warnings

import pytest

from bnbx.errors import BnbxWarning, TargetError
from bnbx.kernels import targets


def test_a_native_target_that_is_ready_is_taken_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert targets.choose("cpu", {"cpu": lambda: None}, "tests run") == targets.Target("cpu")


def test_the_reference_comes_with_the_reason() -> None:
    def fail() -> None:
        raise TargetError("no compiler in this test\nand more of it")

    with pytest.warns(BnbxWarning, match="no compiler in this test\ntests run on plain torch") as w:
        found = targets.choose("cpu", {"cpu": fail}, "tests run")
    assert found == targets.Target("reference", "no compiler in this test\nand more of it")
    assert "more of it" not in str(w[0].message)
    assert targets.HINTS["cpu"]() in str(w[0].message)


def test_a_device_without_kernels_is_named() -> None:
    with pytest.warns(BnbxWarning, match="move the tensors to the CPU or a CUDA device"):
        found = targets.choose("mars", {"cpu": lambda: None}, "tests run")
    assert found.name == targets.REFERENCE
    assert "'mars'" in found.reason
