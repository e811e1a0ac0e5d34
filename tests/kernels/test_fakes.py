"""Fake forms never stand in for an operation: one tensor on the meta device is an error."""

from __future__ import annotations

import pytest
import torch

import bnbx
from bnbx.errors import DeviceError
from bnbx.kernels.fakes import check_meta, registered
from bnbx.layers.matmul import matmul  # it registers what layers are made of


def test_every_operation_of_the_package_has_a_checked_fake_form() -> None:
    assert bnbx.functional is not None
    assert bnbx.optim.AdamW8bit is not None
    assert matmul is not None
    known = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    ours = {name for name in known if name.startswith("bnbx::")}
    assert "bnbx::optimizer_step" in ours
    assert len(registered) == len(set(registered))
    assert ours == set(registered)


def test_error_names_what_is_where() -> None:
    x, bias, scale = torch.ones(2), torch.ones(2, device="meta"), torch.ones(1)
    named = [("x", x), ("bias", bias), ("scale", scale)]
    with pytest.raises(
        DeviceError, match=r"^it: bias on the meta device.*; x, scale on cpu\. Load"
    ):
        check_meta("it", named)
    check_meta("it", [("x", x), ("scale", scale)])
    check_meta("it", [("bias", bias)])
    check_meta("it", [("bias", bias), ("ids", x)], anywhere=("ids",))
    with pytest.raises(DeviceError, match="ids on the meta device"):
        check_meta("it", [("ids", bias), ("x", x)], anywhere=("ids",))
