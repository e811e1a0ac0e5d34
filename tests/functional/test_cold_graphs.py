"""Functions that take a QuantState compile in a process that has not called them before.

What is found out about a state once is kept, so a call before would hide that torch.compile cannot
trace how it is found out.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import torch
import bnbx

F = bnbx.functional
x, weight = torch.randn(3, 64), torch.randn(32, 64)
{state}

def function(x):
    return {call}

found = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
assert torch.equal(found, function(x))
"""
PLAIN = "q, s = F.quantize_4bit(weight)"
DOUBLE = "q, s = F.quantize_4bit(weight, quant_type='nf4', compress_statistics=True)"
BY_TABLE = f"{PLAIN}; s = F.QuantState(s.absmax, s.shape, s.code, s.blocksize, dtype=s.dtype)"
OTHER = """
from bnbx.nn import QuantLinear
weight = QuantLinear(64, 32, quant_type="nvfp4").to("cpu").weight
q, s = weight.detach(), weight.quant_state
s._labeled = None  # as where a state was not made by a layer
"""
PRODUCT = "bnbx.matmul_4bit(x, q.t(), quant_state=s)"
OTHERS = """
p, r = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
c, t = F.quantize_blockwise(weight, blocksize=64, nested=True)
"""
CASES = {
    "matmul_4bit": (PLAIN, PRODUCT),
    "matmul_4bit, scales in codes": (DOUBLE, PRODUCT),
    "matmul_4bit, a type known by its table": (BY_TABLE, PRODUCT),
    "matmul_4bit, a weight made in the graph": (
        "",
        "bnbx.matmul_4bit(x, *F.quantize_4bit(weight))",
    ),
    "dequantize_4bit, any type": (OTHER, "x @ F.dequantize_4bit(q, s).t()"),
    "others": (
        DOUBLE + OTHERS,
        "F.gemv_4bit(x, q, state=s) + x @ F.dequantize_4bit(p, r).t()"
        " + x @ F.dequantize_blockwise(c, t).t()",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_first_call_is_compiled(name: str) -> None:
    state, call = CASES[name]
    code = CODE.format(state=state, call=call)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
