"""Picks the target that runs a batch, and says why the faster ones were passed over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch

from bnbx.kernels import cpu, cuda, reference, targets
from bnbx.kernels.batch import Batch
from bnbx.kernels.plan import Plan

Run = Callable[[Sequence[Batch]], None]


@dataclass(frozen=True)
class Choice:
    """The target that runs a plan on a device, and each faster one's reason not to."""

    target: str
    run: Run
    passed_over: tuple[str, ...] = ()


@lru_cache(maxsize=1024)
def choose(plan: Plan, device: str) -> Choice:
    """The fastest target that can run `plan` on a device type; makes its kernel ready.

    Warns once per reason where that is the reference.
    """
    ready = {"cpu": lambda: cpu.kernel(plan), "cuda": lambda: cuda.kernel(plan)}
    native = {"cpu": cpu.run, "cuda": cuda.run}
    found = targets.choose(device, ready, "The optimizer runs")
    if found.name in native:
        return Choice(found.name, native[found.name])
    return Choice(found.name, reference.run, (f"{device}: {found.reason}",))


def launch(batches: Sequence[Batch]) -> None:
    """Run the batches, those that share a target and device together."""
    together: dict[tuple[Choice, torch.device], list[Batch]] = {}
    for batch in batches:
        device = batch.tensors[0][0].device
        choice = choose(batch.plan, device.type)
        together.setdefault((choice, device), []).append(batch)
    for (choice, _), group in together.items():
        with _profiled(choice.target, group):
            choice.run(group)


def _profiled(target: str, batches: Sequence[Batch]) -> AbstractContextManager[object]:
    """A span in torch's profiler, if one is running."""
    if not torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        return nullcontext()
    plans = dict.fromkeys(batch.plan.describe() for batch in batches)
    return torch.profiler.record_function(f"bnbx {target}: {'; '.join(plans)}")
