"""The CUDA kernels that fit scales, without a GPU: see `emulated.py`.

`Emulated` has the functions of `fit_cuda`, so that a whole fit may run on it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor

from bnbx.kernels import fit_cuda
from bnbx.kernels.cuda_module import THREADS, Launch
from bnbx.kernels.encoding import Encoding
from cuda_on_cpu import compile_source
from cuda_on_cpu.build import Mode
from cuda_on_cpu.launch import Module


@lru_cache(maxsize=64)
def module(encoding: Encoding, mode: Mode) -> Module:
    """The kernels of an encoding, compiled by g++ for the emulator."""
    return compile_source(fit_cuda.source(replace(encoding, second=None)), mode)


@dataclass(frozen=True)
class Emulated:
    """Where and how; a grid smaller than the work makes warps go around."""

    mode: Mode = "plain"
    schedule: int = 0
    grid: int = 2

    def _run(self, encoding: Encoding, each: Launch) -> None:
        kernel = module(encoding, self.mode).kernel(f"bnbx_{each.name}")
        grid = max(min(each.blocks, self.grid), 1)
        kernel(grid, THREADS, list(each.arguments), schedule=self.schedule)

    def sums(
        self,
        encoding: Encoding,
        x: Tensor,
        factor: Tensor,
        inverse: Tensor,
        center: Tensor | None,
        norm: Tensor,
        codes: Tensor | None,
    ) -> Tensor:
        """What `fit_cuda.sums` does."""
        found = fit_cuda.empty_sums(x).fill_(-7.0)
        tables = encoding.tables.pack()
        given = (x, factor, inverse, center, norm, codes)
        self._run(encoding, fit_cuda.sums_launch(*given, tables, found))
        return fit_cuda.joined(found)

    def write(
        self,
        encoding: Encoding,
        x: Tensor,
        inverse: Tensor,
        center: Tensor | None,
        changed: Tensor,
        codes: Tensor,
    ) -> None:
        """What `fit_cuda.write` does."""
        given = (x, inverse, center, changed, codes)
        self._run(encoding, fit_cuda.write_launch(*given, encoding.tables.pack()))
