"""What a product with a quantized weight takes besides its result: at most 5 % of a dense weight.

The whole process is measured, so that what libraries take for themselves counts too. Each product
runs in a fresh process, once before: libraries load and generate code then, some 2 MiB for a dense
product too, whatever its size. What is free is given back to the system in between.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SIDE = 4096
SHARE = 0.05
MEASURE = f"""
import ctypes, sys, torch
from pathlib import Path
from bnbx.kernels import linear
from bnbx.kernels.encoding import make_encoding

dtype, rows, what = getattr(torch, sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
run = linear.linear if what == "linear" else linear.grad_input
encoding = make_encoding("nf4")

def weight(side):
    parts = encoding.empty((side, side), torch.device("cpu"))
    return [part.fill_(1) for part in parts]

def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

parts, x = weight({SIDE}), torch.ones(rows, {SIDE}, dtype=dtype)
run(encoding, parts, ({SIDE}, {SIDE}), x)
ctypes.CDLL(None).malloc_trim(0)
before = kilobytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
y = run(encoding, parts, ({SIDE}, {SIDE}), x)
print((kilobytes("VmHWM") - before) * 1024 - y.nbytes)
"""


@pytest.mark.parametrize("what", ["linear", "grad_input"])
@pytest.mark.parametrize(
    ("dtype", "rows"),
    [("float32", 1), ("float32", 512), ("bfloat16", 1), ("bfloat16", 40), ("bfloat16", 512)],
)
def test_a_product_takes_little_memory(what: str, dtype: str, rows: int) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc/self/clear_refs, which Linux has")
    command = [sys.executable, "-c", MEASURE, dtype, str(rows), what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    dense = SIDE * SIDE * (4 if dtype == "float32" else 2)
    assert int(done.stdout) <= SHARE * dense, f"{int(done.stdout) / dense:.1%} of the dense weight"
