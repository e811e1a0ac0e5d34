"""Quantizing and dequantizing take little memory besides their results: a block for each thread.

As in `test_linear_memory.py`, the whole of a fresh process is measured, after a first call.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SIDE = 4096
ROOM = 1 << 20  # pages that a process touches while it runs
MEASURE = f"""
import ctypes, sys, torch
from pathlib import Path
from bnbx.kernels import coding
from bnbx.kernels.encoding import make_encoding

name, double, what = sys.argv[1], sys.argv[2] == "double", sys.argv[3]
encoding = make_encoding(name, double=double)
x = torch.ones({SIDE}, {SIDE})
parts = coding.encode(encoding, x)

def run():
    if what == "encode":
        return coding.encode(encoding, x)
    return [coding.decode(encoding, parts, x.shape, x.dtype)]

def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

run()
ctypes.CDLL(None).malloc_trim(0)
before = kilobytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
found = run()
print((kilobytes("VmHWM") - before) * 1024 - sum(part.nbytes for part in found))
"""


@pytest.mark.parametrize("what", ["encode", "decode"])
@pytest.mark.parametrize("name", ["nf4", "dynamic8", "nvfp4", "int8", "nf3"])
def test_nothing_is_copied(name: str, what: str) -> None:
    assert _taken(name, "plain", what) <= ROOM


def test_scales_that_are_quantized_are_kept_in_float32_meanwhile() -> None:
    scales = SIDE * SIDE // 64 * 4
    assert _taken("nf4", "double", "encode") <= 3 * scales + ROOM  # as they are, less their mean
    assert _taken("nf4", "double", "decode") <= ROOM


def _taken(*arguments: str) -> int:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc/self/clear_refs, which Linux has")
    command = [sys.executable, "-c", MEASURE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)
