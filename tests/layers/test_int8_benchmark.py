"""The benchmark of the int8 layer measures what it says, on a small weight."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import linear_int8
from benchmarks.linear_int8 import Job
from benchmarks.side_by_side import Row


@pytest.fixture(autouse=True)
def _as_it_was() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_contender_is_timed(dtype: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, from the extra `peers`")
    told: list[float] = []
    job = Job(dtype, 1, (1, 3), 64, 0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BNBX_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "kernels"))
        rows = linear_int8.measure(job, lambda what, fraction: told.append(fraction))
    expected = {"bnbx", "dense float32", "int_mm", "bitsandbytes", "bitsandbytes, training"}
    for count, row in zip(job.rows, rows, strict=True):
        assert row.label == str(count)
        assert set(row.times) == expected | ({"dense"} if dtype != "float32" else set())
        assert all(len(times) >= 3 for times in row.times.values())
    assert told[-1] == 1.0


def test_contenders_compute_the_same_product() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, from the extra `peers`")
    torch.manual_seed(0)
    weight, x = torch.randn(64, 64) * 0.02, torch.randn(3, 64)
    x[:, 0] *= 20
    with torch.no_grad():
        calls: dict[str, Any] = linear_int8._calls(weight, x)
        dense = calls["dense float32"]()
        for name in ("bnbx", "bitsandbytes", "bitsandbytes, training"):
            assert (calls[name]() - dense).norm() < 0.02 * dense.norm(), name


def test_table_gives_medians_and_ratios() -> None:
    row = Row("1", "bnbx", {"bnbx": {0: 0.001, 1: 0.002}, "slow": {0: 0.004, 1: 0.004}})
    console = Console(width=100, record=True)
    console.print(linear_int8.table(Job("float32", 2, (1,), 64, 1.0), [row]))
    text = console.export_text()
    assert "64 x 64, float32, 2 threads" in text
    assert "1.50" in text
    assert "4.00 (0.38)" in text  # the median of 1/4 and 2/4
