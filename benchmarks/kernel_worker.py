"""Times the making of one kernel, and of its parts, in a process that has made none before.

Runs in a process of its own, see `process.call`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from time import perf_counter
from typing import Any

from benchmarks.process import Report
from benchmarks.results import KERNEL_PARTS, KERNEL_TOTAL
from bnbx.kernels import cpu
from bnbx.kernels.plan import make_plan
from bnbx.registry import optimizers, quant_types
from bnbx.registry.config import resolve


def kernel_times(dtype: str, _report: Report) -> dict[str, float]:
    """Seconds of the parts of `bnbx.kernels.cpu.kernel`, and in all, for AdamW in 8 bits."""
    spec = optimizers().get("adamw")
    resolved = resolve(spec, quant_types(), [("benchmark", {"bits": 8})])
    types = {state: quant_types().get(name) for state, name in resolved.state_types.items()}
    plan = make_plan(spec, resolved.switches, dtype, dtype, types)
    times = dict.fromkeys(KERNEL_PARTS.values(), 0.0)
    for path, part in KERNEL_PARTS.items():
        module_name, function = path.split(".")
        module = import_module(f"bnbx.kernels.{module_name}")
        setattr(module, function, _counted(getattr(module, function), part, times))
    began = perf_counter()
    cpu.kernel(plan)
    times[KERNEL_TOTAL] = perf_counter() - began
    return times


def _counted(
    function: Callable[..., Any], part: str, times: dict[str, float]
) -> Callable[..., Any]:
    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        began = perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            times[part] += perf_counter() - began

    return wrapper
