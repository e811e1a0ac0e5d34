"""No function reads a tensor whose storage was freed or cut short, and each says which it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import freed_memory
from bnbx import functional
from bnbx.errors import InputError, QuantizedDataError

SCRIPT = Path(freed_memory.__file__)


def test_every_tensor_of_every_function() -> None:
    """In a process of its own, which a read of freed memory would end."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])


# They take no tensors, or read none: another function under another name, an address, a place.
NONE_TO_READ = {
    "QuantState", "QuantTensor", "double_quant", "get_ptr", "has_avx512bf16", "is_on_gpu",
    "create_dynamic_map", "create_fp8_map", "create_linear_map", "create_normal_map",
    "dequantize_fp4", "dequantize_nf4", "get_4bit_type", "quantize_fp4", "quantize_nf4",
}  # fmt: skip


def test_no_function_is_left_out() -> None:
    called = {name.partition(",")[0] for name in freed_memory.CALLS}
    assert set(functional.__all__) - called == NONE_TO_READ


def test_errors_name_the_tensor() -> None:
    x = torch.randn(4, 64)
    memory = torch.ones(4)
    memory.untyped_storage().resize_(0)
    with pytest.raises(InputError, match=r"absmax, of shape \(4,\).* 0 bytes: it was freed"):
        functional.quantize_4bit(x, absmax=memory)
    saved = functional.quantize_4bit(x)[1].as_dict(packed=True)
    saved["absmax"] = memory
    with pytest.raises(QuantizedDataError, match=r"absmax, of shape \(4,\).* it was freed"):
        functional.QuantState.from_dict(saved, "cpu")
