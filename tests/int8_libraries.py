"""The kernels of LLM.int8() as they are compiled for other processors than this one."""

from __future__ import annotations

import ctypes

import pytest

from bnbx.kernels import int8_cpu
from bnbx.kernels.compiler import find_compiler
from bnbx.kernels.library import compiled

# What a processor has and lacks: this one's instructions but some; and a matrix unit in plain C++.
EMULATED, REFUSED = "-DBNBX_EMULATE_TILES", "-DBNBX_REFUSE_TILES"
SSE = "-mno-avx -mno-avx2 -mno-avx512f -mno-avxvnni"
PROCESSORS = {
    "all it has": "",
    "no leave for tiles": REFUSED,
    "AVX-VNNI": "-mno-avx512vnni -mno-avx512f",
    "AVX2": "-mno-avx512vnni -mno-avx512f -mno-avxvnni",
    "SSE": SSE,
    "emulated tiles": EMULATED,
    "emulated tiles, SSE": f"{EMULATED} {SSE}",
}


def library_for(flags: str) -> ctypes.CDLL:
    """The kernels, compiled with more flags."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BNBX_CXX", f"{find_compiler().command[0]} {flags}".strip())
        return compiled(int8_cpu.source(), int8_cpu.FUNCTIONS)
