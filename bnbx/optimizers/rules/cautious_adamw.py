"""Cautious AdamW: arXiv:2411.16085, in the form of its authors' code.

Elements whose update points against their gradient stay where they are; the others move further,
by the inverse of their share (at least 1e-3).
"""

from __future__ import annotations

from bnbx.registry import Optimizer, State, fraction, rate

cautious_adamw = Optimizer(
    name="cautious_adamw",
    summary="AdamW without the updates that oppose their gradient",
    source="arXiv:2411.16085",
    states=(State(name="m"), State(name="v", signed=False)),
    hyper=dict(
        lr=rate(1e-3),
        beta1=fraction(0.9),
        beta2=fraction(0.999),
        eps=rate(1e-8),
        weight_decay=rate(1e-2),
    ),
    packs=dict(betas=("beta1", "beta2")),
    step_code="""
        c1 = 1 - beta1**step
        c2 = sqrt(1 - beta2**step)
    """,
    element_code="""
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        agrees = where(sign(m) * sign(g) > 0, 1, 0)
        u = c2 / c1 * agrees * m / (sqrt(v) + c2 * eps)
    """,
    tensor_code="""
        share = max(norm_agrees * norm_agrees / numel, 1e-3)
    """,
    apply_code="""
        p = p * (1 - lr * weight_decay)
        p = p - lr / share * u
    """,
)
