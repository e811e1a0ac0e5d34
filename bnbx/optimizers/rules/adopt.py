"""ADOPT: arXiv:2411.02853, algorithm 2; the second moment is that of the step before.

Converges with any beta2. The first step only takes the second moment; later gradients, normalized,
are clipped to step**(1/4). Weight decay is decoupled.
"""

from __future__ import annotations

from bnbx.registry import Optimizer, State, fraction, rate

adopt = Optimizer(
    name="adopt",
    summary="Adam whose normalization does not see the present gradient",
    source="arXiv:2411.02853",
    states=(State(name="m"), State(name="v", signed=False)),
    hyper=dict(
        lr=rate(1e-3),
        beta1=fraction(0.9),
        beta2=fraction(0.9999),
        eps=rate(1e-6),
        weight_decay=rate(0.0),
    ),
    packs=dict(betas=("beta1", "beta2")),
    step_code="""
        most = (step - 1) ** 0.25
    """,
    element_code="""
        n = min(most, max(-most, g / max(eps, sqrt(v))))
        m = where(step == 1, 0 * g, beta1 * m + (1 - beta1) * n)
        v = where(step == 1, g * g, beta2 * v + (1 - beta2) * g * g)
        u = m
    """,
    apply_code="""
        p = where(step == 1, p, p * (1 - lr * weight_decay))
        p = p - lr * u
    """,
)
