"""Picks the target that runs a batch, and says why the faster ones were passed over."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch

from bnbx.errors import BnbxWarning, TargetError
from bnbx.kernels import cpu, cuda, reference
from bnbx.kernels.batch import Batch
from bnbx.kernels.compiler import HOW_TO
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
    reason = f"there are no native kernels for device {device!r}"
    hint = "move the parameters to the CPU or a CUDA device"
    try:
        if device == "cpu":
            cpu.kernel(plan)
            return Choice("cpu", cpu.run)
        if device == "cuda":
            cuda.kernel(plan)
            return Choice("cuda", cuda.run)
    except TargetError as error:
        reason = str(error)
        hint = HOW_TO if device == "cpu" else cuda.HOW_TO
    _warn_once(
        f"{reason.splitlines()[0]}\nThe optimizer runs on plain torch operations, "
        f"with the same results but slowly. For the fast path: {hint}."
    )
    return Choice("reference", reference.run, (f"{device}: {reason}",))


@lru_cache(maxsize=64)
def _warn_once(message: str) -> None:
    warnings.warn(message, BnbxWarning, stacklevel=2)


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
