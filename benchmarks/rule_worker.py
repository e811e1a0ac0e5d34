"""Measures one rule: bnbx in each width, torch's fused AdamW, and the peers that have the rule.

Runs in a process of its own, see `process.call`.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.process import Report
from benchmarks.rule_contenders import OURS, contenders, key_of
from benchmarks.rule_results import Moved, RuleJob, RuleMeasurement
from benchmarks.traffic import in_float32, reference_bytes, traffic
from benchmarks.worker import attempt
from bnbx.kernels.plan import Plan


def measure_rule(job: RuleJob, report: Report) -> RuleMeasurement:
    """Time the steps of a rule, and count the bytes that they move.

    Raises:
        Exception: what torch raises; another's error becomes its row's problem.
    """
    chosen = contenders(job.rule, job.bits, job.only)
    shapes = ((job.numel,),)
    trial = attempt(chosen, shapes, job.dtype, job.threads, job.seconds, report)
    moved = {
        key_of(OURS, bits): _moved(trial.optimizers[key_of(OURS, bits)])
        for bits in job.bits
        if key_of(OURS, bits) in trial.optimizers
    }
    return RuleMeasurement(
        job,
        trial.load_average,
        trial.renewal_s,
        trial.peak_rss_bytes,
        trial.rows,
        reference_bytes(job.dtype),
        moved,
    )


def _moved(optimizer: torch.optim.Optimizer) -> Moved:
    plan = plan_of(optimizer)
    found, wide = traffic(plan), traffic(in_float32(plan))
    return Moved(found.total, found.update, wide.total, plan.measured)


def plan_of(optimizer: Any) -> Plan:
    """The plan by which a bnbx optimizer updates its first parameter."""
    p = optimizer.param_groups[0]["params"][0]
    plan: Plan = optimizer._slots.plan(p, p.grad.dtype, optimizer.resolved(p))
    return plan
