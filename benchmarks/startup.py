"""What the first use of bnbx costs: its import, and a kernel made with and without a cache.

Every figure comes from fresh processes, several of them, in alternation.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.process import ProcessError, Report, call
from benchmarks.results import Startup

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = ("import torch", "import torch; import bnbx; import bnbx.optim")
TIMED = "from time import perf_counter; began = perf_counter(); {}; print(perf_counter() - began)"


def measure_startup(repeats: int, report: Report) -> Startup:
    """Time imports and kernels, `repeats` times each.

    Raises:
        ProcessError: an import failed, or a kernel could not be made.
    """
    found = Startup({statement: [] for statement in IMPORTS}, {}, {})
    for statement in IMPORTS:  # files come into the page cache, byte code is written
        _import_time(statement)
    for number in range(repeats):
        report("imports", number / repeats / 2)
        for statement in IMPORTS:
            found.imports[statement].append(_import_time(statement))
    for number in range(repeats):
        report("kernels", 0.5 + number / repeats / 2)
        with tempfile.TemporaryDirectory(prefix="bnbx-benchmark-") as empty:
            for parts in (found.compile, found.load):
                for part, seconds in _kernel_time(empty).items():
                    parts.setdefault(part, []).append(seconds)
    return found


def _import_time(statement: str) -> float:
    command = [sys.executable, "-c", TIMED.format(statement)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ProcessError(f"{statement!r} failed in a fresh process:\n{done.stderr}")
    return float(done.stdout)


def _kernel_time(cache: str) -> dict[str, float]:
    times: dict[str, float] = call(
        "benchmarks.kernel_worker",
        "kernel_times",
        "float32",
        {"BNBX_CACHE_DIR": cache},
        lambda _what, _done: None,
    )
    return times
